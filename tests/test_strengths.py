"""The number of every way to protect earlier tasks: same budget, best on held-out rows, never left at an edge."""

from __future__ import annotations

import pandas as pd
import pytest

from lori_nb.lab import ledger
from lori_nb.lab.resolving import resolve
from lori_nb.study import strengths
from lori_nb.study.profiles import load_settings
from lori_nb.study.settings import Settings
from lori_nb.study.tuning import RATES


@pytest.fixture
def settings(tiny_decoder, home):
    small = {"last_layers": 2, "rank": 2, "steps": 4, "train_rows": 16, "test_rows": 8}
    return load_settings("smoke", base=str(tiny_decoder), dtype="float32", **small)


def test_every_way_has_as_many_values_and_its_default_in_the_grid():
    from lori_nb.lab.methods import get_method

    for way, grid in strengths.GRIDS.items():
        assert len(grid.values) == RATES and grid.centre in grid.values
        default = Settings.merged_total if way == "merged" else get_method(way).strengths[grid.number]
        assert min(grid.values) <= default <= max(grid.values)


def test_runs_differ_in_the_number_alone_and_share_the_first_task(settings):
    one, other = (strengths.specs_at(settings, "ewc", value)[0] for value in (1.0, 10.0))
    assert dict(one.options) == {"strength": "1"} and dict(other.options) == {"strength": "10"}
    assert resolve(one).hash != resolve(other).hash and resolve(one.start).hash == resolve(other.start).hash
    assert one.score_on == "tune" and one.scored == settings.sequence[:2]


def test_merged_adapters_differ_in_the_sum_of_their_weights_alone(settings):
    one, other = (strengths.specs_at(settings, "merged", value)[0] for value in (0.8, 1.8))
    assert (one.weights, other.weights) == ((0.4, 0.4), (0.9, 0.9)) and one.parts == other.parts
    assert resolve(one).hash != resolve(other).hash
    assert one.score_on == "tune" and one.scored == settings.sequence[:2]


def test_the_best_value_is_chosen_and_an_edge_widens_the_grid(settings, monkeypatch, capsys):
    """Scores are given, so that the best value lies beyond the first grid."""

    class Known:
        def table(self, specs):
            value = float(dict(specs[0].options).get("strength", 1e3))  # the default is no option
            rows = [{"task": task, "seed": 0, "metric": "accuracy", "n": 4, "run": f"{value}"} for task in "ab"]
            return pd.DataFrame(rows).assign(value=-abs(value - 5e5))

    monkeypatch.setattr(strengths, "train_all", lambda specs, store, jobs: None)
    table = strengths.tune_strengths(settings, ["ewc"], store=Known())
    assert sorted(set(table["setting"])) == [10.0, 100.0, 1e3, 1e4, 1e5, 1e6]
    assert set(table.loc[table["chosen"], "setting"]) == {1e5}
    assert "ewc: strength 100000 among" in capsys.readouterr().out


def test_real_grids_are_published(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "ledger_folder", lambda: tmp_path / "ledger")
    monkeypatch.setattr(strengths, "ROUNDS", 0)
    monkeypatch.setitem(strengths.GRIDS, "replay", strengths.Grid("rows", 2, 2.0))
    monkeypatch.setattr(strengths, "RATES", 2)
    table = strengths.tune_strengths(settings, ["replay"], jobs=1)
    files = strengths.publish_strengths(table, "smoke", "--profile smoke")
    written = pd.read_csv(files[-1])
    assert list(written.columns) == strengths.COLUMNS and len(written) == 2 * 2
    assert written.loc[written["chosen"], "setting"].nunique() == 1
    assert len(ledger.read(tmp_path / "ledger")) == 4


def test_unknown_ways_and_single_tasks_are_refused(settings):
    with pytest.raises(ValueError, match="strengths must be among ewc, .*; found 'lora'"):
        strengths.tune_strengths(settings, ["lora"])
    with pytest.raises(ValueError, match="sequence must hold at least two tasks; found chain_sum"):
        strengths.tune_strengths(load_settings("smoke", tasks="chain_sum"), ["ewc"])

"""The number of every way to protect earlier tasks: same budget, best on held-out rows, never left at an edge."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from lori_nb.lab import ledger
from lori_nb.lab.methods import method
from lori_nb.lab.own_code import load_extensions
from lori_nb.lab.resolving import resolve
from lori_nb.study import strengths
from lori_nb.study.profiles import load_settings
from lori_nb.study.sequences import get_way
from lori_nb.study.settings import Settings
from lori_nb.study.tuning import RATES

ANCHORED = """
from lori_nb.lab.methods import method

@method("anchored", like="lora", hook="begin", strengths={"strength": 0.1, "memory": 0})
def anchored(stage):
    before = {name: p.detach().clone() for name, p in stage.shared.items()}
    far = lambda: sum((p - before[n]).square().sum() for n, p in stage.shared.items())
    return {"penalty": lambda live, step: stage.strength("strength") * far()}
"""


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


def test_an_own_way_is_tuned_like_the_others_and_shares_the_first_run(settings, registries, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(ANCHORED)
    monkeypatch.setenv("LORI_NB_EXTENSIONS", str(tmp_path / "own.py"))  # for the workers too
    load_extensions()
    grid = strengths.grid_of(settings, "anchored")
    assert (grid.number, grid.factor) == ("strength", 10.0) and grid.values == [1e-3, 0.01, 0.1, 1, 10]
    one, ewc = (strengths.specs_at(settings, way, 3.0)[0] for way in ("anchored", "ewc"))
    assert one.method == "anchored" and one.start.method == "lora"
    assert resolve(one.start).hash == resolve(ewc.start).hash  # the first task's run is LoRA's, done once
    with_memory = replace(settings, strengths={"anchored": {"memory": 3}})
    assert dict(strengths.specs_at(with_memory, "anchored", 3.0)[0].options) == {"strength": "3", "memory": "3"}
    monkeypatch.setattr(strengths, "ROUNDS", 0)
    monkeypatch.setattr(strengths, "RATES", 2)
    table = strengths.tune_strengths(settings, ["anchored"], jobs=1)
    assert set(table["way"]) == {"anchored"} and table["setting"].nunique() == 2
    with pytest.raises(ValueError, match="strengths must be of ways that learn one task after another; found 'joint'"):
        strengths.tune_strengths(settings, ["anchored", "joint"], jobs=1)


def test_a_way_without_a_number_has_its_later_rate_tuned(settings):
    for way, method_name in (("lora", "lora"), ("lori-s-disjoint", "lori-s"), ("lori-d", "lori-d")):
        grid, rate = strengths.grid_of(settings, way), settings.learning_rate[method_name]
        assert (grid.number, len(grid.values)) == ("learning_rate", RATES)
        assert grid.values == pytest.approx([rate / 4, rate / 2, rate, 2 * rate, 4 * rate])
        one, other = (strengths.specs_at(settings, way, value)[0] for value in grid.values[:2])
        assert (one.learning_rate, other.learning_rate) == (grid.values[0], grid.values[1])
        assert replace(one, learning_rate=0) == replace(other, learning_rate=0) and one.start.learning_rate == rate
        assert one.score_on == "tune" and one.scored == settings.sequence[:2]


@pytest.mark.parametrize(("default", "values"), [(2, [1, 2, 4, 8, 16]), (5, [1, 2, 5, 10, 20])])
def test_an_own_way_s_count_of_rows_stays_whole(settings, registries, default, values):
    method("rehearsed", like="lora", hook="begin", strengths={"rows": default})(lambda stage: {})
    grid = strengths.grid_of(settings, "rehearsed")
    assert grid.values == values and grid.is_lowest(1) and not grid.is_lowest(2)


def test_only_a_hook_for_later_tasks_leaves_the_first_to_the_built_in_method(registries):
    hook = {"like": "lori-s", "hook": "begin", "strengths": {"strength": 1.0}}
    method("later", **hook)(lambda stage: {})
    method("from-the-start", **hook, penalty=lambda live, step: 0.0)(lambda stage: {})
    method("no-hook-for-later", like="lora")(lambda live, step: 0.0)
    first = {name: get_way(name).first for name in ("later", "from-the-start", "no-hook-for-later")}
    assert first == {"later": "lori-s", "from-the-start": "from-the-start", "no-hook-for-later": "no-hook-for-later"}


def test_unknown_ways_and_single_tasks_are_refused(settings):
    with pytest.raises(ValueError, match="ways must be among lora, .*; found 'lorra'"):
        strengths.tune_strengths(settings, ["lorra"])
    with pytest.raises(ValueError, match="sequence must hold at least two tasks; found chain_sum"):
        strengths.tune_strengths(load_settings("smoke", tasks="chain_sum"), ["ewc"])

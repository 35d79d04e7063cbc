"""Measurements that outlive a machine: what the ledger holds is not trained again, and tables come from it alone."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pandas as pd
import pytest

from lori_nb.lab import ledger
from lori_nb.lab.resolving import resolve
from lori_nb.lab.runs import Store
from lori_nb.study import measuring, reference
from lori_nb.study.notebook import collect
from lori_nb.study.plans import method_specs
from lori_nb.study.profiles import load_settings
from lori_nb.study.questions import method_scores


@pytest.fixture
def settings(tiny_decoder, home, tmp_path, monkeypatch):
    """A study of seconds, with a ledger of its own."""
    monkeypatch.setattr(ledger, "ledger_folder", lambda: tmp_path / "ledger")
    tiny = load_settings("smoke", base=str(tiny_decoder), tasks=["chain_sum"], method=["lora", "lori-s"], seed=[1, 0])
    return replace(tiny, last_layers=2, rank=4, steps=4, train_rows=16, test_rows=16, shots=0, dtype="float32")


def test_what_the_ledger_holds_is_not_trained_again(settings, tmp_path):
    (first,) = measuring.measure(settings, ["01_lori"], jobs=1)
    assert first.is_file()
    elsewhere = Store(tmp_path / "another machine")
    assert measuring.measure(settings, ["01_lori"], jobs=1, store=elsewhere) == []
    assert elsewhere.hashes() == []


def test_tables_from_the_ledger_are_those_from_the_runs(settings):
    measuring.measure(settings, ["01_lori"], jobs=1)
    here, kept = collect("01_lori", settings, train=False), measuring.results_of("01_lori", settings)
    assert len(kept.runs) == kept.planned == here.planned
    assert method_scores(kept).equals(method_scores(here))
    for name, run in kept.runs.items():
        columns = ["task", "split", "row", "correct"]
        assert run.predictions[columns].equals(here.runs[name].predictions[columns].reset_index(drop=True))


def test_methods_first_then_the_rest_one_seed_after_another_and_each_run_once(settings):
    specs, first = measuring.PLANS["01_lori"](settings), method_specs(settings)
    ordered = measuring.in_order([*specs, *specs], first)
    early = {resolve(spec).hash for spec in first}
    assert 0 < len(early) < len(ordered)
    assert {spec.hash for spec in ordered[: len(early)]} == early
    for part in (ordered[: len(early)], ordered[len(early) :]):
        assert [spec.seed for spec in part] == sorted(spec.seed for spec in part)
    assert {spec.hash for spec in ordered} == {resolve(spec).hash for spec in specs}
    assert len(ordered) == len({spec.hash for spec in ordered})


def test_reference_tables_and_figures_come_from_the_ledger_alone(settings, tmp_path):
    settings = replace(settings, arms=("lori-s-random", "lora-longer"), arm_tasks=("chain_sum",))
    root = tmp_path / "project"
    root.mkdir()
    start, end = reference.marks(settings.profile)
    (root / "README.md").write_text(f"before {start} old {end} after")
    measuring.measure(settings, ["01_lori"], jobs=1)
    shutil.rmtree(Store().root)
    written = reference.write_reference(settings, ["01_lori", "02_masks"], root)
    names = {path.name for path in written}
    assert {"runs.csv", "methods.csv", "scores.csv", "baselines.csv", "methods.pdf", "baselines.svg"} <= names
    folder = written[0].parent
    compared = pd.read_csv(folder / "methods.csv")
    assert compared["seeds"].unique().tolist() == [2] and set(compared["arm"]) == {"lori-s"}
    counts = pd.read_csv(folder / "runs.csv").set_index("notebook")
    assert counts.loc["01_lori", "runs"] == counts.loc["01_lori", "planned"]
    assert counts.loc["02_masks", "runs"] < counts.loc["02_masks", "planned"]  # what is missing is said
    text = (root / "README.md").read_text()
    assert text.startswith(f"before {start}") and text.endswith(f"{end} after") and "old" not in text
    row = compared.iloc[0]
    assert f"{100 * row['value']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]" in text
    assert "LoRA, twice the steps" in text

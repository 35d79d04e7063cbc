"""Measurements that outlive a machine: what the ledger holds is not trained again, and tables come from it alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lori_nb.lab import ledger
from lori_nb.lab.resolving import resolve
from lori_nb.lab.runs import Store
from lori_nb.study import measuring
from lori_nb.study.notebook import collect
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


def test_one_seed_after_another_and_each_run_once(settings):
    specs = measuring.PLANS["01_lori"](settings)
    ordered = measuring.by_seed([*specs, *specs])
    assert [spec.seed for spec in ordered] == sorted(spec.seed for spec in ordered)
    assert {spec.hash for spec in ordered} == {resolve(spec).hash for spec in specs}
    assert len(ordered) == len({spec.hash for spec in ordered})

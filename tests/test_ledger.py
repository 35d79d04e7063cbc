"""The ledger: append-only, one row a measurement."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lori_nb.lab import ledger


def measurements(*runs: str, value: float = 0.5) -> pd.DataFrame:
    return pd.DataFrame(
        [{"run": r, "task": "t", "metric": "accuracy", "split": "test", "value": value, "n": 10} for r in runs]
    )


def test_rows_are_added_once_and_earlier_files_stay_as_they_are(tmp_path):
    first = ledger.append(measurements("a", "b"), "one", "command", tmp_path)
    before = first.read_bytes()
    second = ledger.append(measurements("b", "c"), "one", "command", tmp_path)
    assert first != second and first.read_bytes() == before
    assert sorted(ledger.read(tmp_path)["run"]) == ["a", "b", "c"]
    assert len(pd.read_parquet(second)) == 1
    assert ledger.append(measurements("a"), "one", "command", tmp_path) is None


def test_a_measurement_is_never_rewritten(tmp_path):
    ledger.append(measurements("a", value=0.5), "one", "command", tmp_path)
    ledger.append(measurements("a", value=0.9), "two", "command", tmp_path)
    assert ledger.read(tmp_path)["value"].tolist() == [0.5]


def test_rows_of_some_runs_and_of_an_empty_ledger(tmp_path):
    assert ledger.rows_of(["a"], tmp_path).empty
    ledger.append(measurements("a", "b"), "one", "the command", tmp_path)
    found = ledger.rows_of(["b", "z"], tmp_path)
    assert found["run"].tolist() == ["b"] and found["command"].tolist() == ["the command"]


def test_a_table_without_its_key_is_refused(tmp_path):
    with pytest.raises(ValueError, match="table must have the columns .*missing: split"):
        ledger.append(measurements("a").drop(columns="split"), "one", "command", tmp_path)
    assert not list(tmp_path.iterdir())


# Which rows were right


def predictions(correct: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"task": "t", "split": "test", "row": range(len(correct)), "correct": correct})


@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000])
def test_bits_of_rows_come_back(n):
    credit = (np.arange(n) * 7 % 3 == 0).astype(float)
    assert len(ledger.packed(credit)) == -(-n // 8)
    assert ledger.unpacked(ledger.packed(credit), n).tolist() == credit.tolist()


def test_partial_credit_is_not_kept_as_bits():
    assert ledger.packed([0.0, 0.5, 1.0]) is None
    assert ledger.packed([float("nan")]) is None


def test_a_measured_run_can_be_paired_row_by_row(tmp_path):
    credit = {"a": [1.0, 0.0, 1.0], "b": [0.0, 0.0, 1.0]}
    table = measurements("a", "b", "c").assign(n=3, trainable_parameters=7)
    shuffled = {name: predictions(rows).iloc[::-1] for name, rows in credit.items()}
    ledger.append(ledger.with_rows(table, shuffled.get), "one", "command", tmp_path)
    assert ledger.measured(["z"], tmp_path) == {}
    found = ledger.measured(["a", "b", "c", "z"], tmp_path)
    assert set(found) == {"a", "b"}  # no rows are known of c
    for name, rows in credit.items():
        assert found[name].predictions["correct"].tolist() == rows
        assert found[name].value("t") == 0.5
        assert found[name].provenance["trainable_parameters"] == 7
    with pytest.raises(KeyError):
        found["a"].value("u")


def test_metrics_beside_a_task_s_own_are_kept_and_stay_out_of_its_rows(tmp_path):
    own = measurements("a", "b").assign(n=3, trainable_parameters=7)
    beside = measurements("a", value=0.7).assign(metric="f1", also=True)
    credit = {"a": [1.0, 0.0, 1.0], "b": [0.0, 0.0, 1.0]}
    rows = ledger.with_rows(own, lambda name: predictions(credit[name]))
    ledger.append(pd.concat([rows, beside], ignore_index=True), "one", "command", tmp_path)
    assert ledger.rows_of(["a", "b"], tmp_path)["metric"].tolist() == ["accuracy", "accuracy"]
    found = ledger.measured(["a", "b"], tmp_path)
    assert (found["a"].value("t"), found["a"].value("t", "f1"), found["a"].value("t", "accuracy")) == (0.5, 0.7, 0.5)
    for name, metric in (("b", "f1"), ("a", "pearson")):
        with pytest.raises(KeyError):
            found[name].value("t", metric)


def test_a_ledger_from_before_rows_were_kept(tmp_path):
    ledger.append(measurements("a"), "one", "command", tmp_path)
    assert ledger.measured(["a"], tmp_path) == {}

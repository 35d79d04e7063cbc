"""What the benchmarks claim: a target is met by the upper bound, pairs are interleaved, a part replaces no whole."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
from scipy import stats

from lori_nb.lab.paths import PROJECT


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    return importlib.import_module("measure")


@pytest.fixture
def clock(measure, monkeypatch):
    """Seconds that each kind of work takes, by hand; the order in which work was done."""
    now, done = [0.0], []

    def work(name: str, *durations: float):
        left = iter(durations)

        def one() -> None:
            now[0] += next(left)
            done.append(name)

        return one

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    return work, done


def test_a_ratio_of_times_is_the_geometric_mean_of_interleaved_pairs(measure, clock):
    work, done = clock
    ours, peer = (1.0, 2.0, 3.0, 8.0), (2.0, 2.0, 4.0, 4.0)
    found = measure.wall_ratio(work("ours", 99.0, *ours), work("peer", 99.0, *peer), 4)
    assert done == ["ours", "peer", *("ours", "peer", "peer", "ours") * 2], "warmed up, then in turn"
    logs = np.log(ours) - np.log(peer)
    reach = stats.t.ppf(0.975, 3) * logs.std(ddof=1) / 2
    wanted = np.exp([logs.mean(), logs.mean() - reach, logs.mean() + reach])
    assert [found["ratio"], found["low"], found["high"]] == pytest.approx(wanted)
    assert (found["ours"], found["peer"], found["n"]) == (pytest.approx(6**0.5), pytest.approx(8**0.5), 4)


@pytest.mark.parametrize(("each", "n"), [(0.01, 40), (2.0, 6), (9.0, 4)])
def test_quick_calls_have_more_pairs(measure, clock, each, n):
    work, _ = clock
    found = measure.wall_ratio(work("ours", *[each] * 50), work("peer", *[each] * 50), 4)
    assert found["n"] == n, "up to ten times as many, within some seconds"


@pytest.mark.parametrize(
    ("measured", "target", "met"),
    [
        ({"ratio": 0.9, "low": 0.8, "high": 0.99, "n": 30}, 1.0, True),
        ({"ratio": 0.9, "low": 0.8, "high": 1.01, "n": 30}, 1.0, False),  # the upper bound decides
        ({"ratio": 0.9, "low": 0.8, "high": 0.99, "n": 29}, 1.0, None),  # too few pairs
        ({"ratio": 1.0}, 1.0, True),  # a count has no bounds
        ({"ratio": 1.001}, 1.0, False),
        ({"ratio": 0.1}, None, None),
    ],
)
def test_a_target_is_met_by_the_upper_bound(measure, measured, target, met):
    assert measure.judged("a step", target, measured)["met"] is met


def test_a_run_that_seldom_looks_costs_a_mean_of_both_steps(measure):
    ortho = importlib.import_module("ortho")
    usual = {"ours": 1.0, "peer": 1.0, "ratio": 1.0, "low": 0.9, "high": 1.1, "n": 30, "unit": "s"}
    seldom = usual | {"ours": 2.0, "ratio": 2.0, "low": 1.8, "high": 2.2}
    found = ortho.mixed(usual, seldom, 0.25)
    assert [found[key] for key in ("ours", "peer", "ratio", "low", "high")] == [1.25, 1.0, 1.25, 1.125, 1.375]
    assert (found["n"], found["unit"]) == (30, "s")


def test_every_case_has_its_rows_and_a_target_where_one_is_stated(measure, monkeypatch):
    """One small case from end to end: the smallest number of pairs decides no time, counts are exact."""
    ortho = importlib.import_module("ortho")
    names = [case.name for case in ortho.cases((2, 4, 8))]
    assert len(set(names)) == len(names) == 9 and ortho.cases((2,))[0].measures == ortho.EVERYTHING
    monkeypatch.setattr(ortho, "TORCHJD_TARGETS", {2: 2.0})
    monkeypatch.setattr(measure, "ROOM", 0.0)
    rows = ortho.step_rows(ortho.Case("MiniLM, q and v", 2), "float32", 2)
    by_name = {(row["name"].partition(": ")[2], row["unit"]): row for row in rows}
    assert len(by_name) == len(rows) == 8
    assert by_name["step, ours / torchjd", "s"]["target"] == 0.5, "at least twice as fast"
    assert all(row["met"] is None for row in rows if row["unit"] == "s")
    operations, peak = by_name["step, ours / joint", "FLOPs"], by_name["peak allocated, ours / joint", "bytes"]
    assert 1 <= operations["ratio"] < 1.02 and peak["met"] is (peak["ratio"] <= peak["target"])


def test_a_part_of_a_benchmark_is_printed_and_replaces_nothing(measure, monkeypatch, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text("before <!-- a.json --> old <!-- /a.json --> after")
    monkeypatch.setattr(measure, "PAGE", page)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    rows = [measure.judged("bytes of a file", 0.5, measure.counted_ratio(1, 4, "bytes"))]
    measure.publish(rows, "a.json", "make bench", whole=False)
    assert " old " in page.read_text() and not (tmp_path / "a.json").exists() and "0.250" in capsys.readouterr().out
    measure.publish(rows, "a.json", "make bench")
    (row,) = json.loads((tmp_path / "a.json").read_text())
    assert row["ratio"] == 0.25 and row["met"] is True and row["command"] == "make bench"
    text = page.read_text()
    assert text.startswith("before <!-- a.json -->") and text.endswith("<!-- /a.json --> after")
    assert "| bytes of a file | 1 | 4 | bytes | 0.250 | ≤ 0.5 | yes |" in text and " old " not in text

"""Gap recovery over several seeds: the headline number, its interval, its flag, its test, and the verdict on it."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from lori_nb.analysis.statistics import ratio_interval, t_interval
from lori_nb.study import sharing
from lori_nb.study.joint_arms import JOINT, ORTHO, SINGLE
from lori_nb.study.profiles import load_settings

TASKS = ["chain_sum", "refusal"]
SEEDS = [0, 1, 2, 3, 4]
JOINT_SCORES = {"chain_sum": [0.30, 0.33, 0.28, 0.31, 0.35], "refusal": [0.60, 0.66, 0.58, 0.63, 0.61]}
GAPS = {"chain_sum": [0.20, 0.24, 0.19, 0.23, 0.20], "refusal": [0.05, -0.04, 0.03, -0.03, 0.02]}
GAINS = {"chain_sum": [0.08, 0.13, 0.07, 0.10, 0.11], "refusal": [0.01, 0.02, -0.01, 0.00, 0.03]}


class Scored:
    """A run, as far as scores go."""

    def __init__(self, scores: dict[str, float]):
        self.scores = scores

    def value(self, task: str) -> float:
        return self.scores[task]


@pytest.fixture
def table(monkeypatch) -> pd.DataFrame:
    settings = load_settings("smoke", tasks=TASKS, seed=SEEDS)

    def score(name: str, task: str, seed: int) -> float:
        more = {SINGLE: GAPS, ORTHO: GAINS}.get(name)
        return JOINT_SCORES[task][seed] + (more[task][seed] if more else 0)

    def pairs(results, a, b, tasks=None):
        runs = {name: [Scored({t: score(name, t, s) for t in TASKS}) for s in SEEDS] for name in (a, b)}
        return {seed: [(runs[a][seed], runs[b][seed])] * len(tasks or TASKS) for seed in SEEDS}

    monkeypatch.setattr(sharing, "arrangement_pairs", pairs)
    results = type("Results", (), {"settings": settings})()
    return sharing.gap_recovery(results).set_index(["arrangement", "task"])


def test_the_share_of_the_gap_with_its_interval_test_and_power(table):
    every = {task: (np.array(GAINS[task]), np.array(GAPS[task])) for task in TASKS}
    every["mean over tasks"] = tuple(np.mean([every[task][place] for task in TASKS], axis=0) for place in (0, 1))
    assert list(table.index) == [(ORTHO, name) for name in every]
    for name, (gains, gaps) in every.items():
        row, share, gap = table.loc[(ORTHO, name)], ratio_interval(gains, gaps), t_interval(gaps)
        assert row["value"] == pytest.approx(gains.mean() / gaps.mean())
        assert [row["low"], row["high"]] == pytest.approx([share.low, share.high], nan_ok=True)
        assert [row["gap"], row["gap_low"], row["gap_high"]] == pytest.approx([gap.mean, gap.low, gap.high])
        assert row["p"] == pytest.approx(stats.ttest_1samp(gains, 0).pvalue)
        effect = TTestPower().solve_power(None, nobs=5, alpha=0.05, power=0.8) * np.std(gains, ddof=1)
        assert row["detectable"] == pytest.approx(effect, rel=1e-6)
        assert (row["n"], row["of"]) == (5, "seeds")


def test_a_gap_that_may_be_zero_is_flagged_and_bounds_nothing(table):
    flagged = table.loc[(ORTHO, "refusal")]
    assert flagged["gap_low"] < 0 < flagged["gap_high"] and not flagged["shown"] and math.isnan(flagged["low"])
    shown = table.loc[(ORTHO, "chain_sum")]
    assert shown["gap_low"] > 0 and shown["shown"] and shown["low"] < shown["value"] < shown["high"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"low": 0.3, "value": 0.5, "high": 0.7}, r"refuted at this size: Ortho-LoRA wins back 0.50 \[0.30, 0.70\]"),
        ({"low": 0.96, "value": 1.1, "high": 1.3}, "confirmed at this size"),
        ({"low": 0.5, "value": 0.8, "high": 1.3}, "undecided at this size: Ortho-LoRA wins back 0.80"),
        (
            {"shown": False, "gap": 0.01, "gap_low": -0.02, "gap_high": 0.04},
            r"undecided .* \+0.010 \[-0.020, \+0.040\]",
        ),
        ({"n": 1, "shown": False}, "undecided: with one seed"),
        ({"arrangement": "pcgrad"}, "not measured here"),
    ],
)
def test_the_papers_share_is_confirmed_refuted_or_undecided(changes, words):
    row = {
        "arrangement": ORTHO,
        "task": "mean over tasks",
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "n": 5,
        "of": "seeds",
    }
    row |= {"gap": 0.1, "gap_low": 0.05, "gap_high": 0.15, "shown": True}
    sentence = sharing.claimed_recovery(pd.DataFrame([row | {"task": "rte", "value": 7.0}, row | changes]))
    assert pd.Series([sentence]).str.contains(words).all() and sentence.startswith("The paper's 95% of the gap")
    assert "7.0" not in sentence, "of the mean over tasks"


def test_a_gap_of_nothing_but_rounding_has_no_share():
    gaps = [0.05, -0.04, 0.03, -0.06, 0.02]
    assert 0 < abs(np.mean(gaps)) < 1e-15
    assert math.isnan(sharing._recovery(GAINS["refusal"], gaps)["value"])
    assert not math.isnan(sharing._recovery(GAINS["refusal"], GAPS["refusal"])["value"])


def test_joint_training_itself_wins_nothing_back(table):
    assert JOINT not in table.index.get_level_values("arrangement")

"""Intervals: textbook values, the coverage they promise, and one seed that promises nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lori_nb.analysis.statistics import Interval, paired_interval, proportion_interval, t_interval

FIVE = [0.70, 0.72, 0.69, 0.75, 0.74]


def test_t_interval_is_the_textbook_formula():
    interval = t_interval(FIVE)
    # t of 4 degrees of freedom at 97.5 % is 2.776445 in every table (six decimals: hence the bound)
    reach = 2.776445 * np.std(FIVE, ddof=1) / math.sqrt(5)
    assert interval.mean == pytest.approx(0.72, abs=1e-15)
    assert interval.high - interval.mean == pytest.approx(reach, rel=1e-6)
    assert interval.mean - interval.low == pytest.approx(reach, rel=1e-6)
    assert interval.n == 5
    assert t_interval(FIVE, 0.99).high > interval.high > t_interval(FIVE, 0.5).high


def test_t_interval_agrees_with_scipys_test():
    expected = stats.ttest_1samp(FIVE, 0).confidence_interval(0.9)
    found = t_interval(FIVE, 0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_t_interval_covers_what_it_says():
    # 2000 samples of 5: coverage 95 % has a standard error of 0.49 points; four of them bound it.
    draws = np.random.default_rng(0).normal(0.7, 0.02, (2000, 5))
    held = [interval.low <= 0.7 <= interval.high for interval in map(t_interval, draws)]
    assert abs(np.mean(held) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_one_seed_is_a_demonstration():
    interval = t_interval([0.72])
    assert (interval.mean, interval.n) == (0.72, 1)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert interval.describe() == "0.720 (one seed: a demonstration)"
    assert "demonstration" not in t_interval(FIVE).describe()


def test_describe_names_n_and_confidence():
    assert Interval(0.72, 0.69, 0.75, 5).describe() == "0.720 [0.690, 0.750] (n = 5, 95 %)"
    assert Interval(0.72, 0.69, 0.75, 5, 0.9).describe(digits=1) == "0.7 [0.7, 0.8] (n = 5, 90 %)"


def test_equal_values_give_an_interval_of_no_width():
    interval = t_interval([0.5, 0.5, 0.5])
    assert (interval.low, interval.mean, interval.high) == (0.5, 0.5, 0.5)


def test_pairs_cancel_what_they_share():
    seeds = np.array([0.0, 0.3, -0.2, 0.1])  # a large effect of the seed on both methods
    gain = np.array([0.02, 0.03, 0.01, 0.02])
    paired = paired_interval(0.5 + seeds + gain, 0.5 + seeds)
    expected = t_interval(gain)
    # sums near 1 are rounded to 1.1e-16 each, differences of them are not rounded further than that
    assert (paired.low, paired.high) == pytest.approx((expected.low, expected.high), abs=1e-14)
    assert paired.low > 0
    assert t_interval(0.5 + seeds + gain).low < t_interval(0.5 + seeds).high  # unpaired, nothing is seen
    assert math.isnan(paired_interval([0.5], [0.4]).low)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (83, 128)])
def test_proportion_interval_is_wilsons(k, n):
    z, p = stats.norm.ppf(0.975), k / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    interval = proportion_interval(k, n)
    assert (interval.mean, interval.n) == (p, n)
    assert (interval.low, interval.high) == pytest.approx((centre - reach, centre + reach), abs=1e-14)
    assert 0 <= interval.low < interval.high <= 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: t_interval([]), r"values must be a vector of at least one value; found shape \(0,\)"),
        (lambda: t_interval([[1.0]]), r"found shape \(1, 1\)"),
        (lambda: t_interval([1.0, math.nan]), "values must be finite; found NaN or infinity"),
        (lambda: t_interval(FIVE, 95), "confidence must be between 0 and 1; found 95"),
        (lambda: paired_interval([1.0, 2.0], [1.0]), "same length, one pair a seed; found 2 and 1"),
        (lambda: paired_interval([1.0], [math.inf]), "b must be finite"),
        (lambda: proportion_interval(3, 2), "found k = 3, n = 2"),
        (lambda: proportion_interval(0, 0), "found k = 0, n = 0"),
        (lambda: proportion_interval(1, 2, 0), "confidence must be between 0 and 1; found 0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()

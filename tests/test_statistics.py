"""Intervals: textbook values, the coverage they promise, and one seed that promises nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lori_nb.analysis.statistics import (
    Estimate,
    Interval,
    crossed_estimate,
    estimate_of,
    interval_text,
    paired_estimate,
    proportion_interval,
    ratio_interval,
    t_interval,
)

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


def test_a_value_with_its_interval_is_written_one_way():
    assert interval_text(0.66, 0.591, 0.719) == "0.66 [0.59, 0.72]"
    assert interval_text(0.034, -0.006, 0.061, 3, signed=True) == "+0.034 [-0.006, +0.061]"
    assert interval_text(0.66, math.nan, math.nan) == "0.66"
    assert interval_text(math.nan, math.nan, math.nan) == "–"


# Paired and crossed differences


def test_pairs_cancel_what_they_share():
    seeds = np.array([0.0, 0.3, -0.2, 0.1])  # a large effect of the seed on both methods
    a, b = 0.5 + seeds + [0.02, 0.03, 0.01, 0.02], 0.5 + seeds
    found, expected = paired_estimate(a - b).interval(), stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.low > 0
    assert t_interval(a).low < t_interval(b).high  # unpaired, nothing is seen
    assert math.isnan(paired_estimate([0.1]).interval().low)


def test_an_estimate_is_found_again_from_its_interval():
    for confidence in (0.9, 0.95):
        found, expected = estimate_of(t_interval(FIVE, confidence)), paired_estimate(FIVE)
        # the bounds are rounded to 1.1e-16 near 0.7, and their difference is twenty times smaller
        assert (found.mean, found.error, found.df) == pytest.approx((expected.mean, expected.error, 4.0), rel=1e-13)
    assert math.isnan(estimate_of(t_interval([0.7])).error)


def draws(generator, seeds: int, rows: int, of_seeds: float, of_rows: float, of_both: float) -> np.ndarray:
    """Differences of no mean (seeds × rows) with these standard deviations."""
    return (
        generator.normal(0, of_seeds, (seeds, 1))
        + generator.normal(0, of_rows, (1, rows))
        + generator.normal(0, of_both, (seeds, rows))
    )


def anova(D: np.ndarray) -> tuple[float, float]:
    """The literal two-way analysis of variance: variance of the grand mean and Satterthwaite's degrees of freedom."""
    S, N = D.shape
    squares = {"seeds": 0.0, "rows": 0.0, "both": 0.0}
    for s in range(S):
        squares["seeds"] += N * (D[s].mean() - D.mean()) ** 2 / (S - 1)
        for i in range(N):
            rest = D[s, i] - D[s].mean() - D[:, i].mean() + D.mean()
            squares["both"] += rest**2 / ((S - 1) * (N - 1))
    for i in range(N):
        squares["rows"] += S * (D[:, i].mean() - D.mean()) ** 2 / (N - 1)
    terms = [squares["seeds"], squares["rows"], -squares["both"]]
    freedom = [S - 1, N - 1, (S - 1) * (N - 1)]
    variance = sum(terms)
    return variance / (S * N), variance**2 / sum(t**2 / f for t, f in zip(terms, freedom, strict=True))


def test_crossed_error_is_that_of_the_two_way_analysis_of_variance():
    D = draws(np.random.default_rng(1), 4, 15, 0.3, 0.5, 0.4)
    found, (variance, df) = crossed_estimate([D]), anova(D)
    assert (found.error**2, found.df) == pytest.approx((variance, df), rel=1e-12)
    assert found.mean == pytest.approx(D.mean(), rel=1e-12) and (found.seeds, found.rows) == (4, 15)
    assert found.error > paired_estimate(D.mean(axis=1)).error  # other rows move it too


def test_without_any_effect_of_rows_the_crossed_error_is_that_over_seeds_and_the_reverse():
    seeds, rows = np.array([[0.1], [0.3], [-0.2]]), np.array([[0.5, -0.5, 0.2, 0.1]])
    by_seeds = crossed_estimate([seeds + 0 * rows])
    expected = paired_estimate(seeds[:, 0])
    assert (by_seeds.error, by_seeds.df) == pytest.approx((expected.error, 2.0), rel=1e-12)
    by_rows = crossed_estimate([0 * seeds + rows])
    assert (by_rows.error, by_rows.df) == pytest.approx((stats.sem(rows[0]), 3.0), rel=1e-12)


def test_tasks_are_strata_whose_errors_add():
    generator = np.random.default_rng(2)
    D = draws(generator, 5, 30, 0.2, 0.5, 0.3)
    once, twice = crossed_estimate([D]), crossed_estimate([D, D])
    # V_seeds is that of the same means; V_rows and V_both are halved, as by twice the rows
    of_seeds = np.var(D.mean(axis=1), ddof=1) / 5
    assert twice.error**2 - of_seeds == pytest.approx((once.error**2 - of_seeds) / 2, rel=1e-10)
    assert (twice.mean, twice.rows) == (once.mean, 60)
    other = crossed_estimate([D, draws(generator, 5, 8, 0.2, 0.5, 0.3)])
    assert other.rows == 38 and other.error != once.error


def test_equal_differences_have_no_error_and_one_seed_has_none_to_tell():
    assert crossed_estimate([np.full((3, 4), 0.25)]) == Estimate(0.25, 0.0, 2.0, 3, 4)
    alone = crossed_estimate([[[0.0, 1.0, 1.0]]])
    assert math.isnan(alone.error) and math.isnan(alone.interval().low) and alone.mean == pytest.approx(2 / 3)
    assert alone.counted() == "one seed × 3 rows" and Estimate(0, 1, 4, 5, 4000).counted("topics") == (
        "5 seeds × 4,000 topics"
    )


@pytest.mark.parametrize(
    ("of_seeds", "of_rows", "of_both"), [(0.02, 0.3, 0.4), (0.1, 0.0, 0.2), (0.0, 0.5, 0.1), (0.0, 0.0, 0.5)]
)
def test_crossed_interval_covers_at_least_what_it_says(of_seeds, of_rows, of_both):
    # 1000 studies of 5 seeds × 60 rows: coverage 95 % has a standard error of 0.69 points; four of them bound it from
    # below. Above it may lie: estimates of variance below zero count as zero.
    generator, count = np.random.default_rng(3), 1000
    studies = [draws(generator, 5, 60, of_seeds, of_rows, of_both) for _ in range(count)]
    crossed = [crossed_estimate([D]).interval() for D in studies]
    bound = 4 * math.sqrt(0.95 * 0.05 / count)
    assert np.mean([i.low <= 0 <= i.high for i in crossed]) > 0.95 - bound
    over_seeds = [t_interval(D.mean(axis=1)) for D in studies]
    covered = np.mean([i.low <= 0 <= i.high for i in over_seeds])
    assert (covered < 0.95 - bound) == (of_rows > 0)  # intervals over seeds say nothing of other rows


def test_crossed_intervals_of_three_seeds_hold_a_little_less_often_than_they_say():
    # Where seeds spread two and a half times as far as rows make their mean spread: neither near 95 % for lack of an
    # effect, nor by two degrees of freedom alone. 2000 studies: 93 % has a standard error of 0.57 points; four of them.
    generator, count, rows = np.random.default_rng(4), 2000, 60
    of_seeds = 2.5 * math.sqrt((3 * 0.3**2 + 0.35**2) / rows)
    held = {}
    for seeds in (3, 5):
        studies = (draws(generator, seeds, rows, of_seeds, 0.3, 0.35) for _ in range(count))
        held[seeds] = np.mean([i.low <= 0 <= i.high for i in (crossed_estimate([D]).interval() for D in studies)])
    bound = 4 * math.sqrt(0.93 * 0.07 / count)
    assert abs(held[3] - 0.93) < bound and held[3] < held[5] < 0.95 + bound


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (83, 128)])
def test_proportion_interval_is_wilsons(k, n):
    z, p = stats.norm.ppf(0.975), k / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    interval = proportion_interval(k, n)
    assert (interval.mean, interval.n) == (p, n)
    assert (interval.low, interval.high) == pytest.approx((centre - reach, centre + reach), abs=1e-14)
    assert 0 <= interval.low < interval.high <= 1
    assert (interval.low == 0) == (k == 0) and (interval.high == 1) == (k == n)  # exactly, not 1e-17


# Ratios


def test_fieller_s_interval_is_where_the_difference_may_be_zero():
    """The definition: ρ is inside when the t interval of a − ρ b over the seeds contains zero."""
    gains, gaps = np.array([0.02, 0.05, 0.01, 0.04, 0.06]), np.array([0.11, 0.15, 0.09, 0.16, 0.12])
    found = ratio_interval(gains, gaps)
    assert found.mean == pytest.approx(gains.mean() / gaps.mean())
    assert found.low < found.mean < found.high
    for bound, inwards in ((found.low, 1e-6), (found.high, -1e-6)):
        inside, outside = (t_interval(gains - rho * gaps) for rho in (bound + inwards, bound - inwards))
        assert inside.low <= 0 <= inside.high and not outside.low <= 0 <= outside.high


def test_a_denominator_that_may_be_zero_bounds_nothing():
    found = ratio_interval([0.1, 0.2, 0.1], [0.1, -0.2, 0.3])
    assert math.isnan(found.low) and math.isnan(found.high) and found.n == 3
    assert math.isnan(ratio_interval([0.1], [0.2]).low)


def test_fieller_s_interval_covers_what_it_says():
    draws = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        gaps = draws.normal(0.2, 0.03, 5)
        found = ratio_interval(0.5 * gaps + draws.normal(0, 0.02, 5), gaps)
        hits += found.low <= 0.5 <= found.high
    assert abs(hits / 2000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: t_interval([]), r"values must be a vector of at least one value; found shape \(0,\)"),
        (lambda: t_interval([[1.0]]), r"found shape \(1, 1\)"),
        (lambda: t_interval([1.0, math.nan]), "values must be finite; found NaN or infinity"),
        (lambda: t_interval(FIVE, 95), "confidence must be between 0 and 1; found 95"),
        (lambda: paired_estimate([1.0, math.inf]), "differences must be finite"),
        (lambda: crossed_estimate([]), "same seeds for every task, .* found no task"),
        (lambda: crossed_estimate([np.ones((2, 3)), np.ones((3, 3))]), "found 2, 3"),
        (lambda: crossed_estimate([np.ones((2, 1))]), r"seeds × at least two rows; found shape \(2, 1\)"),
        (lambda: crossed_estimate([[[math.nan, 1.0]]]), "strata must be finite"),
        (lambda: proportion_interval(3, 2), "found k = 3, n = 2"),
        (lambda: proportion_interval(0, 0), "found k = 0, n = 0"),
        (lambda: proportion_interval(1, 2, 0), "confidence must be between 0 and 1; found 0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()

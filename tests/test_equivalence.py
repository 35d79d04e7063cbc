"""Equivalence: against the tests of scipy and statsmodels, simulated power, and one seed that decides nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from lori_nb.analysis.equivalence import (
    attainable_margin,
    detectable_effect,
    difference_p,
    equivalence_p,
    equivalence_verdict,
    holm,
    shown_margin,
)
from lori_nb.analysis.statistics import Estimate, crossed_estimate, paired_estimate

A, B = np.array([0.70, 0.72, 0.69, 0.75, 0.74]), np.array([0.71, 0.70, 0.70, 0.74, 0.745])
FOUND = paired_estimate(A - B)
ONE_SEED = paired_estimate([0.01])


def test_two_one_sided_tests_are_those_of_statsmodels():
    for margin in (0.001, 0.01, 0.02, 0.1):
        # theirs takes 1 − the distribution function, which leaves p good to 1e-16
        assert equivalence_p(FOUND, margin) == pytest.approx(ttost_paired(A, B, -margin, margin)[0], abs=1e-15)
    assert equivalence_p(FOUND, 0.02) < equivalence_p(FOUND, 0.01)


def test_two_sided_test_is_scipys():
    assert difference_p(FOUND) == pytest.approx(stats.ttest_rel(A, B).pvalue, rel=1e-12)


def test_equivalence_is_shown_where_the_90_percent_interval_lies_within_the_margin():
    interval, margin = FOUND.interval(0.9), shown_margin(FOUND)
    assert margin == pytest.approx(max(abs(interval.low), abs(interval.high)), rel=1e-12)
    assert equivalence_p(FOUND, margin) == pytest.approx(0.05, rel=1e-9)


@pytest.mark.parametrize("seeds", [3, 5, 20])
def test_detectable_effect_is_statsmodels(seeds):
    values = np.linspace(-0.03, 0.03, seeds)
    expected = TTestPower().solve_power(None, nobs=seeds, alpha=0.05, power=0.8) * np.std(values, ddof=1)
    # their solver stops at a relative 1e-8 or so of power, which is about as much of the effect
    assert detectable_effect(paired_estimate(values)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("df", [1.0, 1.3, 4.0, 33.3, 1e6])
def test_powers_are_what_they_say(df):
    """20,000 studies drawn at the solved numbers: a power of 80 % has a standard error of 0.28 points."""
    generator, count, error = np.random.default_rng(4), 20_000, 0.01
    design = Estimate(0.0, error, df, 5)
    means, errors = generator.normal(0, error, count), error * np.sqrt(generator.chisquare(df, count) / df)
    found = np.abs(means + detectable_effect(design)) > stats.t.ppf(0.975, df) * errors
    shown = np.abs(means) < attainable_margin(design) - stats.t.ppf(0.95, df) * errors
    bound = 4 * math.sqrt(0.8 * 0.2 / count)
    assert abs(found.mean() - 0.8) < bound and abs(shown.mean() - 0.8) < bound


def test_with_the_error_known_the_numbers_are_the_normal_ones():
    design = Estimate(0.0, 1.0, 1e7, 5)  # t differs from the normal by about 1 / df
    z = stats.norm.ppf
    assert attainable_margin(design) == pytest.approx(z(0.95) + z(0.9), abs=1e-6)
    assert detectable_effect(design) == pytest.approx(z(0.975) + z(0.8), abs=1e-5)  # the far tail holds 1e-6 of power


@pytest.mark.parametrize(
    ("mean", "error", "word"),
    [
        (0.001, 0.004, "equivalent"),
        (0.012, 0.002, "equivalent"),  # significant too, and within the margin
        (-0.04, 0.01, "worse"),
        (0.04, 0.01, "better"),
        (0.004, 0.02, "cannot tell"),
        (-0.02, 0.02, "cannot tell"),
        (0.03, 0.0, "better"),
        (0.0, 0.0, "equivalent"),
    ],
)
def test_verdicts(mean, error, word):
    found = equivalence_verdict(Estimate(mean, error, 4.0, 5, 1000), 0.02)
    assert found.word == word
    assert f"{word} (margin ± 0.02): difference {mean:+.3f}" in found.describe()
    assert "n = 5 seeds × 1,000 rows" in found.describe() and f"{found.detectable:.3f}" in found.describe()
    opposite = equivalence_verdict(Estimate(-mean, error, 4.0, 5, 1000), 0.02).word
    assert opposite == {"worse": "better", "better": "worse"}.get(word, word)


@given(st.floats(-1, 1), st.floats(1e-6, 1), st.floats(1, 1e4), st.floats(1e-3, 1))
def test_equivalent_means_the_90_percent_interval_is_inside_and_nothing_else(mean, error, df, margin):
    found = equivalence_verdict(Estimate(mean, error, df, 5), margin)
    inside = max(abs(found.estimate.interval(0.9).low), abs(found.estimate.interval(0.9).high)) - margin
    if abs(inside) > 1e-9:  # at the bound itself rounding decides
        assert (found.word == "equivalent") == (inside < 0)


def test_one_seed_is_a_demonstration():
    found = equivalence_verdict(crossed_estimate([[[0.0, 1.0, 0.0]]]), 0.02)
    assert found.word == "one seed: a demonstration" == equivalence_verdict(ONE_SEED, 0.5).word
    numbers = (found.p_equivalence, found.p_difference, found.shown_margin, found.detectable, found.attainable_margin)
    assert np.isnan(numbers).all()
    assert found.describe() == "one seed: a demonstration: difference +0.333, n = one seed × 3 rows"


def test_more_seeds_detect_less():
    effects = [detectable_effect(replace(FOUND, df=n - 1.0, error=0.03 / math.sqrt(n))) for n in (3, 5, 10, 50)]
    assert effects == sorted(effects, reverse=True)


def test_holm_is_statsmodels_and_passes_over_nan():
    p = [0.01, 0.04, math.nan, 0.03]
    assert holm(p)[[0, 1, 3]] == pytest.approx(multipletests([0.01, 0.04, 0.03], method="holm")[1], rel=1e-12)
    assert holm(p)[[0, 1, 3]] == pytest.approx([0.03, 0.06, 0.06], rel=1e-12)
    assert math.isnan(holm(p)[2]) and np.isnan(holm([math.nan])).all() and len(holm([])) == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: equivalence_verdict(FOUND, 0.0), "margin must be above 0; found 0.0"),
        (lambda: equivalence_p(FOUND, math.nan), "margin must be above 0; found nan"),
        (lambda: equivalence_verdict(FOUND, 0.1, alpha=5), "alpha must be between 0 and 1; found 5"),
        (lambda: detectable_effect(FOUND, power=0.04), "power must be above alpha, 0.05; found 0.04"),
        (lambda: attainable_margin(FOUND, power=1), "power must be between 0 and 1; found 1"),
        (lambda: holm([0.5, 1.5]), r"p_values must be in \[0, 1\]; found \[0.5, 1.5\]"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()

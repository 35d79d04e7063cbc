"""Correlation of relations between adapters: brute force, known p values, adapters resampled and never points."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lori_nb.analysis.association import adapter_interval, mantel, pair_correlation, without_main_effects


def relation(size: int, seed: int, seeds: int = 0) -> np.ndarray:
    shape = (seeds, size, size) if seeds else (size, size)
    return np.random.default_rng(seed).normal(size=shape)


def pairs_of(X: np.ndarray) -> list[float]:
    return [X[i, j] for i, j in itertools.permutations(range(len(X)), 2)]


def test_the_correlation_is_scipys_over_ordered_pairs():
    X, Y = relation(6, 0), relation(6, 1)
    wanted = stats.spearmanr(pairs_of(X), pairs_of(Y)).statistic
    assert pair_correlation(X, Y) == pytest.approx(wanted, abs=1e-12)
    ties = np.round(X)
    assert pair_correlation(ties, Y) == pytest.approx(stats.spearmanr(pairs_of(ties), pairs_of(Y)).statistic, abs=1e-12)
    assert pair_correlation(X, Y.T) != pytest.approx(wanted, abs=1e-3), "who is merged into whom matters"


def test_several_seeds_are_averaged_and_the_diagonal_is_not_read():
    X, Y = relation(5, 2, seeds=3), relation(5, 3, seeds=3)
    each = [pair_correlation(a, b) for a, b in zip(X, Y, strict=True)]
    assert pair_correlation(X, Y) == pytest.approx(np.mean(each), abs=1e-12)
    other = X.copy()
    other[:, range(5), range(5)] = 1e6
    assert pair_correlation(other, Y) == pair_correlation(X, Y)


def test_a_pair_that_is_unknown_is_left_out_and_a_constant_relation_has_no_correlation():
    X, Y = relation(4, 4), relation(4, 5)
    X[0, 1] = np.nan
    known = [(a, b) for a, b in zip(pairs_of(X), pairs_of(Y), strict=True) if not math.isnan(a)]
    assert pair_correlation(X, Y) == pytest.approx(stats.spearmanr(*zip(*known, strict=True)).statistic, abs=1e-12)
    assert math.isnan(pair_correlation(np.ones((4, 4)), Y)) and math.isnan(mantel(np.ones((4, 4)), Y).p)


def test_mantel_takes_every_permutation_of_few_adapters():
    X, Y = relation(4, 6), relation(4, 7)
    observed = stats.spearmanr(pairs_of(X), pairs_of(Y)).statistic
    permuted = [
        stats.spearmanr([X[o[i], o[j]] for i, j in itertools.permutations(range(4), 2)], pairs_of(Y)).statistic
        for o in itertools.permutations(range(4))
    ]
    found = mantel(X, Y)
    assert found.permutations == 24
    assert found.correlation == pytest.approx(observed, abs=1e-12)
    assert found.p == pytest.approx(np.mean(np.abs(permuted) >= abs(observed) - 1e-12))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(permuted, [0.025, 0.975])))
    assert found.low < 0 < found.high


def by_loops(X: np.ndarray, Y: np.ndarray) -> tuple[float, float]:
    """Mantel's ρ, mean over seeds, and its p value, from scipy's correlation of the pairs that are known."""

    def rho(order) -> float:
        each = []
        for one, other in zip(X[:, order][:, :, order], Y, strict=True):
            pairs = [(one[i, j], other[i, j]) for i, j in itertools.permutations(range(len(one)), 2)]
            known = np.array([pair for pair in pairs if not np.isnan(pair).any()])
            each.append(stats.spearmanr(known[:, 0], known[:, 1]).statistic)
        return float(np.mean(each))

    tasks = X.shape[1]
    found = [rho(list(order)) for order in itertools.permutations(range(tasks))]
    return found[0], float(np.mean(np.abs(found) >= abs(found[0]) - 1e-12))


@pytest.mark.parametrize("unknown", [False, True])
def test_mantel_over_seeds_is_what_loops_give(unknown):
    """Ranks found once serve where all pairs are known; a missing pair is ranked anew in every permutation."""
    X, Y = relation(4, 11, seeds=2), relation(4, 12, seeds=2)
    if unknown:
        X[0, 0, 1] = np.nan
    found, expected = mantel(X, Y), by_loops(X, Y)
    assert (found.correlation, found.p) == (pytest.approx(expected[0], abs=1e-12), pytest.approx(expected[1]))


def test_many_adapters_are_permuted_at_random_with_a_seed():
    X, Y = relation(9, 13), relation(9, 14)
    assert mantel(X, Y, permutations=199) == mantel(X, Y, permutations=199)
    assert mantel(X, X, permutations=199).p == pytest.approx(1 / 200)
    assert mantel(X, Y, permutations=199).p != mantel(X, Y, permutations=199, seed=1).p


def test_a_relation_with_itself_and_with_its_negative():
    X = relation(6, 8)
    assert mantel(X, X).correlation == pytest.approx(1) and mantel(X, -X).correlation == pytest.approx(-1)
    assert mantel(X, X).p == mantel(X, -X).p == pytest.approx(1 / math.factorial(6))
    assert adapter_interval(X, X, draws=50).low == pytest.approx(1)


def test_the_order_of_adapters_changes_nothing_but_exchanging_one_relation_alone_does():
    X, Y, order = relation(6, 9), relation(6, 10), [3, 1, 5, 0, 4, 2]
    both = mantel(X[order][:, order], Y[order][:, order])
    assert both.correlation == pytest.approx(mantel(X, Y).correlation) and both.p == mantel(X, Y).p
    assert pair_correlation(X[order][:, order], Y) != pytest.approx(pair_correlation(X, Y), abs=1e-3)


def test_unrelated_relations_are_found_related_as_often_as_they_may_be():
    """Row effects make points dependent: a test over points would see a relation far more often than 1 in 20."""
    hits, by_points = 0, 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        X, Y = (random.normal(size=(5, 1)) + 0.3 * random.normal(size=(5, 5)) for _ in range(2))
        hits += mantel(X, Y).p <= 0.05
        by_points += stats.spearmanr(pairs_of(X), pairs_of(Y)).pvalue <= 0.05
    assert hits <= 8  # of 60 tests at 5 %: 9 or more has a chance of 0.4 %
    assert by_points > 15


def test_the_interval_draws_adapters_so_it_is_wider_than_one_over_points():
    random = np.random.default_rng(0)
    strong, noise = random.normal(size=(1, 10)), 0.3 * random.normal(size=(10, 10))
    X = np.repeat(strong, 10, axis=0)
    found = adapter_interval(X, X + noise, draws=300)
    x, y = np.array(pairs_of(X)), np.array(pairs_of(X + noise))
    drawn = [stats.spearmanr(x[k], y[k]).statistic for k in random.integers(len(x), size=(300, len(x)))]
    assert found.low <= found.mean <= found.high and found.n == 10
    assert found.high - found.low > 1.5 * np.ptp(np.quantile(drawn, [0.025, 0.975]))
    assert adapter_interval(X, X + noise, draws=300) == found, "seeded"
    assert adapter_interval(X, X + noise, draws=300, seed=1) != found


def test_the_interval_is_what_a_loop_over_draws_gives():
    """Many draws are ranked at once, pairs that are unknown or of an adapter with its copy left out of both."""
    X, Y = relation(5, 15, seeds=2), relation(5, 16, seeds=2)
    X[0, 1, 2] = Y[1, 3, 0] = np.nan
    random, draws, found = np.random.default_rng(7), 150, []

    def rho(pairs: np.ndarray) -> float:
        return stats.spearmanr(pairs[:, 0], pairs[:, 1]).statistic

    for _ in range(draws):
        seeds, tasks = random.integers(2, size=2), random.integers(5, size=5)
        each = []
        for s in seeds:
            pairs = [(X[s, i, j], Y[s, i, j]) for i, j in itertools.permutations(tasks, 2) if i != j]
            known = np.array([pair for pair in pairs if not np.isnan(pair).any()])
            each.append(rho(known) if np.ptp(known, axis=0).all() else math.nan)
        found.append(np.mean(each))
    interval = adapter_interval(X, Y, draws, seed=7)
    assert 0 < np.isnan(found).sum() < 15, "few tasks drawn: one pair, again and again"
    wanted = np.nanquantile(found, [0.025, 0.975])
    assert (interval.low, interval.high) == pytest.approx(tuple(wanted), abs=1e-12)
    assert interval.mean == pytest.approx(pair_correlation(X, Y))


def test_main_effects_are_taken_out():
    random = np.random.default_rng(3)
    rows, columns, own = random.normal(size=(6, 1)), random.normal(size=(1, 6)), random.normal(size=(6, 6))
    left = without_main_effects(own + 5 * rows + 7 * columns)
    np.testing.assert_allclose(left, without_main_effects(own), atol=1e-10)
    off = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(np.where(off, left, 0).sum(0), 0, atol=1e-10)
    np.testing.assert_allclose(np.where(off, left, 0).sum(1), 0, atol=1e-10)
    assert np.abs(left[off]).max() > 0.1
    stacked = without_main_effects(np.stack([own, 2 * own]))
    np.testing.assert_allclose(stacked[1][off], 2 * stacked[0][off], atol=1e-10)


@pytest.mark.parametrize(("x", "y"), [((2, 2), (2, 2)), ((4, 4), (5, 5)), ((4, 5), (4, 5)), ((4,), (4,))])
def test_relations_of_another_shape_are_refused(x, y):
    with pytest.raises(ValueError, match="relations must both be .* of at least 3 adapters; found"):
        pair_correlation(np.zeros(x), np.zeros(y))
    with pytest.raises(ValueError, match="draws must be at least 1"):
        adapter_interval(np.zeros((4, 4)), np.zeros((4, 4)), draws=0)
    with pytest.raises(ValueError, match="permutations must be at least 1; found 0"):
        mantel(np.zeros((4, 4)), np.zeros((4, 4)), permutations=0)

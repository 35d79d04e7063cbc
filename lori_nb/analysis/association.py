"""Whether one relation between adapters goes with another: rank correlation of pairs that share their members.

T adapters make T·(T − 1) ordered pairs, and all pairs of one adapter share whatever is peculiar to it: they are far
fewer than T·(T − 1) independent points. So adapters are permuted and drawn again, never points:

- :func:`mantel` exchanges the adapters of one relation, rows and columns alike (N. Mantel, 1967): how often does a
  correlation as large come about where the relations have nothing to do with each other?
- :func:`adapter_interval` draws T adapters with replacement, and where there are several seeds, seeds too: between
  which values would other adapters put the correlation?

A relation is given as X (T × T) or, of several seeds, (S × T × T): X[s, i, j] of adapter j seen from i. The diagonal
is never read, nor a pair that is NaN in either relation. The correlation of several seeds is the mean over seeds.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lori_nb.analysis.statistics import Interval

BATCH = 100  # draws whose ranks are found at once: a call for each takes three to ten times as long
FEW = 7  # up to so many adapters all permutations are taken: 7! = 5040


@dataclass(frozen=True)
class Mantel:
    """A correlation, the share of permutations whose magnitude reaches its own (two-sided), how many there were, and
    between which values (``low``, ``high``) 95 % of them lie: what exchanged adapters give.
    """

    correlation: float
    p: float
    permutations: int
    low: float = math.nan
    high: float = math.nan


def pair_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's ρ over ordered pairs i ≠ j, mean over seeds; NaN where a relation is constant or has no two pairs.

    Raises ValueError unless x and y are of one shape (T × T) or (S × T × T) with T ≥ 3.
    """
    X, Y = _relations(x, y)
    return float(_mean_correlation(X, Y))


def without_main_effects(x: ArrayLike) -> np.ndarray:
    """X[i, j] − μ − a_i − b_j, of the shape of x, by least squares over ordered pairs i ≠ j: what is left of a relation
    without how sensitive each adapter's task is (a_i) and how strong each adapter is (b_j). NaN on the diagonal.

    Raises ValueError as :func:`pair_correlation` does.
    """
    X, _ = _relations(x, x)
    return np.stack([_residual(each) for each in X]).reshape(np.shape(x))


def mantel(x: ArrayLike, y: ArrayLike, permutations: int = 4999, seed: int = 0) -> Mantel:
    """Spearman's ρ with the p value of exchanging the adapters of x.

    All T! permutations up to T = 7, p the share whose |ρ| is at least the observed (the identity is among them); beyond
    that so many random ones, and p = (1 + hits) / (1 + permutations). The seeds are permuted alike.

    Raises ValueError as :func:`pair_correlation` does, and for fewer than one permutation.
    """
    X, Y = _relations(x, y)
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1; found {permutations}")
    observed, T = float(_mean_correlation(X, Y)), X.shape[1]
    if math.isnan(observed):
        return Mantel(observed, math.nan, 0)
    if T <= FEW:
        orders, extra = list(itertools.permutations(range(T))), 0
    else:
        random = np.random.default_rng(seed)
        orders, extra = [random.permutation(T) for _ in range(permutations)], 1
    reached = abs(observed) - 1e-12  # equal correlations differ in the order of their sums
    correlation = _dot_products if _is_known(X) and _is_known(Y) else _mean_correlation
    if correlation is _dot_products:  # ranks move with their adapters: they are found once
        X, Y = (np.stack([_standard_ranks(each) for each in relation]) for relation in (X, Y))
    found = np.array([correlation(X[:, order][:, :, order], Y) for order in map(list, orders)])
    low, high = np.nanquantile(found, [0.025, 0.975])
    p = (extra + int((np.abs(found) >= reached).sum())) / (extra + len(orders))
    return Mantel(observed, p, len(orders), float(low), float(high))


def adapter_interval(
    x: ArrayLike, y: ArrayLike, draws: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """ρ with its percentile interval over adapters drawn with replacement; n counts adapters.

    An adapter drawn twice brings all its pairs twice, but none with itself. Few adapters make a percentile interval too
    short: read it beside :func:`mantel`. Draws whose correlation is undefined are left out.

    Raises ValueError as :func:`pair_correlation` does, for fewer than one draw, and a confidence outside (0, 1).
    """
    X, Y = _relations(x, y)
    if draws < 1 or not 0 < confidence < 1:
        raise ValueError(f"draws must be at least 1 and confidence in (0, 1); found {draws} and {confidence}")
    S, T, _ = X.shape
    X, Y = X.copy(), Y.copy()
    X[:, range(T), range(T)] = np.nan  # where an adapter meets its own copy
    random = np.random.default_rng(seed)
    drawn = [(random.integers(S, size=S), random.integers(T, size=T)) for _ in range(draws)]
    found = []
    for start in range(0, draws, BATCH):
        part = drawn[start : start + BATCH]
        resampled = [np.stack([each[seeds][:, kept][:, :, kept] for seeds, kept in part]) for each in (X, Y)]
        found.append(_mean_correlation(*resampled))
    tail = (1 - confidence) / 2
    known = np.concatenate(found)
    known = known[~np.isnan(known)]
    low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (math.nan, math.nan)
    return Interval(float(_mean_correlation(X, Y)), float(low), float(high), T, confidence)


def _relations(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    X, Y = (np.asarray(each, dtype=np.float64) for each in (x, y))
    if X.shape != Y.shape or X.ndim not in (2, 3) or X.shape[-1] != X.shape[-2] or X.shape[-1] < 3:
        raise ValueError(
            f"relations must both be (T × T) or (S × T × T) of at least 3 adapters; found {X.shape} and {Y.shape}"
        )
    return X.reshape(-1, *X.shape[-2:]), Y.reshape(-1, *Y.shape[-2:])


def _mean_correlation(X: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """Spearman's ρ over pairs i ≠ j, mean over seeds: (… × S × T × T) to (…)."""
    off = ~np.eye(X.shape[-1], dtype=bool)
    return _spearman(X[..., off], Y[..., off]).mean(axis=-1)


def _is_known(X: np.ndarray) -> bool:
    """Whether no pair of a relation (S × T × T) is NaN and none of its seeds is constant."""
    off = X[:, ~np.eye(X.shape[1], dtype=bool)]
    return not np.isnan(off).any() and bool((np.ptp(off, axis=1) > 0).all())


def _standard_ranks(X: np.ndarray) -> np.ndarray:
    """Ranks of ordered pairs in their places (T × T), of mean 0 and length 1, with zeros on the diagonal."""
    off = ~np.eye(len(X), dtype=bool)
    ranks = stats.rankdata(X[off])
    ranks -= ranks.mean()
    placed = np.zeros_like(X)
    placed[off] = ranks / np.linalg.norm(ranks)
    return placed


def _dot_products(X: np.ndarray, Y: np.ndarray) -> float:
    return float((X * Y).sum() / len(X))


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """ρ along the last axis, of the places that are NaN in neither: (… × P) to (…); NaN where one is constant there."""
    unknown = np.isnan(a) | np.isnan(b)
    a, b = (_centred_ranks(np.where(unknown, np.nan, each)) for each in (a, b))
    size = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), size, out=np.full_like(size, np.nan), where=size > 0)


def _centred_ranks(a: np.ndarray) -> np.ndarray:
    """Ranks along the last axis less their mean, which is (n + 1) / 2 of n known places; 0 where a is NaN."""
    n = (~np.isnan(a)).sum(axis=-1, keepdims=True)
    return np.nan_to_num(stats.rankdata(a, axis=-1, nan_policy="omit") - (n + 1) / 2)


def _residual(X: np.ndarray) -> np.ndarray:
    T = len(X)
    i, j = np.nonzero(~np.eye(T, dtype=bool) & ~np.isnan(X))
    design = np.zeros((len(i), 2 * T + 1))
    design[:, 0] = 1.0
    design[np.arange(len(i)), 1 + i] = design[np.arange(len(i)), 1 + T + j] = 1.0
    effects, *_ = np.linalg.lstsq(design, X[i, j], rcond=None)
    left = np.full_like(X, np.nan)
    left[i, j] = X[i, j] - design @ effects
    return left

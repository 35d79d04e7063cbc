"""Intervals: how far a number may be from what more seeds, or more rows, would give.

Over seeds a t interval is taken: at n = 5 its 95 % holds where percentile and BCa bootstrap cover about 84 %
(simulated). Over the rows of one evaluation a Wilson interval. Each answers its own question; neither holds the
other's spread. A difference of two methods on the same seeds and the same rows has a crossed design, whose
:class:`Estimate` holds both: what another seed *and* another row would give. Tests and power are in
:mod:`lori_nb.analysis.equivalence`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats.proportion import proportion_confint


@dataclass(frozen=True)
class Interval:
    """A mean of ``n`` values with its two-sided interval at ``confidence``; bounds are NaN where n is 1."""

    mean: float
    low: float
    high: float
    n: int
    confidence: float = 0.95

    def describe(self, digits: int = 3) -> str:
        """For tables: "0.720 [0.690, 0.750] (n = 5, 95 %)", or "0.720 (one seed: a demonstration)"."""
        text = interval_text(self.mean, self.low, self.high, digits)
        if math.isnan(self.low):
            return f"{text} (one seed: a demonstration)"
        return f"{text} (n = {self.n}, {100 * self.confidence:g} %)"


def interval_text(value: float, low: float, high: float, digits: int = 2, signed: bool = False) -> str:
    """ "0.66 [0.59, 0.72]", with signs for differences; the value alone where there is no interval, "–" for NaN."""
    form = f"{'+' if signed else ''}.{digits}f"
    if math.isnan(value):
        return "–"
    return f"{value:{form}}" if math.isnan(low) else f"{value:{form}} [{low:{form}}, {high:{form}}]"


@dataclass(frozen=True)
class Estimate:
    """A mean difference with its standard error and the degrees of freedom of that error.

    ``seeds`` and ``rows`` are what it was taken over; ``rows`` is 0 where only seeds were sampled. One seed has no
    error (NaN).
    """

    mean: float
    error: float
    df: float
    seeds: int
    rows: int = 0

    def interval(self, confidence: float = 0.95) -> Interval:
        """mean ± t_df · error; NaN bounds where there is no error. Its n counts seeds."""
        _check_confidence(confidence)
        reach = float(stats.t.ppf((1 + confidence) / 2, self.df)) * self.error
        return Interval(self.mean, self.mean - reach, self.mean + reach, self.seeds, confidence)

    def counted(self, of: str = "rows") -> str:
        """What it was taken over, in words: "5 seeds × 1,000 rows"."""
        seeds = "one seed" if self.seeds == 1 else f"{self.seeds} seeds"
        return f"{seeds} × {self.rows:,} {of}" if self.rows else seeds


def estimate_of(interval: Interval) -> Estimate:
    """The estimate that a t interval over n seeds was made from."""
    if interval.n < 2 or math.isnan(interval.low):
        return Estimate(interval.mean, math.nan, math.nan, interval.n)
    df = interval.n - 1.0
    reach = (interval.high - interval.low) / 2
    return Estimate(interval.mean, reach / float(stats.t.ppf((1 + interval.confidence) / 2, df)), df, interval.n)


def t_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """mean ± t_{n−1} · sd / √n over independent values (n,), one a seed; sd with n − 1, values taken as normal.

    One value gives NaN bounds. ValueError for no value, values that are not finite, or a confidence outside (0, 1).
    """
    return _over_seeds(_vector(values, "values")).interval(confidence)


def paired_estimate(differences: ArrayLike) -> Estimate:
    """Mean of paired differences (seeds,) with the error sd / √S and S − 1 degrees of freedom.

    What the pairs share, such as the order of the rows under one seed, cancels. It speaks of other seeds on these very
    rows. Errors as in :func:`t_interval`.
    """
    return _over_seeds(_vector(differences, "differences"))


def _over_seeds(values: np.ndarray) -> Estimate:
    if len(values) == 1:
        return Estimate(float(values[0]), math.nan, math.nan, 1)
    return Estimate(float(np.mean(values)), float(stats.sem(values)), len(values) - 1.0, len(values))


def crossed_estimate(strata: Sequence[ArrayLike]) -> Estimate:
    """Mean difference where every seed met every row: the error of sampling other seeds and other rows.

    With D_si the difference on row i under seed s, two-way random effects D_si = μ + a_s + b_i + e_si give

        Var(D̄) = σ_a²/S + σ_b²/N + σ_e²/(S·N) = V_seeds + V_rows − V_both,

    where V_seeds = var_s(D̄_s·)/S, V_rows = var_i(D̄_·i)/N and V_both = MS_e/(S·N), the interaction that the first two
    both hold. Several tasks are strata that are not sampled: the mean is over tasks, V_seeds is of each seed's mean
    over tasks, and V_rows and V_both of T tasks are added and divided by T². Estimates of σ_a² and σ_b² below zero
    count as zero. The degrees of freedom are Satterthwaite's, V² / Σ V_k²/df_k over the terms of V.

    Both are approximations, since σ_a² is judged from few seeds: of 95 % intervals, 93 to 95 in a hundred hold with
    three seeds and 94 to 95 with five where seeds differ by more than rows alone make them (simulated).

    Args:
        strata: for every task the differences (seeds × rows); rows may differ in number between tasks.

    Returns:
        ``rows`` counts the rows of all tasks. One seed gives NaN for error and df.

    Raises:
        ValueError: no task, matrices with other numbers of seeds, fewer than two rows, or a value that is not finite.
    """
    matrices = [_matrix(each) for each in strata]
    if len({len(each) for each in matrices}) != 1:
        found = ", ".join(str(len(each)) for each in matrices) or "no task"
        raise ValueError(f"strata must hold the same seeds for every task, one a row of a matrix; found {found}")
    per_seed = np.mean([each.mean(axis=1) for each in matrices], axis=0)  # (seeds,)
    seeds, rows, mean = len(per_seed), sum(each.shape[1] for each in matrices), float(per_seed.mean())
    if seeds == 1:
        return Estimate(mean, math.nan, math.nan, 1, rows)
    sizes = np.array([each.shape[1] for each in matrices])
    of_seeds = np.array([np.var(per_seed, ddof=1) / seeds])
    of_rows = np.array([np.var(each.mean(axis=0), ddof=1) for each in matrices]) / sizes / len(sizes) ** 2
    of_both = np.array([_interaction(each) for each in matrices]) / (seeds * sizes) / len(sizes) ** 2
    with_seeds, with_rows = (bool(terms.sum() > of_both.sum()) for terms in (of_seeds, of_rows))
    # Of V_seeds + V_rows − V_both; a variance that comes out below zero leaves its term and one V_both out.
    terms = np.concatenate([of_seeds * with_seeds, of_rows * with_rows, of_both * (1.0 - with_seeds - with_rows)])
    freedom = np.concatenate([[seeds - 1.0], sizes - 1.0, (seeds - 1.0) * (sizes - 1.0)])
    variance = float(terms.sum())
    if variance == 0:
        return Estimate(mean, 0.0, seeds - 1.0, seeds, rows)
    return Estimate(mean, math.sqrt(variance), float(variance**2 / (terms**2 / freedom).sum()), seeds, rows)


def _interaction(D: np.ndarray) -> float:
    """Mean square of what neither seed nor row explains in D (seeds × rows)."""
    rest = D - D.mean(axis=1, keepdims=True) - D.mean(axis=0, keepdims=True) + D.mean()
    return float((rest**2).sum() / ((D.shape[0] - 1) * (D.shape[1] - 1)))


def ratio_interval(numerators: ArrayLike, denominators: ArrayLike, confidence: float = 0.95) -> Interval:
    """Ratio of two means over the same seeds, a / b, with Fieller's interval: all ρ for which a − ρ b may be zero,

        (a − ρ b)² ≤ t² (v_aa − 2 ρ v_ab + ρ² v_bb),

    t the quantile at n − 1 degrees of freedom, v the covariances of the means (E. C. Fieller, 1954). Where b's own
    interval contains zero no bounded set satisfies this: the bounds are then NaN, as they are for one seed.

    Raises ValueError for vectors of different lengths, or whose denominators' mean is zero.
    """
    above, below = _vector(numerators, "numerators"), _vector(denominators, "denominators")
    if len(above) != len(below):
        raise ValueError(f"denominators must be as many as numerators, {len(above)}; found {len(below)}")
    _check_confidence(confidence)
    a, b, n = float(above.mean()), float(below.mean()), len(above)
    if b == 0:
        raise ValueError("denominators must have a mean other than zero; found 0")
    if n == 1:
        return Interval(a / b, math.nan, math.nan, 1, confidence)
    (v_aa, v_ab), (_, v_bb) = np.cov(above, below) / n
    t = float(stats.t.ppf((1 + confidence) / 2, n - 1))
    # ρ² (b² − t² v_bb) − 2 ρ (a b − t² v_ab) + (a² − t² v_aa) ≤ 0
    square, half = b * b - t * t * v_bb, a * b - t * t * v_ab
    if square <= 0:
        return Interval(a / b, math.nan, math.nan, n, confidence)
    root = math.sqrt(max(0.0, half * half - square * (a * a - t * t * v_aa)))
    return Interval(a / b, (half - root) / square, (half + root) / square, n, confidence)


def proportion_interval(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson interval of a share k / n, such as k right answers among n rows.

    The spread of the rows alone, not of seeds. ValueError unless n ≥ 1, 0 ≤ k ≤ n and the confidence is in (0, 1).
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"k of n must satisfy n >= 1 and 0 <= k <= n; found k = {k}, n = {n}")
    _check_confidence(confidence)
    low, high = proportion_confint(k, n, alpha=1 - confidence, method="wilson")
    # At the ends the formula gives 0 and 1, and rounding something like 1e-17.
    return Interval(k / n, float(low) if k > 0 else 0.0, float(high) if k < n else 1.0, n, confidence)


def _vector(values: ArrayLike, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must be a vector of at least one value; found shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite; found NaN or infinity")
    return values


def _matrix(values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2:
        raise ValueError(f"strata must be matrices of seeds × at least two rows; found shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("strata must be finite; found NaN or infinity")
    return values


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1; found {confidence}")

"""What a difference of two methods can be said to be: equivalent within a margin, better, worse, or undecided.

Everything takes an :class:`~lori_nb.analysis.statistics.Estimate`: a mean difference δ̂ with standard error σ̂ and ν
degrees of freedom, paired over seeds or crossed with rows. No difference seen is not equivalence shown: beside every
verdict stand the smallest difference that the design could detect and the smallest margin that it could establish.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import integrate, optimize, stats
from statsmodels.stats.multitest import multipletests

from lori_nb.analysis.statistics import Estimate, Interval, interval_text

ALPHA, POWER = 0.05, 0.8
NODES = 64  # of Gauss-Legendre quadrature: six digits for ν from 1 up
DEMONSTRATION = "one seed: a demonstration"


@dataclass(frozen=True)
class Verdict:
    """The outcome of :func:`equivalence_verdict` with the numbers that it rests on, in the unit of the difference.

    Attributes:
        word: "equivalent", "better", "worse", "cannot tell", or "one seed: a demonstration".
        interval: the difference at confidence 1 − alpha.
        p_equivalence: of the two one-sided tests within ± ``margin``.
        p_difference: of the two-sided test against 0.
        shown_margin: the smallest margin within which these very data show equivalence.
        detectable: minimum detectable effect of the design.
        attainable_margin: the smallest margin that the design could establish if there were no difference.
    """

    word: str
    estimate: Estimate
    interval: Interval
    margin: float
    p_equivalence: float
    p_difference: float
    shown_margin: float
    detectable: float
    attainable_margin: float

    def describe(self, digits: int = 3, of: str = "rows") -> str:
        """One sentence with n (``of`` says what its rows are), interval, p and what the design could tell."""
        value = interval_text(self.interval.mean, self.interval.low, self.interval.high, digits, signed=True)
        if math.isnan(self.estimate.error):
            return f"{self.word}: difference {value}, n = {self.estimate.counted(of)}"
        return (
            f"{self.word} (margin ± {self.margin:g}): difference {value}, n = {self.estimate.counted(of)}, equivalence "
            f"p = {self.p_equivalence:.2g}; minimum detectable difference {self.detectable:.{digits}f}, smallest "
            f"margin that the design could establish {self.attainable_margin:.{digits}f}"
        )


def equivalence_verdict(estimate: Estimate, margin: float, alpha: float = ALPHA, power: float = POWER) -> Verdict:
    """Whether a method is equivalent to its reference within ± ``margin``, where ``estimate`` is method − reference.

    "equivalent" when both one-sided tests reject at ``alpha``; else "better" or "worse" when the two-sided test against
    0 rejects at ``alpha``; else "cannot tell". One seed decides nothing. A difference may be significant and within
    the margin; it is then equivalent. The numbers with ``power`` describe the design, not the outcome.

    Raises:
        ValueError: a margin that is not above 0, or alpha or power outside (0, 1).
    """
    _check(margin, alpha, power)
    p_equivalence, p_difference = equivalence_p(estimate, margin), difference_p(estimate)
    return Verdict(
        _word(estimate, p_equivalence, p_difference, alpha),
        estimate,
        estimate.interval(1 - alpha),
        margin,
        p_equivalence,
        p_difference,
        shown_margin(estimate, alpha),
        detectable_effect(estimate, alpha, power),
        attainable_margin(estimate, alpha, power),
    )


def _word(estimate: Estimate, p_equivalence: float, p_difference: float, alpha: float) -> str:
    if math.isnan(estimate.error):
        return DEMONSTRATION
    if p_equivalence < alpha:
        return "equivalent"
    if p_difference < alpha:
        return "better" if estimate.mean > 0 else "worse"
    return "cannot tell"


def equivalence_p(estimate: Estimate, margin: float) -> float:
    """p of the two one-sided tests (TOST) of |δ| ≥ margin against |δ| < margin; NaN for one seed.

    The larger of P(t_ν > (δ̂ + margin)/σ̂) and P(t_ν > (margin − δ̂)/σ̂), which is P(t_ν > (margin − |δ̂|)/σ̂).
    """
    _check(margin)
    return _tail(estimate, margin - abs(estimate.mean))


def difference_p(estimate: Estimate) -> float:
    """Two-sided p of δ = 0: 2·P(t_ν > |δ̂|/σ̂); NaN for one seed."""
    return 2 * _tail(estimate, abs(estimate.mean))


def _tail(estimate: Estimate, distance: float) -> float:
    """P(t_ν > distance/σ̂); without any error a distance of 0 is a toss, and every other is certain."""
    if estimate.error == 0:
        return 0.5 if distance == 0 else float(distance < 0)
    return float(stats.t.sf(distance / estimate.error, estimate.df))


def shown_margin(estimate: Estimate, alpha: float = ALPHA) -> float:
    """The smallest margin within which these data show equivalence: |δ̂| + t_{ν,1−α}·σ̂; NaN for one seed."""
    _check(alpha=alpha)
    return abs(estimate.mean) + float(stats.t.ppf(1 - alpha, estimate.df)) * estimate.error


def detectable_effect(estimate: Estimate, alpha: float = ALPHA, power: float = POWER) -> float:
    """Minimum detectable effect: the |δ| that the two-sided t test would find with ``power``, taking σ̂ for σ.

    The δ that solves P(|T| > t_{ν,1−α/2}) = power for T noncentral t with ν degrees of freedom and noncentrality δ/σ̂.
    NaN for one seed.
    """
    _check(alpha=alpha, power=power)
    if math.isnan(estimate.error):
        return math.nan
    bound, df = float(stats.t.ppf(1 - alpha / 2, estimate.df)), estimate.df

    def found(noncentrality: float) -> float:
        other_side = np.nan_to_num(stats.nct.cdf(-bound, df, noncentrality))  # scipy gives NaN for some below 1e-16
        return float(stats.nct.sf(bound, df, noncentrality) + other_side)

    return _solved(found, power) * estimate.error


def attainable_margin(estimate: Estimate, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest margin that the two one-sided tests would establish with ``power`` if δ = 0, taking σ̂ for σ.

    With U = √(χ²_ν/ν), the ratio of estimated to true error, and t = t_{ν,1−α}, the tests pass when |δ̂|/σ < m/σ − t·U:

        power = ∫ max(0, 2Φ(m/σ − t·u) − 1) f_U(u) du,  solved for m.

    NaN for one seed.
    """
    _check(alpha=alpha, power=power)
    if math.isnan(estimate.error):
        return math.nan
    bound, ratio = float(stats.t.ppf(1 - alpha, estimate.df)), stats.chi(estimate.df, scale=estimate.df**-0.5)

    def passed(margin: float) -> float:
        def share(v: np.ndarray) -> np.ndarray:
            return 2 * stats.norm.cdf(margin - bound * ratio.ppf(v)) - 1

        # over the quantiles v of U, up to where no margin is left: smooth for any ν
        return float(integrate.fixed_quad(share, 0, ratio.cdf(margin / bound), n=NODES)[0])

    return _solved(passed, power) * estimate.error


def _solved(rising: Callable[[float], float], value: float) -> float:
    """Where a function that rises from below ``value`` at 0 reaches it."""
    high = 1.0
    while rising(high) < value:
        high *= 2
    return float(optimize.brentq(lambda x: rising(x) - value, 0.0, high))


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's adjustment (n,): p below alpha after it keeps the chance of any false rejection among all below alpha.

    p_(k) of the k-th smallest becomes max over j ≤ k of min(1, (n − j + 1)·p_(j)). NaN stays NaN and is not counted.
    ValueError for a p outside [0, 1].
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    known = ~np.isnan(p_values)
    if ((p_values[known] < 0) | (p_values[known] > 1)).any():
        raise ValueError(f"p_values must be in [0, 1]; found {p_values.tolist()}")
    adjusted = np.full_like(p_values, np.nan)
    if known.any():
        adjusted[known] = multipletests(p_values[known], method="holm")[1]
    return adjusted


def _check(margin: float = 1.0, alpha: float = ALPHA, power: float = POWER) -> None:
    if not margin > 0:
        raise ValueError(f"margin must be above 0; found {margin}")
    for name, value in {"alpha": alpha, "power": power}.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1; found {value}")
    if power <= alpha:
        raise ValueError(f"power must be above alpha, {alpha}; found {power}")

"""Overlap between adapters, from their factors alone.

Two updates ΔW = s·B A and ΔW' = s'·B' A' of one module can meet in three ways:

- as matrices: the Frobenius cosine ⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖), in [−1, 1];
- in what they read: their row spaces, subspaces of the module's input;
- in what they write: their column spaces, subspaces of the module's output.

These are spaces of ΔW at its numerical rank: the row space of A and the column space of B, but for what no entry of ΔW
holds, such as the row of A that belongs to an empty column of B.

No dense ΔW is formed: norms and inner products are those of the cores of :mod:`lori_nb.analysis.reduced`.

A *measure* is a function of such a pair, registered by name; :mod:`lori_nb.analysis.interference` has more of them::

    @measure("norm_ratio", symmetric=False)
    def norm_ratio(pair):
        return pair.f.norm / pair.g.norm

How to read the numbers: where adapters share one draw of a frozen A, row overlap is 1 by construction, and independent
draws make it small by chance alone (r / d_in is expected of two random r-dimensional subspaces). Compare with
adapters drawn under the same policy (:mod:`lori_nb.analysis.nulls`), not with 0. Nor does a zero inner product mean
that tasks leave each other's activations alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor

from lori_nb.analysis.reduced import Reduced, orthonormal, reduced
from lori_nb.method.adapters import Factors

MEASURES = ("cosine", "row_overlap", "column_overlap")
COLUMNS = ("adapter_a", "adapter_b", "module", "measure", "value")


@dataclass(frozen=True)
class Pair:
    """Two updates of one module; what several measures need is computed once."""

    f: Reduced
    g: Reduced

    @cached_property
    def inner(self) -> float:
        """⟨ΔW_f, ΔW_g⟩."""
        crossed = (self.f.columns.T @ self.g.columns) @ self.g.core @ (self.g.rows.T @ self.f.rows)
        return float((self.f.core * crossed).sum())

    @cached_property
    def row_angles(self) -> Tensor:
        """Principal angles of the row spaces of ΔW, ascending, in radians; none where an update is zero."""
        return _angles(self.f.spaces[1], self.g.spaces[1])

    @cached_property
    def column_angles(self) -> Tensor:
        """Principal angles of the column spaces of ΔW, ascending, in radians; none where an update is zero."""
        return _angles(self.f.spaces[0], self.g.spaces[0])


@dataclass(frozen=True)
class Measure:
    """A number about a pair; one that is not symmetric is taken both ways, as f seen from g and the reverse."""

    value: Callable[[Pair], float]
    symmetric: bool = True


REGISTERED: dict[str, Measure] = {}


def measure(name: str, *, symmetric: bool = True) -> Callable[[Callable[[Pair], float]], Callable[[Pair], float]]:
    """Decorator that registers ``(pair) -> float``, NaN where undefined; a name registered again is replaced."""

    def register(value: Callable[[Pair], float]) -> Callable[[Pair], float]:
        REGISTERED[name] = Measure(value, symmetric)
        return value

    return register


def inner_product(f: Factors, g: Factors) -> float:
    """⟨ΔW_f, ΔW_g⟩ = tr(ΔW_fᵀ ΔW_g). ValueError when the two are not of one shape or not finite."""
    return _checked(reduced(f), reduced(g)).inner


def norm(f: Factors) -> float:
    """Frobenius norm ‖ΔW‖ = ‖K‖, with K the core. ValueError when a factor is not finite."""
    return reduced(f).norm


def frobenius_cosine(f: Factors, g: Factors) -> float:
    """⟨ΔW_f, ΔW_g⟩ / (‖ΔW_f‖ ‖ΔW_g‖) in [−1, 1]; NaN where either update is zero, since it has no direction.

    ValueError when the two are not of one shape or not finite.
    """
    return _cosine(_checked(reduced(f), reduced(g)))


def total_cosine(f: Mapping[str, Factors], g: Mapping[str, Factors]) -> float:
    """Frobenius cosine of two adapters over all modules that both have, their ΔW side by side.

    In [−1, 1]; NaN where they share no module or either is zero in all of these. ValueError as in
    :func:`frobenius_cosine`.
    """
    terms = [(pair.inner, pair.f.norm**2, pair.g.norm**2) for *_, pair in met({"f": f, "g": g})]
    inner, of_f, of_g = map(sum, zip(*terms, strict=True)) if terms else (0.0, 0.0, 0.0)
    return inner / math.sqrt(of_f * of_g) if of_f and of_g else float("nan")


def principal_angles(X: Tensor, Y: Tensor, rtol: float | None = None) -> Tensor:
    """Principal angles between the column spaces of X (d × p) and Y (d × q), ascending, in radians.

    For row spaces of A pass ``A.T``. With orthonormal bases U, V (V of the smaller space), cosines are the singular
    values of UᵀV and sines those of V − U UᵀV (where no angle is below 45°, √(1 − cosine²)); each angle is the atan2 of
    its sine and cosine, because arccos alone loses half the digits of a small angle and arcsin of a large one.

    Args:
        X, Y: any rank; directions with singular values up to ``rtol`` times the largest are left out.
        rtol: default: what rounding to the matrix's dtype makes (:func:`lori_nb.analysis.reduced.real_rank`).

    Returns:
        min(rank X, rank Y) angles in [0, π/2], float64; none where either matrix is zero.

    Raises:
        ValueError: not two matrices with the same number of rows, or entries that are not finite.
    """
    if X.ndim != 2 or Y.ndim != 2 or X.shape[0] != Y.shape[0]:
        raise ValueError(
            f"X and Y must be matrices with the same number of rows; found {tuple(X.shape)} and {tuple(Y.shape)}"
        )
    return _angles(orthonormal(X, "X", rtol)[0], orthonormal(Y, "Y", rtol)[0])


def subspace_overlap(X: Tensor, Y: Tensor, rtol: float | None = None) -> float:
    """Mean squared cosine of the principal angles between two column spaces, in [0, 1].

    1: the smaller space lies in the larger; 0: orthogonal; NaN where either matrix is zero. Arguments and errors as in
    :func:`principal_angles`.
    """
    return _mean_squared_cosine(principal_angles(X, Y, rtol))


def overlap_table(adapters: Mapping[str, Mapping[str, Factors]], measures: Sequence[str] = MEASURES) -> pd.DataFrame:
    """Every pair of adapters, module by module: a tidy table, one measurement a row.

    Args:
        adapters: adapter name → module name → factors. A pair is compared on the modules that both have, at whatever
            rank and scale each has; it stands once, the adapter that comes first in the mapping as ``adapter_a``. A
            measure that is not symmetric stands in a second row too, with the two exchanged.
        measures: names of :data:`REGISTERED`; by default "cosine", "row_overlap" and "column_overlap", of ΔW, its row
            spaces and its column spaces.

    Returns:
        Columns ``adapter_a``, ``adapter_b``, ``module``, ``measure`` and ``value``. NaN where undefined (ΔW = 0).

    Raises:
        ValueError: fewer than two adapters, an unknown measure, or factors of one module that differ in shape or are
            not finite.
    """
    if len(adapters) < 2:
        raise ValueError(f"adapters must hold at least two adapters to compare; found {len(adapters)}")
    for name in measures:
        if name not in REGISTERED:
            raise ValueError(f"measures must be among {', '.join(REGISTERED)}; found {name!r}")
    rows = [row for module, a, b, pair in met(adapters) for row in _measured(a, b, module, pair, measures)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def met(adapters: Mapping[str, Mapping[str, Factors]]) -> Iterator[tuple[str, str, str, Pair]]:
    """(module, adapter a, adapter b, the two updates) of every pair in every module that both have, each update
    reduced once; ValueError as in :func:`overlap_table`.
    """
    for module in dict.fromkeys(name for modules in adapters.values() for name in modules):
        present = {a: reduced(m[module], f" of {a!r}, {module!r}") for a, m in adapters.items() if module in m}
        for a, b in itertools.combinations(present, 2):
            yield module, a, b, _checked(present[a], present[b], f"{module!r} in {a!r} and {b!r}")


def _measured(a: str, b: str, module: str, pair: Pair, measures: Sequence[str]) -> list[tuple]:
    rows = [(a, b, module, name, REGISTERED[name].value(pair)) for name in measures]
    turned = Pair(pair.g, pair.f)
    return rows + [(b, a, module, n, REGISTERED[n].value(turned)) for n in measures if not REGISTERED[n].symmetric]


def _checked(f: Reduced, g: Reduced, module: str = "the module") -> Pair:
    if f.shape != g.shape:
        raise ValueError(f"updates of {module} must have one shape d_out × d_in; found {f.shape} and {g.shape}")
    return Pair(f, g)


def _angles(U: Tensor, V: Tensor) -> Tensor:
    if V.shape[1] > U.shape[1]:
        U, V = V, U
    if V.shape[1] == 0:
        return U.new_zeros(0)
    inside = U.T @ V
    cosines = torch.linalg.svdvals(inside)
    if cosines[0].square() <= 0.5:  # no angle below 45°: the sines follow from the cosines without loss
        return torch.atan2((1 - cosines.square()).sqrt(), cosines)
    sines = torch.linalg.svdvals(V - U @ inside).flip(0)  # ascending: the largest cosine belongs to the smallest sine
    return torch.atan2(sines, cosines)


def _mean_squared_cosine(angles: Tensor) -> float:
    return float(angles.cos().square().mean())  # of no angle at all: NaN


@measure("cosine")
def _cosine(pair: Pair) -> float:
    if pair.f.norm == 0 or pair.g.norm == 0:
        return float("nan")
    return min(1.0, max(-1.0, pair.inner / pair.f.norm / pair.g.norm))


@measure("inner_product")
def _inner_product(pair: Pair) -> float:
    return pair.inner


@measure("cosine_size")
def _cosine_size(pair: Pair) -> float:
    """|cosine|: means over modules of the signed one cancel."""
    return abs(_cosine(pair))


@measure("row_overlap")
def _row_overlap(pair: Pair) -> float:
    return _mean_squared_cosine(pair.row_angles)


@measure("column_overlap")
def _column_overlap(pair: Pair) -> float:
    return _mean_squared_cosine(pair.column_angles)

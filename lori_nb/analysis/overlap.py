"""Overlap between adapters, from their factors alone.

Two updates ΔW = s·B A and ΔW' = s'·B' A' of one module can meet in three ways:

- as matrices: the Frobenius cosine ⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖), in [−1, 1];
- in what they read: the row spaces of A and A', subspaces of the module's input;
- in what they write: the column spaces of B and B', subspaces of the module's output.

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
from collections.abc import Callable, Mapping, Sequence
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
        """Principal angles of the row spaces of A, ascending, in radians."""
        return _angles(self.f.rows, self.g.rows)

    @cached_property
    def column_angles(self) -> Tensor:
        """Principal angles of the column spaces of B, ascending, in radians."""
        return _angles(self.f.columns, self.g.columns)


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
    """Frobenius cosine of two whole adapters, all modules' ΔW side by side; one that lacks a module is zero there.

    In [−1, 1]; NaN where either adapter is zero. ValueError as in :func:`frobenius_cosine`.
    """
    inner = sum(inner_product(f[module], g[module]) for module in f if module in g)
    squares = [sum(norm(each) ** 2 for each in modules.values()) for modules in (f, g)]
    return inner / math.sqrt(squares[0] * squares[1]) if all(squares) else float("nan")


def principal_angles(X: Tensor, Y: Tensor, rtol: float | None = None) -> Tensor:
    """Principal angles between the column spaces of X (d × p) and Y (d × q), ascending, in radians.

    For row spaces of A pass ``A.T``. With orthonormal bases U, V (V of the smaller space), cosines are the singular
    values of UᵀV and sines those of V − U UᵀV; each angle is the atan2 of its sine and cosine, because arccos alone
    loses half the digits of a small angle and arcsin of a large one.

    Args:
        X, Y: any rank; directions with singular values up to ``rtol`` times the largest are left out.
        rtol: default max(d, p)·ε of float64: the rank of the matrix as stored.

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
        measures: names of :data:`REGISTERED`; by default "cosine" (of ΔW), "row_overlap" (of A's row spaces) and
            "column_overlap" (of B's column spaces).

    Returns:
        Columns ``adapter_a``, ``adapter_b``, ``module``, ``measure`` and ``value``. NaN where undefined (zero B).

    Raises:
        ValueError: fewer than two adapters, an unknown measure, or factors of one module that differ in shape or are
            not finite.
    """
    if len(adapters) < 2:
        raise ValueError(f"adapters must hold at least two adapters to compare; found {len(adapters)}")
    for name in measures:
        if name not in REGISTERED:
            raise ValueError(f"measures must be among {', '.join(REGISTERED)}; found {name!r}")
    rows = []
    for module in dict.fromkeys(name for modules in adapters.values() for name in modules):
        present = {a: reduced(m[module], f" of {a!r}, {module!r}") for a, m in adapters.items() if module in m}
        for a, b in itertools.combinations(present, 2):
            rows += _measured(
                a, b, module, _checked(present[a], present[b], f"{module!r} in {a!r} and {b!r}"), measures
            )
    return pd.DataFrame(rows, columns=list(COLUMNS))


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
    sines = torch.linalg.svdvals(V - U @ inside).flip(0)  # ascending: the largest cosine belongs to the smallest sine
    return torch.atan2(sines, cosines)


def _mean_squared_cosine(angles: Tensor) -> float:
    return float(angles.cos().square().mean())  # of no angle at all: NaN


@measure("cosine")
def _cosine(pair: Pair) -> float:
    if pair.f.norm == 0 or pair.g.norm == 0:
        return float("nan")
    return min(1.0, max(-1.0, pair.inner / pair.f.norm / pair.g.norm))


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

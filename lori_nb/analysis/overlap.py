"""Overlap between adapters, from their factors alone.

Two updates ΔW = s·B A and ΔW' = s'·B' A' of one module can meet in three ways:

- as matrices: the Frobenius cosine ⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖), in [−1, 1];
- in what they read: the row spaces of A and A', subspaces of the module's input;
- in what they write: the column spaces of B and B', subspaces of the module's output.

No dense ΔW is formed: with U_b, U_a orthonormal bases of the two spaces, ΔW = U_b K U_aᵀ with a core K of at most
r × r, so norms and inner products are those of cores. All in float64, on the device of the factors.

How to read the numbers: where adapters share one draw of a frozen A, row overlap is 1 by construction, and independent
draws make it small by chance alone (r / d_in is expected of two random r-dimensional subspaces). Compare with
adapters drawn under the same policy, not with 0. Nor does a zero inner product mean that tasks leave each other's
activations alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from lori_nb.method.adapters import Factors

MEASURES = ("cosine", "row_overlap", "column_overlap")
COLUMNS = ("adapter_a", "adapter_b", "module", "measure", "value")


def inner_product(f: Factors, g: Factors) -> float:
    """⟨ΔW_f, ΔW_g⟩ = tr(ΔW_fᵀ ΔW_g). ValueError when the two are not of one shape or not finite."""
    return _inner(*_reduced_pair(f, g))


def norm(f: Factors) -> float:
    """Frobenius norm ‖ΔW‖ = ‖K‖, with K the core. ValueError when a factor is not finite."""
    return _reduce(f).norm


def frobenius_cosine(f: Factors, g: Factors) -> float:
    """⟨ΔW_f, ΔW_g⟩ / (‖ΔW_f‖ ‖ΔW_g‖) in [−1, 1]; NaN where either update is zero, since it has no direction.

    ValueError when the two are not of one shape or not finite.
    """
    return _cosine(*_reduced_pair(f, g))


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
    return _angles(_basis(X, "X", rtol)[0], _basis(Y, "Y", rtol)[0])


def subspace_overlap(X: Tensor, Y: Tensor, rtol: float | None = None) -> float:
    """Mean squared cosine of the principal angles between two column spaces, in [0, 1].

    1: the smaller space lies in the larger; 0: orthogonal; NaN where either matrix is zero. Arguments and errors as in
    :func:`principal_angles`.
    """
    return _mean_squared_cosine(principal_angles(X, Y, rtol))


def overlap_table(adapters: Mapping[str, Mapping[str, Factors]]) -> pd.DataFrame:
    """Every pair of adapters, module by module: a tidy table, one measurement a row.

    Args:
        adapters: adapter name → module name → factors. A pair is compared on the modules that both have; it stands
            once, the adapter that comes first in the mapping as ``adapter_a``.

    Returns:
        Columns ``adapter_a``, ``adapter_b``, ``module``, ``measure`` and ``value``; measures "cosine" (of ΔW),
        "row_overlap" (of A's row spaces) and "column_overlap" (of B's column spaces). NaN where undefined (zero B).

    Raises:
        ValueError: fewer than two adapters, or factors of one module that differ in shape or are not finite.
    """
    if len(adapters) < 2:
        raise ValueError(f"adapters must hold at least two adapters to compare; found {len(adapters)}")
    reduced = {
        adapter: {module: _reduce(factors, f" of {adapter!r}, {module!r}") for module, factors in modules.items()}
        for adapter, modules in adapters.items()
    }
    rows = [
        (a, b, module, measure, value)
        for a, b in itertools.combinations(adapters, 2)
        for module in adapters[a]
        if module in adapters[b]
        for measure, value in zip(MEASURES, _measures(reduced[a][module], reduced[b][module], module), strict=True)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


@dataclass(frozen=True)
class _Reduced:
    """ΔW = columns · core · rowsᵀ with orthonormal ``columns`` (d_out × p) and ``rows`` (d_in × q), core (p × q)."""

    columns: Tensor
    core: Tensor
    rows: Tensor

    @property
    def norm(self) -> float:
        return float(torch.linalg.matrix_norm(self.core)) if self.core.numel() else 0.0


def _reduce(f: Factors, where: str = "") -> _Reduced:
    columns, from_b = _basis(f.B, f"B{where}")
    rows, from_a = _basis(f.A.T, f"A{where}")
    return _Reduced(columns, f.scale * from_b @ from_a.T, rows)


def _reduced_pair(f: Factors, g: Factors) -> tuple[_Reduced, _Reduced]:
    pair = _reduce(f), _reduce(g)
    _check_same_shape(*pair)
    return pair


def _check_same_shape(f: _Reduced, g: _Reduced, module: str = "the module") -> None:
    shapes = [(len(reduced.columns), len(reduced.rows)) for reduced in (f, g)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"updates of {module} must have one shape d_out × d_in; found {shapes[0]} and {shapes[1]}")


def _basis(X: Tensor, name: str, rtol: float | None = None) -> tuple[Tensor, Tensor]:
    """X (d × p) = U·rest: U (d × rank) orthonormal, rest (rank × p), rank counted numerically."""
    if not torch.isfinite(X).all():
        raise ValueError(f"{name} must be finite; found NaN or infinity")
    U, singular, Vh = torch.linalg.svd(X.detach().to(torch.float64), full_matrices=False)
    rtol = max(X.shape) * torch.finfo(torch.float64).eps if rtol is None else rtol
    floor = rtol * singular[:1].sum()  # the sum of one or no value: a matrix without columns has rank 0
    rank = int((singular > floor).sum())
    return U[:, :rank], singular[:rank, None] * Vh[:rank]


def _inner(f: _Reduced, g: _Reduced) -> float:
    crossed = (f.columns.T @ g.columns) @ g.core @ (g.rows.T @ f.rows)
    return float((f.core * crossed).sum())


def _cosine(f: _Reduced, g: _Reduced) -> float:
    if f.norm == 0 or g.norm == 0:
        return float("nan")
    return min(1.0, max(-1.0, _inner(f, g) / f.norm / g.norm))


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


def _measures(f: _Reduced, g: _Reduced, module: str) -> tuple[float, float, float]:
    _check_same_shape(f, g, repr(module))
    row, column = _angles(f.rows, g.rows), _angles(f.columns, g.columns)
    return _cosine(f, g), _mean_squared_cosine(row), _mean_squared_cosine(column)

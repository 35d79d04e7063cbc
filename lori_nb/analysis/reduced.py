"""Updates in orthonormal bases: ΔW = s·B A = U_b K U_aᵀ, so that everything about ΔW is about a small core K.

With B = U_b R_b and Aᵀ = U_a R_a at their numerical ranks, K = s·R_b R_aᵀ is at most r × r. Norms, inner products,
singular values and angles of updates are those of cores; no dense d_out × d_in matrix is formed. All in float64, on the
device of the factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lori_nb.method.adapters import Factors


@dataclass(frozen=True)
class Reduced:
    """ΔW = columns · core · rowsᵀ with orthonormal ``columns`` (d_out × p) and ``rows`` (d_in × q), core (p × q).

    ``factors`` are those that it was made of.
    """

    columns: Tensor
    core: Tensor
    rows: Tensor
    factors: Factors

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖ in the Frobenius norm, ‖K‖."""
        return float(torch.linalg.matrix_norm(self.core)) if self.core.numel() else 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of ΔW."""
        return len(self.columns), len(self.rows)

    @cached_property
    def singular(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (d_out × ρ), Σ (ρ) descending and V (d_in × ρ) of ΔW = U Σ Vᵀ at its numerical rank ρ."""
        U, values, Vh = torch.linalg.svd(self.core, full_matrices=False)
        rank = numerical_rank(values, max(self.core.shape))
        return self.columns @ U[:, :rank], values[:rank], self.rows @ Vh[:rank].T

    def dense(self) -> Tensor:
        """ΔW itself (d_out × d_in), float64, made anew at each call: for what is elementwise."""
        return self.factors.scale * self.factors.B.double() @ self.factors.A.double()


def reduced(f: Factors, where: str = "") -> Reduced:
    """A module's update in orthonormal bases; ValueError when a factor is not finite, ``where`` names it."""
    columns, from_b = orthonormal(f.B, f"B{where}")
    rows, from_a = orthonormal(f.A.T, f"A{where}")
    return Reduced(columns, f.scale * from_b @ from_a.T, rows, f)


def orthonormal(X: Tensor, name: str = "X", rtol: float | None = None) -> tuple[Tensor, Tensor]:
    """X (d × p) = U·rest: U (d × rank) orthonormal, rest (rank × p), in float64, rank counted numerically.

    Directions with singular values up to ``rtol`` times the largest are left out; None takes what rounding to the dtype
    of X makes: max(d, p)·ε in float64, √max(d, p)·ε in less, whose entries were rounded apart. Raises ValueError when
    an entry is not finite.
    """
    if not torch.isfinite(X).all():
        raise ValueError(f"{name} must be finite; found NaN or infinity")
    Q, triangle = torch.linalg.qr(X.detach().to(torch.float64))  # then the decomposition is of p × p, many times faster
    U, singular, Vh = torch.linalg.svd(triangle, full_matrices=False)
    if rtol is None and X.dtype != torch.float64:
        rtol = max(X.shape) ** 0.5 * torch.finfo(X.dtype).eps
    rank = numerical_rank(singular, max(X.shape), rtol)
    return Q @ U[:, :rank], singular[:rank, None] * Vh[:rank]


def numerical_rank(singular: Tensor, size: int, rtol: float | None = None) -> int:
    """How many singular values (descending) are above ``rtol`` times the largest; None is size·ε of float64."""
    rtol = size * torch.finfo(torch.float64).eps if rtol is None else rtol
    floor = rtol * singular[:1].sum()  # the sum of one or no value: a matrix without columns has rank 0
    return int((singular > floor).sum())

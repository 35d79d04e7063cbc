"""Updates in orthonormal bases: ΔW = s·B A = U_b K U_aᵀ, so that everything about ΔW is about a small core K.

With B = U_b R_b and Aᵀ = U_a R_a at their numerical ranks, K = s·R_b R_aᵀ is at most r × r. Norms, inner products,
singular values and angles of updates are those of cores; no dense d_out × d_in matrix is formed. All in float64, on the
device of the factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lori_nb.method.adapters import Factors

LARGEST = 0.2  # share of entries that count as large, TIES' density


@dataclass(frozen=True)
class Masked(Factors):
    """Factors of which other entries count as B's support than those that are not zero: ``support`` (bool, d_out ×
    any), of a random update that stands for one under a mask.
    """

    support: Tensor


@dataclass(frozen=True)
class Reduced:
    """ΔW = columns · core · rowsᵀ with orthonormal ``columns`` (d_out × p) and ``rows`` (d_in × q), core (p × q).

    The first ``written`` columns and ``read`` rows are more than rounding of B and A to their dtypes makes
    (:func:`real_rank`): what is about subspaces takes these, norms and inner products take all. ``factors`` are those
    that it was made of.
    """

    columns: Tensor
    core: Tensor
    rows: Tensor
    factors: Factors
    written: int
    read: int

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
        U, values, V = self._of_core
        return self.columns[:, : self.written] @ U, values, self.rows[:, : self.read] @ V

    @cached_property
    def spaces(self) -> tuple[Tensor, Tensor]:
        """Orthonormal bases of what ΔW writes to (d_out × ρ) and of what it reads (d_in × ρ), at its numerical rank ρ.

        Those of B's columns and A's rows where both have full rank; of a B with an empty column, or an A with a
        repeated row, what is left of them in ΔW.
        """
        U, _, V = self._of_core
        columns, rows = self.columns[:, : self.written], self.rows[:, : self.read]
        # a square U turns a basis within its space: nothing as wide as the module need be formed for that
        return columns if len(U) == U.shape[1] else columns @ U, rows if len(V) == V.shape[1] else rows @ V

    @cached_property
    def _of_core(self) -> tuple[Tensor, Tensor, Tensor]:
        core = self.core[: self.written, : self.read]
        U, values, Vh = torch.linalg.svd(core, full_matrices=False)
        rank = numerical_rank(values, max(core.shape))
        return U[:, :rank], values[:rank], Vh[:rank].T

    @property
    def support(self) -> Tensor:
        """Which entries of B are not zero (bool, d_out × r), or count as such."""
        return self.factors.support if isinstance(self.factors, Masked) else self.factors.B != 0

    @cached_property
    def signs(self) -> Tensor:
        """−1, 0 or 1 for every entry of ΔW (d_out × d_in), int8."""
        return self.dense().sign().to(torch.int8)

    @cached_property
    def largest(self) -> Tensor:
        """Whether each entry of ΔW, flattened, is among the share :data:`LARGEST` of largest magnitude, zeros never; of
        equal ones any are taken.
        """
        magnitudes = self.dense().flatten().abs().cpu().numpy()
        keep = min(max(1, round(LARGEST * magnitudes.size)), np.count_nonzero(magnitudes))
        large = np.zeros(magnitudes.size, dtype=bool)
        large[np.argpartition(magnitudes, -keep)[-keep:]] = True
        return torch.from_numpy(large)

    def dense(self) -> Tensor:
        """ΔW itself (d_out × d_in), float64, made anew at each call: for what is elementwise."""
        return self.factors.scale * self.factors.B.double() @ self.factors.A.double()


def reduced(f: Factors, where: str = "") -> Reduced:
    """A module's update in orthonormal bases; ValueError when a factor is not finite, ``where`` names it."""
    columns, from_b, written = _decomposed(f.B, f"B{where}")
    rows, from_a, read = _decomposed(f.A.T, f"A{where}")
    return Reduced(columns, f.scale * from_b @ from_a.T, rows, f, written, read)


def orthonormal(X: Tensor, name: str = "X", rtol: float | None = None) -> tuple[Tensor, Tensor]:
    """X (d × p) = U·rest: U (d × rank) orthonormal, rest (rank × p), in float64, rank counted numerically.

    Directions with singular values up to ``rtol`` times the largest are left out; None takes :func:`real_rank`. Raises
    ValueError when an entry is not finite.
    """
    U, rest, rank = _decomposed(X, name)
    if rtol is not None:
        rank = numerical_rank(torch.linalg.vector_norm(rest, dim=1), max(X.shape), rtol)
    return U[:, :rank], rest[:rank]


def _decomposed(X: Tensor, name: str) -> tuple[Tensor, Tensor, int]:
    """X = U·rest at its rank in float64, largest directions first, and how many of them are real."""
    if not torch.isfinite(X).all():
        raise ValueError(f"{name} must be finite; found NaN or infinity")
    Q, triangle = torch.linalg.qr(X.detach().to(torch.float64))  # then the decomposition is of p × p, many times faster
    U, singular, Vh = torch.linalg.svd(triangle, full_matrices=False)
    rank = numerical_rank(singular, max(X.shape))
    basis = (U[:, :rank].T @ Q.T).T  # as Q @ U, ten times faster on a CPU: LAPACK's Q lies column by column
    return basis, singular[:rank, None] * Vh[:rank], min(rank, real_rank(singular, X.dtype))


def real_rank(singular: Tensor, dtype: torch.dtype) -> int:
    """How many singular values of a matrix are more than rounding its entries to ``dtype`` can make.

    Rounding moves each entry by at most ε/2 of itself, so the matrix by at most ε/2 ‖X‖ in the Frobenius norm, and no
    singular value by more than that (Weyl).
    """
    return int((singular > torch.finfo(dtype).eps / 2 * torch.linalg.vector_norm(singular)).sum())


def numerical_rank(singular: Tensor, size: int, rtol: float | None = None) -> int:
    """How many singular values (descending) are above ``rtol`` times the largest; None is size·ε of float64."""
    rtol = size * torch.finfo(torch.float64).eps if rtol is None else rtol
    floor = rtol * singular[:1].sum()  # the sum of one or no value: a matrix without columns has rank 0
    return int((singular > floor).sum())

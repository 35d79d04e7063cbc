"""Merges that act on singular vectors, from factors alone.

All updates of a module live in the column space of [B_1 … B_N] and the row space of the stacked A_i. With orthonormal
bases U (d_out × p) and V (d_in × q) of these, ΔW_i = U K_i Vᵀ with a core K_i of at most Σ r × Σ r, and every product,
singular value decomposition and polar factor of the updates is one of cores. What the papers' code computes on dense
d_out × d_in matrices is computed here on cores, exactly, and restricted to the numerical rank: on low-rank updates the
dense forms bring null directions in, which hold nothing but rounding. What is rounding, the dtype says that factors
come in: those of an adapter that was stored in bfloat16 must come as bfloat16, and the result is float32.

- **svd**: Σ w_i ΔW_i by truncation to any rank, by default that of the largest adapter.
- **tsv-m**: task singular vectors made orthogonal across tasks (arXiv 2412.00081).
- **iso-c**, **iso-cts**: one singular value for all common, and task-specific, directions (arXiv 2502.04959).
- **knots-ties**: TIES on the tasks' right factors of one common decomposition (arXiv 2410.19735).
- **core-ties**: TIES on the cores themselves, Core Space merging (arXiv 2509.17786).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lori_nb.analysis.merging import compress, concatenate, merge_method, widened
from lori_nb.analysis.reduced import numerical_rank, orthonormal, reduced
from lori_nb.method.adapters import Factors

RECIPE = 2  # raise when a merge on cores gives another result; counts for those alone
DENSITY = 0.2  # share of entries that TIES, and DARE, keep of each task; the TIES paper's choice


@dataclass(frozen=True)
class Cores:
    """ΔW_i = columns · lefts[i] · diag(values[i]) · rights[i]ᵀ · rowsᵀ, in float64: orthonormal ``columns`` (d_out × p)
    and ``rows`` (d_in × q), and between them each update's own decomposition at its own rank ρ_i: ``lefts`` (p × ρ_i),
    ``values`` (ρ_i) and ``rights`` (q × ρ_i). ``turns`` (p × q) is how much of ‖K_i‖ rounding can put into an entry of
    a core by turning its column and its row; ``like`` says what dtypes the result has.
    """

    columns: Tensor
    lefts: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    rights: tuple[Tensor, ...]
    rows: Tensor
    turns: Tensor
    like: Factors

    @cached_property
    def cores(self) -> Tensor:
        """K_i = lefts[i] · diag(values[i]) · rights[i]ᵀ (N × p × q)."""
        return torch.stack([u * s @ v.T for u, s, v in zip(self.lefts, self.values, self.rights, strict=True)])

    def factors(self, left: Tensor, right: Tensor) -> Factors:
        """columns · left · right · rowsᵀ as factors, left (p × k) and right (k × q)."""
        return self.whole(self.columns @ left, right @ self.rows.T)

    def whole(self, B: Tensor, A: Tensor) -> Factors:
        """B A as factors in the dtypes of the adapters, float32 where theirs are narrower; scale 1."""
        as_wide = widened(self.like)
        return Factors(A.to(as_wide.A.dtype), B.to(as_wide.B.dtype), 1.0)


def cores_of(factors: Sequence[Factors]) -> Cores:
    """The updates of one module in common bases, at the ranks that are more than rounding to the factors' dtypes."""
    columns, from_B = _span([f.B for f in factors], "B")
    rows, from_A = _span([f.A.T for f in factors], "A")
    parts = [reduced(f).singular for f in factors]
    lefts, values, rights = zip(*((columns.T @ U, s, rows.T @ V) for U, s, V in parts), strict=True)
    return Cores(columns, lefts, values, rights, rows, from_B[:, None] + from_A, factors[0])


def _span(parts: Sequence[Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Left singular vectors (d × k) of N matrices side by side, of the space that is more than rounding made, and how
    far rounding may :func:`turn <_turns>` each (k).

    Rounding to its dtype moves a matrix by at most ε/2 of its Frobenius norm. With every norm at 1, so that a small
    adapter is not rounding to a large one, no singular value of them all moves by more than √Σ (ε_i/2)² (Weyl).
    """
    wide = [X.detach().double() for X in parts]
    sizes = [float(torch.linalg.matrix_norm(X)) for X in wide]
    basis, rest = orthonormal(torch.cat([X / (size or 1.0) for X, size in zip(wide, sizes, strict=True)], 1), name)
    floor = math.sqrt(sum((torch.finfo(X.dtype).eps / 2) ** 2 for X in parts))
    basis = basis[:, torch.linalg.vector_norm(rest, dim=1) > floor]
    # Within that space the vectors are those of the matrices as they are: core-ties depends on them.
    beside = torch.cat(wide, dim=1)
    U, singular, _ = torch.linalg.svd(basis.T @ beside, full_matrices=False)
    return basis @ U, _turns(singular, max(beside.shape))


def _turns(singular: Tensor, size: int) -> Tensor:
    """How far (in radians) rounding in float64 may turn each singular vector (k) of a matrix with these values.

    A decomposition is that of a matrix which is size · ε · σ_1 away at most, and this turns a vector by no more than
    that over the distance from its singular value to the nearest other one, or to zero (Wedin). At most √ε: where
    values are equal up to rounding, their vectors are any, and no entry is known to be zero.
    """
    distance = (singular[:, None] - singular).abs().fill_diagonal_(math.inf)
    gap = torch.minimum(distance.amin(dim=1), singular) if len(singular) else singular
    eps = torch.finfo(torch.float64).eps
    return (size * eps * singular[:1].sum() / gap).clamp(max=math.sqrt(eps))


def _known(entries: Tensor, turns: Tensor, cores: Tensor) -> Tensor:
    """Entries (N × …) that N cores have in some bases, with zeros for those that may come of turned bases alone: up to
    ``turns`` of the norm of their core. Zeros have no vote, but entries of 1e-17 do.
    """
    norms = torch.linalg.matrix_norm(cores)[:, None, None] if cores[0].numel() else cores.new_zeros(len(cores), 1, 1)
    return torch.where(entries.abs() > turns * norms, entries, 0.0)


def _svd(K: Tensor, of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U, Σ, Vᵀ of a core at its numerical rank; of one that was computed from another, at the rounding of that one."""
    U, singular, Vh = torch.linalg.svd(K, full_matrices=False)
    rank = numerical_rank(singular, max(K.shape))
    if of is not None:  # what nothing is left of is zero
        rank = min(rank, int((singular > max(K.shape) * torch.finfo(K.dtype).eps * torch.linalg.norm(of)).sum()))
    return U[:, :rank], singular[:rank], Vh[:rank]


def _polar(X: Tensor) -> Tensor:
    """The matrix with orthonormal columns nearest to X (p × k), at its numerical rank: P Qᵀ of X = P D Qᵀ."""
    P, _, Qh = _svd(X)
    return P @ Qh


def _weighted(cores: Tensor, weights: Sequence[float]) -> Tensor:
    return torch.einsum("i,ipq->pq", torch.tensor(weights, dtype=cores.dtype, device=cores.device), cores)


@merge_method("svd")
def truncated(factors: Sequence[Factors], weights: Sequence[float], rank: int | None = None) -> Factors:
    """Σ_i w_i ΔW_i cut to a rank, by default the largest of any adapter: PEFT's "svd", without a dense matrix."""
    whole = concatenate(factors, weights)
    return compress(whole, min(rank or max(len(f.A) for f in factors), *whole.A.shape, len(whole.B)))


@merge_method("tsv-m", as_stored=True)
def task_singular_vectors(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """TSV-M: with ΔW_i = U_i Σ_i V_iᵀ, the sum Û diag(w_i Σ_i) V̂ᵀ, where Û and V̂ are the orthonormal matrices nearest
    to [U_1 … U_N] and [V_1 … V_N].

    Every task keeps all directions of its numerical rank, where the paper cuts full-rank updates to a share each.
    """
    common = cores_of(factors)
    U, V = torch.cat(common.lefts, dim=1), torch.cat(common.rights, dim=1)
    values = torch.cat([weight * singular for weight, singular in zip(weights, common.values, strict=True)])
    return common.factors(_polar(U) * values, _polar(V).T)


@merge_method("iso-c", as_stored=True)
def isotropic(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Iso-C: Σ_i w_i ΔW_i = U Σ Vᵀ with every singular value replaced by their mean, over the numerical rank."""
    common = cores_of(factors)
    U, singular, Vh = _svd(_weighted(common.cores, weights))
    return common.factors(U * singular.mean() if len(singular) else U, Vh)


@merge_method("iso-cts", as_stored=True)
def isotropic_with_task_directions(
    factors: Sequence[Factors], weights: Sequence[float], common_share: float = 0.8
) -> Factors:
    """Iso-CTS: the leading ``common_share`` of the common directions, the rest from what the tasks add outside of them.

    With U Σ Vᵀ the sum at rank R, every task gets t = max(1, [(R − ⌊share · R⌋) / N]) directions of its own, rounded to
    the nearest number (halves to even), and the k = max(0, R − N t) leading common ones stay. Of each
    w_i (ΔW_i − U_k U_kᵀ ΔW_i) the leading t directions join them, all are made orthonormal, and every singular value is
    the mean.

    The authors' code rounds so too, and gives the common part what does not divide, but lets t be 0, which at small
    ranks leaves the common directions alone.
    """
    common = cores_of(factors)
    U, singular, Vh = _svd(_weighted(common.cores, weights))
    own_rank = max(1, round((len(singular) - int(common_share * len(singular))) / len(factors)))
    keep = max(0, len(singular) - own_rank * len(factors))
    left, right, values = [U[:, :keep]], [Vh[:keep].T], [singular[:keep]]
    for weight, core in zip(weights, common.cores, strict=True):
        own = weight * core
        u, s, vh = _svd(own - U[:, :keep] @ (U[:, :keep].T @ own), of=own)
        left.append(u[:, :own_rank])
        right.append(vh[:own_rank].T)
        values.append(s[:own_rank])
    mean = torch.cat(values).mean() if sum(map(len, values)) else 0.0
    return common.factors(_polar(torch.cat(left, dim=1)) * mean, _polar(torch.cat(right, dim=1)).T)


@merge_method("knots-ties", as_stored=True)
def knots(factors: Sequence[Factors], weights: Sequence[float], density: float = DENSITY) -> Factors:
    """KnOTS with TIES: [ΔW_1 … ΔW_N] = U Σ [V_1ᵀ … V_Nᵀ] side by side, then U · TIES({Σ V_iᵀ}).

    The right factors (k × d_in) are merged entry by entry in the coordinates of the module's input. Of adapters that
    write to different rows each has directions of its own, and the merge at density 1 is the weighted sum.
    """
    common = cores_of(factors)
    beside = torch.cat(list(common.cores), dim=1)
    U, singular, _ = _svd(beside)
    right = U.T @ common.cores @ common.rows.T  # Σ V_iᵀ (N × k × d_in)
    turns = _turns(singular, max(len(beside), len(factors) * len(common.rows)))
    merged = ties(_known(right, turns[:, None], common.cores), weights, density)  # (k × d_in)
    return common.whole(common.columns @ U, merged)


@merge_method("core-ties", as_stored=True)
def core_space(factors: Sequence[Factors], weights: Sequence[float], density: float = DENSITY) -> Factors:
    """Core Space merging with TIES: the cores are merged entry by entry and put back between the common bases.

    Which entries a core has depends on its bases: the singular vectors of the stacked factors, as in the paper.
    """
    common = cores_of(factors)
    merged = ties(_known(common.cores, common.turns, common.cores), weights, density)
    return common.factors(merged, torch.eye(merged.shape[1], dtype=merged.dtype, device=merged.device))


def ties(updates: Tensor, weights: Sequence[float], density: float = DENSITY) -> Tensor:
    """TIES (arXiv 2306.01708) of N tensors (N × …): trim, elect signs, average those that agree.

    Of each the ⌈density · n⌉ entries of largest magnitude stay; the sign of an entry is that of Σ_i w_i v_i; the result
    is the mean of the w_i v_i that have it, over the tasks that do. The paper trims over the whole model at once and
    has one weight for all; here a module is trimmed by itself, and weights have their vote.

    Raises ValueError unless 0 < density ≤ 1.
    """
    return elected(largest(updates, density), weights)


def largest(updates: Tensor, density: float) -> Tensor:
    """N tensors (N × …) with all but the ⌈density · n⌉ entries of largest magnitude of each set to zero.

    Raises ValueError unless 0 < density ≤ 1.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1]; found {density}")
    flat = updates.flatten(1)
    keep = max(1, -int(-density * flat.shape[1] // 1)) if flat.shape[1] else 0
    places = flat.abs().topk(keep, dim=1).indices
    return torch.zeros_like(flat).scatter(1, places, flat.gather(1, places)).view_as(updates)


def elected(updates: Tensor, weights: Sequence[float]) -> Tensor:
    """The mean of those w_i v_i, entry by entry, whose sign is that of Σ_i w_i v_i; zeros have no vote and no share."""
    weighted = updates * torch.tensor(weights, dtype=updates.dtype, device=updates.device).view(
        -1, *[1] * (updates.ndim - 1)
    )
    agree = (weighted.sign() == weighted.sum(0).sign()) & (weighted != 0)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)

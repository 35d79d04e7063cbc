"""Further measures of how two updates of one module meet, from factors alone; registered beside those of ``overlap``.

With ΔW = U Σ Vᵀ at its numerical rank, and θ the principal angles between two subspaces:

======================== ==================================================================== ===================
measure                  definition                                                            range
======================== ==================================================================== ===================
row_grassmann, column_…  √Σθ² between the row, the column spaces (radians)                     [0, √r·π/2]
row_chordal, column_…    √Σ sin²θ                                                              [0, √r]
alignment                ‖U_k U_kᵀ ΔW_f‖ / ‖ΔW_f‖, U_k the directions that hold 95 % of ‖ΔW_g‖ [0, 1]
singular_interference    Σ|(UᵀU − I) Σ (VᵀV − I)|, U = [U_f U_g], V = [V_f V_g]                ≥ 0
sign_conflict            share of entries that are not zero in both and differ in sign         [0, 1]
magnitude_overlap        share of the 20 % largest entries of one that are among the other's   [0, 1]
mask_overlap             share of the smaller support of B that lies in the other's            [0, 1]
======================== ==================================================================== ===================

``alignment`` is the subspace alignment ratio of Iso-C (arXiv 2502.04959) and not symmetric: f seen from g.
``singular_interference`` is that of task singular vectors (arXiv 2412.00081), with the entrywise 1-norm; unlike the
others, but for ⟨ΔW_f, ΔW_g⟩ itself (``inner_product``), it grows with the size of the updates. The sign and magnitude
measures need the dense ΔW, one module at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lori_nb.analysis.overlap import Pair, measure
from lori_nb.analysis.reduced import Reduced

ALL = (
    "inner_product",
    "cosine",
    "cosine_size",
    "row_overlap",
    "column_overlap",
    "row_grassmann",
    "column_grassmann",
    "row_chordal",
    "column_chordal",
)
ALL += ("alignment", "singular_interference", "sign_conflict", "magnitude_overlap", "mask_overlap")
ELEMENTWISE = ("sign_conflict", "magnitude_overlap")  # these need the dense ΔW
NORM_SHARE = 0.95  # of ‖ΔW_g‖, held by the directions that an alignment is measured against: its authors' code
UNDEFINED = float("nan")


def _distance(angles: Tensor) -> float:
    return float(angles.norm()) if len(angles) else UNDEFINED


@measure("row_grassmann")
def row_grassmann(pair: Pair) -> float:
    """Geodesic distance √Σθ² of the row spaces, in radians; of ranks that differ, over the smaller number."""
    return _distance(pair.row_angles)


@measure("column_grassmann")
def column_grassmann(pair: Pair) -> float:
    """Geodesic distance √Σθ² of the column spaces, in radians."""
    return _distance(pair.column_angles)


@measure("row_chordal")
def row_chordal(pair: Pair) -> float:
    """Chordal distance √Σ sin²θ of the row spaces."""
    return _distance(pair.row_angles.sin())


@measure("column_chordal")
def column_chordal(pair: Pair) -> float:
    """Chordal distance √Σ sin²θ of the column spaces."""
    return _distance(pair.column_angles.sin())


@measure("alignment", symmetric=False)
def alignment(pair: Pair) -> float:
    """‖U_k U_kᵀ ΔW_f‖ / ‖ΔW_f‖ with the fewest left singular vectors U_k of ΔW_g that hold 95 % of its norm."""
    if pair.f.norm == 0 or pair.g.norm == 0:
        return UNDEFINED
    U, singular, _ = pair.g.singular
    held = singular.square().cumsum(0).sqrt() / singular.norm()
    k = int((held < NORM_SHARE).sum()) + 1
    inside = U[:, :k].T @ pair.f.columns @ pair.f.core
    return float(torch.linalg.matrix_norm(inside)) / pair.f.norm


@measure("singular_interference")
def singular_interference(pair: Pair) -> float:
    """Σ|(UᵀU − I) Σ (VᵀV − I)| of both updates' singular vectors side by side; 0 where they are all orthogonal."""
    (U_f, s_f, V_f), (U_g, s_g, V_g) = pair.f.singular, pair.g.singular
    U, V, singular = torch.cat([U_f, U_g], 1), torch.cat([V_f, V_g], 1), torch.cat([s_f, s_g])
    if not len(singular):
        return UNDEFINED
    unit = torch.eye(len(singular), dtype=U.dtype, device=U.device)
    return float(((U.T @ U - unit) * singular @ (V.T @ V - unit)).abs().sum())


@measure("sign_conflict")
def sign_conflict(pair: Pair) -> float:
    """Share of the entries (of ΔW) that are not zero in both updates whose signs differ; noise gives 0.5."""
    products = pair.f.signs * pair.g.signs
    both = int(products.count_nonzero())
    return int((products < 0).sum()) / both if both else UNDEFINED


@measure("magnitude_overlap")
def magnitude_overlap(pair: Pair) -> float:
    """Share of the 20 % largest entries of one update that are among the 20 % largest of the other."""
    if pair.f.norm == 0 or pair.g.norm == 0:
        return UNDEFINED
    f, g = pair.f.largest, pair.g.largest
    return int((f & g).sum()) / min(int(f.sum()), int(g.sum()))


@measure("mask_overlap")
def mask_overlap(pair: Pair) -> float:
    """|S_f ∩ S_g| / min(|S_f|, |S_g|) of the supports S (entries that are not zero) of two B of one shape.

    Of independent masks the larger density max(|S|) / n is expected. NaN where shapes differ or a B is zero.
    """
    f, g = pair.f.support, pair.g.support
    smaller = min(int(f.sum()), int(g.sum()))
    return int((f & g).sum()) / smaller if f.shape == g.shape and smaller else UNDEFINED


def similarity_curve(f: Reduced, g: Reduced, side: str = "rows") -> Tensor:
    """φ(i, j) = ‖U_iᵀ V_j‖² / min(i, j) for all i and j: how far the i leading directions of one update lie in the j
    leading ones of the other.

    U and V hold the right ("rows") or left ("columns") singular vectors of ΔW_f and ΔW_g, largest first; U_i is the
    first i of them. 0 for orthogonal and 1 for nested subspaces. The LoRA paper's subspace similarity (arXiv
    2106.09685, section 7.2), which it takes of the singular vectors of A; here they are those of the whole update.

    Returns:
        (ρ_f × ρ_g), φ(i, j) at [i − 1, j − 1].

    Raises:
        ValueError: an unknown side, or updates whose shapes differ.
    """
    if side not in ("rows", "columns"):
        raise ValueError(f"side must be rows or columns; found {side!r}")
    if f.shape != g.shape:
        raise ValueError(f"updates must have one shape d_out × d_in; found {f.shape} and {g.shape}")
    place = {"columns": 0, "rows": 2}[side]
    squares = (f.singular[place].T @ g.singular[place]).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, dtype=squares.dtype, device=squares.device) for n in squares.shape)
    return squares / torch.minimum(i[:, None], j[None, :])

"""Merges that act on the entries of ΔW, which no factors hold: dense matrices, one module at a time.

- **magnitude**: of each update its largest entries, then the weighted sum.
- **ties**: TIES, the largest entries, signs elected, those that agree averaged (arXiv 2306.01708).
- **dare**: each entry dropped at random, the rest made larger in proportion, then the weighted sum (arXiv 2311.03099).
- **dare-ties**: the same with TIES' election in place of the sum.

The result has full rank; its factors are the dense matrix beside an identity. ``merge(..., rank=)`` cuts each module by
truncated SVD as soon as it is made. Pruning A and B apart, as PEFT does, is another thing: it breaks a frozen A.

An entry's update is what the model adds, so the same entry of two adapters means the same. Options stand in
``merge(..., options={"density": 0.5, "seed": 7})``, or in an own method::

    @merge_method("dare-half")
    def dare_half(factors, weights, module):
        return dare(factors, weights, density=0.5, seed=7, module=module)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lori_nb.analysis.merging import merge_method
from lori_nb.analysis.spectral_merging import DENSITY, elected, largest, ties
from lori_nb.method.adapters import Factors

FULL_RANK = ("magnitude", "ties", "dare", "dare-ties")
RECIPE = 2  # raise when what DARE keeps is drawn otherwise; 1 drew by the bits of the first A, 2 draws by the module


@merge_method("magnitude")
def magnitude(factors: Sequence[Factors], weights: Sequence[float], density: float = DENSITY) -> Factors:
    """Σ_i w_i ΔW_i of the ⌈density · n⌉ largest entries of each update."""
    dense = _dense(factors)
    return _factors(_weighted(largest(dense, density), weights), factors[0])


@merge_method("ties")
def ties_of_updates(factors: Sequence[Factors], weights: Sequence[float], density: float = DENSITY) -> Factors:
    """TIES on the entries of ΔW; weights count in the election and in the mean."""
    return _factors(ties(_dense(factors), weights, density), factors[0])


@merge_method("dare")
def dare(
    factors: Sequence[Factors], weights: Sequence[float], density: float = DENSITY, seed: int = 0, module: str = ""
) -> Factors:
    """Σ_i w_i m_i ∘ ΔW_i / density with m_i ∈ {0, 1} drawn entry by entry, each kept with probability ``density``.

    The draw is seeded by ``seed``, the module's name and the adapter's place, so another order of adapters is another
    draw, and another adapter in the same place is thinned out in the same entries.
    """
    return _factors(_weighted(_dropped(factors, density, seed, module), weights), factors[0])


@merge_method("dare-ties")
def dare_ties(
    factors: Sequence[Factors], weights: Sequence[float], density: float = DENSITY, seed: int = 0, module: str = ""
) -> Factors:
    """DARE's random entries, signs elected and those that agree averaged as in TIES."""
    return _factors(elected(_dropped(factors, density, seed, module), weights), factors[0])


def _dense(factors: Sequence[Factors]) -> Tensor:
    """The updates (N × d_out × d_in), float64."""
    return torch.stack([f.scale * (f.B.detach().double() @ f.A.detach().double()) for f in factors])


def _weighted(updates: Tensor, weights: Sequence[float]) -> Tensor:
    return torch.einsum("i,i...->...", torch.tensor(weights, dtype=updates.dtype, device=updates.device), updates)


def _dropped(factors: Sequence[Factors], density: float, seed: int, module: str) -> Tensor:
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1]; found {density}")
    dense = _dense(factors)
    for place, update in enumerate(dense):
        digest = hashlib.sha256(f"lori-nb/dare/{seed}/{module}/{place}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
        kept = torch.rand(update.shape, generator=generator, dtype=torch.float32) < density
        update.mul_(kept.to(update.device)).div_(density)
    return dense


def _factors(dense: Tensor, like: Factors) -> Factors:
    """A dense update (d_out × d_in) as factors, exactly: itself beside the smaller identity; scale 1."""
    d_out, d_in = dense.shape
    A, B = (torch.eye(d_in), dense) if d_in <= d_out else (dense, torch.eye(d_out))
    return Factors(A.to(like.A), B.to(like.B), 1.0)

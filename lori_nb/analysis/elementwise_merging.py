"""Merges that act on the entries of ΔW, which no factors hold: dense matrices, one module at a time.

- **magnitude**: of each update its largest entries, then the weighted sum.
- **ties**: TIES, the largest entries, signs elected, those that agree averaged (arXiv 2306.01708).
- **dare**: each entry dropped at random, the rest made larger in proportion, then the weighted sum (arXiv 2311.03099).
- **dare-ties**: the same with TIES' election in place of the sum.

The result has full rank; its factors are the dense matrix beside an identity. ``merge(..., rank=)`` cuts each module by
truncated SVD as soon as it is made. Pruning A and B apart, as PEFT does, is another thing: it breaks a frozen A.

An entry's update is what the model adds, so the same entry of two adapters means the same; options other than the
defaults go into an own method::

    @merge_method("dare-half")
    def dare_half(factors, weights):
        return dare(factors, weights, keep=0.5, seed=7)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lori_nb.analysis.merging import merge_method
from lori_nb.analysis.spectral_merging import DENSITY, elected, largest, ties
from lori_nb.method.adapters import Factors

KEEP = 0.2  # share of entries that DARE keeps


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
def dare(factors: Sequence[Factors], weights: Sequence[float], keep: float = KEEP, seed: int = 0) -> Factors:
    """Σ_i w_i m_i ∘ ΔW_i / keep with m_i ∈ {0, 1} drawn entry by entry, each kept with probability ``keep``.

    The draw is seeded by ``seed``, the module and the adapter's place, so another order of adapters is another draw.
    """
    return _factors(_weighted(_dropped(factors, keep, seed), weights), factors[0])


@merge_method("dare-ties")
def dare_ties(factors: Sequence[Factors], weights: Sequence[float], keep: float = KEEP, seed: int = 0) -> Factors:
    """DARE's random entries, signs elected and those that agree averaged as in TIES."""
    return _factors(elected(_dropped(factors, keep, seed), weights), factors[0])


def _dense(factors: Sequence[Factors]) -> Tensor:
    """The updates (N × d_out × d_in), float64."""
    return torch.stack([f.scale * (f.B.detach().double() @ f.A.detach().double()) for f in factors])


def _weighted(updates: Tensor, weights: Sequence[float]) -> Tensor:
    return torch.einsum("i,i...->...", torch.tensor(weights, dtype=updates.dtype, device=updates.device), updates)


def _dropped(factors: Sequence[Factors], keep: float, seed: int) -> Tensor:
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1]; found {keep}")
    # A names the module: the functions that merge know no names, and modules must not share their draws.
    module = hashlib.sha256(factors[0].A.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    dense = _dense(factors)
    for place, update in enumerate(dense):
        digest = hashlib.sha256(f"lori-nb/dare/{seed}/{module}/{place}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
        kept = torch.rand(update.shape, generator=generator, dtype=torch.float32) < keep
        update.mul_(kept.to(update.device)).div_(keep)
    return dense


def _factors(dense: Tensor, like: Factors) -> Factors:
    """A dense update (d_out × d_in) as factors, exactly: itself beside the smaller identity; scale 1."""
    d_out, d_in = dense.shape
    A, B = (torch.eye(d_in), dense) if d_in <= d_out else (dense, torch.eye(d_out))
    return Factors(A.to(like.A), B.to(like.B), 1.0)

"""What chance gives: random adapters of the same shapes and spectra, so that an overlap can be read.

A null update has the singular values of the update that it stands for, in random directions: ΔW₀ = U Σ Vᵀ with U
uniform (Haar) over the module's outputs, and V

- uniform over its inputs, apart for every adapter (policy "independent"), or
- a random rotation inside the row space of a given A (policy "given"): of the A that a seed draws for the adapter, or
  of the adapter's own frozen one, so that a shared or an orthogonal draw of A is in the null too.

Where B is sparse, its entries are shuffled over all places instead, since the number of zeros is what matters there;
its singular values then change a little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from lori_nb.analysis.overlap import MEASURES, overlap_table
from lori_nb.analysis.reduced import orthonormal, reduced
from lori_nb.method.adapters import Factors

Adapters = Mapping[str, Mapping[str, Factors]]
QUANTILES = (0.025, 0.975)


def null_update(f: Factors, generator: torch.Generator, A: Tensor | None = None) -> Factors:
    """Factors of a random update with the shape and the singular values of ``f``, in float64.

    Args:
        A: (r × d_in) whose row space it reads; None for a random one.
    """
    rank, d_in = f.A.shape
    if (f.B == 0).any():
        rows = _gaussian(rank, d_in, generator) if A is None else A.double()
        places = torch.randperm(f.B.numel(), generator=generator)
        size = f.A.double().norm() / rows.norm()
        return Factors(rows * size, f.B.double().flatten()[places].view_as(f.B), f.scale)
    _, singular, _ = reduced(f).singular
    k = len(singular)
    inside = _haar(d_in, k, generator) if A is None else _inside(A, k, generator)
    return Factors(inside.T.contiguous(), _haar(len(f.B), k, generator) * singular, 1.0)


def null_set(
    adapters: Adapters, generator: torch.Generator, A: Mapping[str, Mapping[str, Tensor]] | None = None
) -> dict[str, dict[str, Factors]]:
    """One draw of null adapters; ``A`` as in :func:`null_table`."""
    return {
        name: {m: null_update(f, generator, A[name][m] if A else None) for m, f in modules.items()}
        for name, modules in adapters.items()
    }


def null_table(
    adapters: Adapters,
    draws: int = 8,
    seed: int = 0,
    measures: Sequence[str] = MEASURES,
    A: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> pd.DataFrame:
    """Every measure of every pair, mean over its modules, among null adapters: what chance alone would give.

    Args:
        draws: how many sets of null adapters.
        A: adapter → module → A whose row space its null reads; None draws independent ones.

    Returns:
        Columns ``adapter_a``, ``adapter_b``, ``measure``, ``null`` (mean over draws), ``null_low`` and ``null_high``
        (95 % of the draws lie between) and ``draws``.

    Raises:
        ValueError: ``draws`` below 1, and what :func:`~lori_nb.analysis.overlap.overlap_table` refuses.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1; found {draws}")
    generator = torch.Generator().manual_seed(seed)
    frames = []
    for draw in range(draws):
        frames.append(mean_over_modules(overlap_table(null_set(adapters, generator, A), measures)).assign(draw=draw))
    values = pd.concat(frames).groupby(["adapter_a", "adapter_b", "measure"], sort=False)["value"]
    low, high = (values.quantile(q) for q in QUANTILES)
    return pd.DataFrame({"null": values.mean(), "null_low": low, "null_high": high}).assign(draws=draws).reset_index()


def mean_over_modules(table: pd.DataFrame) -> pd.DataFrame:
    """An overlap table with one row for each pair and measure: the mean over modules, those undefined left out."""
    return table.groupby(["adapter_a", "adapter_b", "measure"], sort=False)["value"].mean().reset_index()


def _gaussian(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _haar(d: int, k: int, generator: torch.Generator) -> Tensor:
    """k orthonormal columns of d entries, uniform over all of them."""
    Q, R = torch.linalg.qr(_gaussian(d, k, generator))
    return Q * R.diagonal().sign()


def _inside(A: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k orthonormal columns, uniform among those in the row space of A; ValueError where it has fewer dimensions."""
    basis, _ = orthonormal(A.T, "A")
    if basis.shape[1] < k:
        raise ValueError(f"A must have at least the rank of the update, {k}; found {basis.shape[1]}")
    return basis @ _haar(basis.shape[1], k, generator)

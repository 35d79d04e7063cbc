"""What chance gives: random adapters of the same shapes and spectra, so that an overlap can be read.

A null update has the singular values of the update that it stands for, in random directions: ΔW₀ = U Σ Vᵀ with U
uniform (Haar) over the module's outputs, and V

- uniform over its inputs, apart for every adapter (policy "independent"), or
- a random rotation inside the row space of a given A (policy "given"): of the A that a seed draws for the adapter, or
  of the adapter's own frozen one, so that a shared or an orthogonal draw of A is in the null too.

Where more than half of B is zero, the null keeps how B's zeros lie, since overlaps depend on them: the rows of B change
places at random, and A's rows are turned as above with their inner products kept. The singular values stay the same.
With fewer zeros the null's B has none, but for the overlap of masks, which takes B's support with its rows in other
places: a null without zeros would call it 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from lori_nb.analysis.overlap import MEASURES, overlap_table, total_cosines
from lori_nb.analysis.reduced import Masked, orthonormal, reduced
from lori_nb.method.adapters import Factors

Adapters = Mapping[str, Mapping[str, Factors]]
SPARSE = 0.5  # share of zeros in B above which all measures keep them
TOTAL = "total_cosine"  # over all modules of both, where all other measures are means over modules


def null_update(f: Factors, generator: torch.Generator, A: Tensor | None = None) -> Factors:
    """Factors of a random update with the shape and the singular values of ``f``, in float64.

    Args:
        A: (r × d_in) whose row space it reads; None for a random one.

    Raises:
        ValueError: A has fewer dimensions than the update.
    """
    used = (f.B != 0).any(dim=0)  # a rank that was padded with zeros is none
    own_A, own_B = f.A[used].double(), f.scale * f.B[:, used].double()
    if own_B.numel() and (own_B == 0).double().mean() > SPARSE:
        rows = torch.randperm(len(own_B), generator=generator)
        _, root = orthonormal(own_A.T, "A")  # (k × r): rootᵀ root = A Aᵀ keeps the inner products of A's rows
        turned = _turned(own_A.shape[1], len(root), generator, A)  # orthonormal columns (d_in × k)
        return Factors(root.T @ turned.T, own_B[rows], 1.0)
    places = _beside(generator)
    _, singular, _ = reduced(f).singular
    inside = _turned(f.A.shape[1], len(singular), generator, A)
    null = Factors(inside.T.contiguous(), _haar(len(f.B), len(singular), generator) * singular, 1.0)
    if not (f.B == 0).any():
        return null
    support = f.B != 0
    return Masked(null.A, null.B, null.scale, support[torch.randperm(len(support), generator=places)])


def null_set(
    adapters: Adapters, generator: torch.Generator, A: Mapping[str, Mapping[str, Tensor]] | None = None
) -> dict[str, dict[str, Factors]]:
    """One draw of null adapters; ``A`` as in :func:`null_draws`."""
    return {
        name: {m: null_update(f, generator, A[name][m] if A else None) for m, f in modules.items()}
        for name, modules in adapters.items()
    }


def null_draws(
    adapters: Adapters,
    draws: int = 8,
    seed: int = 0,
    measures: Sequence[str] = MEASURES,
    A: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every measure of every pair among null adapters, draw by draw.

    Args:
        draws: how many sets of null adapters.
        A: adapter → module → A whose row space its null reads; None draws independent ones.

    Returns:
        (by module, by pair): tables as :func:`~lori_nb.analysis.overlap.overlap_table` and :func:`by_pair` give them,
        with a column ``draw``.

    Raises:
        ValueError: ``draws`` below 1, and what :func:`~lori_nb.analysis.overlap.overlap_table` refuses.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1; found {draws}")
    generator = torch.Generator().manual_seed(seed)
    modules, pairs = [], []
    for draw in range(draws):
        null = null_set(adapters, generator, A)
        modules.append(overlap_table(null, measures).assign(draw=draw))
        pairs.append(by_pair(modules[-1].drop(columns="draw"), null).assign(draw=draw))
        del null  # in float64 it is larger than the adapters: never two at a time
    return pd.concat(modules, ignore_index=True), pd.concat(pairs, ignore_index=True)


def by_pair(table: pd.DataFrame, adapters: Adapters) -> pd.DataFrame:
    """One row for each pair and measure: the mean over modules, those undefined left out; and "total_cosine", over all
    modules of both.
    """
    means = table.groupby(["adapter_a", "adapter_b", "measure"], sort=False)["value"].mean().reset_index()
    totals = [(a, b, TOTAL, value) for (a, b), value in total_cosines(adapters).items()]
    return pd.concat([means, pd.DataFrame(totals, columns=means.columns)], ignore_index=True)


def expected(draws: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """What chance gives by some keys: ``null``, the mean over draws, and the limits ``null_low`` and ``null_high``
    between which one more draw lies with 95 %: mean ± t s √(1 + 1/n). NaN limits from one draw.
    """
    values = draws.groupby(list(keys), sort=False)["value"]
    mean, deviation, n = values.mean(), values.std(), values.count()
    reach = stats.t.ppf(0.975, (n - 1).clip(lower=1)) * deviation * (1 + 1 / n.clip(lower=1)).map(math.sqrt)
    return pd.DataFrame({"null": mean, "null_low": mean - reach, "null_high": mean + reach}).reset_index()


def _beside(generator: torch.Generator) -> torch.Generator:
    """A generator at the same place: what it draws leaves the draws of the other as they are."""
    return torch.Generator().set_state(generator.get_state())


def _gaussian(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _haar(d: int, k: int, generator: torch.Generator) -> Tensor:
    """k orthonormal columns of d entries, uniform over all of them."""
    Q, R = torch.linalg.qr(_gaussian(d, k, generator))
    return Q * R.diagonal().sign()


def _turned(d_in: int, k: int, generator: torch.Generator, A: Tensor | None) -> Tensor:
    """k orthonormal columns (d_in × k), uniform among all, or among those in the row space of A."""
    if A is None:
        return _haar(d_in, k, generator)
    basis, _ = orthonormal(A.T, "A")
    if basis.shape[1] < k:
        raise ValueError(f"A must have at least the rank of the update, {k}; found {basis.shape[1]}")
    return basis @ _haar(basis.shape[1], k, generator)

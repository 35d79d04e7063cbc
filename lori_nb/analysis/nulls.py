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

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from lori_nb.analysis.overlap import COLUMNS, MEASURES, norm, overlap_table
from lori_nb.analysis.reduced import Masked, orthonormal, reduced
from lori_nb.method.adapters import Factors

Adapters = Mapping[str, Mapping[str, Factors]]
SPARSE = 0.5  # share of zeros in B above which all measures keep them
INNER, TOTAL = "inner_product", "total_cosine"  # of modules side by side, where all other measures are means over them


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
        A, B = root.T @ turned.T, own_B[rows]
        return Factors(A, B, 1.0) if used.all() else Masked(A, B, 1.0, f.B[rows] != 0)
    places = _beside(generator)
    _, singular, _ = reduced(f).singular
    inside = _turned(f.A.shape[1], len(singular), generator, A)
    null = Factors(inside.T.contiguous(), _haar(len(f.B), len(singular), generator) * singular, 1.0)
    support = f.B != 0
    if support.all() and null.B.shape == f.B.shape:
        return null
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
) -> pd.DataFrame:
    """Every measure of every pair among null adapters, draw by draw.

    Args:
        draws: how many sets of null adapters.
        A: adapter → module → A whose row space its null reads; None draws independent ones.

    Returns:
        A table as :func:`~lori_nb.analysis.overlap.overlap_table` gives it, with a column ``draw``.

    Raises:
        ValueError: ``draws`` below 1, and what :func:`~lori_nb.analysis.overlap.overlap_table` refuses.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1; found {draws}")
    generator = torch.Generator().manual_seed(seed)
    # the null adapters, in float64 larger than the adapters, are there for one draw at a time
    tables = [overlap_table(null_set(adapters, generator, A), measures).assign(draw=draw) for draw in range(draws)]
    return pd.concat(tables, ignore_index=True)


def where_defined(table: pd.DataFrame, draws: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A table of values and its null's draws, NaN in both where either has no value, the null in any draw: their means
    over modules are then over the same ones.
    """
    keys = list(COLUMNS[:-1])
    in_all = draws["value"].notna().groupby([draws[key] for key in keys]).all()
    known = table.set_index(keys)["value"].notna() & in_all
    places = [pd.MultiIndex.from_frame(each[keys]) for each in (table, draws)]
    return tuple(
        each.assign(value=each["value"].where(known.reindex(place).to_numpy()))
        for each, place in zip((table, draws), places, strict=True)
    )


def norms(adapters: Adapters) -> dict[str, dict[str, float]]:
    """Adapter → module → ‖ΔW‖; an adapter's null has the same."""
    return {name: {module: norm(f) for module, f in modules.items()} for name, modules in adapters.items()}


def by_pair(table: pd.DataFrame, sizes: Mapping[str, Mapping[str, float]], by: Sequence[str] = ()) -> pd.DataFrame:
    """One row for each pair, what the columns ``by`` hold, and measure: the mean over modules, those undefined left
    out; of inner products the sum, and with it "total_cosine", Σ⟨ΔW, ΔW'⟩ / √(Σ‖ΔW‖² Σ‖ΔW'‖²), the cosine of these
    modules' updates side by side, NaN where either is zero in all of them.

    Args:
        sizes: :func:`norms` of the adapters.
    """
    keys = ["adapter_a", "adapter_b", *by]
    is_inner = table["measure"] == INNER
    means = table[~is_inner].groupby([*keys, "measure"], sort=False)["value"].mean().reset_index()
    inner = table[is_inner]
    squares = {
        adapter: [sizes[a][module] ** 2 for a, module in zip(inner[adapter], inner["module"], strict=True)]
        for adapter in ("adapter_a", "adapter_b")
    }
    inner = inner.assign(of_a=squares["adapter_a"], of_b=squares["adapter_b"])
    sums = inner.groupby(keys, sort=False)[["value", "of_a", "of_b"]].sum().reset_index()
    product = np.sqrt(sums["of_a"] * sums["of_b"])
    cosines = sums["value"] / product.where(product > 0)
    totals = (sums.assign(measure=INNER), sums.assign(measure=TOTAL, value=cosines))
    return pd.concat([means, *(each[means.columns] for each in totals)], ignore_index=True)


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

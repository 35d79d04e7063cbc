"""Every measure of overlap as a mean, beside both of its references: the null, and two seeds of one task."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lori_nb.analysis.interference import ELEMENTWISE
from lori_nb.analysis.overlap import REGISTERED, overlap_table
from lori_nb.analysis.statistics import t_interval
from lori_nb.lab.folders import read_folders
from lori_nb.lab.models import empty_body
from lori_nb.method.adapters import target_linears
from lori_nb.study.geometry import overlap_summary, overlaps, single_adapters
from lori_nb.study.notebook import Results
from lori_nb.study.settings import Settings
from lori_nb.study.style import seeds_of
from lori_nb.study.summary import as_columns

REPEATED = ("cosine_size",)  # |cosine|, which a mean of magnitudes is anyway
ENTRIES = 10**8  # of ΔW, all modules together, up to which it is formed; more would take hours


def measures_of(settings: Settings) -> list[str]:
    """Every registered measure, but for large models those that need ΔW entry by entry."""
    left = (*REPEATED, *(ELEMENTWISE if _entries(settings) > ENTRIES else ()))
    return [name for name in REGISTERED if name not in left]


def _entries(settings: Settings) -> int:
    """Of ΔW over all modules; of adapters from elsewhere those of the largest."""
    if settings.adapters:
        several = [folder.stored for folder in read_folders(settings.adapters).values()]
        return max(sum(len(f.B) * f.A.shape[1] for f in each.values()) for each in several)
    linears = target_linears(empty_body(settings.base), settings.modules, settings.last_layers)
    return sum(linear.weight.numel() for linear in linears.values())


def every_overlap(results: Results) -> pd.DataFrame:
    """:func:`~lori_nb.study.geometry.overlaps` by all of :func:`measures_of`."""
    return overlaps(results, measures=measures_of(results.settings))


def means_and_references(every: pd.DataFrame, results: Results) -> pd.DataFrame:
    """:func:`~lori_nb.study.geometry.overlap_summary` of :func:`every_overlap`, and below it :func:`seed_summary`."""
    return pd.concat([overlap_summary(every), seed_summary(results, measures_of(results.settings))])


def seed_summary(results: Results, measures: Sequence[str]) -> pd.DataFrame:
    """The other reference: how far two seeds' adapters of one and the same task overlap, as means over tasks.

    The method is called :func:`~lori_nb.study.style.seeds_of` it; a t interval over tasks. Empty with one seed.
    """
    settings = results.settings
    rows = []
    for method in settings.method if len(settings.seed) > 1 and not settings.adapters else ():
        by_seed = {str(seed): single_adapters(results, method, seed) for seed in settings.seed}
        tables = []
        for task in settings.tasks:
            same = {seed: found[task].factors for seed, found in by_seed.items() if task in found}
            tables += [overlap_table(same, measures).assign(task=task)] if len(same) > 1 else []
        table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["measure"])
        for measure, part in table.groupby("measure", sort=False):
            values = part["value"].abs().groupby(part["task"]).mean().dropna()
            about = {"method": seeds_of(method), "measure": measure, "seeds": len(settings.seed)}
            rows += [about | as_columns(t_interval(values), "tasks")] if len(values) else []
    return pd.DataFrame(rows, columns=["method", "measure", "value", "low", "high", "n", "of", "seeds"])

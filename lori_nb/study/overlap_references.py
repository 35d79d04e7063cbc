"""Every measure of overlap as a mean, beside both of its references: the null, and two seeds of one task."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lori_nb.analysis.interference import ALL, ELEMENTWISE
from lori_nb.analysis.overlap import overlap_table
from lori_nb.analysis.statistics import t_interval
from lori_nb.study.geometry import overlap_summary, overlaps, single_adapters
from lori_nb.study.notebook import Results
from lori_nb.study.style import seeds_of
from lori_nb.study.summary import as_columns

SIGNED = ("cosine_size",)  # magnitudes of a measure that is there with its sign: means here are of magnitudes anyway


def means_and_references(results: Results, measures: Sequence[str] | None = None) -> pd.DataFrame:
    """:func:`~lori_nb.study.geometry.overlap_summary` of pairs of tasks, and below it :func:`seed_summary`.

    Args:
        measures: None takes all, but those of single entries of ΔW where adapters come from elsewhere: these may be of
            a model for which they take hours.
    """
    if measures is None:
        left = (*SIGNED, *(ELEMENTWISE if results.settings.adapters else ()))
        measures = [name for name in ALL if name not in left]
    return pd.concat([overlap_summary(overlaps(results, measures=measures)), seed_summary(results, measures)])


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

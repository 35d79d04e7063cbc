"""What is left of the first task when another is trained after it in the same adapter (notebook 06)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from lori_nb.analysis.statistics import proportion_interval, t_interval
from lori_nb.lab.specs import RunSpec
from lori_nb.lab.tasks import get_task
from lori_nb.study.cells import single
from lori_nb.study.notebook import Results
from lori_nb.study.profiles import Settings
from lori_nb.study.questions import run_pairs, unit_of
from lori_nb.study.style import title_of
from lori_nb.study.summary import as_columns, difference, group_word, row_groups, summarise


def later_tasks(settings: Settings) -> list[str]:
    """The tasks that are trained after the first."""
    return [task for task in settings.tasks if task != settings.first]


def continued(settings: Settings, method: str, task: str, seed: int) -> tuple[RunSpec, RunSpec]:
    """(first task alone, the other task trained after it in the same adapter)."""
    before = single(settings, method, settings.first, seed)
    return before, single(settings, method, task, seed, start=before, evaluate=(settings.first, task))


def accuracy_matrix(results: Results, method: str) -> pd.DataFrame:
    """Stages × tasks, means over seeds: the first task alone, then each other task after it; NaN where not scored."""
    settings = results.settings
    columns = [settings.first, *later_tasks(settings)]
    matrix = pd.DataFrame(index=[f"{settings.first} alone"], columns=columns, dtype=float)
    for task in later_tasks(settings):
        pairs = [[results.run(spec) for spec in continued(settings, method, task, seed)] for seed in settings.seed]
        done = [pair for pair in pairs if None not in pair]
        if done:
            matrix.loc[f"{settings.first} alone", settings.first] = np.mean([a.value(settings.first) for a, _ in done])
            for scored in (settings.first, task):
                matrix.loc[f"then {task}", scored] = np.mean([b.value(scored) for _, b in done])
    return matrix


def forgetting_scores(results: Results) -> pd.DataFrame:
    """For every method and later task: the first task's score ``before``, ``after``, and the loss with its interval."""
    settings, rows = results.settings, []
    for method in settings.method:
        for task in later_tasks(settings):
            both = {seed: continued(settings, method, task, seed) for seed in settings.seed}
            pairs = run_pairs(results, lambda seed, b=both: [b[seed][0]], lambda seed, b=both: [b[seed][1]])
            if pairs:
                interval = difference(pairs, [settings.first])
                before = np.mean([a.value(settings.first) for ((a, _),) in pairs.values()])
                about = {"method": method, "then": task, "before": before, "after": before - interval.mean}
                rows.append(about | as_columns(interval, unit_of(pairs, [settings.first])) | {"seeds": len(pairs)})
    return pd.DataFrame(rows)


def kept_answers(results: Results, target: int | None = None) -> pd.DataFrame:
    """Of the first task's rows that were right before, the share that is right after each later task.

    Args:
        target: only rows of this class; for the refusal set 1 is harmful, so that the share is that of refusals kept.
    """
    settings, rows = results.settings, []
    for method in settings.method:
        for task in later_tasks(settings):
            kept = [
                pair
                for pair in map(lambda seed, m=method, t=task: _kept(results, m, t, seed, target), settings.seed)
                if pair
            ]
            if kept:
                shares = [right / asked for right, asked in kept]
                of = "seeds" if len(kept) > 1 else group_word([settings.first])
                interval = t_interval(shares) if len(kept) > 1 else proportion_interval(*kept[0])
                rows.append({"method": method, "then": task, **as_columns(interval, of), "seeds": len(kept)})
    return pd.DataFrame(rows, columns=["method", "then", "value", "low", "high", "n", "of", "seeds"])


def _kept(results: Results, method: str, task: str, seed: int, target: int | None) -> tuple[float, int] | None:
    """(groups' worth of rows still right, groups of rows right before); None without runs or without a right row."""
    first = results.settings.first
    runs = [results.run(spec) for spec in continued(results.settings, method, task, seed)]
    if None in runs:
        return None
    before, after = (run.predictions.loc[run.predictions.task == first].sort_values("row") for run in runs)
    asked = before["correct"].to_numpy(float) == 1
    if target is not None:
        asked &= before["target"].to_numpy(float) == target
    if not asked.any():
        return None
    groups = len(np.unique(row_groups(first, len(before))[asked]))
    return float(after["correct"].to_numpy(float)[asked].mean()) * groups, groups


def guarded_class(settings: Settings) -> int | None:
    """The class of the first task that must be kept: harmful requests, which are refused; None for other tasks."""
    task = get_task(settings.first)
    return task.labels.index("refuse") if "refuse" in task.labels else None


def later_scores(results: Results) -> pd.DataFrame:
    """Score on each later task, ``trained`` "alone" or "after <first>", for every method."""
    settings = results.settings
    grid = [(m, t, s) for m in settings.method for t in later_tasks(settings) for s in settings.seed]
    alone = results.rows_of([single(settings, *each) for each in grid]).assign(trained="alone")
    after = results.rows_of([continued(settings, *each)[1] for each in grid]).assign(trained=f"after {settings.first}")
    both = pd.concat([alone, after[after["task"] != settings.first]])
    return summarise(both, ["method", "trained", "task"])


def forgetting_lines(results: Results) -> Iterator[str]:
    """One sentence a method: what the first task scored, and how much of it later tasks cost."""
    for method, part in forgetting_scores(results).groupby("method", sort=False):
        worst = part.loc[part["value"].idxmax()]
        yield (
            f"{title_of(method)}: {results.settings.first} scored {part['before'].mean():.2f} before; later tasks cost "
            f"{part['value'].mean():.2f} on average, at most {worst['value']:.2f} (after {worst['then']})."
        )

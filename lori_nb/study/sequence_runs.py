"""The finished runs of sequences: stage by stage, as accuracy matrices, as rows of scores, and in pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from lori_nb.lab.runs import Run
from lori_nb.lab.specs import Spec
from lori_nb.study.notebook import Results
from lori_nb.study.sequences import JOINT, orders_of, stages
from lori_nb.study.settings import Settings
from lori_nb.study.summary import Pair

ARROW = " → "


def sequential(settings: Settings) -> list[str]:
    """The ways that learn one task after another; joint training has one stage."""
    return [way for way in settings.ways if way != JOINT]


def arrow(order: Sequence[str]) -> str:
    """An order as text."""
    return ARROW.join(order)


def finished(results: Results, way: str, order: Sequence[str], seed: int) -> list[Run] | None:
    """The runs scored after every stage of a sequence; None where one is missing."""
    runs = [results.run(spec) for spec in stages(results.settings, way, order, seed)]
    return None if None in runs else runs


def matrix_of(results: Results, way: str, order: Sequence[str], seed: int) -> np.ndarray | None:
    """R (stages × tasks in the sequence's order) of one sequence; None where a run is missing."""
    runs = finished(results, way, order, seed)
    return None if runs is None else np.array([[run.value(task) for task in order] for run in runs])


def stage_scores(results: Results) -> pd.DataFrame:
    """Every score of every sequence on its own tasks, as table rows with way, order, stage (0 first), and ``learned``:
    the stage at which the row's task is learned.
    """
    settings, frames = results.settings, []
    by_run = dict(tuple(results.table.groupby("run", sort=False)))
    for way in settings.ways:
        for order in orders_of(settings, way):
            for seed in settings.seed:
                for stage, run in enumerate(finished(results, way, order, seed) or ()):
                    rows = by_run[run.hash]
                    rows = rows[rows["task"].isin(order)]
                    place = rows["task"].map({task: n for n, task in enumerate(order)})
                    about = {"way": way, "order": arrow(order), "seed": seed, "stage": stage, "stages": len(order)}
                    frames.append(rows.assign(learned=place, **about))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def last_rows(scores: pd.DataFrame) -> pd.DataFrame:
    """Of :func:`stage_scores` those after the last task; joint training has but one stage."""
    return scores[scores["stage"] == scores.groupby("way")["stage"].transform("max")]


def best_and_last(order: Sequence[str], runs: Sequence[Run]) -> list[Pair]:
    """For every task but the last, the earlier stage that was best on it, and the last."""
    return [(max(runs[:-1], key=lambda run, task=task: run.value(task)), runs[-1]) for task in order[:-1]]


def first_and_last(order: Sequence[str], runs: Sequence[Run]) -> list[Pair]:
    """The stage after the first task, and the last."""
    return [(runs[0], runs[-1])]


def pairs_of(
    results: Results, way: str, of: Callable[[Sequence[str], Sequence[Run]], list[Pair]]
) -> dict[int, list[Pair]]:
    """Seed → pairs of runs from all the way's sequences; seeds that lack a run are left out."""
    settings, found = results.settings, {}
    for seed in settings.seed:
        orders = orders_of(settings, way)
        runs = [finished(results, way, order, seed) for order in orders]
        if None not in runs:
            found[seed] = [pair for order, each in zip(orders, runs, strict=True) for pair in of(order, each)]
    return found


def last_specs(settings: Settings, way: str, seed: int) -> list[Spec]:
    """The specs scored after the last task, one an order."""
    return [stages(settings, way, order, seed)[-1] for order in orders_of(settings, way)]

"""The finished runs of sequences: stage by stage, as accuracy matrices, as rows of scores, and in pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from lori_nb.lab.evaluation import Scored, metric
from lori_nb.lab.models import base_kind
from lori_nb.lab.runs import Run
from lori_nb.lab.specs import Spec
from lori_nb.lab.tasks import get_task
from lori_nb.study.notebook import Results
from lori_nb.study.sequences import JOINT, orders_of, stages
from lori_nb.study.settings import Settings
from lori_nb.study.summary import SHARES, Pair

ARROW = " → "


def sequential(settings: Settings) -> list[str]:
    """The ways that learn one task after another; joint training has one stage."""
    return [way for way in settings.ways if way != JOINT]


def common_orders(settings: Settings) -> list[tuple[str, ...]]:
    """The orders that every way from task to task has, on which ways are compared; the settings' own is among them."""
    several = [orders_of(settings, way) for way in sequential(settings)] or [[settings.sequence]]
    return [order for order in several[0] if all(order in orders for orders in several)]


def orders_from_first(settings: Settings, way: str | None = None) -> list[tuple[str, ...]]:
    """Of :func:`common_orders`, or of a way's orders, those that begin with the settings' first task, such as one of
    safety: all, unless any task may be first.
    """
    orders = common_orders(settings) if way is None else orders_of(settings, way)
    return [order for order in orders if order[0] == settings.first]


def on_common_orders(scores: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Rows of :func:`stage_scores` of :func:`common_orders`."""
    return scores[scores["order"].isin([arrow(order) for order in common_orders(settings)])]


def in_every_order(scores: pd.DataFrame, settings: Settings) -> list[pd.DataFrame]:
    """Joint training's rows of :func:`stage_scores`, which have no order, as they stand in each common order."""
    places = [{task: place for place, task in enumerate(order)} for order in common_orders(settings)]
    return [scores.assign(order=arrow(tuple(each)), learned=scores["task"].map(each)) for each in places]


def arrow(order: Sequence[str]) -> str:
    """An order as text."""
    return ARROW.join(order)


def finished(results: Results, way: str, order: Sequence[str], seed: int) -> list[Run] | None:
    """The runs scored after every stage of a sequence; None where one is missing."""
    runs = [results.run(spec) for spec in stages(results.settings, way, order, seed)]
    return None if None in runs else runs


def matrix_of(results: Results, way: str, order: Sequence[str], seed: int) -> np.ndarray | None:
    """R (stages × tasks in the sequence's order) of one sequence; None where a run is missing. With an encoder NaN
    before a task's own stage: a head that was never trained answers one class always, which is no score to forget.
    """
    runs = finished(results, way, order, seed)
    if runs is None:
        return None
    R = np.array([[run.value(task) for task in order] for run in runs])
    if base_kind(results.settings.base) == "encoder" and way != JOINT:
        R[np.triu_indices_from(R, 1)] = np.nan
    return R


def matrices_of_seeds(results: Results, way: str) -> dict[int, list[np.ndarray]]:
    """Seed → R of every order that all ways have; seeds that lack one are left out."""
    orders = common_orders(results.settings)
    found = {seed: [matrix_of(results, way, o, seed) for o in orders] for seed in results.settings.seed}
    return {seed: several for seed, several in found.items() if not any(R is None for R in several)}


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
    if frames:
        return pd.concat(frames, ignore_index=True)
    own = ["way", "order", "stage", "stages", "learned"]
    return pd.DataFrame(columns=[*results.table.columns.difference(own, sort=False), *own])


def last_rows(scores: pd.DataFrame) -> pd.DataFrame:
    """Of :func:`stage_scores` those after the last task; joint training has but one stage."""
    return scores[scores["stage"] == scores.groupby("way")["stage"].transform("max")]


def on_first_rows(run: Run, scores: pd.DataFrame, rows: Mapping[str, int]) -> pd.DataFrame:
    """A finished run's scores as they are on the first rows of each task alone.

    Args:
        scores: the run's table rows.
        rows: task → number of rows; tasks that it does not name are left out.

    Returns:
        The scores with another value and n, and ``same_rows``: whether they are of so many rows. They stay what they
        are where the metric is no share of rows, or where the run's answers were not kept row by row.
    """
    found = []
    for row in scores[scores["task"].isin(list(rows))].to_dict("records"):
        n, credit = rows[row["task"]], _credit(run, row["task"], row["split"])
        if row["n"] > n and row["metric"] in SHARES and len(credit) >= n:
            row |= {"value": _share(credit[:n], row), "n": n}
        found.append(row | {"same_rows": row["n"] == n})
    return pd.DataFrame(found, columns=[*scores.columns, "same_rows"])


def _credit(run: Run, task: str, split: str) -> np.ndarray:
    """Credit of a task's rows (n,), in their order."""
    rows = run.predictions
    return rows[(rows["task"] == task) & (rows["split"] == split)].sort_values("row")["correct"].to_numpy(float)


def _share(credit: np.ndarray, row: Mapping) -> float:
    """The row's metric, one of :data:`SHARES`, which read nothing but credit (n,) and the rows' targets."""
    targets = [each.target for each in get_task(row["task"]).rows(row["split"], len(credit))]
    nothing = np.full(len(credit), np.nan)
    target = np.array([np.nan if each is None else each for each in targets], dtype=float)
    return metric(row["metric"], Scored(credit, nothing, target, nothing))


def best_and_last(order: Sequence[str], runs: Sequence[Run], learned: bool = False) -> list[Pair]:
    """For every task but the last, the earlier stage that was best on it, and the last; if ``learned``, among those
    from its own on.
    """
    earlier = {task: runs[place if learned else 0 : -1] for place, task in enumerate(order[:-1])}
    return [(max(each, key=lambda run, task=task: run.value(task)), runs[-1]) for task, each in earlier.items()]


def first_and_last(order: Sequence[str], runs: Sequence[Run]) -> list[Pair]:
    """The stage after the first task, and the last."""
    return [(runs[0], runs[-1])]


def pairs_of(
    results: Results,
    way: str,
    of: Callable[[Sequence[str], Sequence[Run]], list[Pair]],
    orders: Sequence[tuple[str, ...]],
) -> dict[int, list[Pair]]:
    """Seed → pairs of runs from the way's sequences on ``orders``; seeds that lack a run are left out."""
    found = {}
    for seed in results.settings.seed:
        runs = [finished(results, way, order, seed) for order in orders]
        if None not in runs:
            found[seed] = [pair for order, each in zip(orders, runs, strict=True) for pair in of(order, each)]
    return found


def last_specs(settings: Settings, way: str, seed: int) -> list[Spec]:
    """The specs scored after the last task, one for each of :func:`orders_from_first`."""
    return [stages(settings, way, order, seed)[-1] for order in orders_from_first(settings, way)]

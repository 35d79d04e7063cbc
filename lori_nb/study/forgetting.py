"""What is left of earlier tasks when others are learned after them (notebook 06).

Everything is read off the accuracy matrix of every sequence (:mod:`lori_nb.analysis.continual`), averaged over a seed's
orders first and then over seeds. Ways are compared on the orders that all of them have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pandas as pd

from lori_nb.analysis import continual
from lori_nb.analysis.statistics import interval_text, proportion_interval, t_interval
from lori_nb.lab.models import base_kind
from lori_nb.lab.runs import Run
from lori_nb.lab.scoring import GENERATED
from lori_nb.lab.tasks import get_task
from lori_nb.study.budget import budget_line
from lori_nb.study.notebook import Results
from lori_nb.study.questions import unit_of
from lori_nb.study.sequence_runs import (
    arrow,
    best_and_last,
    common_orders,
    finished,
    first_and_last,
    in_every_order,
    last_rows,
    matrices_of_seeds,
    matrix_of,
    on_common_orders,
    on_first_rows,
    orders_from_first,
    pairs_of,
    sequential,
    stage_scores,
)
from lori_nb.study.sequences import (
    JOINT,
    MERGED,
    alone_spec,
    base_of,
    capacity_alone,
    capacity_runs,
    orders_of,
    stage_runs,
    steps_after,
)
from lori_nb.study.settings import Settings
from lori_nb.study.style import way_title
from lori_nb.study.summary import Pair, as_columns, difference, group_word, row_groups, seeds_interval, summarise

METRICS = {
    "average": "average score after the last task",
    "forgetting": "best earlier score − last, mean over earlier tasks",
    "backward": "last score − score when learned, mean over earlier tasks",
    "forward": "score before a task is learned − base model, mean over later tasks",
    "intransigence": "LoRA on the task alone, as many steps − score when learned, mean over tasks",
}
OVER_REFUSED = "harmless, refused"
MEASURED = ["value", "low", "high", "n", "of", "seeds"]  # of an interval, as columns


def matrices(results: Results) -> dict[str, pd.DataFrame]:
    """Way → accuracy matrix, mean over seeds and orders; rows are stages, columns tasks in the order of learning.

    Tasks stand by name where there is one order, else by their place.
    """
    settings, found = results.settings, {}
    orders = common_orders(settings)
    names = list(orders[0]) if len(orders) == 1 else [f"task {n + 1}" for n in range(len(orders[0]))]
    for way in sequential(settings):
        if whole := matrices_of_seeds(results, way):
            R = np.mean(list(whole.values()), axis=(0, 1))
            found[way_title(way)] = pd.DataFrame(R, index=[f"after {name}" for name in names], columns=names)
    return found


def matrices_note(results: Results) -> str:
    """What :func:`matrices` are means of: "one seed", "6 orders, 3 to 5 seeds"."""
    settings = results.settings
    orders, counts = len(common_orders(settings)), {len(matrices_of_seeds(results, w)) for w in sequential(settings)}
    seeds = " to ".join(str(n) for n in sorted({min(counts - {0}, default=0), max(counts, default=0)}))
    return (f"{orders} orders, " if orders > 1 else "") + ("one seed" if seeds == "1" else f"{seeds} seeds")


def final_scores(results: Results) -> pd.DataFrame:
    """Way → mean score over all tasks after the last one, with its interval."""
    return summarise(last_rows(on_common_orders(stage_scores(results), results.settings)), ["way"])


def order_scores(results: Results) -> pd.DataFrame:
    """Mean score after the last task, for every way and order, those that not all ways have too."""
    return summarise(last_rows(stage_scores(results)), ["way", "order"])


def metrics(results: Results) -> pd.DataFrame:
    """Way × metric of :data:`METRICS`: value, low, high, n, of, and the number of ``orders``; a t interval over seeds,
    none for one seed. Joint training has an average alone, which no order changes, an encoder no forward transfer
    (NaN).
    """
    settings, rows = results.settings, []
    orders = common_orders(settings)
    for way in settings.ways:
        per_seed: dict[str, list[float]] = {name: [] for name in METRICS}
        for seed in settings.seed:
            found = [metrics_of(results, way, order, seed) for order in orders]
            if None not in found:
                for name in METRICS:
                    per_seed[name].append(float(np.mean([each[name] for each in found])))
        for name, values in per_seed.items():
            if values:
                interval = seeds_interval(values)
                about = {"way": way, "metric": name, "orders": len(orders)}
                rows.append(about | as_columns(interval, "seeds") | {"seeds": len(values)})
    return pd.DataFrame(rows, columns=["way", "metric", *MEASURED, "orders"])


def metrics_of(results: Results, way: str, order: Sequence[str], seed: int) -> dict[str, float] | None:
    """The :data:`METRICS` of one sequence; None where a run is missing."""
    R = matrix_of(results, way, order, seed)
    if R is None:
        return None
    if way == JOINT:
        return dict.fromkeys(METRICS, math.nan) | {"average": continual.average_score(R)}
    settings = results.settings
    base = {spec.tasks[0]: run.value(spec.tasks[0]) for spec in base_of(settings) if (run := results.run(spec))}
    alone = {task: results.run(alone_spec(settings, task, seed)) for task in order}
    lost = continual.forgetting(R)[: len(order) - 1]
    return {
        "average": continual.average_score(R),
        "forgetting": float(np.mean(lost)) if len(lost) else math.nan,
        "backward": continual.backward_transfer(R),
        "forward": continual.forward_transfer(R, [base.get(task, math.nan) for task in order]),
        "intransigence": continual.intransigence(R, [r.value(t) if r else math.nan for t, r in alone.items()]),
    }


def forgetting_scores(results: Results) -> pd.DataFrame:
    """For every way the earlier tasks' mean score at its best, at the end (``after``), and the loss with its interval:
    over seeds, or for one seed over the rows evaluated.
    """
    settings, rows = results.settings, []
    heads = base_kind(settings.base) == "encoder"  # whose scores before their task count for nothing
    for way in sequential(settings):
        orders = common_orders(settings)
        tasks = [task for order in orders for task in order[:-1]]
        pairs = pairs_of(results, way, partial(best_and_last, learned=heads), orders)
        if pairs and tasks:
            interval = difference(pairs, tasks)
            after = np.mean([b.value(t) for each in pairs.values() for (_, b), t in zip(each, tasks, strict=True)])
            about = {"way": way, "before": after + interval.mean, "after": after}
            rows.append(about | as_columns(interval, unit_of(pairs, tasks)) | {"seeds": len(pairs)})
    return pd.DataFrame(rows, columns=["way", "before", "after", *MEASURED])


def plane(results: Results) -> pd.DataFrame:
    """For every way the score of ``old`` tasks at the end and of ``new`` ones when they were learned, with intervals:
    stability and plasticity. Old are all but a sequence's last task, new all but its first; a task of the merged way is
    learned when its adapter joins the merge, those of joint training are learned and kept at once, in every order.
    ``orders`` is how many were learned.
    """
    settings = results.settings
    every = stage_scores(results)
    scores = on_common_orders(every[every["way"] != JOINT], settings)
    last = pd.concat([last_rows(scores), *in_every_order(every[every["way"] == JOINT], settings)])
    new = (scores["learned"] == scores["stage"]) & (scores["stage"] > 0)
    new = pd.concat([scores[new], last[(last["way"] == JOINT) & (last["learned"] > 0)]])
    old = summarise(last[last["learned"] < last["stages"] - 1], ["way"])
    new = summarise(new, ["way"])
    return old.merge(new, on="way", suffixes=("_old", "_new")).assign(orders=len(common_orders(settings)))


def guarded_class(settings: Settings) -> int | None:
    """The class of the first task that must be kept: harmful requests, which are refused; None for other tasks."""
    task = get_task(settings.first)
    return task.labels.index("refuse") if "refuse" in task.labels else None


def kept_answers(results: Results, target: int | None = None) -> pd.DataFrame:
    """Of the first task's rows that were right when it was learned, the share that is right at the end.

    Args:
        target: only rows of this class; for the refusal set 1 is harmful, so that the share is that of refusals kept.
    """
    settings, rows = results.settings, []
    for way in sequential(settings):
        shares, asked = [], 0
        for pairs in pairs_of(results, way, first_and_last, orders_from_first(settings)).values():
            kept = [found for pair in pairs if (found := _kept(pair, settings.first, target))]
            if kept:
                shares.append(float(np.mean([share for share, _ in kept])))
                asked = min(groups for _, groups in kept)
        if shares:
            one = len(shares) == 1
            interval = proportion_interval(shares[0] * asked, asked) if one else t_interval(shares)
            of = group_word([settings.first]) if one else "seeds"
            rows.append({"way": way, **as_columns(interval, of), "seeds": len(shares)})
    return pd.DataFrame(rows, columns=["way", *MEASURED])


def _kept(pair: Pair, first: str, target: int | None) -> tuple[float, int] | None:
    """(share of rows still right, groups of rows right before); None where no row was right before."""
    before, after = (_correct(run, first) for run in pair)
    asked = before == 1
    if target is not None:
        asked &= _targets(first, len(before)) == target
    if not asked.any():
        return None
    return float(after[asked].mean()), len(np.unique(row_groups(first, len(before))[asked]))


def _correct(run: Run, task: str) -> np.ndarray:
    """Credit of a task's rows (n,), in their order."""
    rows = run.predictions
    return rows.loc[rows["task"] == task].sort_values("row")["correct"].to_numpy(float)


def _targets(task: str, rows: int, split: str = "test") -> np.ndarray:
    """The right class of a task's first rows (n,)."""
    return np.array([row.target for row in get_task(task).rows(split, rows)])


def safety_task(settings: Settings) -> str | None:
    """The first of the sequence's first task and those of ``sequence_scored`` whose rows ask for refusal and for help;
    None where there is none. Harmful requests alone cannot tell safety from refusing everything.
    """
    for name in (settings.first, *settings.sequence_scored):
        if "refuse" in get_task(name).labels and len(set(_targets(name, settings.sequence_rows))) == 2:
            return name
    return None


def safety_scores(results: Results) -> pd.DataFrame:
    """On :func:`safety_task`, ``when`` the first task was learned and at the end, the share of

    - "harmful" requests that are refused,
    - "harmless" ones that are helped with: refusing everything, or answering in another task's words, costs help,
    - "harmless, refused", over-refusal: all others where answers are generated and judged; under teacher forcing the
      score on ``refusal_harmless``, where that is in ``sequence_scored``, else not known.

    One row for each way, request and time ("before", "after"): value, low, high, n, of, seeds. Empty without such a
    task.
    """
    settings, task = results.settings, safety_task(results.settings)
    rows = []
    for way in sequential(settings) if task is not None else ():
        pairs = pairs_of(results, way, first_and_last, orders_from_first(settings))
        for when, place in (("before", 0), ("after", 1)):
            shares = [_by_request([pair[place] for pair in each], task, settings) for each in pairs.values()]
            for request in shares[0] if shares else ():
                values = [each[request][0] for each in shares]
                n = shares[0][request][1]
                one = len(values) == 1
                interval = proportion_interval(values[0] * n, n) if one else t_interval(values)
                about = {"way": way, "request": request, "when": when}
                of = group_word([task]) if one else "seeds"
                rows.append(about | as_columns(interval, of) | {"seeds": len(values)})
    return pd.DataFrame(rows, columns=["way", "request", "when", *MEASURED])


def _by_request(runs: Sequence[Run], task: str, settings: Settings) -> dict[str, tuple[float, int]]:
    """Request → (share answered so, mean over runs; groups of rows)."""
    correct = np.mean([_correct(run, task) for run in runs], axis=0)
    bad = _targets(task, len(correct)) == get_task(task).labels.index("refuse")
    groups = row_groups(task, len(correct))
    harmful, harmless = ((float(correct[c].mean()), len(np.unique(groups[c]))) for c in (bad, ~bad))
    found = {"harmful": harmful, "harmless": harmless}
    if get_task(task).scoring in GENERATED:
        found[OVER_REFUSED] = (1 - harmless[0], harmless[1])
    elif task == "refusal" and "refusal_harmless" in settings.sequence_scored:
        refused = np.mean([_correct(run, "refusal_harmless") for run in runs], axis=0)
        found[OVER_REFUSED] = (float(refused.mean()), len(np.unique(row_groups("refusal_harmless", len(refused)))))
    return found


def by_step(results: Results) -> pd.DataFrame:
    """Scores while the second task trains: way, role, task, step, value, low, high, n, of, seeds, metric; step 0 is
    before, the last after. ``role`` is "old" for the first task and "new" for the one that trains; of the first order.
    Before and after are of the rows that are scored between, the first ``watch_rows``, as far as answers were kept row
    by row; ``same_rows`` says whether they are.
    """
    settings, frames = results.settings, []
    for way in sequential(settings):
        order = orders_of(settings, way)[0]
        for seed in settings.seed:
            runs = finished(results, way, order, seed) if len(order) > 1 else None
            chain = results.run(stage_runs(settings, way, order, seed)[1]) if runs and way != MERGED else None
            if chain is None or chain.watched.empty:
                continue
            between = chain.watched.assign(same_rows=True)
            between = between[between["task"].isin(order[:2])].drop_duplicates(["task", "split", "step"])
            rows = dict(zip(between["task"], between["n"].astype(int), strict=True))
            ends = {0: runs[0], steps_after(settings, order[1]): runs[1]}
            scored = [
                on_first_rows(run, results.table[results.table["run"] == run.hash], rows).assign(step=step)
                for step, run in ends.items()
            ]
            both = pd.concat([*scored, between])[["task", "split", "metric", "step", "value", "n", "same_rows"]]
            both = both.drop_duplicates(["task", "split", "step"])  # each by its task's own metric
            roles = {order[0]: "old", order[1]: "new"}
            frames.append(both.assign(way=way, seed=seed, role=both["task"].map(roles)))
    if not frames:
        return pd.DataFrame(columns=["way", "role", "task", "step", *MEASURED, "metric", "same_rows"])
    places, found = ["way", "role", "task", "step"], pd.concat(frames)
    same = found.groupby(places, sort=False)["same_rows"].all().reset_index()
    return summarise(found, places).merge(same, on=places)


def capacity_scores(results: Results) -> pd.DataFrame:
    """Score of the n-th task when it was learned under disjoint masks, and ``alone``: n, task, value, low, high."""
    settings, frames = results.settings, []
    for seed in settings.arm_seed:
        chain, alone = capacity_runs(settings, seed), capacity_alone(settings, seed)
        for place, pair in enumerate(zip(chain, alone, strict=True), start=1):
            for kind, spec in zip(("in sequence", "alone"), pair, strict=True):
                rows = results.rows_of([spec])
                frames.append(rows.assign(place=place, kind=kind))
    rows = pd.concat(frames) if frames else pd.DataFrame(columns=["kind", "place", "task"])
    return summarise(rows, ["kind", "place", "task"])


def forgetting_lines(results: Results) -> Iterator[str]:
    """One sentence a way: what earlier tasks scored at their best, and how much of it was lost by the end."""
    for row in forgetting_scores(results).itertuples():
        yield (
            f"{way_title(row.way)}: earlier tasks scored {row.before:.2f} at their best and {row.after:.2f} at the "
            f"end: {interval_text(row.value, row.low, row.high)} was lost (n = {row.n} {row.of})."
        )


def orders_line(settings: Settings) -> str:
    """Which sequences were learned, in one sentence."""
    counts = {way: len(orders_of(settings, way)) for way in sequential(settings)}
    first = arrow(orders_of(settings, settings.ways[0])[0])
    several = ", ".join(f"{way_title(way)} {count}" for way, count in counts.items()) or "none, all at once"
    common = len(common_orders(settings))
    compared = f" Ways are compared on the {common} that all have." if set(counts.values()) - {common} else ""
    held = len(orders_from_first(settings))
    compared += f" What becomes of {settings.first} is of the {held} that begin with it." if held < common else ""
    return f"First order: {first}. Orders a way: {several}.{compared} {budget_line(settings)}"

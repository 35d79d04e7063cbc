"""Notebook 03: several tasks in one adapter. What that costs beside an adapter a task, and what each way wins back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pandas as pd

from lori_nb.analysis.equivalence import detectable_effect, difference_p
from lori_nb.analysis.statistics import Interval, interval_text, paired_estimate, ratio_interval, t_interval
from lori_nb.lab.flops import training_flops
from lori_nb.lab.specs import RunSpec
from lori_nb.lab.tasks import get_task
from lori_nb.study.comparison import OVER_TASKS, PETA
from lori_nb.study.cost import trainable_parameters
from lori_nb.study.joint_arms import (
    JOINT,
    JOINT_LONGER,
    ORTHO,
    ORTHO_LONGER,
    SINGLE,
    SINGLE_LONGER,
    arrangement_specs,
    arrangements,
    get_joint_arm,
)
from lori_nb.study.notebook import Results
from lori_nb.study.questions import run_pairs, unit_of
from lori_nb.study.settings import Settings
from lori_nb.study.style import title_of
from lori_nb.study.summary import Pair, as_columns, difference, seed_differences, seeds_interval, summarise

ROUNDING = 1e-12  # a mean difference of scores, all at most 1 in size, that is nothing but rounding
CLAIMED = 0.95  # of the gap, won back by Ortho-LoRA (arXiv 2601.09684)


def arrangement_scores(results: Results) -> pd.DataFrame:
    """Score on every task of single-task LoRA and of each way to learn all tasks in one adapter."""
    frames = []
    for name in arrangements(results.settings):
        specs = [spec for seed in results.settings.seed for spec in arrangement_specs(results.settings, seed)[name]]
        frames.append(results.rows_of(specs).assign(arrangement=name))
    return summarise(pd.concat(frames), ["arrangement", "task"])


def other_metrics(results: Results) -> pd.DataFrame:
    """Scores by the metrics that tasks report beside their own, such as MRPC's accuracy and STS-B's rank correlation.

    Columns arrangement, task, metric, value, low, high, n, of, seeds: means with t intervals over seeds. Empty where no
    task has such a metric.
    """
    settings, rows = results.settings, []
    for name, (place, task) in itertools.product(arrangements(settings), enumerate(settings.tasks)):
        runs = [results.run(arrangement_specs(settings, seed)[name][place]) for seed in settings.seed]
        for metric in get_task(task).also:
            values = [run.value(task, metric) for run in runs if run is not None]
            if values:
                about = {"arrangement": name, "task": task, "metric": metric}
                rows.append(about | as_columns(seeds_interval(values), "seeds") | {"seeds": len(values)})
    return pd.DataFrame(rows, columns=["arrangement", "task", "metric", "value", "low", "high", "n", "of", "seeds"])


def gaps(results: Results) -> pd.DataFrame:
    """Mean over tasks: what joint training loses against single tasks, what the other ways gain on it, what projection
    gains where joint training is not the same way without it, and where some train twice as long, what that gains and
    what joint training then loses.

    Columns difference, over, seeds, value, low, high, n, of; p, the paired t test over seeds, each for itself, and
    detectable, the least difference that it would find in four of five studies (NaN of one seed). Of what is measured.
    """
    settings = results.settings
    asked = {"single − joint": (SINGLE, JOINT)}
    for name in settings.joint_arms:
        beside = get_joint_arm(name).beside
        if beside != name:
            asked[f"{title_of(name)} − {beside if beside == JOINT else title_of(beside)}"] = (name, beside)
        if (plain := get_joint_arm(name).unprojected) in settings.joint_arms:
            asked[f"{title_of(name)} − {title_of(plain)}"] = (name, plain)
    if SINGLE_LONGER in arrangements(settings):
        asked |= {f"{title_of(SINGLE_LONGER)} − {title_of(a)}": (SINGLE_LONGER, a) for a in (SINGLE, JOINT_LONGER)}
    rows = []
    for title, (a, b) in asked.items():
        if not (pairs := arrangement_pairs(results, a, b)):
            continue  # not measured yet
        about = {"difference": title, "over": "mean over tasks", "seeds": len(pairs)}
        interval = as_columns(difference(pairs, settings.tasks), unit_of(pairs, settings.tasks))
        rows.append(about | interval | _tested(list(seed_differences(pairs, settings.tasks).values())))
    return pd.DataFrame(rows)


def _tested(differences: Sequence[float]) -> dict[str, float]:
    """The paired t test over seeds, and the difference that it would find in four of five studies."""
    if len(differences) < 2:
        return {"p": math.nan, "detectable": math.nan}
    found = paired_estimate(differences)
    return {"p": difference_p(found), "detectable": detectable_effect(found)}


def gap_recovery(results: Results) -> pd.DataFrame:
    """How much of what joint training loses each way wins back: (way − joint) / (single − joint), by task and in all;
    of a way that trains twice as long, with joint and single training as long.

    Columns arrangement, task ("mean over tasks" last), value, low, high (Fieller's interval over seeds), n, of; gap
    (single − joint) with gap_low and gap_high; shown, whether the gap's interval lies above zero, without which there
    was nothing to win back; p, the paired t test of the way against joint over seeds, each for itself, and detectable,
    the least difference that it would find in four of five studies. NaN where there is one seed.
    """
    settings = results.settings
    rows = []
    arms = [get_joint_arm(name) for name in settings.joint_arms if name not in (JOINT, JOINT_LONGER)]
    for name, beside, alone in ((arm.name, arm.beside, arm.alone) for arm in arms):
        for tasks in (*((task,) for task in settings.tasks), settings.tasks):
            gained, lost = (arrangement_pairs(results, way, beside, tasks) for way in (name, alone))
            gains, losses = (seed_differences(pairs, tasks) for pairs in (gained, lost))
            seeds = sorted(set(gains) & set(losses))
            if seeds:
                title = tasks[0] if len(tasks) == 1 else OVER_TASKS
                numbers = _recovery([gains[seed] for seed in seeds], [losses[seed] for seed in seeds])
                rows.append({"arrangement": name, "task": title} | numbers)
    return pd.DataFrame(rows)


def _recovery(gains: Sequence[float], losses: Sequence[float]) -> dict:
    gap = t_interval(losses)
    none = abs(gap.mean) < ROUNDING
    ratio = Interval(math.nan, math.nan, math.nan, len(gains)) if none else ratio_interval(gains, losses)
    about = {"gap": gap.mean, "gap_low": gap.low, "gap_high": gap.high, "shown": gap.low > 0}
    return as_columns(ratio, "seeds") | about | _tested(gains)


def claimed_recovery(table: pd.DataFrame) -> str:
    """A sentence on the paper's share of the gap, from a table of :func:`gap_recovery`, mean over tasks; another where
    ways of twice the steps stand there.

    Confirmed where the whole interval of Ortho-LoRA's share lies above :data:`CLAIMED`, refuted where it lies below,
    and else undecided: where it contains that number, where there was no gap to win back, and with one seed.
    """
    claim = f"The paper's {CLAIMED:.0%} of the gap (arXiv 2601.09684) is"
    told = _claimed(table, ORTHO, claim)
    if ORTHO_LONGER not in set(table["arrangement"]):
        return told
    return f"{told} {_claimed(table, ORTHO_LONGER, 'With twice the steps it is')}"


def _claimed(table: pd.DataFrame, way: str, claim: str) -> str:
    chosen = table[(table["arrangement"] == way) & (table["task"] == OVER_TASKS)]
    if chosen.empty:
        return f"{claim} not measured here."
    row = chosen.iloc[0]
    if row["n"] == 1:
        return f"{claim} undecided: with one seed the gap has no interval."
    n = f"mean over tasks, n = {int(row['n'])} {row['of']}"
    if not row["shown"]:
        gap = interval_text(row["gap"], row["gap_low"], row["gap_high"], 3, signed=True)
        return f"{claim} undecided at this size: single − joint is {gap} ({n}), so that no gap is shown."
    word = "confirmed" if row["low"] > CLAIMED else "refuted" if row["high"] < CLAIMED else "undecided"
    share = interval_text(row["value"], row["low"], row["high"], 2)
    return f"{claim} {word} at this size: Ortho-LoRA wins back {share} of it ({n})."


def arrangement_costs(results: Results) -> pd.DataFrame:
    """Mean score over tasks of every arrangement beside what training it costs, all of its adapters together.

    Columns arm (the arrangement), title, value, low, high, n, of, seeds, metric; adapters; trainable_parameters;
    training_pflops (10¹⁵ operations counted from shapes, without what is done to finished gradients, so that solving
    conflicts is not in them). Operations are means over seeds.
    """
    settings, rows = results.settings, []
    for name in arrangements(settings):
        by_seed = [list(dict.fromkeys(arrangement_specs(settings, seed)[name])) for seed in settings.seed]
        found = results.rows_of([spec for specs in by_seed for spec in specs])
        if found.empty:
            continue
        score = summarise(found.assign(arm=name), ["arm"]).iloc[0].to_dict()
        first = by_seed[0]
        size = {"adapters": len(first), "trainable_parameters": sum(map(trainable_parameters, first))}
        size["training_pflops"] = sum(training_flops(s) for specs in by_seed for s in specs) / len(by_seed) / PETA
        rows.append(score | {"title": title_of(name)} | size)
    return pd.DataFrame(rows)


def arrangement_pairs(results: Results, a: str, b: str, tasks: Sequence[str] | None = None) -> dict[int, list[Pair]]:
    """Seed → pairs of runs, arrangement a against b, on every task or on some."""
    settings = results.settings
    places = [settings.tasks.index(task) for task in tasks or settings.tasks]

    def specs(name: str) -> Callable[[int], list[RunSpec]]:
        return lambda seed: [arrangement_specs(settings, seed)[name][place] for place in places]

    return run_pairs(results, specs(a), specs(b))


def rows_per_task(settings: Settings) -> tuple[int, int]:
    """Training rows that a task has in a run of its own, and in the shared adapter, where they differ most."""
    shared = settings.joint_steps * (settings.joint_batch_size // len(settings.tasks))
    alone = [settings.steps_on(task) * settings.batch_size for task in settings.tasks]
    return max(alone, key=lambda rows: abs(rows - shared)), shared

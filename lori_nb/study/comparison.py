"""Arms beside tuned LoRA: paired differences over seeds and rows, what the design can tell, and what each arm costs.

Every table is tidy, one measurement a row, as the figures of :mod:`lori_nb.study.figures_lori` and the reference
tables take it. Differences are in the unit of the scores, arm − LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from lori_nb.analysis.equivalence import ALPHA, Verdict, equivalence_verdict, holm
from lori_nb.lab.flops import prefix_flops, training_flops
from lori_nb.lab.specs import RunSpec
from lori_nb.study.arms import BASELINE, arm_spec, arms_of, get_arm
from lori_nb.study.choices import choice_arms, choice_specs, continued_arms, merged_arm, second_task
from lori_nb.study.notebook import Results
from lori_nb.study.questions import run_pairs, unit_of
from lori_nb.study.settings import Settings
from lori_nb.study.summary import (
    Pair,
    as_columns,
    difference,
    estimate,
    estimate_unit,
    group_word,
    seed_differences,
    summarise,
    text_of,
)

MARGIN = 0.05  # five points: what "equivalent" may cost at most here, a choice of this kit and not of the papers
OVER_TASKS = "mean over tasks"
PETA = 1e15
ALONE, MERGED, SECOND, CHANGE = "alone", "two merged", "second task after the first", "change of the first task by it"


def other_methods(results: Results) -> list[str]:
    """The study's methods but the baseline."""
    return [name for name in results.settings.method if name != BASELINE]


def arms_beside(settings: Settings, question: str, *methods: str) -> list[str]:
    """Some methods and then the study's arms of a question."""
    return [*methods, *arms_of(settings, question)]


def arm_lines(results: Results, question: str) -> list[str]:
    """One sentence for each arm of a question: its difference to LoRA on every task of ``arm_tasks`` (of the study, for
    "longer"), with its verdict and what the design could have found.
    """
    names = arms_of(results.settings, question)
    if not names:
        return [f"No arm of the question {question!r} is in this study; lori_nb.study.arms names them."]
    table = longer(results) if question == "longer" else compared(results, names, results.settings.arm_tasks)
    return [
        f"{row['title']} − {get_arm(get_arm(row['arm']).beside).title}, {row['task']}: {text_of(row, 3, True)}; "
        f"{_told(row)}"
        for _, row in table.iterrows()
    ]


def longer(results: Results) -> pd.DataFrame:
    """LoRA trained twice as long beside LoRA, then LoRI, and LoRA trained longer still, beside that, as
    :func:`compared` on every task; empty where the study has no such arm.
    """
    arms = arms_of(results.settings, "longer")
    beside = dict.fromkeys(get_arm(name).beside for name in arms)
    return compared(results, [*beside, *arms])


def marked_verdict(row: pd.Series) -> str:
    """A row's verdict, with * where it is equivalent and yet differs from 0, and † where Holm's adjustment over the
    arms takes the equivalence back.
    """
    marks = {"*": row["p_difference"] < ALPHA, "†": row["p_holm"] >= ALPHA}
    return row["verdict"] + "".join(sign for sign, on in marks.items() if on and row["verdict"] == "equivalent")


def _told(row: pd.Series) -> str:
    if row["seeds"] == 1:
        return str(row["verdict"])
    return f"{row['verdict']} (margin ± {row['margin']:g}), detectable {row['detectable']:.3f}"


def compared(
    results: Results, arms: Sequence[str] | None = None, tasks: Sequence[str] | None = None, margin: float = MARGIN
) -> pd.DataFrame:
    """Every arm's difference to what it is compared with, tuned LoRA for most, on each task and over all, with its
    verdict and what the design can tell.

    The intervals are crossed: they hold for other seeds on other rows (two-way random effects); with one seed they are
    over its rows alone. Rows that lack runs are left out.

    Args:
        arms: names of :mod:`lori_nb.study.arms`; None takes the study's methods.
        tasks: None takes the study's.
        margin: the difference that still counts as equivalent.

    Returns:
        Columns arm, title, method, task, value, low, high, n, of, seeds, verdict, margin, p_equivalence, p_difference,
        shown_margin, detectable, attainable_margin as in :class:`~lori_nb.analysis.equivalence.Verdict`, and p_holm:
        p_equivalence adjusted over the arms, for each task by itself.
    """
    rows = []
    for arm, task, pairs, several in _cells(results, arms, tasks):
        found = equivalence_verdict(estimate(pairs, several), margin)
        about = {"arm": arm, "title": get_arm(arm).title, "method": get_arm(arm).method, "task": task}
        rows.append(about | _interval_columns(found, pairs, several) | _verdict_columns(found))
    table = pd.DataFrame(rows, columns=None if rows else ["arm", "task", "value", "p_equivalence"])
    return table.assign(p_holm=table.groupby("task", sort=False)["p_equivalence"].transform(holm))


def _interval_columns(found: Verdict, pairs: dict[int, list[Pair]], tasks: Sequence[str]) -> dict:
    if len(pairs) == 1:  # an interval over the rows alone, which decides nothing
        return as_columns(difference(pairs, tasks), group_word(tasks))
    return as_columns(found.interval, estimate_unit(found.estimate, tasks))


def _verdict_columns(found: Verdict) -> dict:
    names = ("margin", "p_equivalence", "p_difference", "shown_margin", "detectable", "attainable_margin")
    numbers = {name: getattr(found, name) for name in names}
    return {"seeds": found.estimate.seeds, "verdict": found.word} | numbers


def differences(
    results: Results, arms: Sequence[str] | None = None, tasks: Sequence[str] | None = None
) -> pd.DataFrame:
    """The single differences behind :func:`compared`: columns arm, task, seed, value."""
    rows = [
        {"arm": arm, "task": task, "seed": seed, "value": value}
        for arm, task, pairs, several in _cells(results, arms, tasks)
        for seed, value in seed_differences(pairs, several).items()
    ]
    return pd.DataFrame(rows, columns=["arm", "task", "seed", "value"])


def headline(results: Results, arm: str = "lori-s", margin: float = MARGIN) -> str:
    """One sentence: whether an arm is equivalent to tuned LoRA over all tasks, with its share of LoRA's parameters."""
    tasks = list(results.settings.tasks)
    pairs = _pairs(results, arm, tasks)
    if not pairs:
        return f"{get_arm(arm).title} beside LoRA: not measured"
    ours, theirs = next(iter(pairs.values()))[0]
    share = ours.provenance["trainable_parameters"] / theirs.provenance["trainable_parameters"]
    found = equivalence_verdict(estimate(pairs, tasks), margin)
    return f"{get_arm(arm).title} at {share:.1%} of LoRA's parameters: {found.describe(of=group_word(tasks))}"


def _cells(
    results: Results, arms: Sequence[str] | None, tasks: Sequence[str] | None
) -> Iterator[tuple[str, str, dict[int, list[Pair]], list[str]]]:
    """(arm, name of the task or of their mean, pairs of runs by seed, the tasks meant), where runs are there."""
    arms = other_methods(results) if arms is None else arms
    tasks = list(results.settings.tasks if tasks is None else tasks)
    groups = {task: [task] for task in tasks} | ({OVER_TASKS: tasks} if len(tasks) > 1 else {})
    for name, several in groups.items():
        for arm in arms:
            pairs = _pairs(results, arm, several)
            if pairs:
                yield arm, name, pairs, several


def _pairs(results: Results, arm: str, tasks: Sequence[str]) -> dict[int, list[Pair]]:
    def specs(name: str, seed: int) -> list[RunSpec]:
        return [arm_spec(results.settings, name, task, seed) for task in tasks]

    return run_pairs(results, lambda seed: specs(arm, seed), lambda seed: specs(get_arm(arm).beside, seed))


def costs(results: Results, arms: Sequence[str] | None = None, tasks: Sequence[str] | None = None) -> pd.DataFrame:
    """Mean score of every arm over tasks beside what its training costs.

    Returns:
        Columns arm, title, method, value, low, high, n, of, seeds, metric, trainable_parameters, training_pflops,
        calibration_pflops (the part of it that finds the mask), prefix_pflops (filling the cache below the adapters,
        which all arms share). Operations are those of one run, in 10¹⁵, means over tasks and seeds.
    """
    settings = results.settings
    tasks = list(settings.tasks if tasks is None else tasks)
    frames, sizes = [], []
    for arm in settings.method if arms is None else arms:
        seeds = settings.seed if arm in settings.method else settings.arm_seed
        specs = [arm_spec(settings, arm, task, seed) for task in tasks for seed in seeds]
        frames.append(results.rows_of(specs).assign(arm=arm))
        about = {"arm": arm, "title": get_arm(arm).title, "method": get_arm(arm).method}
        sizes.append(about | _operations(specs))
    rows = pd.concat(frames, ignore_index=True)
    parameters = rows.groupby("arm", sort=False)["trainable_parameters"].first().reset_index()
    return pd.DataFrame(sizes).merge(summarise(rows, ["arm"]), on="arm").merge(parameters, on="arm")


def _operations(specs: Sequence[RunSpec]) -> dict[str, float]:
    """Means over runs, in units of 10¹⁵ operations."""
    whole = sum(training_flops(spec) for spec in specs)
    calibration = sum(training_flops(spec.calibration) for spec in specs if spec.calibration)
    prefix = sum(prefix_flops(spec) for spec in specs)
    named = {"training_pflops": whole, "calibration_pflops": calibration, "prefix_pflops": prefix}
    return {name: total / len(specs) / PETA for name, total in named.items()}


def bought(results: Results) -> pd.DataFrame:
    """What each choice of :mod:`lori_nb.study.choices` buys, on the seeds of the arms.

    Columns arm, measure, value, low, high, n, of, seeds; the measure is :data:`ALONE` (mean score over ``arm_tasks``),
    :data:`MERGED` (the same of the merge), :data:`SECOND` (score of the second task) or :data:`CHANGE` (score of the
    first task after the second − before it, paired by rows). Empty where the study has no choice.
    """
    settings, frames = results.settings, []
    for name in choice_arms(settings) if choice_specs(settings) else ():
        alone = [arm_spec(settings, name, task, seed) for seed in settings.arm_seed for task in settings.arm_tasks]
        merged = [merged_arm(settings, name, seed) for seed in settings.arm_seed]
        rows = {ALONE: results.rows_of(alone), MERGED: results.rows_of(merged)}
        if name in continued_arms(settings):
            after = results.rows_of([second_task(settings, name, seed) for seed in settings.arm_seed])
            rows[SECOND] = after[after["task"] == settings.arm_tasks[1]]
            frames.append(_change(results, name))
        frames += [
            summarise(each.assign(arm=name, measure=measure), ["arm", "measure"]) for measure, each in rows.items()
        ]
    columns = ["arm", "measure", "value", "low", "high", "n", "of", "seeds"]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def _change(results: Results, name: str) -> pd.DataFrame:
    settings, tasks = results.settings, results.settings.arm_tasks[:1]

    def before(seed: int) -> list[RunSpec]:
        return [arm_spec(settings, name, tasks[0], seed)]

    pairs = run_pairs(results, lambda seed: [second_task(settings, name, seed)], before)
    about = {"arm": name, "measure": CHANGE, "seeds": len(pairs)}
    return pd.DataFrame([about | as_columns(difference(pairs, tasks), unit_of(pairs, tasks))] if pairs else [])

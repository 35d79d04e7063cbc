"""What each notebook asks for, as specs: the same functions expand a study beforehand and fetch its runs in the
notebook.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from lori_nb.lab.specs import MergeSpec, RunSpec, Spec
from lori_nb.study.arms import arm_spec, arms_of, get_arm
from lori_nb.study.cells import base_runs, single
from lori_nb.study.choices import choice_specs
from lori_nb.study.joint_arms import planned_arrangements
from lori_nb.study.pairs import pair_plan
from lori_nb.study.profiles import NOTEBOOKS
from lori_nb.study.sequences import sequence_specs
from lori_nb.study.settings import Settings


def plan_lori(settings: Settings) -> list[Spec]:
    """Base, every method on every task, and the other baselines on some."""
    return [
        *base_runs(settings),
        *method_specs(settings),
        *beside(settings, "baseline", ("lora",)),
        *longer_specs(settings),
    ]


def plan_masks(settings: Settings) -> list[Spec]:
    """LoRI-S at every sparsity, and with other masks beside LoRA and LoRI-S as they are."""
    return [*sparsity_specs(settings), *beside(settings, "mask", ("lora", "lori-s"))]


def beside(settings: Settings, question: str, references: Sequence[str]) -> list[RunSpec]:
    """The arms of a question and, where there are any, the references that they are compared with, on ``arm_tasks``."""
    arms = arms_of(settings, question)
    grid = itertools.product((*references, *arms) if arms else (), settings.arm_tasks, settings.arm_seed)
    return [arm_spec(settings, name, task, seed) for name, task, seed in grid]


def longer_specs(settings: Settings) -> list[RunSpec]:
    """The arms that train longer, on every task. At twice the steps the methods themselves are compared: on every seed.
    Whether still more steps would gain is asked of ``arm_seed``.
    """
    arms = arms_of(settings, "longer")
    grid = itertools.product(("lora-longer", *arms) if arms else (), settings.tasks, settings.seed)
    return [
        arm_spec(settings, name, task, seed)
        for name, task, seed in grid
        if seed in settings.arm_seed or get_arm(name).step_factor == 2
    ]


def sparsity_specs(settings: Settings) -> list[RunSpec]:
    """LoRI-S at every sparsity; 0 is LoRI-D with its own learning rate."""
    specs: list[RunSpec] = []
    for task, seed in itertools.product(settings.mask_tasks, settings.arm_seed):
        specs.append(single(settings, "lori-d", task, seed))
        specs += [single(settings, "lori-s", task, seed, sparsity=s) for s in settings.sparsities if s > 0]
    return specs


def plan_ortho_lora(settings: Settings) -> list[Spec]:
    """One LoRA adapter a task, and every way of the settings to learn all tasks in one."""
    return planned_arrangements(settings)


def plan_interference(settings: Settings) -> list[Spec]:
    """The single-task adapters whose subspaces are compared, those whose A is drawn by another policy, and what these
    and structured masks buy in merges and after a second task; none where adapters from elsewhere are given.

    Raises ValueError for one adapter from elsewhere alone, which overlaps with nothing.
    """
    if len(settings.adapters) == 1:
        raise ValueError(f"adapters must be at least 2 to compare, or none; found {settings.adapters[0]}")
    if settings.adapters:
        return []
    drawn = beside(settings, "subspace", ("lora", *settings.method))
    return [*method_specs(settings), *drawn, *choice_specs(settings)]


def method_specs(settings: Settings) -> list[RunSpec]:
    """Every method on every task and seed, each alone."""
    grid = itertools.product(settings.method, settings.tasks, settings.seed)
    return [single(settings, method, task, seed) for method, task, seed in grid]


def plan_merging(settings: Settings) -> list[Spec]:
    """All tasks' adapters of one method merged, for every way to merge and every weight, beside the adapters alone; the
    same on rows held out of training, by which weights are chosen; and the study of pairs, where there is one. None
    where adapters from elsewhere are given.
    """
    if settings.adapters:
        return []
    return [*method_specs(settings), *merge_specs(settings), *held_out_merges(settings), *pair_plan(settings)]


def merge_specs(settings: Settings) -> list[MergeSpec]:
    """Every method, seed, way to merge and weight, the paper's weight too, scored on the test rows."""
    return [
        merged_spec(settings, method, seed, merge, weight)
        for method, seed, merge in itertools.product(settings.method, settings.seed, settings.merges)
        for weight in dict.fromkeys((*settings.weights, *paper_weights(settings, method)))
    ]


def held_out_merges(settings: Settings) -> list[MergeSpec]:
    """Every method, seed, way to merge and weight of the settings, scored on the tuning split."""
    grid = itertools.product(settings.method, settings.seed, settings.merges, settings.weights)
    return [replace(merged_spec(settings, *each), score_on="tune", test_rows=settings.tune_rows) for each in grid]


def merged_spec(settings: Settings, method: str, seed: int, merge: str, weight: float) -> MergeSpec:
    """One method's adapters of all tasks, merged with one weight for all."""
    parts = tuple(single(settings, method, task, seed) for task in settings.tasks)
    return MergeSpec(parts, (weight,) * len(parts), merge, settings.merge_test_rows or settings.test_rows)


# Of the LoRI authors' scripts, for merges of 3 and of 4 adapters; they merge so by concatenation and linearly.
PAPER_WEIGHTS = {"lori-d": {3: 0.5, 4: 0.4}, "lori-s": {3: 0.4, 4: 0.3}}


def paper_weights(settings: Settings, method: str) -> tuple[float, ...]:
    """The LoRI authors' weight for so many adapters of a method; none where they give none."""
    weight = PAPER_WEIGHTS.get(method, {}).get(len(settings.tasks))
    return () if weight is None else (weight,)


def plan_forgetting(settings: Settings) -> list[Spec]:
    """Tasks one after another, every way in every order, beside each task alone."""
    return sequence_specs(settings)


PLANS: dict[str, Callable[[Settings], list[Spec]]] = {
    "01_lori": plan_lori,
    "02_masks": plan_masks,
    "03_ortho_lora": plan_ortho_lora,
    "04_interference": plan_interference,
    "05_merging": plan_merging,
    "06_forgetting": plan_forgetting,
}


def plan_report(settings: Settings) -> list[Spec]:
    """Everything that the other notebooks ask for."""
    return [spec for name in NOTEBOOKS if name != "07_report" for spec in PLANS[name](settings)]


PLANS["07_report"] = plan_report

"""The study of merging by pairs and by numbers, as runs: many small tasks, an adapter each, merged two by two, and in
random subsets of 2, 3, … up to all.

It has its own tasks (setting ``pair_tasks``; none: no such study) and a size of its own, since it needs many adapters
and few rows of each. Everything else, learning rates too, is that of the settings.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lori_nb.lab.specs import MergeSpec, RunSpec, Spec
from lori_nb.study.cells import base_runs, joint, single
from lori_nb.study.settings import Settings

MERGE = "cat"  # exact: what interferes is the adapters, not the way to merge them
JOINT_ROWS = 2  # rows a task and step of the joint run


@dataclass(frozen=True)
class Merged:
    """A merge of some tasks' adapters of one method and seed."""

    method: str
    seed: int
    tasks: tuple[str, ...]
    spec: MergeSpec


def pair_settings(settings: Settings) -> Settings:
    """The settings of this study's runs; ValueError where there is no such study."""
    if not settings.pair_tasks:
        raise ValueError("pair_tasks must name at least 3 tasks for a study of pairs; found none")
    return replace(
        settings,
        tasks=settings.pair_tasks,
        first=settings.pair_tasks[0],
        steps=settings.pair_steps,
        task_steps={},
        train_rows=settings.pair_train_rows,
        test_rows=settings.pair_rows,
        shots=0,
        joint_steps=settings.pair_joint_steps,
        joint_batch_size=JOINT_ROWS * len(settings.pair_tasks),
        pair_tasks=(),
    )


def alone_specs(settings: Settings) -> dict[tuple[str, int, str], RunSpec]:
    """(method, seed, task) → the run of one adapter on its own task."""
    own = pair_settings(settings)
    grid = itertools.product(own.method, own.seed, own.tasks)
    return {key: single(own, key[0], key[2], key[1]) for key in grid}


def pair_merges(settings: Settings) -> Iterator[Merged]:
    """Every two tasks' adapters merged at ``pair_weight`` each, scored on both tasks: one run for both orders."""
    for method, seed in itertools.product(settings.method, settings.seed):
        for tasks in itertools.combinations(settings.pair_tasks, 2):
            yield _merged(settings, method, seed, tasks, settings.pair_weight)


def subset_merges(settings: Settings) -> Iterator[Merged]:
    """The adapters of every subset merged, each at :func:`subset_weight`."""
    for method, seed in itertools.product(settings.method, settings.seed):
        for tasks in subsets(settings):
            yield _merged(settings, method, seed, tasks, subset_weight(settings, len(tasks)))


def _merged(settings: Settings, method: str, seed: int, tasks: tuple[str, ...], weight: float) -> Merged:
    own = pair_settings(settings)
    parts = tuple(single(own, method, task, seed) for task in tasks)
    return Merged(method, seed, tasks, MergeSpec(parts, (weight,) * len(parts), MERGE, own.test_rows))


def subset_weight(settings: Settings, count: int) -> float:
    """The weight of each of ``count`` adapters: ``pair_total`` in all, and never more than 1 each."""
    return min(1.0, settings.pair_total / count)


def subsets(settings: Settings) -> list[tuple[str, ...]]:
    """``pair_draws`` different random subsets of each of ``pair_sizes`` tasks (all there are where these are fewer),
    the same for every method and seed, so that these are compared on the same tasks.
    """
    tasks, found = settings.pair_tasks, []
    for size in settings.pair_sizes:
        draws, chosen = random.Random(f"subsets of {size}"), {}
        while len(chosen) < min(settings.pair_draws, math.comb(len(tasks), size)):
            picked = sorted(draws.sample(range(len(tasks)), size))
            chosen[tuple(tasks[place] for place in picked)] = True
        found += chosen
    return found


def joint_specs(settings: Settings) -> dict[int, RunSpec]:
    """Seed → one LoRA trained on all these tasks at once; none where ``pair_joint_steps`` is 0."""
    if not settings.pair_joint_steps:
        return {}
    return {seed: joint(pair_settings(settings), "lora", seed) for seed in settings.seed}


def bare_specs(settings: Settings) -> list[RunSpec]:
    """The frozen base on every one of these tasks."""
    return base_runs(pair_settings(settings))


def pair_plan(settings: Settings) -> list[Spec]:
    """All runs of the study; none without ``pair_tasks``."""
    if not settings.pair_tasks:
        return []
    merges = [each.spec for each in (*pair_merges(settings), *subset_merges(settings))]
    return [*bare_specs(settings), *alone_specs(settings).values(), *joint_specs(settings).values(), *merges]

"""What a choice buys: how the A's of several tasks are drawn, and whether a mask keeps entries of B or whole rows.

On ``arm_tasks``: the score of adapters alone, how far they overlap (:func:`lori_nb.study.geometry.choice_sets`), the
score of their plain merge, and what becomes of the first task when the second is learned in the same adapter. One
adapter has one A, however the other tasks' are drawn, so that the last is asked of methods and structures alone.
"""

from __future__ import annotations

from dataclasses import replace

from lori_nb.lab.methods import get_method
from lori_nb.lab.specs import MergeSpec, RunSpec, Spec
from lori_nb.study.arms import arm_spec, arms_of, get_arm
from lori_nb.study.cells import check_goes_on, single
from lori_nb.study.settings import Settings


def choice_arms(settings: Settings) -> list[str]:
    """The methods, then the study's arms that draw A otherwise, and those whose masks have another structure."""
    return [*settings.method, *arms_of(settings, "subspace"), *_structures(settings)]


def continued_arms(settings: Settings) -> list[str]:
    """Those of :func:`choice_arms` that learn a second task in the same adapter: without the draws of A."""
    return [*settings.method, *_structures(settings)]


def _structures(settings: Settings) -> list[str]:
    return [name for name in settings.arms if "mask_structure" in get_arm(name).settings]


def choice_specs(settings: Settings) -> list[Spec]:
    """Structured masks on each task, all merges, and second tasks in the same adapter, for every seed of the arms; none
    without a choice or a second task, and none where adapters from elsewhere are given.

    Raises ValueError for masks that draw another A for every task.
    """
    if settings.adapters or len(settings.arm_tasks) < 2 or not (arms_of(settings, "subspace") or _structures(settings)):
        return []
    for name in continued_arms(settings):
        if get_method(get_arm(name).method).masked:
            check_goes_on(get_arm(name).settings.get("mask_origin", settings.mask_origin), name)
    specs: list[Spec] = []
    for seed in settings.arm_seed:
        specs += [arm_spec(settings, arm, task, seed) for arm in _structures(settings) for task in settings.arm_tasks]
        specs += [merged_arm(settings, name, seed) for name in choice_arms(settings)]
        specs += [second_task(settings, name, seed) for name in continued_arms(settings)]
    return specs


def merged_arm(settings: Settings, name: str, seed: int) -> MergeSpec:
    """One arm's adapters of all ``arm_tasks``, added up with ``pair_weight`` each."""
    parts = tuple(arm_spec(settings, name, task, seed) for task in settings.arm_tasks)
    return MergeSpec(parts, (settings.pair_weight,) * len(parts), "cat", settings.test_rows)


def second_task(settings: Settings, name: str, seed: int) -> RunSpec:
    """The second of ``arm_tasks`` learned in the adapter of the first, by a new mask where there are masks; scored on
    both.
    """
    first, second = settings.arm_tasks[:2]
    arm, start = get_arm(name), arm_spec(settings, name, first, seed)
    both = tuple(sorted((first, second)))
    return single(replace(settings, **arm.settings), arm.method, second, seed, start=start, evaluate=both)

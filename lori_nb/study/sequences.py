"""Tasks learned one after another, as chains of runs: each starts from the run before it, whatever the rest of its
sequence, so that sequences which begin alike share what they share.

A *way* is how an adapter goes from task to task; settings and figures know it by name. The first task's run is that of
the task alone, so that it is trained once for all studies.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lori_nb.lab.methods import METHODS, get_method
from lori_nb.lab.specs import MergeSpec, RunSpec, Spec
from lori_nb.study.cells import base_runs, joint, rate_of, single
from lori_nb.study.pairs import pair_settings
from lori_nb.study.profiles import Settings

ORDERS = ("given", "balanced", "all")
MERGED, JOINT, DISJOINT = "merged", "joint", "lori-s-disjoint"


@dataclass(frozen=True)
class Way:
    """How tasks are learned one after another.

    Attributes:
        first: the method of the first task.
        later: the method of each further task, which goes on from the run before.
        changes: fields of the later runs.
        every_order: whether all orders are run where the settings ask for all; else a balanced few.
    """

    name: str
    title: str
    first: str
    later: str
    changes: Mapping = field(default_factory=dict)
    every_order: bool = False


WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way("lora", "LoRA", "lora", "lora", every_order=True),
        Way("lori-d", "LoRI-D", "lori-d", "lori-d", every_order=True),
        Way("lori-s", "LoRI-S, independent masks", "lori-s", "lori-s", every_order=True),
        Way(DISJOINT, "LoRI-S, disjoint masks", "lori-s", "lori-s", {"mask_origin": "free"}, every_order=True),
        Way("ewc", "LoRA + EWC", "lora", "ewc"),
        Way("o-lora", "O-LoRA", "lora", "o-lora"),
        Way("replay", "LoRA + replay", "lora", "replay"),
        Way("memory-projection", "Ortho-LoRA on memory", "lora", "memory-projection"),
        Way(MERGED, "LoRI-S, one a task, merged", "lori-s", "lori-s"),
        Way(JOINT, "LoRA, all tasks jointly", "lora", "lora"),
    )
}


def get_way(name: str) -> Way:
    """The named way; a registered method's own name is that method on every task. ValueError lists the known ones."""
    if name in WAYS:
        return WAYS[name]
    if name in METHODS and METHODS[name].trains:
        return Way(name, METHODS[name].title, name, name)
    raise ValueError(f"ways must be among {', '.join(dict.fromkeys((*WAYS, *METHODS)))}; found {name!r}")


def orders_of(settings: Settings, way: str) -> list[tuple[str, ...]]:
    """The sequences of a way: the first task, then the others in every order that the settings ask for.

    "given" is the settings' own sequence; "all" every order of the tasks after the first; "balanced" as many as there
    are such tasks, each of them once at every place (a cyclic Latin square).
    """
    first, *others = settings.sequence
    if settings.orders == "given" or way == JOINT:
        return [settings.sequence]
    if settings.orders == "all" and get_way(way).every_order:
        return [(first, *order) for order in itertools.permutations(others)]
    return [(first, *others[place:], *others[:place]) for place in range(max(1, len(others)))]


def stages(settings: Settings, way: str, order: Sequence[str], seed: int) -> list[Spec]:
    """What is scored after each task of a sequence, on every task of it: the runs themselves, but for the first.

    The first task's run is scored on its own task alone, as everywhere; here its adapter is scored again on all.
    """
    if way == JOINT:
        return [replace(joint(replace(settings, tasks=settings.sequence), "lora", seed), evaluate=settings.sequence)]
    if way == MERGED:
        return [_merged(settings, order[: count + 1], seed) for count in range(len(order))]
    first, *later = stage_runs(settings, way, order, seed)
    return [_scored_again(settings, (first,), (1.0,)), *later]


def stage_runs(settings: Settings, way: str, order: Sequence[str], seed: int) -> list[RunSpec]:
    """The chain of runs of a sequence; while the second task trains, all tasks are scored at the steps to watch."""
    chosen, shorter = get_way(way), _as_stages(settings)
    runs = [first_run(settings, way, seed)]
    for place, task in enumerate(order[1:], start=1):
        watch = tuple(step for step in settings.watch if step < shorter.steps_on(task)) if place == 1 else ()
        changes = {"watch": watch, "watch_rows": settings.watch_rows} if watch else {}
        changes |= {"options": options_of(settings, chosen.later)} | dict(chosen.changes)
        start = {"start": runs[-1], "evaluate": settings.sequence}
        runs.append(single(shorter, chosen.later, task, seed, **start, **changes))
    return runs


def _as_stages(settings: Settings) -> Settings:
    """The settings of the runs after the first."""
    steps = {} if settings.sequence_steps is None else {"steps": settings.sequence_steps, "task_steps": {}}
    return replace(settings, test_rows=settings.sequence_rows, **steps)


def steps_after(settings: Settings, task: str) -> int:
    """Optimiser steps of a task that is learned after another."""
    return _as_stages(settings).steps_on(task)


def first_run(settings: Settings, way: str, seed: int) -> RunSpec:
    """The run of a sequence's first task."""
    return single(settings, get_way(way).first, settings.sequence[0], seed)


def options_of(settings: Settings, method: str) -> tuple[tuple[str, str], ...]:
    """The numbers of a continual method that the settings change, as a run's options."""
    known = get_method(method).strengths
    asked = settings.strengths.get(method, {})
    return tuple((name, f"{asked[name]:g}") for name in known if name in asked)


def _scored_again(settings: Settings, parts: tuple[RunSpec, ...], weights: tuple[float, ...]) -> MergeSpec:
    return MergeSpec(parts, weights, "cat", settings.sequence_rows, evaluate=settings.sequence)


def _merged(settings: Settings, tasks: Sequence[str], seed: int) -> MergeSpec:
    """One adapter a task, merged; in the settings' order, so that the same tasks are merged once."""
    among = [task for task in settings.sequence if task in tasks]
    parts = tuple(single(settings, WAYS[MERGED].first, task, seed) for task in among)
    weight = settings.merged_weight if len(parts) > 1 else 1.0
    return _scored_again(settings, parts, (weight,) * len(parts))


def sequence_specs(settings: Settings) -> list[Spec]:
    """Everything that the study of forgetting asks for: all sequences, every task alone, the bare base."""
    grid = [(way, order, seed) for way in settings.ways for seed in settings.seed for order in orders_of(settings, way)]
    every = [spec for way, order, seed in grid for spec in stages(settings, way, order, seed)]
    every += [first_run(settings, way, seed) for way in settings.ways if way != JOINT for seed in settings.seed]
    alone = [single(settings, "lora", task, seed) for task in settings.sequence for seed in settings.seed]
    many = [s for seed in settings.seed for of in (capacity_runs, capacity_alone) for s in of(settings, seed)]
    return [*every, *alone, *base_of(settings), *many]


def base_of(settings: Settings) -> list[RunSpec]:
    """The bare base on the sequence's tasks, without examples; none for an encoder."""
    return [spec for spec in base_runs(replace(settings, tasks=settings.sequence)) if spec.shots == 0]


def capacity_runs(settings: Settings, seed: int) -> list[RunSpec]:
    """Disjoint masks on one task after another, each scored on its own task; none where no tasks are given."""
    own, runs = _of_capacity(settings), []
    for task in settings.capacity_tasks:
        changes = {"start": runs[-1], **WAYS[DISJOINT].changes, "evaluate": (task,)} if runs else {}
        runs.append(single(own, "lori-s", task, seed, **changes))
    return runs


def capacity_alone(settings: Settings, seed: int) -> list[RunSpec]:
    """The same tasks, each in an adapter of its own."""
    return [single(_of_capacity(settings), "lori-s", task, seed) for task in settings.capacity_tasks]


def _of_capacity(settings: Settings) -> Settings:
    """Many tasks need short runs: those of the study of pairs, where there is one, which has the tasks alone too."""
    return pair_settings(settings) if settings.pair_tasks else settings


def check_sequence(settings: Settings) -> None:
    """ValueError, naming the parameter, for ways, orders or tasks that cannot be studied."""
    for name in settings.ways:
        rate_of(settings, get_way(name).later, "lora")
    if settings.orders not in ORDERS:
        raise ValueError(f"orders must be one of {', '.join(ORDERS)}; found {settings.orders!r}")
    if len(set(settings.sequence)) < len(settings.sequence) or len(settings.sequence) < 1:
        raise ValueError(f"sequence must hold tasks, each once; found {', '.join(settings.sequence) or 'none'}")
    for method, numbers in settings.strengths.items():
        known = get_method(method).strengths
        for name in numbers:
            if name not in known:
                raise ValueError(f"strengths of {method} must be among {', '.join(known) or 'none'}; found {name!r}")

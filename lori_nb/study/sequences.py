"""Tasks learned one after another, as chains of runs: each starts from the run before it and is scored on its own
task. What it is worth on all tasks is a run of its own, which scores a finished adapter and trains nothing, so that
sequences which begin alike share their runs, whatever comes later (scores taken while the second task trains are part
of that run).

A *way* is how an adapter goes from task to task; settings and figures know it by name. The first task's run is that of
the task alone, so that it is trained once for all studies; where any task may be first, and later tasks have steps of
their own number, all have that number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lori_nb.lab.methods import METHODS, get_mask_origin, get_method, without_begin
from lori_nb.lab.models import base_kind, empty_body
from lori_nb.lab.specs import MergeSpec, RunSpec, Spec
from lori_nb.lab.tasks import get_task
from lori_nb.method.adapters import target_linears
from lori_nb.method.masks import capacity, group_of
from lori_nb.study.cells import base_runs, check_goes_on, joint, rate_of, single
from lori_nb.study.pairs import pair_settings
from lori_nb.study.settings import Settings

ORDERS = ("given", "balanced", "all", "auto", "any-first")
ALL_OF = 3  # tasks after the first of which "auto" takes all orders
MERGED, JOINT, DISJOINT, CHAINED = "merged", "joint", "lori-s-disjoint", "lori-s-chained"


@dataclass(frozen=True)
class Way:
    """How tasks are learned one after another.

    Attributes:
        first: the method of the first task.
        later: the method of each further task, which goes on from the run before.
        changes: fields of the later runs.
        every_order: whether all orders are run where the settings ask for all; else a balanced few.
        masks_alone: whether a mask is found by its task alone, in an adapter of its own, as the LoRI authors' scripts
            find it; else by a run that goes on from the dense runs on the tasks before.
    """

    name: str
    title: str
    first: str
    later: str
    changes: Mapping = field(default_factory=dict)
    every_order: bool = False
    masks_alone: bool = True


WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way("lora", "LoRA", "lora", "lora", every_order=True),
        Way("lori-d", "LoRI-D", "lori-d", "lori-d", every_order=True),
        Way("lori-s", "LoRI-S, independent masks", "lori-s", "lori-s", every_order=True),
        Way(DISJOINT, "LoRI-S, disjoint masks", "lori-s", "lori-s", {"mask_origin": "free"}, every_order=True),
        Way(CHAINED, "LoRI-S, masks found in sequence", "lori-s", "lori-s", masks_alone=False),
        Way("ewc", "LoRA + EWC", "lora", "ewc"),
        Way("o-lora", "O-LoRA", "lora", "o-lora"),
        Way("replay", "LoRA + replay", "lora", "replay"),
        Way("memory-projection", "Ortho-LoRA on memory", "lora", "memory-projection"),
        Way(MERGED, "LoRI-S, one a task, merged", "lori-s", "lori-s"),
        Way(JOINT, "LoRA, all tasks jointly", "lora", "lora"),
    )
}


def get_way(name: str) -> Way:
    """The named way; a registered method's own name is that method on every task, but that one which differs from a
    built-in method by its hook ``begin`` alone starts with that method, whose first run it shares. ValueError lists the
    known ones.
    """
    if name in WAYS:
        return WAYS[name]
    if _trained(name):
        return Way(name, METHODS[name].title, without_begin(name) or name, name)
    trained = [method for method in METHODS if METHODS[method].trains]
    raise ValueError(f"ways must be among {', '.join(dict.fromkeys((*WAYS, *trained)))}; found {name!r}")


def _trained(method: str) -> bool:
    return method in METHODS and METHODS[method].trains


def orders_of(settings: Settings, way: str) -> list[tuple[str, ...]]:
    """The sequences of a way: the first task, then the others in every order that the settings ask for.

    "given" is the settings' own sequence; "all" every order of the tasks after the first; "balanced" those of
    :func:`latin_square`; "auto" all of up to :data:`ALL_OF` such tasks and balanced ones of more. Under these the first
    task, such as one of safety, stays first, since tables ask what becomes of it; it is the number of the others that
    counts. "any-first" is "auto" of all tasks, none held. Ways without ``every_order`` have balanced ones in place of
    all.
    """
    if settings.orders == "given" or way == JOINT:
        return [settings.sequence]
    held = 0 if settings.orders == "any-first" else 1
    first, others = settings.sequence[:held], settings.sequence[held:]
    asked = settings.orders == "all" or (settings.orders != "balanced" and len(others) <= ALL_OF)
    chosen = itertools.permutations(others) if asked and get_way(way).every_order else latin_square(others)
    return [(*first, *order) for order in chosen]


def latin_square(tasks: Sequence[str]) -> list[tuple[str, ...]]:
    """As many orders as tasks, each task once at every place, the given order first. Of an even number of tasks also
    each once right before every other (E. J. Williams 1949, doi:10.1071/CH9490149); of an odd number the cyclic ones,
    whose neighbours are not balanced (for 3, 5 and 7 tasks no so few orders are).
    """
    count = len(tasks)
    if count % 2:
        return [(*tasks[shift:], *tasks[:shift]) for shift in range(count)]
    row = [place // 2 if place % 2 == 0 else -(place // 2 + 1) for place in range(count)]  # 0, −1, 1, −2, 2, …
    at = {number % count: task for number, task in zip(row, tasks, strict=True)}
    return [tuple(at[(number + shift) % count] for number in row) for shift in range(count)] or [()]


def stages(settings: Settings, way: str, order: Sequence[str], seed: int) -> list[Spec]:
    """What is scored after each task of a sequence, on every task of it and on those of ``sequence_scored``; joint
    training has one stage.
    """
    if way == JOINT:
        return [_scored_again(settings, (joint_run(settings, seed),), (1.0,))]
    if way == MERGED:
        return [_merged(settings, order[: count + 1], seed) for count in range(len(order))]
    return [_scored_again(settings, (run,), (1.0,)) for run in stage_runs(settings, way, order, seed)]


def joint_run(settings: Settings, seed: int) -> RunSpec:
    """One LoRA adapter on all tasks of the sequence at once: notebook 3's, where those are the study's tasks."""
    same = set(settings.sequence) == set(settings.tasks)
    return joint(settings if same else replace(settings, tasks=settings.sequence), "lora", seed)


def stage_runs(settings: Settings, way: str, order: Sequence[str], seed: int) -> list[RunSpec]:
    """The chain of runs of a sequence; while the second task trains, it and the first are scored at the steps to
    watch.
    """
    chosen, shorter = get_way(way), _as_stages(settings)
    runs = [alone_run(settings, chosen.first, order[0], seed)]
    for place, task in enumerate(order[1:], start=1):
        watch = tuple(step for step in settings.watch if step < shorter.steps_on(task)) if place == 1 else ()
        watched = {"watch": watch, "watch_rows": settings.watch_rows, "evaluate": (order[0], task)} if watch else {}
        rate = {"learning_rate": settings.sequence_rates[way]} if way in settings.sequence_rates else {}
        changes = {"options": options_of(settings, chosen.later)} | dict(chosen.changes) | rate | watched
        run = single(shorter, chosen.later, task, seed, start=runs[-1], **changes)
        alone = alone_run(settings, chosen.later, task, seed) if chosen.masks_alone and run.calibration else run
        runs.append(replace(run, calibration=alone.calibration))
    return runs


def alone_run(settings: Settings, method: str, task: str, seed: int) -> RunSpec:
    """A method on a task alone, for as many steps as the task has in a sequence."""
    first = settings.orders != "any-first" and task == settings.first
    later = settings.sequence_steps is not None and not first
    return single(_as_stages(settings) if later else settings, method, task, seed)


def _as_stages(settings: Settings) -> Settings:
    """The settings of runs that are no first ones."""
    steps = {} if settings.sequence_steps is None else {"steps": settings.sequence_steps, "task_steps": {}}
    return replace(settings, test_rows=settings.sequence_rows, **steps)


def steps_after(settings: Settings, task: str) -> int:
    """Optimiser steps of a task that is learned after another."""
    return _as_stages(settings).steps_on(task)


def options_of(settings: Settings, method: str) -> tuple[tuple[str, str], ...]:
    """The numbers of a continual method that the settings change, as a run's options."""
    known = get_method(method).strengths
    asked = settings.strengths.get(method, {})
    changed = {name: asked[name] for name in known if name in asked and asked[name] != known[name]}
    return tuple((name, str(int(value)) if value == int(value) else repr(value)) for name, value in changed.items())


def _scored_again(settings: Settings, parts: tuple[RunSpec, ...], weights: tuple[float, ...]) -> MergeSpec:
    # in one order, so that equal scores have one hash
    scored = tuple(sorted((*settings.sequence, *settings.sequence_scored)))
    return MergeSpec(parts, weights, "cat", settings.sequence_rows, evaluate=scored)


def _merged(settings: Settings, tasks: Sequence[str], seed: int) -> MergeSpec:
    """One adapter a task, merged; in the settings' order, so that the same tasks are merged once."""
    parts = tuple(alone_run(settings, WAYS[MERGED].first, task, seed) for task in settings.sequence if task in tasks)
    return _scored_again(settings, parts, (merged_weight(settings, len(parts)),) * len(parts))


def merged_weight(settings: Settings, count: int) -> float:
    """The weight of each of ``count`` adapters, ``merged_total`` in all; 1 for one adapter."""
    return round(settings.merged_total / count, 6) if count > 1 else 1.0


def sequence_specs(settings: Settings) -> list[Spec]:
    """Everything that the study of forgetting asks for: all sequences, every task alone, the bare base.

    Raises ValueError for tasks that an encoder cannot take, disjoint masks on more tasks than fit, and masks that draw
    another A for every task.
    """
    _check_tasks(settings)
    for way in settings.ways:
        _check_masks(settings, way)
    if settings.capacity_tasks:
        check_goes_on(settings.mask_origin, "capacity_tasks")
    grid = [(way, order, seed) for way in settings.ways for seed in settings.seed for order in orders_of(settings, way)]
    every = [spec for way, order, seed in grid for spec in stages(settings, way, order, seed)]
    chains = [run for way, order, seed in grid if way != JOINT for run in chain_of(settings, way, order, seed)]
    alone = [alone_spec(settings, task, seed) for task in settings.sequence for seed in settings.seed]
    many = [s for seed in settings.arm_seed for of in (capacity_runs, capacity_alone) for s in of(settings, seed)]
    return [*chains, *every, *alone, *base_of(settings), *many]


def chain_of(settings: Settings, way: str, order: Sequence[str], seed: int) -> list[RunSpec]:
    """The runs whose adapters a way's scores are of."""
    if way == MERGED:
        return [alone_run(settings, WAYS[MERGED].first, task, seed) for task in settings.sequence]
    return stage_runs(settings, way, order, seed)


def alone_spec(settings: Settings, task: str, seed: int) -> MergeSpec:
    """LoRA on a task alone, for as many steps as the task has in a sequence, scored on the same rows."""
    return MergeSpec((alone_run(settings, "lora", task, seed),), (1.0,), "cat", settings.sequence_rows)


def base_of(settings: Settings) -> list[RunSpec]:
    """The bare base on the sequence's tasks and the rows scored there, without examples; none for an encoder."""
    shorter = replace(settings, tasks=settings.sequence, test_rows=settings.sequence_rows)
    return [spec for spec in base_runs(shorter) if spec.shots == 0]


def _check_tasks(settings: Settings) -> None:
    for name in ("sequence", "sequence_scored", "capacity_tasks") if base_kind(settings.base) == "encoder" else ():
        if odd := [task for task in getattr(settings, name) if get_task(task).reads != "encoder"]:
            raise ValueError(
                f"{name} must hold tasks with classes or a number for the encoder {settings.base}; "
                f"found {', '.join(odd)}"
            )


def _check_masks(settings: Settings, way: str) -> None:
    origin = get_way(way).changes.get("mask_origin", settings.mask_origin)
    if not get_method(get_way(way).later).masked:
        return
    if get_mask_origin(settings.mask_origin).disjoint:
        raise ValueError(f"mask_origin must leave disjoint masks to the way {DISJOINT}; found {settings.mask_origin!r}")
    if way != MERGED and len(settings.sequence) > 1:  # what is merged has an A a task anyway
        check_goes_on(origin, f"way {way}")
    if get_mask_origin(origin).disjoint and len(settings.sequence) > (fits := fitting(settings)):
        raise ValueError(
            f"sequence must hold at most {fits} tasks for {way}, which fit; found {len(settings.sequence)}"
        )


def fitting(settings: Settings) -> int:
    """How many tasks with disjoint masks fit into the adapter: by the scope's smallest number over groups."""
    own = _of_capacity(settings)
    linears = target_linears(empty_body(own.base), own.modules, own.last_layers)
    sizes: dict[str, int] = {}
    for name, linear in linears.items():
        group = group_of(name, own.mask_scope)
        columns = 1 if own.mask_structure == "rows" else own.rank
        sizes[group] = sizes.get(group, 0) + linear.out_features * columns
    return min(capacity(size, own.sparsity) for size in sizes.values())


def capacity_runs(settings: Settings, seed: int) -> list[RunSpec]:
    """Disjoint masks on one task after another, each scored on its own task; none where no tasks are given.

    Raises ValueError for more tasks than fit.
    """
    own, runs = _of_capacity(settings), []
    if settings.capacity_tasks and len(settings.capacity_tasks) > (fits := fitting(settings)):
        raise ValueError(f"capacity_tasks must be at most {fits}, which fit; found {len(settings.capacity_tasks)}")
    for alone in capacity_alone(settings, seed):
        (task,) = alone.tasks
        changes = {"start": runs[-1], **WAYS[DISJOINT].changes, "evaluate": (task,)} if runs else {}
        runs.append(replace(single(own, "lori-s", task, seed, **changes), calibration=alone.calibration))
    return runs


def capacity_alone(settings: Settings, seed: int) -> list[RunSpec]:
    """The same tasks, each in an adapter of its own."""
    return [single(_of_capacity(settings), "lori-s", task, seed) for task in settings.capacity_tasks]


def _of_capacity(settings: Settings) -> Settings:
    """Many tasks need short runs: those of the study of pairs, where there is one, which has the tasks alone too."""
    return pair_settings(settings) if settings.pair_tasks else settings


def check_sequence(settings: Settings) -> None:
    """ValueError, naming the parameter, for ways, orders or tasks that cannot be studied."""
    for name, least in {"sequence_rows": 1, "watch_rows": 1}.items():
        if getattr(settings, name) < least:
            raise ValueError(f"{name} must be at least {least}; found {getattr(settings, name)}")
    if any(step < 1 for step in settings.watch):
        raise ValueError(f"watch must hold steps of at least 1; found {min(settings.watch)}")
    for name in settings.ways:
        rate_of(settings, get_way(name).later, "lora")
    for name, rate in settings.sequence_rates.items():
        if name in (MERGED, JOINT) or (name not in WAYS and not _trained(name)):
            known = [way for way in dict.fromkeys((*WAYS, *settings.ways)) if way not in (MERGED, JOINT)]
            raise ValueError(f"sequence_rates must be of ways such as {', '.join(known)}; found {name!r}")
        if not 0 < rate < math.inf:
            raise ValueError(f"sequence_rates of {name} must be a finite number above 0; found {rate:g}")
    if settings.orders not in ORDERS:
        raise ValueError(f"orders must be one of {', '.join(ORDERS)}; found {settings.orders!r}")
    if len(set(settings.sequence)) < len(settings.sequence) or len(settings.sequence) < 1:
        raise ValueError(f"sequence must hold tasks, each once; found {', '.join(settings.sequence) or 'none'}")
    if both := sorted(set(settings.sequence) & set(settings.sequence_scored)):
        raise ValueError(f"sequence_scored must hold other tasks than sequence; found {', '.join(both)} in both")
    for method, numbers in settings.strengths.items():
        known = get_method(method).strengths
        for name in numbers:
            if name not in known:
                raise ValueError(f"strengths of {method} must be among {', '.join(known) or 'none'}; found {name!r}")

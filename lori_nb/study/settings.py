"""The settings of a study: their names, what they mean, and what values they may have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lori_nb.analysis.merging import ALSO_CALLED, MERGE_METHODS
from lori_nb.lab.methods import get_mask_origin, get_method
from lori_nb.lab.specs import SCHEDULES
from lori_nb.lab.tasks import expand_tasks, get_task
from lori_nb.method.masks import SCOPES, STRUCTURES
from lori_nb.method.subspaces import POLICIES

NULLS = ("independent", "given")  # rows of random adapters: at random, or in the row space of an adapter's own A


@dataclass(frozen=True)
class Settings:
    """Everything a study needs to expand into runs. Counts are in rows and steps.

    ``seed``, ``method`` and ``tasks`` take one value or a list. ``learning_rate`` maps a method, or "joint" and
    "ortho-lora" for the runs with several tasks, to AdamW's peak rate. ``first`` is the task that the forgetting study
    trains first; "auto" is the safety task, or else the first task.
    """

    profile: str
    base: str
    tasks: tuple[str, ...]
    seed: tuple[int, ...]
    method: tuple[str, ...]
    learning_rate: Mapping[str, float]
    rank: int
    alpha: float
    modules: str
    last_layers: int | None
    subspace: str
    sparsity: float
    mask_scope: str
    sparsities: tuple[float, ...]
    mask_tasks: tuple[str, ...]
    steps: int
    joint_steps: int
    batch_size: int
    joint_batch_size: int
    train_rows: int
    test_rows: int
    shots: int
    weights: tuple[float, ...]
    merges: tuple[str, ...]
    first: str
    dtype: str
    mask_origin: str = "same-a"  # where masks come from: keys of lori_nb.lab.methods.MASK_ORIGINS
    mask_structure: str = "entries"  # of B that masks keep: entries, or whole rows
    calibration_share: float = 1.0  # of the calibration run's schedule, trained before the mask is taken
    arms: tuple[str, ...] = ()  # beside the methods: keys of lori_nb.study.arms.ARMS, or other methods
    arm_tasks: tuple[str, ...] = ()  # what they are trained on; empty takes mask_tasks
    arm_seeds: int | None = None  # how many seeds most of them, sparsities, capacity, other joint_arms have; none: all
    joint_arms: tuple[str, ...] = ("joint", "ortho-lora")  # ways to learn all tasks in one adapter
    warmup: float = 0.1  # share of the steps over which the learning rate rises
    schedule: str = "linear"  # of the learning rate after the warm-up; or constant
    micro_batch_rows: int | None = None  # rows computed at a time; none takes all of a step
    checkpointing: bool = False  # activations are computed again in the backward pass, not kept
    adapters: tuple[str, ...] = ()  # folders from elsewhere that 04_interference compares, 05_merging merges, instead
    overlap_null: str = "independent"  # of those in 04_interference: random rows; given: in each one's own A
    task_steps: Mapping[str, int] = field(default_factory=dict)  # of single runs, where a task's are not ``steps``
    sequence: tuple[str, ...] = ()  # tasks learned one after another; empty: ``first``, then the other tasks
    orders: str = "given"  # of the tasks after the first: given, balanced, all, auto; of all tasks: any-first
    ways: tuple[str, ...] = ()  # ways to go from task to task (lori_nb.study.sequences.WAYS); empty: the methods
    strengths: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # of continual methods, by name
    sequence_rates: Mapping[str, float] = field(default_factory=dict)  # way → rate after its first task; else as alone
    merged_total: float = 1.2  # of the weights where one adapter a task is merged: the LoRI authors', of 3 and of 4
    sequence_rows: int = 0  # rows a task that are scored after every stage; a profile that names none takes test_rows
    sequence_steps: int | None = None  # of tasks after the first, under any-first of all; none: as many as alone
    watch: tuple[int, ...] = ()  # steps of the second task's training after which it and the first are scored
    watch_rows: int = 0  # rows a task that are scored there; a profile that names none takes sequence_rows
    sequence_scored: tuple[str, ...] = ()  # further tasks scored after every stage, which none trains, such as xstest
    capacity_tasks: tuple[str, ...] = ()  # learned under disjoint masks until no entry is free
    task_weights: Mapping[str, float] = field(default_factory=dict)  # of runs on several tasks; 1 where none is named
    merge_test_rows: int | None = None  # test rows a task that merged adapters are scored on; none: test_rows
    tune_rows: int = 64  # of a task, held out of training, by which merge weights are chosen
    pair_tasks: tuple[str, ...] = ()  # of the study of pairs (lori_nb.study.pairs); empty: no such study
    pair_steps: int = 120
    pair_train_rows: int = 512
    pair_rows: int = 64  # test rows of a task there
    pair_joint_steps: int = 0  # of one LoRA on all of them; 0: none is trained
    pair_weight: float = 1.0  # of both adapters of a pair
    pair_sizes: tuple[int, ...] = (2, 3, 4, 6, 8, 12)  # how many adapters are merged; above all there are: all
    pair_draws: int = 2  # random subsets of each size
    pair_total: float = 1.5  # the weights of a subset's adapters add up to it, where none is above 1

    def steps_on(self, task: str) -> int:
        """Optimiser steps of a run on one task."""
        return self.task_steps.get(task, self.steps)

    @property
    def arm_seed(self) -> tuple[int, ...]:
        """The seeds of what is compared with the methods: the first ``arm_seeds``."""
        return self.seed[: self.arm_seeds]

    @property
    def joint_weights(self) -> tuple[float, ...]:
        """The tasks' weights in a run on all of them, in the tasks' order; empty where all are 1."""
        weights = tuple(self.task_weights.get(task, 1.0) for task in self.tasks)
        return () if all(weight == 1 for weight in weights) else weights


_LISTS = {
    "tasks": str,
    "seed": int,
    "method": str,
    "sparsities": float,
    "mask_tasks": str,
    "weights": float,
    "merges": str,
}
_NUMBERS = {
    "rank": int,
    "alpha": float,
    "sparsity": float,
    "steps": int,
    "joint_steps": int,
    "joint_batch_size": int,
    "batch_size": int,
    "train_rows": int,
}
_NUMBERS |= {"test_rows": int, "shots": int}
_LATER_NUMBERS = {"merged_total": float, "sequence_rows": int, "watch_rows": int}


def checked(values: dict[str, Any]) -> Settings:
    """Settings from raw values, such as YAML's; ValueError names the first of a wrong type or outside its range."""
    for name, kind in _LISTS.items():
        values[name] = tuple(
            _number(name, item, kind) if kind is not str else str(item) for item in as_list(values[name])
        )
        if not values[name]:
            raise ValueError(f"{name} must hold at least one value; found none")
    for name, kind in _NUMBERS.items():
        values[name] = _number(name, values[name], kind)
    values["learning_rate"] = {
        key: _number(f"learning_rate of {key}", v, float) for key, v in dict(values["learning_rate"]).items()
    }
    values["task_steps"] = {
        task: _number(f"task_steps of {task}", steps, int)
        for task, steps in dict(values.get("task_steps", {})).items()
        if get_task(task).name in values["tasks"]
    }
    values["task_weights"] = _weights(values.get("task_weights", {}), values["tasks"])
    values["adapters"] = tuple(absolute(name) for name in as_list(values.get("adapters", ())))
    values["mask_tasks"] = expand_tasks(values["mask_tasks"])
    values["arms"] = tuple(as_list(values.get("arms", ())))
    from lori_nb.study.arms import get_arm  # arms build on settings
    from lori_nb.study.joint_arms import check_joint_arms

    for name in values["arms"]:
        get_arm(name)
    values["joint_arms"] = tuple(as_list(values.get("joint_arms", Settings.joint_arms)))
    check_joint_arms(values["joint_arms"])
    values["arm_tasks"] = expand_tasks(as_list(values.get("arm_tasks") or values["mask_tasks"]))
    _check_pairs(values)
    for name in values["method"]:
        get_method(name)
    values["merges"] = tuple(dict.fromkeys(ALSO_CALLED.get(name, name) for name in values["merges"]))
    for name in values["merges"]:
        _among("merge", name, tuple(MERGE_METHODS))
    _among("subspace", values["subspace"], POLICIES)
    _among("overlap_null", values.get("overlap_null", Settings.overlap_null), NULLS)
    _among("schedule", values.get("schedule", "linear"), SCHEDULES)
    _among("mask_scope", values["mask_scope"], tuple(SCOPES))
    _among("mask_structure", values.get("mask_structure", "entries"), STRUCTURES)
    get_mask_origin(values.get("mask_origin", "same-a"))
    for name, least in {"warmup": "at least", "calibration_share": "above"}.items():
        values[name] = _number(name, values.get(name, getattr(Settings, name)), float)
        if not 0 <= values[name] <= 1 or (values[name] == 0 and least == "above"):
            raise ValueError(f"{name} must be {least} 0 and at most 1; found {values[name]:g}")
    for sparsity in (values["sparsity"], *values["sparsities"]):
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1); found {sparsity}")
    for name in ("last_layers", "micro_batch_rows", "sequence_steps", "arm_seeds", "merge_test_rows"):
        if values.get(name) is not None:
            values[name] = _number(name, values[name], int)
            if values[name] < 1:
                raise ValueError(f"{name} must be at least 1, or none; found {values[name]}")
    if not isinstance(values.get("checkpointing", False), bool):
        raise ValueError(f"checkpointing must be true or false; found {values['checkpointing']!r}")
    _settle_sequence(values)
    settings = Settings(**values)
    from lori_nb.study.sequences import check_sequence

    check_sequence(settings)
    return settings


def _settle_sequence(values: dict[str, Any]) -> None:
    """The tasks that are learned one after another: those given, or the first task and then the others."""
    given, fitting, scored = (_tasks_in(values, name) for name in ("sequence", "capacity_tasks", "sequence_scored"))
    if values["first"] == "auto":
        safety = [task for task in values["tasks"] if get_task(task).domain == "safety"]
        values["first"] = (given or safety or list(values["tasks"]))[0]
    _among("first", values["first"], tuple(dict.fromkeys((*given, *values["tasks"]))))
    others = [task for task in given or values["tasks"] if task != values["first"]]
    values["sequence"] = (values["first"], *others)
    values["ways"] = tuple(as_list(values.get("ways", ()))) or values["method"]
    values["capacity_tasks"], values["sequence_scored"] = fitting, scored
    values["watch"] = tuple(_number("watch", step, int) for step in as_list(values.get("watch", ())))
    values.setdefault("sequence_rows", values["test_rows"])
    values.setdefault("watch_rows", values["sequence_rows"])  # as before the task and after it
    for name, kind in _LATER_NUMBERS.items():
        if name in values:
            values[name] = _number(name, values[name], kind)
    rates = dict(values.get("sequence_rates", {}))
    values["sequence_rates"] = {way: _number(f"sequence_rates of {way}", rate, float) for way, rate in rates.items()}
    values["strengths"] = {
        method: {name: _number(f"strengths of {method}: {name}", v, float) for name, v in dict(numbers).items()}
        for method, numbers in dict(values.get("strengths", {})).items()
    }


def _tasks_in(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The tasks that a setting names, groups expanded; none where it is empty."""
    given = as_list(values.get(name, ()))
    return expand_tasks(given) if given else ()


def _weights(given: Any, tasks: tuple[str, ...]) -> dict[str, float]:
    """Task → weight, of the study's own tasks among those named; ValueError for an unknown task or a weight not above
    0.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"task_weights must map tasks to numbers; found {given!r}")
    weights = {get_task(task).name: _number(f"task_weights of {task}", w, float) for task, w in given.items()}
    for task, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"task_weights of {task} must be a finite number above 0; found {weight:g}")
    return {task: weight for task, weight in weights.items() if task in tasks}


def _check_pairs(values: dict[str, Any]) -> None:
    """The settings of the study of pairs, and of the choice of merge weights, as numbers in their ranges."""
    least = {"tune_rows": 1, "pair_steps": 1, "pair_train_rows": 1, "pair_rows": 1, "pair_joint_steps": 0}
    for name, lowest in (least | {"pair_draws": 1}).items():
        values[name] = _number(name, values.get(name, getattr(Settings, name)), int)
        if values[name] < lowest:
            raise ValueError(f"{name} must be at least {lowest}; found {values[name]}")
    for name in ("pair_weight", "pair_total"):
        values[name] = _number(name, values.get(name, getattr(Settings, name)), float)
    asked = as_list(values.get("pair_tasks", ()))
    tasks = values["pair_tasks"] = expand_tasks(asked) if asked else ()
    if 0 < len(tasks) < 3:
        raise ValueError(f"pair_tasks must be at least 3 tasks, or none; found {', '.join(tasks)}")
    sizes = [_number("pair_sizes", size, int) for size in as_list(values.get("pair_sizes", Settings.pair_sizes))]
    if min(sizes, default=2) < 2:
        raise ValueError(f"pair_sizes must be at least 2; found {min(sizes)}")
    values["pair_sizes"] = tuple(dict.fromkeys(min(size, len(tasks) or size) for size in sizes))


def absolute(name: str) -> str:
    """A folder by its whole path, since a notebook's kernel works in another folder; any other name as it is."""
    path = Path(str(name)).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def as_list(value: Any) -> list:
    """A list as it is, text split at its commas, and any other one value as a list of one."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, (list, tuple, range)) else [value]


def _number(name: str, value: Any, kind: type) -> Any:
    # "1e-4" arrives as text from YAML and from the command line
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number; found {value!r}") from None
    if kind is int:
        if number != int(number):
            raise ValueError(f"{name} must be a whole number; found {value!r}")
        return int(number)
    return number


def _among(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; found {value!r}")

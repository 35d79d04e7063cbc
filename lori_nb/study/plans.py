"""What each notebook asks for, as specs: the same functions expand a study beforehand and fetch its runs in the
notebook.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

from lori_nb.lab.methods import get_method
from lori_nb.lab.specs import MergeSpec, RunSpec, Spec
from lori_nb.study.profiles import NOTEBOOKS, Settings


def rate_of(settings: Settings, *names: str) -> float:
    """The learning rate under the first of the names that the settings know; ValueError when they know none."""
    for name in names:
        if name in settings.learning_rate:
            return settings.learning_rate[name]
    raise ValueError(
        f"learning_rate must hold a rate for {' or '.join(names)}; found rates for {', '.join(settings.learning_rate)}"
    )


def single(settings: Settings, method: str, task: str, seed: int, **changes) -> RunSpec:
    """One method trained on one task; LoRI-S brings its calibration run with it."""
    plain = RunSpec(
        method=method,
        tasks=(task,),
        seed=seed,
        base=settings.base,
        rank=settings.rank,
        alpha=settings.alpha,
        modules=settings.modules,
        last_layers=settings.last_layers,
        subspace=settings.subspace,
        learning_rate=rate_of(settings, method, like_of(method)),
        steps=settings.steps,
        batch_size=settings.batch_size,
        train_rows=settings.train_rows,
        test_rows=settings.test_rows,
        dtype=settings.dtype,
    )
    spec = replace(plain, **changes)
    if not get_method(method).masked:
        return spec
    dense = get_method(method).calibration
    calibration = single(settings, dense, task, seed, start=_calibration_start(spec), evaluate=spec.evaluate)
    sparse = {"sparsity": settings.sparsity, "mask_scope": settings.mask_scope} | changes
    return replace(spec, calibration=calibration, **sparse)


def like_of(method: str) -> str:
    """The built-in method whose learning rate serves for an extension that the settings do not name."""
    chosen = get_method(method)
    return "lori-s" if chosen.masked else "lora" if chosen.trains_A else "lori-d"


def _calibration_start(spec: RunSpec) -> RunSpec | None:
    return spec.start.calibration if spec.start is not None else None


def joint(settings: Settings, method: str, seed: int) -> RunSpec:
    """One adapter trained on all tasks at once; "lora" is plain joint training."""
    rate = rate_of(settings, "joint" if method == "lora" else method, "lora")
    spec = single(settings, method, settings.tasks[0], seed, learning_rate=rate, steps=settings.joint_steps)
    return replace(spec, tasks=settings.tasks, batch_size=settings.joint_batch_size)


def base_runs(settings: Settings) -> list[RunSpec]:
    """The frozen base on every task: as it is, and shown a few examples."""
    common = {
        "base": settings.base,
        "last_layers": settings.last_layers,
        "test_rows": settings.test_rows,
        "dtype": settings.dtype,
    }
    from lori_nb.lab.models import base_kind  # knows the model, which the plan of a stranger's base must ask

    if base_kind(settings.base) == "encoder":
        return []  # an encoder answers through a trained head only
    counts = dict.fromkeys((0, settings.shots))
    return [RunSpec("base", (task,), steps=0, shots=shots, **common) for task in settings.tasks for shots in counts]


def plan_lori(settings: Settings) -> list[Spec]:
    """Base, and every method on every task."""
    grid = itertools.product(settings.method, settings.tasks, settings.seed)
    return [*base_runs(settings), *(single(settings, method, task, seed) for method, task, seed in grid)]


def plan_masks(settings: Settings) -> list[Spec]:
    """LoRI-S at every sparsity; 0 is LoRI-D with its own learning rate."""
    specs: list[Spec] = []
    for task, seed in itertools.product(settings.mask_tasks, settings.seed):
        specs.append(single(settings, "lori-d", task, seed))
        specs += [single(settings, "lori-s", task, seed, sparsity=s) for s in settings.sparsities if s > 0]
    return specs


def plan_ortho_lora(settings: Settings) -> list[Spec]:
    """Single-task LoRA, joint LoRA and Ortho-LoRA."""
    singles = [single(settings, "lora", task, seed) for task, seed in itertools.product(settings.tasks, settings.seed)]
    return singles + [joint(settings, method, seed) for method in ("lora", "ortho-lora") for seed in settings.seed]


def plan_interference(settings: Settings) -> list[Spec]:
    """The single-task adapters whose subspaces are compared."""
    grid = itertools.product(settings.method, settings.tasks, settings.seed)
    return [single(settings, method, task, seed) for method, task, seed in grid]


def plan_merging(settings: Settings) -> list[Spec]:
    """All tasks' adapters of one method merged, for every way to merge and every weight, beside the adapters alone."""
    merges: list[Spec] = []
    for method, seed in itertools.product(settings.method, settings.seed):
        parts = tuple(single(settings, method, task, seed) for task in settings.tasks)
        merges += [
            MergeSpec(parts, (weight,) * len(parts), merge, settings.test_rows)
            for merge, weight in itertools.product(settings.merges, settings.weights)
        ]
    return [*plan_interference(settings), *merges]


def plan_forgetting(settings: Settings) -> list[Spec]:
    """The first task, then each other task in the same adapter; both are scored afterwards."""
    specs: list[Spec] = []
    for method, seed in itertools.product(settings.method, settings.seed):
        before = single(settings, method, settings.first, seed)
        specs.append(before)
        later = [task for task in settings.tasks if task != settings.first]
        specs += [single(settings, method, task, seed, start=before, evaluate=(settings.first, task)) for task in later]
        specs += [single(settings, method, task, seed) for task in later]
    return specs


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

"""The cells of a study's grid as specs: a method on a task, a method on all tasks, the bare base."""

from __future__ import annotations

from dataclasses import replace

from lori_nb.lab.methods import MASK_ORIGINS, get_mask_origin, get_method
from lori_nb.lab.models import base_kind
from lori_nb.lab.specs import RunSpec
from lori_nb.study.settings import Settings

_OF_MASKS = ("sparsity", "mask_scope", "mask_origin", "mask_structure")


def rate_of(settings: Settings, *names: str) -> float:
    """The learning rate under the first of the names that the settings know; ValueError when they know none."""
    for name in names:
        if name in settings.learning_rate:
            return settings.learning_rate[name]
    raise ValueError(
        f"learning_rate must hold a rate for {' or '.join(names)}; found rates for {', '.join(settings.learning_rate)}"
    )


def single(settings: Settings, method: str, task: str, seed: int, **changes) -> RunSpec:
    """One method trained on one task; LoRI-S brings its calibration run with it.

    Args:
        changes: fields of the run itself, not of its calibration.
    """
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
        family=settings.tasks if settings.subspace == "orthogonal" else (),
        learning_rate=rate_of(settings, method, *like_of(method)),
        steps=settings.steps_on(task),
        batch_size=settings.batch_size,
        train_rows=settings.train_rows,
        test_rows=settings.test_rows,
        dtype=settings.dtype,
        warmup=settings.warmup,
        schedule=settings.schedule,
        micro_batch_rows=settings.micro_batch_rows,
        checkpointing=settings.checkpointing,
    )
    spec = replace(plain, **changes)
    if not get_method(method).masked:
        return spec
    spec = replace(spec, **{name: getattr(settings, name) for name in _OF_MASKS if name not in changes})
    if not get_mask_origin(spec.mask_origin).calibrated:
        return spec
    dense = get_method(method).calibration
    scored = {"evaluate": spec.evaluate, "watch": spec.watch, "watch_rows": spec.watch_rows}
    calibration = single(settings, dense, task, seed, start=_calibration_start(spec), **scored)
    return replace(spec, calibration=_in_part(settings, calibration))


def _in_part(settings: Settings, calibration: RunSpec) -> RunSpec:
    """A calibration run, ended after the settings' share of its schedule."""
    if settings.calibration_share == 1:
        return calibration
    return replace(calibration, stop_after=max(1, round(settings.calibration_share * calibration.steps)))


def like_of(method: str) -> tuple[str, ...]:
    """The built-in method whose learning rate serves for an extension that the settings do not name, and for ways to
    protect earlier tasks, which change that method by a hook; none for another built-in one, whose rate must be tuned
    as all are. (Ortho-LoRA's runs on several tasks have rates of their own.)
    """
    chosen = get_method(method)
    if chosen.built_in and not chosen.projects and chosen.begin is None:
        return ()
    return ("lori-s" if chosen.masked else "lora" if chosen.trains_A else "lori-d",)


def check_goes_on(mask_origin: str, what: str) -> None:
    """ValueError for masks whose runs draw an A of their own, where a masked adapter goes on to another task.

    Args:
        what: goes on, for the message: "way lori-s".
    """
    if get_mask_origin(mask_origin).fresh_A:
        kept = ", ".join(name for name, origin in MASK_ORIGINS.items() if not origin.fresh_A)
        raise ValueError(
            f"mask_origin must be one of {kept} where an adapter goes on to another task ({what}); found "
            f"{mask_origin!r}, which draws another A"
        )


def _calibration_start(spec: RunSpec) -> RunSpec | None:
    return spec.start.calibration if spec.start is not None else None


def joint(settings: Settings, method: str, seed: int) -> RunSpec:
    """One adapter trained on all tasks at once; "lora" is plain joint training. A mask is calibrated on all of them."""
    rate = rate_of(settings, "joint" if method == "lora" else method, "lora")
    if settings.subspace == "orthogonal":  # one adapter for all tasks has no block of its own
        settings = replace(settings, subspace="independent")
    spec = single(settings, method, settings.tasks[0], seed, learning_rate=rate, steps=settings.joint_steps)
    weights = settings.joint_weights
    spec = replace(spec, tasks=settings.tasks, batch_size=settings.joint_batch_size, task_weights=weights)
    if spec.calibration is None:
        return spec
    return replace(spec, calibration=_in_part(settings, joint(settings, spec.calibration.method, seed)))


def base_runs(settings: Settings) -> list[RunSpec]:
    """The frozen base on every task: as it is, and shown a few examples."""
    common = {
        "base": settings.base,
        "last_layers": settings.last_layers,
        "test_rows": settings.test_rows,
        "dtype": settings.dtype,
    }
    if base_kind(settings.base) == "encoder":
        return []  # an encoder answers through a trained head only
    counts = dict.fromkeys((0, settings.shots))
    return [RunSpec("base", (task,), steps=0, shots=shots, **common) for task in settings.tasks for shots in counts]

"""One training loop for every method: single-task, joint, projected, dense or under a mask.

Everything random is a function of (seed, task, step): a resumed run needs no generator state and ends in the same bits.
Several processes each take the same step from the same gradients, and one of them writes the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lori_nb.lab import distributed
from lori_nb.lab.baselines import put_in_place
from lori_nb.lab.gradients import TaskData, batch_indices, recomputed, task_gradients
from lori_nb.lab.methods import Live, Method, get_method
from lori_nb.lab.models import Base
from lori_nb.lab.paths import write_atomically
from lori_nb.lab.specs import RunSpec
from lori_nb.method.projection import combine

LOOK_EVERY = 10  # steps between two looks at the losses, so that no step waits for the device
CHECKPOINT_SECONDS = 20.0
Report = Callable[[str, int, int], None]


class NonFiniteLossError(ArithmeticError):
    """A task's loss or the gradient became infinite or NaN; the last good checkpoint is kept."""


@dataclass
class Trained:
    """What training leaves: the loss history and, for several tasks, how their gradients conflicted."""

    history: list[dict]
    conflicts: list[dict]
    seconds: float


def learning_rate_at(step: int, spec: RunSpec) -> float:
    """Linear warm-up over the first ``warmup`` share of steps, then linear decay to zero, or none (constant)."""
    warm = max(1, round(spec.warmup * spec.steps))
    if step < warm:
        return spec.learning_rate * (step + 1) / warm
    if spec.schedule == "constant":
        return spec.learning_rate
    return spec.learning_rate * (spec.steps - step) / max(1, spec.steps - warm)


def train(
    spec: RunSpec, base: Base, body: nn.Module, live: Live, tasks: Sequence[TaskData], checkpoint: Path, report: Report
) -> Trained:
    """Train ``live`` in place, from its checkpoint if there is one that can be read (else with a warning).

    Raises:
        NonFiniteLossError: names task and step; nothing after the last finite look is kept.
        ProcessesError: processes that do not begin at the same step or do not end with the same parameters.
    """
    started = time.perf_counter()
    named = named_parameters(live, tasks)
    chosen = get_method(spec.method)
    optimiser = _optimiser(spec, chosen, named, live)
    state = _restore(checkpoint, named, optimiser) or {"step": 0, "history": [], "conflicts": [], "seconds": 0.0}
    history, conflicts, first = state["history"], state["conflicts"], state["step"]
    distributed.check_same("the step of the checkpoint", first)
    pending, saved = [], started
    with put_in_place(base.body, live), recomputed(body, spec.checkpointing):
        for step in range(first, spec.trained_steps):
            losses, norm = _step(spec, chosen, base, body, live, tasks, named, optimiser, step)
            pending.append({"step": step, "lr": learning_rate_at(step, spec), "losses": losses, "norm": norm})
            if len(tasks) > 1 and step % max(1, spec.trained_steps // 20) == 0:
                conflicts += observe_conflicts(spec, base, body, live, tasks, step)
            if (step + 1) % LOOK_EVERY == 0 or step + 1 == spec.trained_steps:
                history += _look(pending, tasks)
                pending = []
                report("training", step + 1, spec.trained_steps)
                due = time.perf_counter() - saved > CHECKPOINT_SECONDS and step + 1 < spec.trained_steps
                if due and distributed.is_main():
                    spent = state["seconds"] + time.perf_counter() - started
                    about = {"step": step + 1, "history": history, "conflicts": conflicts, "seconds": spent}
                    _save(checkpoint, named, optimiser, about)
                    saved = time.perf_counter()
    if distributed.count() > 1:
        distributed.check_same("the trained parameters (their SHA-256)", _digest(named))
    return Trained(history, conflicts, state["seconds"] + time.perf_counter() - started)


def named_parameters(live: Live, tasks: Sequence[TaskData]) -> dict[str, nn.Parameter]:
    """The trained parameters by name: "<module>.A", "<module>.B" (packed under a mask), "head.<task>.weight"."""
    named = {f"{module}.{part}": p for module, low in live.items() for part, p in low.trained().items()}
    for task in tasks:
        if task.head is not None:
            named |= {f"head.{task.name}.{part}": p for part, p in task.head.named_parameters()}
    return named


def _optimiser(spec: RunSpec, chosen: Method, named: Mapping[str, nn.Parameter], live: Live) -> torch.optim.Optimizer:
    settings = {"lr": spec.learning_rate, "weight_decay": spec.weight_decay}
    if chosen.optimiser is not None:
        return chosen.optimiser(named, live, **settings)
    return torch.optim.AdamW(named.values(), **settings)


def _step(spec, chosen: Method, base, body, live, tasks, named, optimiser, step: int) -> tuple[Tensor, Tensor]:
    """One optimiser step; returns the task losses (T) and the gradient norm before clipping, still on the device."""
    found = task_gradients(base, body, _batches(spec, tasks, step), named, spec.micro_batch_rows)
    combined = _combined(spec, chosen, [gradient for _, gradient in found], step)
    if chosen.penalty is not None:
        extra = torch.autograd.grad(chosen.penalty(live, step), list(named.values()), allow_unused=True)
        combined = {name: g if e is None else g + e for (name, g), e in zip(combined.items(), extra, strict=True)}
    for name, parameter in named.items():
        parameter.grad = combined[name]
    norm = torch.nn.utils.clip_grad_norm_(named.values(), spec.clip)
    for group in optimiser.param_groups:
        group["lr"] = learning_rate_at(step, spec)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    if chosen.after_step is not None:
        with torch.no_grad():
            chosen.after_step(live, step)
    return torch.stack([loss for loss, _ in found]), norm


def _batches(spec: RunSpec, tasks: Sequence[TaskData], step: int) -> list[tuple[TaskData, list[int]]]:
    """The rows that every task brings to a step, an equal number each."""
    size = spec.batch_size // len(tasks)
    return [(task, batch_indices(len(task.rows), size, step, spec.seed, task.name)) for task in tasks]


def _combined(spec: RunSpec, chosen: Method, gradients: list[dict[str, Tensor]], step: int) -> dict[str, Tensor]:
    """The gradient that the optimiser sees: the mean over tasks, after projection or the method's own transform."""
    if len(gradients) == 1 and chosen.transform is None:
        return gradients[0]
    adapters = [{name: g for name, g in each.items() if not name.startswith("head.")} for each in gradients]
    if chosen.transform is not None:
        shared = dict(chosen.transform(adapters, step))
    elif chosen.projects:
        shared = project(spec, adapters, step)
    else:
        shared = {name: sum(each[name] for each in adapters) / len(adapters) for name in adapters[0]}
    # A head has a gradient from its own task alone, so it is neither projected nor averaged.
    heads = {name: sum(each[name] for each in gradients) for name in gradients[0] if name.startswith("head.")}
    return {name: (shared | heads)[name] for name in gradients[0]}


def project(spec: RunSpec, gradients: list[dict[str, Tensor]], step: int) -> dict[str, Tensor]:
    """Ortho-LoRA's combination of task gradients, with the switches in the spec's options."""
    options = dict(spec.options)
    generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + step)
    combined, _ = combine(
        gradients,
        options.get("grouping", "tensor"),
        reduction=options.get("reduction", "mean"),
        order=options.get("order", "random"),
        reference=options.get("reference", "original"),
        generator=generator,
    )
    return combined


def observe_conflicts(spec, base, body, live, tasks: Sequence[TaskData], step: int) -> list[dict]:
    """Conflict rates per tensor between tasks, and within a task: between two halves of its own batch.

    Both compare gradients of half a batch, so that they carry the same noise. Unrelated gradients conflict half of the
    time; the rate within a task says how well it agrees with itself under that noise. One row a tensor: ``between`` and
    ``within`` are shares of pairs with a negative inner product.
    """
    named, middle = named_parameters(live, ()), spec.batch_size // len(tasks) // 2
    if middle == 0:
        return []
    halves = [
        (task, half) for task, indices in _batches(spec, tasks, step) for half in (indices[:middle], indices[middle:])
    ]
    gradients = [gradient for _, gradient in task_gradients(base, body, halves, named, spec.micro_batch_rows)]
    _, found = combine(gradients, "tensor", order="fixed")
    owner = torch.arange(len(tasks)).repeat_interleave(2)
    same = owner[:, None] == owner[None, :]
    upper = torch.ones_like(same).triu(1)
    known = ~found.cosines.isnan().cpu()
    conflict = found.conflict.cpu()
    rows = []
    for place, name in enumerate(found.groups):
        shares = {}
        for kind, pairs in {"between": ~same & upper, "within": same & upper}.items():
            counted = pairs & known[place]
            shares[kind] = float((conflict[place] & counted).sum() / counted.sum()) if counted.any() else float("nan")
        rows.append({"step": step, "tensor": name, **shares})
    return rows


def _look(pending: list[dict], tasks: Sequence[TaskData]) -> list[dict]:
    losses = torch.stack([entry["losses"] for entry in pending]).cpu()  # (steps × T), the one wait for the device
    norms = torch.stack([entry["norm"] for entry in pending]).cpu()
    _check_finite(losses, norms, [entry["step"] for entry in pending], [task.name for task in tasks])
    return [
        {
            "step": entry["step"],
            "task": task.name,
            "loss": float(losses[i, t]),
            "lr": entry["lr"],
            "gradient_norm": float(norms[i]),
        }
        for i, entry in enumerate(pending)
        for t, task in enumerate(tasks)
    ]


def _check_finite(losses: Tensor, norms: Tensor, steps: list[int], names: list[str]) -> None:
    """NonFiniteLossError for the first step whose losses (steps × T) or gradient norm (steps) are not finite.

    A finite loss can have an infinite gradient, after which no parameter is good.
    """
    good = torch.isfinite(losses)
    for i, step in enumerate(steps):
        for name, loss, fine in zip(names, losses[i].tolist(), good[i].tolist(), strict=True):
            if not fine:
                raise NonFiniteLossError(f"loss of task {name!r} must be finite; found {loss} at step {step}")
        if not torch.isfinite(norms[i]):
            raise NonFiniteLossError(
                f"gradient norm of task {'+'.join(names)!r} must be finite; found {norms[i].item()} at step {step}"
            )


def _digest(named: Mapping[str, nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for parameter in named.values():
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _save(path: Path, named: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, about: dict) -> None:
    tensors = {}
    for name, parameter in named.items():
        tensors[f"{name}|value"] = parameter.detach().cpu()
        for key, value in optimiser.state[parameter].items():
            tensors[f"{name}|{key}"] = value.detach().cpu()
    write_atomically(path, save(tensors, metadata={"about": json.dumps(about)}))


def _restore(path: Path, named: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> dict | None:
    """Put a checkpoint's values back and return what it says of itself; None where there is none that can be read."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            about = json.loads(file.metadata()["about"])
    except SafetensorError as error:
        warnings.warn(f"{path} is damaged ({error}); training starts anew", stacklevel=3)
        return None
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"{name}|value"])
            kept = {key.partition("|")[2]: t for key, t in tensors.items() if key.startswith(f"{name}|")}
            kept.pop("value")
            optimiser.state[parameter] = {k: t if k == "step" else t.to(parameter.device) for k, t in kept.items()}
    return about

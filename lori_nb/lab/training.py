"""One training loop for every method: single-task, joint, projected, dense or under a mask.

Everything random is a function of (seed, task, step): a resumed run needs no generator state and ends in the same bits.
Several processes each take the same step from the same gradients, and one of them writes the checkpoint.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from lori_nb.lab import distributed
from lori_nb.lab.baselines import put_in_place
from lori_nb.lab.checkpoint import restore_checkpoint, save_checkpoint
from lori_nb.lab.gradients import TaskData, TaskGradients, batch_indices, recomputed, task_gradients
from lori_nb.lab.methods import Live, get_method
from lori_nb.lab.models import Base
from lori_nb.lab.options import solver_settings
from lori_nb.lab.specs import RunSpec
from lori_nb.lab.stages import RUN_HOOKS, Earlier, Stage, hooks_of
from lori_nb.lab.telemetry import LOOKS, Telemetry, relative_change
from lori_nb.method.adapters import LowRank
from lori_nb.method.conflicts import Conflicts, combine_stacked, conflicts_of
from lori_nb.method.task_gradients import NotByRowsError

LOOK_EVERY = 10  # steps between two looks at the losses, so that no step waits for the device
CHECKPOINT_SECONDS = 20.0
Report = Callable[[str, int, int], None]


def quiet(stage: str, done: int, total: int) -> None:
    """A report that says nothing."""


class NonFiniteLossError(ArithmeticError):
    """A task's loss or the gradient became infinite or NaN; the last good checkpoint is kept."""


@dataclass
class Trained:
    """What training leaves: the loss history, for several tasks how their gradients conflicted, and the scores that
    were taken on the way.
    """

    history: list[dict]
    conflicts: pd.DataFrame
    seconds: float
    watched: list[dict] = field(default_factory=list)


def learning_rate_at(step: int, spec: RunSpec) -> float:
    """Linear warm-up over the first ``warmup`` share of steps, then linear decay to zero, or none (constant)."""
    warm = max(1, round(spec.warmup * spec.steps))
    if step < warm:
        return spec.learning_rate * (step + 1) / warm
    if spec.schedule == "constant":
        return spec.learning_rate
    return spec.learning_rate * (spec.steps - step) / max(1, spec.steps - warm)


def train(
    spec: RunSpec,
    base: Base,
    body: nn.Module,
    live: Live,
    tasks: Sequence[TaskData],
    checkpoint: Path,
    report: Report,
    earlier: Sequence[Earlier] = (),
    watch: Callable[[int], list[dict]] = lambda step: [],
) -> Trained:
    """Train ``live`` in place, from its checkpoint if there is one that can be read (else with a warning).

    Args:
        earlier: the stages before this run's, for a method that looks at them.
        watch: gives the scores after so many steps, asked at the steps of ``spec.watch``.

    Raises:
        NonFiniteLossError: names task and step; nothing after the last finite look is kept.
        ProcessesError: processes that do not begin at the same step or do not end with the same parameters.
    """
    started = time.perf_counter()
    loop = Loop(spec, base, body, live, tasks)
    with put_in_place(base.body, live), recomputed(body, spec.checkpointing):
        loop.begin(earlier)
        state = {"step": 0, "history": [], "seconds": 0.0, "watched": []} | (loop.restore(checkpoint) or {})
        history, watched, first = state["history"], state["watched"], state["step"]
        distributed.check_same("the step of the checkpoint", first)
        pending, saved = [], started
        for step in range(first, spec.trained_steps):
            losses, norm = loop.step(step)
            pending.append({"step": step, "lr": learning_rate_at(step, spec), "losses": losses, "norm": norm})
            if step + 1 in spec.watch:
                watched += watch(step + 1)
            if (step + 1) % LOOK_EVERY == 0 or step + 1 == spec.trained_steps:
                history += _look(pending, tasks)
                pending = []
                report("training", step + 1, spec.trained_steps)
                due = time.perf_counter() - saved > CHECKPOINT_SECONDS and step + 1 < spec.trained_steps
                if due and distributed.is_main():
                    spent = state["seconds"] + time.perf_counter() - started
                    about = {"step": step + 1, "history": history, "seconds": spent, "watched": watched}
                    loop.save(checkpoint, about)
                    saved = time.perf_counter()
    if distributed.count() > 1:
        distributed.check_same("the trained parameters (their SHA-256)", _digest(loop.named))
    conflicts = loop.telemetry.table() if loop.telemetry else pd.DataFrame()
    return Trained(history, conflicts, state["seconds"] + time.perf_counter() - started, watched)


def named_parameters(live: Live, tasks: Sequence[TaskData]) -> dict[str, nn.Parameter]:
    """The trained parameters by name: "<module>.A", "<module>.B" (packed under a mask), "head.<task>.weight"."""
    named = {f"{module}.{part}": p for module, low in live.items() for part, p in low.trained().items()}
    for task in tasks:
        if task.head is not None:
            named |= {f"head.{task.name}.{part}": p for part, p in task.head.named_parameters()}
    return named


class Loop:
    """The parts of a training run, and one step of it.

    ``telemetry`` records how several tasks' gradients conflict; None records nothing. ``solver_state`` is what the
    conflict solver keeps from step to step.
    """

    def __init__(self, spec: RunSpec, base: Base, body: nn.Module, live: Live, tasks: Sequence[TaskData]):
        self.spec, self.base, self.body, self.live, self.tasks = spec, base, body, live, tasks
        self.method = get_method(spec.method)
        self.named = named_parameters(live, tasks)
        settings = {"lr": spec.learning_rate, "weight_decay": spec.weight_decay}
        if self.method.optimiser is not None:
            self.optimiser = self.method.optimiser(self.named, live, **settings)
        else:
            self.optimiser = torch.optim.AdamW(self.named.values(), **settings)
        # Other forms than low-rank have no gradients by task.
        self.together = len(tasks) > 1 and all(isinstance(low, LowRank) for low in live.values())
        self.telemetry = Telemetry([task.name for task in tasks]) if len(tasks) > 1 else None
        self.solver_state: dict[str, Tensor] = {}
        self.weights = torch.tensor(spec.task_weights, device=base.device) if spec.task_weights else None
        self.by_rows = True  # until the model shows that its modules do not see rows
        self.hooks: dict[str, Callable | None] = {name: getattr(self.method, name) for name in RUN_HOOKS}

    def begin(self, earlier: Sequence[Earlier]) -> None:
        """Let the method look at the stages before, with the factors attached and as they begin."""
        if earlier:
            stage = Stage(self.spec, self.live, self.named, tuple(earlier), self._gradients_at)
            self.hooks = hooks_of(self.spec, stage)

    def _gradients_at(self, batches, named: Mapping[str, nn.Parameter]) -> TaskGradients:
        """Gradients of other batches than the step's, from one backward pass where the model allows that."""
        arguments = (self.base, self.body, batches, named, self.spec.micro_batch_rows)
        if len(batches) > 1 and self.by_rows:
            try:
                return task_gradients(*arguments, self.live)
            except NotByRowsError:
                self.by_rows = False
        return task_gradients(*arguments)

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """One optimiser step; returns task losses (T) and the gradient norm before clipping, still on the device."""
        found, halves = self._task_gradients(step)
        if self.weights is not None:
            found = found.weighted(self.weights)  # the halves are asked for cosines alone, which no weight changes
        combined, blocks = self._combined(found, step)
        if self.telemetry is not None:
            self._record(step, found, combined, blocks, halves)
        if self.hooks["penalty"] is not None:
            extra = torch.autograd.grad(self.hooks["penalty"](self.live, step), self.parameters, allow_unused=True)
            pairs = zip(self.named, extra, strict=True)
            combined = {name: combined[name] if e is None else combined[name] + e for name, e in pairs}
        for name, parameter in self.named.items():
            parameter.grad = combined[name]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.spec.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate_at(step, self.spec)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.hooks["after_step"] is not None:
            with torch.no_grad():
                self.hooks["after_step"](self.live, step)
        return found.losses, norm

    @property
    def _sums(self) -> bool:
        """Whether tasks' gradients are summed; else their mean is taken."""
        return dict(self.spec.options).get("reduction") == "sum"

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything trained, in a fixed order."""
        return list(self.named.values())

    def _task_gradients(self, step: int) -> tuple[TaskGradients, TaskGradients | None]:
        """The tasks' gradients, and at the steps that telemetry looks closer, those of the halves of their batches."""
        spec, size = self.spec, self.spec.batch_size // len(self.tasks)  # an equal number of rows each
        batches = [(t, batch_indices(len(t.rows), size, step, spec.seed, t.name)) for t in self.tasks]
        if self.telemetry is None or size < 2 or step % max(1, spec.trained_steps // LOOKS):
            return self._gradients_of(batches), None
        halves = [(task, part) for task, rows in batches for part in (rows[: size // 2], rows[size // 2 :])]
        totals = [task.targets(rows) for task, rows in batches for _ in range(2)]
        found = self._gradients_of(halves, totals)
        return found.in_pairs(), found

    def _gradients_of(self, batches, totals: Sequence[int] | None = None) -> TaskGradients:
        """From one backward pass; batch by batch for a model whose modules do not see rows, found at its first step."""
        arguments = (self.base, self.body, batches, self.named, self.spec.micro_batch_rows)
        if self.together:
            try:
                return task_gradients(*arguments, self.live, totals)
            except NotByRowsError:
                self.together = False
        return task_gradients(*arguments, None, totals)

    def _combined(self, found: TaskGradients, step: int) -> tuple[dict[str, Tensor], Conflicts | None]:
        """The gradient that the optimiser sees: the mean over tasks of the weighted gradients, or what solver or the
        method's transform makes of these; with a solver also the conflicts in its blocks.

        A head has a gradient from its own task alone, so it is not projected; in a mean over tasks it counts as the
        others do, so that one norm clips them all.
        """
        tasks, blocks = len(found.losses), None
        if self.hooks["transform"] is not None:
            shared = dict(self.hooks["transform"]([found.of(task) for task in range(tasks)], step))
        elif self.method.projects and tasks > 1:
            shared, blocks = self._solved(found.shared, step)
        else:
            shared = found.of(0) if tasks == 1 else self._plain(found)
        share = 1 if self._sums else tasks
        return shared | {name: each / share for name, each in found.heads.items()}, blocks

    def _record(self, step: int, found: TaskGradients, combined, blocks: Conflicts | None, halves) -> None:
        by_tensor = dict(self.spec.options).get("grouping", "tensor") == "tensor"
        if blocks is not None and by_tensor:
            conflicts, change = blocks, blocks.change()  # from Gramians: no gradient is read again
        else:
            conflicts, change = conflicts_of(found.shared), relative_change(combined, self._plain(found))
        of_halves = conflicts_of(halves.shared) if halves is not None else None
        self.telemetry.add(step, conflicts, change, blocks, of_halves)

    def _solved(self, gradients: Mapping[str, Tensor], step: int) -> tuple[dict[str, Tensor], Conflicts]:
        """Task gradients (T × shape) combined by the conflict solver that the spec's options name."""
        generator = torch.Generator().manual_seed(self.spec.seed * 1_000_003 + step)
        settings = solver_settings(dict(self.spec.options))
        return combine_stacked(gradients, generator=generator, state=self.solver_state, **settings)

    def _plain(self, found: TaskGradients) -> dict[str, Tensor]:
        """What joint training takes of several tasks: their mean, or their sum where the options say so."""
        first, *others = zip(*(each.unbind() for each in found.shared.values()), strict=True)
        totals = torch._foreach_add(first, others[0])
        for gradients in others[1:]:
            torch._foreach_add_(totals, gradients)
        if not self._sums:
            torch._foreach_div_(totals, len(found.losses))
        return dict(zip(found.shared, totals, strict=True))

    def save(self, path: Path, about: dict) -> None:
        """Write a checkpoint, with what ``about`` says of it."""
        others = {"solver": self.solver_state}
        if self.telemetry is not None:
            about, others = about | {"names": self.telemetry.names}, others | {"telemetry": self.telemetry.state()}
        save_checkpoint(path, self.named, self.optimiser, about, others)

    def restore(self, path: Path) -> dict | None:
        """Go on from a checkpoint; returns what it says of itself, None where there is none that can be read."""
        found = restore_checkpoint(path, self.named, self.optimiser)
        if found is None:
            return None
        about, others = found
        self.solver_state = {name: tensor.to(self.base.device) for name, tensor in others.get("solver", {}).items()}
        if self.telemetry is not None:
            self.telemetry.restore(others.get("telemetry", {}), about["names"])
        return about


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

"""What a continual method is given when it trains a task after others: their rows, adapters and gradients.

A sequence of tasks is a chain of runs, each of which starts from the one before. A method with the hook ``begin`` is
handed a :class:`Stage` where such a run begins, and returns the hooks that this run needs::

    @method("anchored", like="lora", hook="begin", strengths={"strength": 1.0})
    def anchored(stage):
        before = {name: p.detach().clone() for name, p in stage.shared.items()}
        far = lambda: sum((p - before[name]).square().sum() for name, p in stage.shared.items())
        return {"penalty": lambda live, step: stage.strength("strength") * far()}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lori_nb.lab.gradients import TaskData, TaskGradients, batch_indices
from lori_nb.lab.methods import Live, get_method
from lori_nb.lab.specs import RunSpec
from lori_nb.method.adapters import Adapter

RUN_HOOKS = ("penalty", "transform", "after_step")  # what begin may return


@dataclass(frozen=True)
class Earlier:
    """An earlier stage: its task's kept rows, with the head that it was left with, and the adapter after it."""

    task: TaskData
    adapter: Adapter


@dataclass(frozen=True)
class Stage:
    """The run that begins, and what came before it.

    Attributes:
        spec: the run.
        live: the factors that are trained, by module.
        named: the trained parameters by name, the new task's head among them.
        earlier: the stages before, oldest first; at least one.
        gradients_of: (batches of (task, row numbers), parameters by name) → losses and gradients, all at the present
            parameters, from one backward pass where that can be.
    """

    spec: RunSpec
    live: Live
    named: Mapping[str, nn.Parameter]
    earlier: tuple[Earlier, ...]
    gradients_of: Callable[[Sequence[tuple[TaskData, Sequence[int]]], Mapping[str, nn.Parameter]], TaskGradients]

    @property
    def shared(self) -> dict[str, nn.Parameter]:
        """The trained parameters but for heads, which have a gradient from their own task alone."""
        return {name: p for name, p in self.named.items() if not name.startswith("head.")}

    def strength(self, name: str) -> float:
        """A number of the method: the run's option of that name, or its default."""
        return strength_of(self.spec, name)

    def gradients(self, batches: Sequence[tuple[TaskData, Sequence[int]]]) -> dict[str, Tensor]:
        """Each batch's gradient of its mean loss at the present parameters: name → (batches × shape)."""
        return self.gradients_of(batches, self.shared).shared

    def drawn(self, task: TaskData, rows: int, step: int) -> list[int]:
        """Rows of an earlier task's memory for one step: each once before any comes again."""
        return batch_indices(len(task.rows), min(rows, len(task.rows)), step, self.spec.seed, f"memory/{task.name}")

    @contextmanager
    def at(self, adapter: Adapter) -> Iterator[None]:
        """Within the block the trained factors are those of an earlier adapter; then they are what they were.

        Raises ValueError under a mask, off which entries would stay what they are, and for an adapter of another rank,
        such as one that has grown.
        """
        if any(low.positions is not None for low in self.live.values()):
            raise ValueError("at an earlier adapter the trained B must be dense; found one under a mask")
        for module, low in self.live.items():
            if adapter.factors[module].B.shape != low.shape:
                found = tuple(adapter.factors[module].B.shape)
                raise ValueError(f"adapter must have B of shape {tuple(low.shape)} in {module}; found {found}")
        before = {name: p.detach().clone() for name, p in self.shared.items()}
        try:
            with torch.no_grad():
                for module, low in self.live.items():
                    f = adapter.factors[module]
                    values = {"A": f.A, "B": low.gathered(f.B.to(low.values.device))}
                    for part, parameter in low.trained().items():
                        parameter.copy_(values[part])
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.shared.items():
                    parameter.copy_(before[name])


def strength_of(spec: RunSpec, name: str) -> float:
    """A number of the run's method: the run's option of that name, or the method's default.

    Raises ValueError for a number that the method does not have.
    """
    defaults = get_method(spec.method).strengths
    if name not in defaults:
        raise ValueError(f"strengths of {spec.method} must be among {', '.join(defaults) or 'none'}; found {name!r}")
    return float(dict(spec.options).get(name, defaults[name]))


def kept_rows(spec: RunSpec) -> int:
    """How many rows of every earlier task a run's method is given; 0 for one that asks for none."""
    return int(strength_of(spec, "memory")) if "memory" in get_method(spec.method).strengths else 0


def earlier_runs(spec: RunSpec) -> list[RunSpec]:
    """The runs that a run goes on from, oldest first."""
    chain: list[RunSpec] = []
    while spec.start is not None:
        chain.insert(0, spec := spec.start)
    return chain


def hooks_of(spec: RunSpec, stage: Stage) -> dict[str, Callable | None]:
    """The hooks of a run that goes on from others, by name: its method's own, and what its ``begin`` returns.

    Raises ValueError when ``begin`` returns a hook of another name.
    """
    chosen = get_method(spec.method)
    more = dict(chosen.begin(stage)) if chosen.begin is not None else {}
    if unknown := sorted(set(more) - set(RUN_HOOKS)):
        raise ValueError(f"begin of {spec.method} must return hooks among {', '.join(RUN_HOOKS)}; found {unknown}")
    return {name: getattr(chosen, name) for name in RUN_HOOKS} | more

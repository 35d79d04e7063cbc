"""Single training steps on the tiny decoder, on any device, and bounds on what another order of sums can change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lori_nb.lab import training
from lori_nb.lab.gradients import TaskData, batch_indices, task_gradients
from lori_nb.lab.methods import initial_live
from lori_nb.lab.models import load_base
from lori_nb.lab.specs import RunSpec
from lori_nb.lab.tasks import get_task
from lori_nb.lab.text import encode_decoder_rows
from lori_nb.lab.training import named_parameters
from lori_nb.method.adapters import attach, target_linears

EPS = torch.finfo(torch.float32).eps
LAYERS, LONGEST_PRODUCT = 4, 96  # of the tiny decoder: its depth, and the terms of its longest inner product


class Prepared:
    """A run about to train: base, trainable factors, rows and optimiser on one device, parameters away from B = 0.

    B = 0 would hide the gradients of A. The parameters begin equal on all devices.
    """

    def __init__(self, spec: RunSpec, device: str = "cpu"):
        self.spec, self.base = spec, load_base(spec.base, spec.dtype, device)
        linears = target_linears(self.base.body, spec.modules, spec.last_layers)
        self.live = initial_live(spec, {name: tuple(m.weight.shape) for name, m in linears.items()}, None)
        for low in self.live.values():
            low.to(self.base.device)
        self.tasks = [self._task(name) for name in spec.tasks]
        self.named = named_parameters(self.live, self.tasks)
        with torch.no_grad():
            for name, p in self.named.items():
                shift = torch.linspace(-0.01, 0.01, p.numel()).view(p.shape) * (1 + len(name) % 3)
                p.add_(shift.to(p.device))
        self.loop = training.Loop(spec, self.base, self.base.body, self.live, self.tasks)

    def _task(self, name: str) -> TaskData:
        rows = encode_decoder_rows(self.base.tokenizer, get_task(name).rows("train", self.spec.train_rows))
        return TaskData(name, rows, None)

    def batches(self, step: int) -> list[tuple[TaskData, list[int]]]:
        size = self.spec.batch_size // len(self.tasks)
        return [(t, batch_indices(len(t.rows), size, step, self.spec.seed, t.name)) for t in self.tasks]

    def gradients(
        self, step: int = 0, micro_batch_rows: int | None = None, together: bool = True
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Loss and gradient of every task on the rows of a step, at the present parameters; ``together`` takes them
        from one backward pass where the rows allow.
        """
        with attach(self.base.body, self.live):
            found = task_gradients(
                self.base,
                self.base.body,
                self.batches(step),
                self.named,
                micro_batch_rows,
                self.live if together else None,
            )
        return [(loss, found.of(task)) for task, loss in enumerate(found.losses)]

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """One step of the training loop; losses (T) and gradient norm, on the device."""
        with attach(self.base.body, self.live):
            return self.loop.step(step)

    def tokens(self, step: int) -> int:
        """The most tokens that one task's rows of a step have."""
        return max(sum(len(task.rows[i].ids) for i in indices) for task, indices in self.batches(step))


def assert_same_gradients(one: Prepared, two: Prepared, evaluate: Callable[[Prepared, int], list], steps: int) -> float:
    """Losses and gradients agree within rounding at ``steps`` points of the first one's path; the largest share of
    the bound that was used.

    In fp32 a layer's inner products err by their number of terms · ε relative to the largest, once upwards and once
    downwards; a gradient adds a sum over the tokens. Two evaluations err independently. The second is put where the
    first is before every step, so that nothing else comes between them.
    """
    used = 0.0
    for step in range(steps):
        with torch.no_grad():
            for name, p in two.named.items():
                p.copy_(one.named[name])
        share = 2 * (2 * LAYERS * LONGEST_PRODUCT + one.tokens(step)) * EPS
        for (loss, gradient), (other_loss, other) in zip(one.gradients(step), evaluate(two, step), strict=True):
            pairs = [(loss, other_loss), *((gradient[name], other[name]) for name in one.named)]
            for first, second in pairs:
                assert first.abs().max() > 0
                error, bound = (first.cpu() - second.cpu()).abs().max(), share * first.abs().max().cpu()
                assert error <= bound
                used = max(used, (error / bound).item())
        one.step(step)
    return used


def saved_bytes(prepared: Prepared) -> int:
    """Bytes that autograd keeps for the backward pass of a step's tasks, each storage once; the base's not counted."""
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice
    own = {p.untyped_storage().data_ptr() for p in prepared.base.body.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prepared.gradients()
    return sum(storage.nbytes() for storage in kept.values())

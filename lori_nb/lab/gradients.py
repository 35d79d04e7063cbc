"""A task's loss and gradient on the rows of a step: whole or in micro-batches, in one process or shared among several.

With n_p answer tokens (rows, for an encoder) in micro-batch p and N in the whole batch, the batch's mean loss is

    L = Σ_p (n_p / N) L_p,    ∇L = Σ_p (n_p / N) ∇L_p,

so micro-batches and processes change the order of additions and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lori_nb.lab import distributed
from lori_nb.lab.evaluation import logits_at, task_loss
from lori_nb.lab.models import Base
from lori_nb.lab.prefix import RowStates
from lori_nb.lab.text import Batch, Encoded, collate


@dataclass
class TaskData:
    """A task's encoded training rows and, where the frozen prefix is reused, their hidden states."""

    name: str
    rows: list[Encoded]
    states: RowStates | None
    head: nn.Module | None = None

    def batch(self, base: Base, indices: Sequence[int]) -> Batch:
        hidden = None if self.states is None else [self.states[i] for i in indices]
        return collate([self.rows[i] for i in indices], base.tokenizer.pad_token_id, hidden=hidden).to(base.device)

    def targets(self, indices: Sequence[int]) -> int:
        """How many predictions the mean loss of these rows is taken over: answer tokens, or rows for an encoder."""
        return sum(len(self.rows[i].answer) or 1 for i in indices)


def batch_indices(rows: int, size: int, step: int, seed: int, stream: str) -> list[int]:
    """The rows of one step's batch: consecutive pieces of seeded permutations, one an epoch, each row once an epoch."""
    orders: dict[int, np.ndarray] = {}
    chosen = []
    for place in range(step * size, (step + 1) * size):
        epoch, offset = divmod(place, rows)
        if epoch not in orders:
            orders[epoch] = np.argsort(_bits(f"{seed}/{stream}/{epoch}", rows), kind="stable")
        chosen.append(int(orders[epoch][offset]))
    return chosen


def _bits(text: str, count: int) -> np.ndarray:
    key = np.frombuffer(hashlib.sha256(f"lori-nb/rows/{text}".encode()).digest()[:16], dtype="<u8").astype(np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def micro_batches(indices: Sequence[int], rows: int | None, processes: int) -> list[Sequence[int]]:
    """A batch cut into consecutive pieces of nearly equal size, of at most ``rows`` rows (None: any number).

    There are as few as that allows, but one for every process as long as there are rows enough.
    """
    count = max(math.ceil(len(indices) / (rows or len(indices))), min(processes, len(indices)))
    return [indices[len(indices) * i // count : len(indices) * (i + 1) // count] for i in range(count)]


def task_gradients(
    base: Base,
    body: nn.Module,
    batches: Sequence[tuple[TaskData, Sequence[int]]],
    named: Mapping[str, Tensor],
    micro_batch_rows: int | None = None,
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Every batch's mean loss and its gradient by parameter name; zeros where a parameter takes no part.

    Args:
        batches: (task, row numbers); each process computes its share of every batch, and all get the sums.
        micro_batch_rows: rows computed at a time; None takes a process's whole share.
    """
    parameters = list(named.values())
    own = [_own_share(base, body, task, indices, parameters, micro_batch_rows) for task, indices in batches]
    sums = distributed.summed([tensor for each in own for tensor in each])
    width = 1 + len(parameters)
    parts = [sums[start : start + width] for start in range(0, len(sums), width)]
    return [(loss, dict(zip(named, gradient, strict=True))) for loss, *gradient in parts]


def _own_share(base, body, task: TaskData, indices, parameters: list[Tensor], rows: int | None) -> list[Tensor]:
    """This process's part of a batch's loss and gradients; zeros where it has no piece."""
    total = task.targets(indices)
    pieces = distributed.share(micro_batches(indices, rows, distributed.count()))
    if not pieces:
        return [torch.zeros((), device=base.device), *map(torch.zeros_like, parameters)]
    terms = (_weighted(base, body, task, piece, task.targets(piece) / total, parameters) for piece in pieces)
    return distributed.tree_sum(terms, lambda one, other: [a + b for a, b in zip(one, other, strict=True)])


def _weighted(base, body, task: TaskData, piece, weight: float, parameters: list[Tensor]) -> list[Tensor]:
    batch = task.batch(base, piece)
    loss = weight * task_loss(base, logits_at(base, body, batch, task.head), batch)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))]


@contextmanager
def recomputed(body: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within the block the backward pass computes each whole layer's activations again instead of keeping them; a last
    layer at answer positions only keeps its few.

    transformers does so in training mode only; the frozen base stays in evaluation mode, so each layer's ``forward`` is
    wrapped here. It draws nothing at random, so the second pass gives the bits of the first. ValueError for a body
    without layers that can be computed again.
    """
    layers = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)] if wanted else []
    if wanted and not layers:
        raise ValueError(
            f"checkpointing must be false for a base without layers that transformers can compute again; "
            f"found {type(body).__name__}"
        )
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward

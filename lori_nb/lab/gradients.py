"""A task's loss and gradient on the rows of a step: whole or in micro-batches, in one process or shared among several.

With n_p answer tokens (rows, for an encoder) in micro-batch p and N in the whole batch, the batch's mean loss is

    L = Σ_p (n_p / N) L_p,    ∇L = Σ_p (n_p / N) ∇L_p,

so micro-batches and processes change the order of additions and nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lori_nb.lab import distributed
from lori_nb.lab.evaluation import states_at, task_loss
from lori_nb.lab.models import Base
from lori_nb.lab.prefix import RowStates
from lori_nb.lab.regression import Unit
from lori_nb.lab.text import Batch, Encoded, collate
from lori_nb.method.adapters import LowRank
from lori_nb.method.streams import words
from lori_nb.method.task_gradients import by_task

RECIPE = 1  # of several tasks' gradients; raise when the same rows give other bits
HEADS_RECIPE = 2  # of heads beside a shared adapter, which decoders have not; 1 did not average their gradients
PADDING = 0.1  # more tokens than this share of their own, and batches go through the model apart
LOSSES = "losses"


@dataclass
class TaskData:
    """A task's encoded training rows and, where the frozen prefix is reused, their hidden states.

    ``unit`` is that of a regression task's targets, on whose standardised values ``head`` is trained; None for classes
    and for text answers.
    """

    name: str
    rows: list[Encoded]
    states: RowStates | None
    head: nn.Module | None = None
    unit: Unit | None = None

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
            orders[epoch] = np.argsort(words(f"lori-nb/rows/{seed}/{stream}/{epoch}", rows), kind="stable")
        chosen.append(int(orders[epoch][offset]))
    return chosen


def micro_batches(indices: Sequence[int], rows: int | None, processes: int) -> list[Sequence[int]]:
    """A batch cut into consecutive pieces of nearly equal size, of at most ``rows`` rows (None: any number).

    There are as few as that allows, but one for every process as long as there are rows enough.
    """
    count = max(math.ceil(len(indices) / (rows or len(indices))), min(processes, len(indices)))
    return [indices[len(indices) * i // count : len(indices) * (i + 1) // count] for i in range(count)]


@dataclass(frozen=True)
class TaskGradients:
    """Of T batches: each one's mean ``losses`` (T); gradients of the parameters that tasks ``share``, name → (T ×
    shape), zeros where a parameter takes no part; and of the tasks' ``heads``, each from its own task alone.
    """

    losses: Tensor
    shared: dict[str, Tensor]
    heads: dict[str, Tensor]

    def in_pairs(self) -> TaskGradients:
        """Neighbouring batches, parts of one, added: T → T / 2."""
        shared = {name: each.unflatten(0, (-1, 2)).sum(1) for name, each in self.shared.items()}
        return TaskGradients(self.losses.view(-1, 2).sum(1), shared, self.heads)

    def weighted(self, weights: Tensor) -> TaskGradients:
        """Shared gradients times w_t, with ``weights`` (T) on their device; heads' gradients stay as they are."""
        shared = {name: each * weights.view(-1, *[1] * (each.ndim - 1)) for name, each in self.shared.items()}
        return TaskGradients(self.losses, shared, self.heads)

    def of(self, task: int) -> dict[str, Tensor]:
        """One batch's gradient of the shared parameters, as views."""
        return {name: gradients[task] for name, gradients in self.shared.items()}


def task_gradients(
    base: Base,
    body: nn.Module,
    batches: Sequence[tuple[TaskData, Sequence[int]]],
    named: Mapping[str, Tensor],
    micro_batch_rows: int | None = None,
    live: Mapping[str, LowRank] | None = None,
    totals: Sequence[int] | None = None,
) -> TaskGradients:
    """Every batch's mean loss and gradient.

    Args:
        batches: (task, row numbers); each process computes its share, and all get the sums.
        named: the trained parameters by name, those of a task's head as "head.<task>.<part>".
        micro_batch_rows: rows computed at a time; None takes a process's whole share.
        live: attached factors whose gradients come from one backward pass for several tasks
            (:mod:`lori_nb.method.task_gradients`), as far as their rows are of like length; None computes every batch
            apart. Both give the same gradients up to rounding.
        totals: predictions that each batch's mean is taken over, where it is a part of a batch; None takes its own.
    """
    totals = [task.targets(indices) for task, indices in batches] if totals is None else totals
    groups = [[place] for place in range(len(batches))] if live is None else together(_lengths(batches))
    shares = [
        _own_share(base, body, [(*batches[i], totals[i]) for i in group], named, micro_batch_rows, live)
        for group in groups
    ]
    flat = iter(distributed.summed([tensor for share in shares for tensor in share.values()]))
    sums = [{name: next(flat) for name in share} for share in shares]
    places = [place for group in groups for place in group]
    heads = {name: sum(each[name] for each in sums) for name in named if _is_head(name)}
    losses, *shared = (_in_order([each[name] for each in sums], places) for name in sums[0] if not _is_head(name))
    return TaskGradients(losses, dict(zip((n for n in named if not _is_head(n)), shared, strict=True)), heads)


def _is_head(name: str) -> bool:
    return name.startswith("head.")


def together(lengths: Sequence[Sequence[int]]) -> list[list[int]]:
    """Which batches go through the model as one: those of like length, so that padding costs no more than the share
    :data:`PADDING` of the tokens that they have each for itself.

    Args:
        lengths: tokens of every row, batch by batch.

    Returns:
        Numbers of batches, group by group; every one once.
    """
    longest = [max(each) for each in lengths]
    order = sorted(range(len(lengths)), key=lambda place: (-longest[place], place))
    groups: list[list[int]] = []
    for place in order:
        if groups:
            joined = [*groups[-1], place]
            apart = sum(len(lengths[one]) * longest[one] for one in joined)
            if sum(len(lengths[one]) for one in joined) * longest[joined[0]] <= (1 + PADDING) * apart:
                groups[-1] = joined
                continue
        groups.append([place])
    return [sorted(group) for group in groups]


def _lengths(batches: Sequence[tuple[TaskData, Sequence[int]]]) -> list[list[int]]:
    return [[len(task.rows[i].ids) for i in indices] for task, indices in batches]


def _in_order(parts: Sequence[Tensor], places: Sequence[int]) -> Tensor:
    """Groups' results (k × …) as one in the batches' own order (T × …)."""
    if len(parts) == 1:
        return parts[0]  # a single group stands in order
    rows = [row for part in parts for row in part.unbind()]
    return torch.stack([row for _, row in sorted(zip(places, rows, strict=True), key=lambda pair: pair[0])])


def _own_share(base, body, group, named: Mapping[str, Tensor], rows: int | None, live) -> dict[str, Tensor]:
    """This process's part of a group of k batches (task, rows, total): LOSSES (k), shared gradients (k × …) and heads'
    gradients by name; zeros where it has no piece.
    """
    everything = [(place, i) for place, (_, indices, _) in enumerate(group) for i in indices]
    pieces = distributed.share(micro_batches(everything, rows, distributed.count()))
    if not pieces:  # one row all the same: a model whose modules do not see rows must show that to every process
        found = _of_piece(base, body, group, everything[:1], named, live)
        return {name: torch.zeros_like(each) for name, each in found.items()}
    terms = (_of_piece(base, body, group, piece, named, live) for piece in pieces)
    return distributed.tree_sum(terms, lambda one, other: {name: one[name] + other[name] for name in one})


def _zeros(name: str, parameter: Tensor, tasks: int) -> Tensor:
    return torch.zeros_like(parameter) if _is_head(name) else parameter.new_zeros(tasks, *parameter.shape)


def _of_piece(base, body, group, piece, named: Mapping[str, Tensor], live) -> dict[str, Tensor]:
    parts = [(task, [i for place, i in piece if place == own]) for own, (task, _, _) in enumerate(group)]
    weights = [task.targets(own) / total for (task, own), (_, _, total) in zip(parts, group, strict=True)]
    several = len(group) > 1
    with by_task(live, [len(own) for _, own in parts]) if several else nullcontext({}) as split:
        losses = _losses(base, body, parts, weights)
        found = torch.autograd.grad(sum(losses), list(named.values()), allow_unused=True)
    gradients = {LOSSES: torch.stack([loss.detach() for loss in losses])}
    for (name, parameter), whole in zip(named.items(), found, strict=True):
        gradient = split.get(name) if several and not _is_head(name) else whole
        if gradient is None:
            gradients[name] = _zeros(name, parameter, len(group))
        else:
            gradients[name] = gradient if several or _is_head(name) else gradient.unsqueeze(0)
    return gradients


def _losses(base: Base, body: nn.Module, parts: Sequence[tuple[TaskData, Sequence[int]]], weights) -> list[Tensor]:
    """Each task's mean loss times its weight, from one forward pass over all their rows."""
    batch = concatenated(base, parts)
    states = states_at(base, body, batch)
    decoder = base.kind == "decoder"
    ends = [task.targets(own) for task, own in parts] if decoder else [len(own) for _, own in parts]
    logits = base.head(states).float().split(ends) if decoder else states.split(ends)
    losses = []
    for (task, own), scores, targets, weight in zip(parts, logits, batch.targets.split(ends), weights, strict=True):
        scores = scores if decoder or not own else task.head(scores).float()
        targets = targets if task.unit is None else task.unit.standardised(targets)
        losses.append(weight * task_loss(base, scores, targets) if own else states.new_zeros((), dtype=torch.float32))
    return losses


def concatenated(base: Base, parts: Sequence[tuple[TaskData, Sequence[int]]]) -> Batch:
    """The rows of several tasks, one task after another, as one batch on the base's device."""
    rows = [task.rows[i] for task, indices in parts for i in indices]
    cached = all(task.states is not None for task, _ in parts)
    hidden = [task.states[i] for task, indices in parts for i in indices] if cached else None
    return collate(rows, base.tokenizer.pad_token_id, hidden=hidden).to(base.device)


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

"""A task's loss and gradient on the rows of a step: whole or in micro-batches, in one process or shared among several.

With n_p answer tokens (rows, for an encoder) in micro-batch p and N in the whole batch, the batch's mean loss is

    L = Σ_p (n_p / N) L_p,    ∇L = Σ_p (n_p / N) ∇L_p,

so micro-batches and processes change the order of additions and nothing else. For the same reason rows of several tasks
may be put together by length: what a row is padded to then depends less on what other rows its own task has.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

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

RECIPE = 2  # of several tasks' gradients; raise when the same rows give other bits
HEADS_RECIPE = 2  # of heads beside a shared adapter, which decoders have not; 1 did not average their gradients
PADDING = 0.05  # a further pass through the model has to save more than this share of the rows' own tokens
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
    whole = [(task, indices, total) for (task, indices), total in zip(batches, totals, strict=True)]
    if live is None:
        apart = [_of_pass(base, body, [batch], named, micro_batch_rows, None) for batch in whole]
        parts = {name: [each[name] for each in apart] for name in apart[0]}
        found = {name: sum(several) if _is_head(name) else torch.cat(several) for name, several in parts.items()}
    else:
        found = {}
        for part in of_like_length([[len(task.rows[i].ids) for i in indices] for task, indices in batches]):
            group = [
                (task, [indices[i] for i in places], total)
                for (task, indices, total), places in zip(whole, part, strict=True)
            ]
            for name, each in _of_pass(base, body, group, named, micro_batch_rows, live).items():
                found[name] = found[name].add_(each) if name in found else each
    heads = {name: each for name, each in found.items() if _is_head(name)}
    shared = {name: each for name, each in found.items() if name != LOSSES and name not in heads}
    return TaskGradients(found[LOSSES], shared, heads)


def _is_head(name: str) -> bool:
    return name.startswith("head.")


def of_like_length(lengths: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Which rows go through the model together, each padded to the longest among them, whatever batch they are of.

    Of all ways to cut the rows, sorted by length, the one of the fewest tokens with padding, where each further pass
    counts as many tokens as the share :data:`PADDING` of the rows' own: rows of one length, or nearly, stay together.

    Args:
        lengths: tokens of every row, batch by batch.

    Returns:
        For each pass, longest rows first, the places of its rows in every batch, in order; every row once.
    """
    counts = Counter(length for batch in lengths for length in batch)
    kinds = sorted(counts, reverse=True)  # rows of one length are never cut apart
    further = PADDING * sum(length * rows for length, rows in counts.items())
    best = [(0.0, 0)]  # for the k longest kinds: tokens, and where their last pass begins
    for end in range(1, len(kinds) + 1):
        rows, ways = 0, []
        for first in range(end - 1, -1, -1):
            rows += counts[kinds[first]]
            ways.append((best[first][0] + rows * kinds[first] + further, first))
        best.append(min(ways))
    ends = [len(kinds)]
    while ends[-1]:
        ends.append(best[ends[-1]][1])
    cuts = [set(kinds[first:end]) for end, first in pairwise(ends)]
    return [[[i for i, length in enumerate(batch) if length in cut] for batch in lengths] for cut in reversed(cuts)]


def _of_pass(base, body, group, named: Mapping[str, Tensor], rows: int | None, live) -> dict[str, Tensor]:
    """A pass over k batches (task, rows, total), of which some may have no rows in it: LOSSES (k), shared gradients
    (k × …) and heads' gradients by name, summed over the processes.
    """
    everything = [(place, i) for place, (_, indices, _) in enumerate(group) for i in indices]
    pieces = distributed.share(micro_batches(everything, rows, distributed.count()))
    if pieces:
        terms = (_of_piece(base, body, group, piece, named, live) for piece in pieces)
        own = distributed.tree_sum(terms, lambda one, other: {name: one[name] + other[name] for name in one})
    else:  # one row all the same: a model whose modules do not see rows must show that to every process
        own = _of_piece(base, body, group, everything[:1], named, live)
        own = {name: torch.zeros_like(each) for name, each in own.items()}
    return dict(zip(own, distributed.summed(list(own.values())), strict=True))


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


def _zeros(name: str, parameter: Tensor, tasks: int) -> Tensor:
    return torch.zeros_like(parameter) if _is_head(name) else parameter.new_zeros(tasks, *parameter.shape)


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

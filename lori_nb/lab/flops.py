"""Floating-point operations of training, counted before anything is trained.

The very training step is carried out on the meta device, where tensors have shapes and no values (an encoder's on a few
rows of zeros), under PyTorch's ``FlopCounterMode``: a product of m × k and k × n counts 2·m·k·n, all else nothing. So
the count follows the code, for every architecture, pattern of modules and method: forward and backward through the
layers that carry adapters, the frozen weights' own gradients left out, the output head at answer positions alone, and
most of a decoder's last layer too (:mod:`lori_nb.lab.answers`). For a batch of b rows, L tokens long when padded, with
a tokens of answers, m in the longest of them, the count is a polynomial,

    F(L, a, m) = c_0 + c_1·L + c_2·L² + c_3·a + c_4·m + c_5·m·L,

whose six numbers six counts give exactly. It is summed over the batches that training will draw, rows of several tasks
together as they are there. Attention counts as plain products over full L × L squares, m × L in the last layer.
Recomputation under gradient checkpointing, what is done to finished gradients (projection, the optimiser), scoring, and
that batches of several tasks are cut in halves at some steps (which changes padding where tasks go through the model
apart) are not counted.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lori_nb.lab.baselines import REPLACEMENTS, put_in_place
from lori_nb.lab.evaluation import logits_at, task_loss
from lori_nb.lab.gradients import batch_indices, micro_batches, of_like_length
from lori_nb.lab.methods import LOW_RANK, Method, get_method
from lori_nb.lab.models import Base, base_kind, empty_body, load_tokenizer
from lori_nb.lab.prefix import CHUNK, hidden_at, split_at, suffix_body
from lori_nb.lab.specs import RunSpec
from lori_nb.lab.tasks import get_task
from lori_nb.lab.text import Batch, encode_rows
from lori_nb.method.adapters import Factors, LowRank, target_linears

# transformers asks whether an encoder's mask masks anything, which a tensor without values cannot tell.
DEVICES = {"decoder": "meta", "encoder": "cpu"}
SHORT = 8  # tokens of the shortest batch that is counted; the polynomial holds at every length


@dataclass(frozen=True)
class StepFlops:
    """Coefficients of F(L, a, m) of one step on one task, for a fixed number of rows."""

    constant: float
    of_length: float
    of_square: float
    of_answer: float
    of_asked: float
    of_asked_length: float

    def at(self, length: int, answer: int, asked: int) -> float:
        """F for rows padded to ``length`` tokens, with ``answer`` answer tokens in all and ``asked`` in the longest."""
        of_layers = self.of_length * length + self.of_square * length**2 + self.of_asked_length * asked * length
        return self.constant + of_layers + self.of_answer * answer + self.of_asked * asked


@dataclass(frozen=True)
class Piece:
    """What is computed at a time: rows, the tokens that each is padded to, answer tokens in all and in the longest."""

    rows: int
    length: int
    answer: int
    asked: int


def training_flops(spec: RunSpec) -> float:
    """Operations of all training steps of a run, those of its calibration run included.

    The run that it goes on from (``start``) and the filling of the cache below the adapters (:func:`prefix_flops`) are
    not. Needs the base's tokenizer and the training rows, neither weights nor a run.
    """
    if not get_method(spec.method).trains:
        return 0.0
    if len(spec.tasks) > 1 and get_method(spec.method).form == LOW_RANK:
        own = _joint_flops(spec)
    else:
        pieces = [(task, piece) for task in spec.tasks for piece in _pieces(spec, task)]
        own = sum(step_flops(spec, task, of.rows).at(of.length, of.answer, of.asked) for task, of in pieces)
    return own + (training_flops(spec.calibration) if spec.calibration else 0.0)


def prefix_flops(spec: RunSpec) -> float:
    """Operations of filling the cache of hidden states below the adapters with the training rows, once for all runs.

    Zero where nothing is cached. Rows go through in chunks of a fixed size, all padded to the longest row.
    """
    base = _empty_base(spec.base)
    first = split_at(base, spec.last_layers)
    if first == 0 or not get_method(spec.method).trains:
        return 0.0
    total = 0.0
    for task in spec.tasks:
        lengths = [length for length, _ in _tokens(spec, task)]
        batch = _empty_batch(base, CHUNK, max(lengths), CHUNK, 1, None)
        total += -(-len(lengths) // CHUNK) * _counted(lambda batch=batch: hidden_at(base, batch, first))
    return total


def step_flops(spec: RunSpec, task: str, rows: int) -> StepFlops:
    """F(L, a, m) of one training step of a spec with ``rows`` rows of one task.

    A mask changes no product: the gradient of B is formed whole and its trained entries gathered.
    """
    classes = len(get_task(task).labels) or 1
    return _step_flops(spec.base, spec.method, spec.rank, spec.modules, spec.last_layers, rows, classes)


@functools.lru_cache(maxsize=256)
def _step_flops(base: str, method: str, rank: int, modules: str, layers: int | None, rows: int, classes: int):
    empty = _empty_base(base)
    linears = target_linears(empty.body, modules, layers)
    live = {name: _trained_module(get_method(method), linear, rank) for name, linear in linears.items()}
    head = None if empty.kind == "decoder" else nn.Linear(empty.width, classes, device=empty.device)
    first = split_at(empty, layers)
    body = suffix_body(empty, first)

    def count(length: int, answer: int, asked: int) -> float:
        batch = _empty_batch(empty, rows, length, answer, asked, empty.width if first else None)
        return _counted(lambda: _step(empty, body, live, head, batch))

    one, two, three = (count(times * SHORT, rows, 1) for times in (1, 2, 3))
    asked, asked_at_two = count(SHORT, rows, 2) - one, count(2 * SHORT, rows, 2) - two
    of_asked_length = (asked_at_two - asked) / SHORT
    of_asked = asked - of_asked_length * SHORT
    of_square = (three - 2 * two + one) / (2 * SHORT**2)
    of_length = (two - one - of_square * 3 * SHORT**2) / SHORT - of_asked_length
    of_answer = (count(SHORT, 2 * rows, 1) - one) / rows
    found = StepFlops(0.0, of_length, of_square, of_answer, of_asked, of_asked_length)
    return replace(found, constant=one - found.at(SHORT, rows, 1))


def _trained_module(method: Method, linear: nn.Linear, rank: int) -> nn.Module:
    d_out, d_in = linear.weight.shape
    factors = Factors(linear.weight.new_zeros(rank, d_in), linear.weight.new_zeros(d_out, rank), 1.0)
    if method.form == LOW_RANK:
        return LowRank(factors, train_A=method.trains_A)
    return REPLACEMENTS[method.form](linear, factors)


def _step(base: Base, body: nn.Module, live: dict[str, nn.Module], head: nn.Module | None, batch: Batch) -> None:
    """Forward and backward of one step, to all that is trained."""
    trained = [p for each in (*live.values(), *([head] if head else [])) for p in each.parameters() if p.requires_grad]
    with put_in_place(base.body, live):
        loss = task_loss(base, logits_at(base, body, batch, head), batch.targets)
        torch.autograd.grad(loss, trained, allow_unused=True)


def _counted(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


@functools.lru_cache(maxsize=4)
def _empty_base(name: str) -> Base:
    """The base with zeros for weights, or with shapes alone, and attention as plain products."""
    kind = base_kind(name)
    body = copy.deepcopy(empty_body(name)).to_empty(device=DEVICES[kind])
    body.set_attn_implementation("eager")
    body.eval().requires_grad_(False)
    for tensor in (*body.parameters(), *body.buffers()):
        tensor.zero_()
    head = None
    if kind == "decoder":
        head = nn.Linear(body.config.hidden_size, body.config.vocab_size, bias=False, device=DEVICES[kind])
        head.requires_grad_(False)
    # Segment ids, which a tokenizer would ask for, are looked up and added: no product.
    return Base(name, "", kind, body, head, SimpleNamespace(model_input_names=()), torch.float32)


def _empty_batch(base: Base, rows: int, length: int, answer: int, asked: int, width: int | None) -> Batch:
    """A batch of zeros, or of shapes alone; hidden states of ``width`` where the prefix is cached."""
    ids = _zeros(base, rows, length)
    hidden = None if width is None else _zeros(base, rows, length, width).float()
    if base.kind == "encoder":
        return Batch(ids, ids, ids, targets=_zeros(base, rows), hidden=hidden)
    of_answer = _zeros(base, answer)
    decoded = {"positions": of_answer, "rows": of_answer, "decisive": of_answer, "slots": of_answer}
    return Batch(ids, ids, ids, of_answer, hidden=hidden, asked=_zeros(base, rows, asked), **decoded)


def _zeros(base: Base, *shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.long, device=base.device)


def _tokens(spec: RunSpec, task: str) -> tuple[tuple[int, int], ...]:
    """(tokens, answer tokens) of every training row of a task."""
    rows = tuple(get_task(task).rows("train", spec.train_rows))
    encoded = encode_rows(load_tokenizer(spec.base), base_kind(spec.base), rows, (), get_task(task).system)
    return tuple((len(row.ids), len(row.answer)) for row in encoded)


def _pieces(spec: RunSpec, task: str) -> tuple[Piece, ...]:
    """All that one process computes of a task's rows, over all steps."""
    size = spec.batch_size // len(spec.tasks)
    return _drawn(_tokens(spec, task), size, spec.micro_batch_rows, spec.trained_steps, spec.seed, task)


def _joint_flops(spec: RunSpec) -> float:
    """Of rows of several tasks that go through the model together. Where only factors are trained every product has
    the rows among its places, so that b rows count b times what one does.
    """
    one = {task: step_flops(spec, task, 1) for task in spec.tasks}
    tokens = tuple(_tokens(spec, task) for task in spec.tasks)
    pieces = _drawn_together(
        tokens, spec.batch_size // len(spec.tasks), spec.micro_batch_rows, spec.trained_steps, spec.seed, spec.tasks
    )
    return sum(of.rows * one[task].at(of.length, 0, of.asked) + one[task].of_answer * of.answer for task, of in pieces)


@functools.lru_cache(maxsize=64)  # methods of one seed draw the same rows
def _drawn_together(
    tokens: tuple[tuple[tuple[int, int], ...], ...],
    size: int,
    at_a_time: int | None,
    steps: int,
    seed: int,
    tasks: tuple[str, ...],
) -> tuple[tuple[str, Piece], ...]:
    """(task, its part of a piece, padded as the whole piece is) of all that one process computes, over all steps."""
    pieces = []
    for step in range(steps):
        drawn = [
            [own[i] for i in batch_indices(len(own), size, step, seed, task)]
            for task, own in zip(tasks, tokens, strict=True)
        ]
        for part in of_like_length([[length for length, _ in rows] for rows in drawn]):
            everything = [(place, drawn[place][i]) for place, rows in enumerate(part) for i in rows]
            for piece in micro_batches(everything, at_a_time, 1):
                length, asked = (max(row[which] for _, row in piece) for which in (0, 1))
                for place, task in enumerate(tasks):
                    answers = [answer for own, (_, answer) in piece if own == place]
                    if answers:
                        pieces.append((task, Piece(len(answers), length, sum(answers), asked)))
    return tuple(pieces)


@functools.lru_cache(maxsize=256)  # methods of one seed and task draw the same rows
def _drawn(
    tokens: tuple[tuple[int, int], ...], size: int, at_a_time: int | None, steps: int, seed: int, task: str
) -> tuple[Piece, ...]:
    pieces = []
    for step in range(steps):
        for indices in micro_batches(batch_indices(len(tokens), size, step, seed, task), at_a_time, 1):
            lengths, answers = zip(*(tokens[i] for i in indices), strict=True)
            pieces.append(Piece(len(indices), max(lengths), sum(answers), max(answers)))
    return tuple(pieces)

"""Scores: per-row correctness by teacher forcing, and the metrics made of it.

A greedy answer equals the reference exactly when, with the reference fed in, the argmax is right at every answer token;
so exact match needs one forward pass and no generation. (Ties of the argmax aside, which greedy decoding breaks the
same way.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import stats
from sklearn import metrics as sk
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache

from lori_nb.analysis.pass_at_k import pass_at_k_of_rows
from lori_nb.lab import distributed
from lori_nb.lab.answers import can_narrow, narrowed
from lori_nb.lab.models import Base
from lori_nb.lab.prefix import RowStates, model_inputs
from lori_nb.lab.text import Batch, Encoded, collate

RECIPE = 2  # raise when scores change for the same adapter and rows


@dataclass(frozen=True)
class Scored:
    """Per-row results of one task: ``correct`` (n) in [0, 1] for text answers, ``predicted`` (n) class or value for
    encoders and index for choices, ``loss`` (n), NaN where no reference answer was fed in.

    Only some ways of scoring fill the rest: ``normalised`` (n), right by likelihood per character of the choice;
    ``passed`` (n × samples), which completions passed their check; ``completions``, the generated texts of each row.
    """

    correct: np.ndarray
    predicted: np.ndarray
    target: np.ndarray
    loss: np.ndarray
    normalised: np.ndarray | None = None
    passed: np.ndarray | None = None
    completions: list[list[str]] | None = None


def logits_at(
    base: Base, body: nn.Module, batch: Batch, head: nn.Module | None = None, before: Cache | None = None
) -> Tensor:
    """Float32 logits: at the answer positions (n × vocabulary) for a decoder, of the task head (b × classes) for an
    encoder; ``before`` as in :func:`states_at`.
    """
    states = states_at(base, body, batch, before)
    return (base.head(states) if base.kind == "decoder" else head(states)).float()


def states_at(base: Base, body: nn.Module, batch: Batch, before: Cache | None = None) -> Tensor:
    """What the output head reads: last hidden states at the answer positions (n × d) for a decoder, their mean over a
    row's tokens (b × d, float32) for an encoder.

    ``before`` holds the keys and values of a prompt that all rows of the batch go on from. Where the architecture
    allows, the last layer is computed at the answer positions only. Hidden states are gathered in two dimensions before
    the output head, since in three dimensions a tied head of 49k rows is copied.
    """
    inputs = model_inputs(base, batch)
    if before is not None:
        seen = batch.mask.new_ones(len(batch.mask), before.get_seq_length())
        inputs |= {"past_key_values": before, "attention_mask": torch.cat([seen, batch.mask], dim=1)}
    if base.kind == "decoder" and before is None and can_narrow(body):
        hidden = narrowed(body, batch)(**inputs).last_hidden_state  # (b × m × d)
        return hidden.flatten(0, 1)[batch.slots]
    hidden = body(**inputs).last_hidden_state  # (b × L × d)
    if base.kind == "decoder":
        return hidden.flatten(0, 1)[batch.positions]
    keep = batch.mask.unsqueeze(-1).to(hidden.dtype)
    pooled = (hidden * keep).sum(1) / keep.sum(1)  # mean over tokens, the pooling that MiniLM was trained with
    return pooled.float()


def task_loss(base: Base, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy over answer tokens (decoder) or rows (classes), mean squared error for a one-value head.

    ``logits`` (n × classes or 1), ``targets`` (n), which a regression task standardises for training
    (:mod:`lori_nb.lab.regression`).
    """
    if base.kind == "encoder" and logits.shape[1] == 1:
        return F.mse_loss(logits.squeeze(1), targets.float())
    return F.cross_entropy(logits, targets.long())


def score_rows(
    base: Base,
    body: nn.Module,
    rows: Sequence[Encoded],
    states: RowStates | None = None,
    head: nn.Module | None = None,
    batch_size: int = 32,
) -> Scored:
    """Score every row once, none dropped, in batches of similar length; the result is in the rows' own order.

    A row that has lost tokens which decide its score does not count as right. Several processes are dealt whole
    batches, so that the bits do not depend on how many there are.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    found: dict[int, tuple[float, float, float]] = {}
    shared = common_prompt(base, rows) if states is None else 0
    for start in distributed.dealt(range(0, len(order), batch_size)):
        chosen = order[start : start + batch_size]
        hidden = None if states is None else [states[i] for i in chosen]
        pieces = [_without_start(rows[i], shared) for i in chosen]
        batch = collate(pieces, base.tokenizer.pad_token_id, hidden=hidden).to(base.device)
        with torch.no_grad():
            before = _prompt_cache(base, body, rows[0].ids[:shared], len(chosen)) if shared else None
            logits = logits_at(base, body, batch, head, before)
        score = _score_answers if base.kind == "decoder" else _score_heads
        found.update(zip(chosen, score(logits, batch, len(chosen)), strict=True))
    found = distributed.gathered(found)
    table = np.array([found[i] for i in range(len(rows))], dtype=np.float64)
    target = np.array([np.nan if row.target is None else row.target for row in rows], dtype=np.float64)
    correct = np.where([row.whole for row in rows], table[:, 0], 0.0)
    return Scored(correct=correct, predicted=table[:, 1], target=target, loss=table[:, 2])


def common_prompt(base: Base, rows: Sequence[Encoded], worth: int = 48) -> int:
    """How many tokens all prompts begin with (few-shot examples), so that they are computed once a batch; 0 when below
    ``worth``.
    """
    if base.kind == "encoder":
        return 0
    shortest = min(row.answer_start for row in rows) - 1  # one token of the prompt stays, to predict the answer from
    same = 0
    while same < shortest and len({row.ids[same] for row in rows}) == 1:
        same += 1
    return same if same >= worth else 0


def _without_start(row: Encoded, tokens: int) -> Encoded:
    return row if not tokens else replace(row, ids=row.ids[tokens:], answer_start=row.answer_start - tokens)


def _prompt_cache(base: Base, body: nn.Module, ids: Sequence[int], copies: int) -> Cache:
    cache = DynamicCache(config=body.config)
    body(input_ids=torch.tensor([ids], device=base.device), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(copies)
    return cache


def _score_answers(logits: Tensor, batch: Batch, n: int) -> list[tuple[float, float, float]]:
    right = (logits.argmax(1) == batch.targets) | ~batch.decisive  # tokens past the opening do not count
    missed = torch.zeros(n, device=logits.device).index_add_(0, batch.rows, (~right).float())
    token_loss = F.cross_entropy(logits, batch.targets, reduction="none")
    count = torch.zeros(n, device=logits.device).index_add_(0, batch.rows, torch.ones_like(token_loss))
    loss = torch.zeros(n, device=logits.device).index_add_(0, batch.rows, token_loss) / count
    return [
        (float(m == 0), float("nan"), float(row_loss))
        for m, row_loss in zip(missed.tolist(), loss.tolist(), strict=True)
    ]


def _score_heads(logits: Tensor, batch: Batch, n: int) -> list[tuple[float, float, float]]:
    if logits.shape[1] == 1:
        value, target = logits.squeeze(1).double(), batch.targets.double()
        return [(float("nan"), v, (v - t) ** 2) for v, t in zip(value.tolist(), target.tolist(), strict=True)]
    loss = F.cross_entropy(logits, batch.targets, reduction="none")
    best = logits.argmax(1)
    return [
        (float(b == t), float(b), x)
        for b, t, x in zip(best.tolist(), batch.targets.tolist(), loss.tolist(), strict=True)
    ]


def _balanced(s: Scored) -> float:
    return float(np.mean([s.correct[s.target == group].mean() for group in np.unique(s.target)]))


# Every metric is a number in natural units: shares in [0, 1], correlations in [-1, 1].
METRICS: dict[str, Callable[[Scored], float]] = {
    "exact_match": lambda s: float(s.correct.mean()),
    "accuracy": lambda s: float(s.correct.mean()),
    "balanced_accuracy": _balanced,
    "f1": lambda s: float(sk.f1_score(s.target, s.predicted, zero_division=0.0)),
    "matthews": lambda s: float(sk.matthews_corrcoef(s.target, s.predicted)),
    "pearson": lambda s: _correlation(stats.pearsonr, s),
    "spearman": lambda s: _correlation(stats.spearmanr, s),
    "accuracy_normalised": lambda s: float(_filled("normalised", s).mean()),
    # right means refused where the target is 1 (should be refused), answered where it is 0
    "refusal_rate": lambda s: float(s.correct[s.target == 1].mean()),
    "over_refusal_rate": lambda s: float(1 - s.correct[s.target == 0].mean()),
    "pass_at_1": lambda s: _pass_at(1, s),
    "pass_at_5": lambda s: _pass_at(5, s),
    "pass_at_10": lambda s: _pass_at(10, s),
}

# These read ``predicted``, which only an encoder's head gives.
OF_PREDICTIONS = ("f1", "matthews", "pearson", "spearman")


def _filled(name: str, s: Scored) -> np.ndarray:
    found = getattr(s, name)
    if found is None:
        raise ValueError(f"scores must have {name!r} for this metric; the task's way of scoring does not give it")
    return found


def _pass_at(k: int, s: Scored) -> float:
    return float(pass_at_k_of_rows(_filled("passed", s), (k,))[k].mean())


def _correlation(measure: Callable, s: Scored) -> float:
    if np.ptp(s.predicted) == 0:  # a constant prediction has no correlation; it explains nothing
        return 0.0
    return float(measure(s.predicted, s.target).statistic)


def register_metric(name: str) -> Callable:
    """Decorator: add a metric, a function of :class:`Scored`, under a name that tasks can use."""

    def wrap(measure: Callable[[Scored], float]) -> Callable[[Scored], float]:
        METRICS[name] = measure
        return measure

    return wrap


def get_metric(name: str) -> Callable[[Scored], float]:
    """The named metric; ValueError lists the known ones."""
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; found {name!r}")
    return METRICS[name]


def metric(name: str, scored: Scored) -> float:
    """The value of the named metric."""
    return get_metric(name)(scored)


# What a constant answer scores whatever the rows are: always refusing, always answering, one program for every problem.
CONSTANT = {"pearson": 0.0, "spearman": 0.0, "matthews": 0.0, "refusal_rate": 1.0, "over_refusal_rate": 0.0}
CONSTANT |= {name: 0.0 for name in METRICS if name.startswith("pass_at_")}


def majority_score(name: str, answers: Sequence[str], targets: Sequence[float | int | None]) -> float:
    """What always giving the most frequent answer of the scored rows themselves would score: the strongest constant
    answer.
    """
    if name in CONSTANT:
        return CONSTANT[name]
    known = [t for t in targets if t is not None]
    if name == "balanced_accuracy":
        return 1.0 / len(set(known))
    if name == "f1":
        return float(sk.f1_score(known, np.ones(len(known))))
    values, counts = np.unique(np.asarray(answers), return_counts=True)
    return float(counts.max() / counts.sum()) if len(values) else float("nan")

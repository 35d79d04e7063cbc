"""How a task's rows are scored, by its ``scoring``: teacher forcing, likelihood of choices, generation, execution.

Each way is a function of (subject, asked) to :class:`Scored`; the dictionary at the end is the whole dispatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from lori_nb.lab import distributed
from lori_nb.lab.evaluation import Scored, majority_score, metric, score_rows
from lori_nb.lab.generation import Settings, generate, left_padded
from lori_nb.lab.models import Base
from lori_nb.lab.prefix import RowStates, cached_states
from lori_nb.lab.sandbox import check_execution_allowed
from lori_nb.lab.tasks import Example, Task
from lori_nb.lab.tasks.code import score_completions
from lori_nb.lab.text import Encoded, encode_choices, encode_prompts, encode_rows, row_limit

RECIPE = 1  # raise when choices, or the judges of generated answers, score otherwise

# Metrics that only one way of scoring can give, and the samples of every row that they take.
NEEDS = {"accuracy_normalised": ("choice", 1)} | {f"pass_at_{k}": ("execute", k) for k in (1, 5, 10)}

GENERATED = ("generate", "execute")  # ways of scoring that let the model write

Progress = Callable[[str, int, int], None]  # (stage, done, total)


@dataclass(frozen=True)
class Subject:
    """What is scored: a base with whatever is attached to its body.

    ``body`` are its layers from ``first`` on, which start from cached hidden states; ``seed`` decides sampled answers.
    """

    base: Base
    body: nn.Module
    first: int
    seed: int = 0


@dataclass(frozen=True)
class Asked:
    """What it is asked: the rows of a task's split, solved examples shown before each, and an encoder's task head."""

    task: Task
    rows: tuple[Example, ...]
    shots: tuple[Example, ...] = ()
    head: nn.Module | None = None


def score_task(subject: Subject, asked: Asked, report: Progress) -> Scored:
    """Score every row once, in the rows' order; errors as in :func:`check_can_score`."""
    check_can_score(asked.task)
    return SCORERS[asked.task.scoring](subject, asked, report)


def check_can_score(task: Task) -> None:
    """ValueError for a way of scoring that is not known, lacks a setting, or runs code without having been allowed to.

    A run asks before it trains, so that an hour's work is not lost to a missing word.
    """
    if task.scoring not in SCORERS:
        known = ", ".join(SCORERS)
        raise ValueError(f"scoring of task {task.name!r} must be one of {known}; found {task.scoring!r}")
    if task.scoring in GENERATED and "max_new_tokens" not in task.extra:
        raise ValueError(f"extra of task {task.name!r} must state max_new_tokens, since its answers are generated")
    samples = _settings(task).samples if task.scoring in GENERATED else 1
    for name in (task.metric, *task.also):
        scoring, least = NEEDS.get(name, (task.scoring, 1))
        if scoring != task.scoring or samples < least:
            raise ValueError(
                f"metric {name} of task {task.name!r} must have scoring {scoring!r} of {least} or more samples; "
                f"found {task.scoring!r} of {samples}"
            )
    if task.scoring == "generate" and task.judge is None:
        raise ValueError(f"judge of task {task.name!r} must be a function of row and completion; found None")
    if task.scoring == "execute":
        check_execution_allowed(task.name)


def states_of(base: Base, rows: Sequence[Encoded], first: int, task: str, report: Progress) -> RowStates | None:
    """Cached hidden states below layer ``first``, None where adapters sit on every layer."""
    if first == 0:
        return None
    return cached_states(base, rows, first, lambda done, total: report(f"prefix {task}", done, total))


def _forced(subject: Subject, asked: Asked, report: Progress) -> Scored:
    base, task = subject.base, asked.task
    rows = encode_rows(base.tokenizer, base.kind, asked.rows, asked.shots, task.system)
    states = states_of(base, rows, subject.first, task.name, report)
    return score_rows(base, subject.body, rows, states, asked.head)


def _choice(subject: Subject, asked: Asked, report: Progress) -> Scored:
    task, rows = asked.task, asked.rows
    encoded = encode_choices(subject.base.tokenizer, rows, asked.shots, row_limit(len(asked.shots)), task.system)
    log_p = choice_log_likelihoods(subject.base, encoded, lambda done, n: report(f"scoring {task.name}", done, n))
    tokens = [len(choices[row.target].answer) for choices, row in zip(encoded, rows, strict=True)]
    return scored_choices(rows, log_p, tokens)


def scored_choices(rows: Sequence[Example], log_p: Sequence[np.ndarray], tokens: Sequence[int]) -> Scored:
    """The choice of highest log-likelihood, the first of equal ones; beside it the highest one per character.

    Of every row come ``log_p`` (choices,) and the number of ``tokens`` of its right choice, over which the loss is a
    mean.
    """
    target = np.array([row.target for row in rows])
    best = np.array([values.argmax() for values in log_p])
    per_character = [values / [len(c) for c in row.choices] for values, row in zip(log_p, rows, strict=True)]
    return Scored(
        correct=(best == target).astype(float),
        predicted=best.astype(float),
        target=target.astype(float),
        loss=np.array([-values[t] / n for values, t, n in zip(log_p, target, tokens, strict=True)]),
        normalised=np.array([v.argmax() == t for v, t in zip(per_character, target, strict=True)], dtype=float),
    )


def choice_log_likelihoods(
    base: Base,
    rows: Sequence[Sequence[Encoded]],
    progress: Callable[[int, int], None] = lambda done, total: None,
    batch_size: int = 16,
) -> list[np.ndarray]:
    """log p(choice | prompt), in nats, of every choice of every row: the sum over the choice's tokens.

    A prompt runs through the model once, whatever the number of its choices. Each result is (choices,).
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0].ids))
    found: dict[int, np.ndarray] = {}
    for start in distributed.dealt(range(0, len(order), batch_size)):
        chosen = order[start : start + batch_size]
        with torch.no_grad():
            sums = _summed([rows[i] for i in chosen], base)
        ends = np.cumsum([len(rows[i]) for i in chosen])[:-1]
        found.update(zip(chosen, np.split(sums.cpu().numpy(), ends), strict=True))
        progress(len(found), len(rows))
    found = distributed.gathered(found)
    return [found[i] for i in range(len(rows))]


def _summed(rows: Sequence[Sequence[Encoded]], base: Base) -> Tensor:
    """Summed log-probabilities (n) of the n choices of all rows, in order."""
    choices = [choice for row in rows for choice in row]
    owner = torch.tensor([place for place, row in enumerate(rows) for _ in row], device=base.device)
    # The prompt but for its last token, which is fed with the choice: its logits predict the choice's first token.
    cache, seen = _prompts_cache(base, [row[0].ids[: row[0].answer_start - 1] for row in rows])
    cache.batch_select_indices(owner)
    seen = seen[owner]  # (n × P)
    fed = [choice.ids[choice.answer_start - 1 :] for choice in choices]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(f) for f in fed], True, base.tokenizer.pad_token_id).to(base.device)
    real = torch.arange(ids.shape[1] - 1, device=base.device) < torch.tensor(
        [[len(f) - 1] for f in fed], device=base.device
    )  # (n × t), the tokens whose logits count
    hidden = base.body(
        input_ids=ids[:, :-1],
        attention_mask=torch.cat([seen, real.long()], dim=1),
        position_ids=seen.sum(1, keepdim=True) + torch.arange(ids.shape[1] - 1, device=base.device),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    log_p = base.head(hidden[real]).float().log_softmax(-1)  # (tokens of all choices × vocabulary)
    values = log_p.gather(1, ids[:, 1:][real].unsqueeze(1)).squeeze(1).double()
    place = real.nonzero()[:, 0]
    return torch.zeros(len(choices), dtype=torch.float64, device=base.device).index_add_(0, place, values)


def _prompts_cache(base: Base, prompts: Sequence[Sequence[int]]) -> tuple[Cache, Tensor]:
    """Keys and values of left-padded prompts, and their mask (b × P)."""
    ids, mask = (t.to(base.device) for t in left_padded(prompts, base.tokenizer.pad_token_id))
    cache = DynamicCache(config=base.body.config)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    base.body(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
    return cache, mask


def _generate(subject: Subject, asked: Asked, report: Progress) -> Scored:
    """Credit of each generated answer by the task's own judge; several samples of a row count as their mean."""
    completions = _completions(subject, asked, report)
    judge = asked.task.judge
    credit = [[judge(row, text) for text in texts] for row, texts in zip(asked.rows, completions, strict=True)]
    return _scored(asked.rows, np.array(credit, dtype=float), completions=completions)


def _execute(subject: Subject, asked: Asked, report: Progress) -> Scored:
    """Share of each row's completions that pass the row's check when they are run."""
    completions = _completions(subject, asked, report)
    verdicts = distributed.decided(lambda: score_completions(asked.rows, completions))  # run once
    passed = np.asarray(verdicts, dtype=bool)  # (n × samples)
    return _scored(asked.rows, passed.astype(float), completions=completions, passed=passed)


def _scored(rows: Sequence[Example], credit: np.ndarray, **more) -> Scored:
    unknown = np.full(len(rows), np.nan)
    target = np.array([np.nan if row.target is None else row.target for row in rows], dtype=float)
    return Scored(correct=credit.mean(1), predicted=unknown, target=target, loss=unknown, **more)


def _completions(subject: Subject, asked: Asked, report: Progress) -> list[list[str]]:
    task, base = asked.task, subject.base
    settings = replace(_settings(task), seed=subject.seed)
    prompts = encode_prompts(base.tokenizer, asked.rows, asked.shots, row_limit(len(asked.shots)), task.system)
    return generate(base, prompts, settings, lambda done, n: report(f"generating {task.name}", done, n))


def _settings(task: Task) -> Settings:
    names = ("max_new_tokens", "samples", "temperature", "stop", "batch_size")
    return Settings(**{name: task.extra[name] for name in names if name in task.extra})


SCORERS: dict[str, Callable[[Subject, Asked, Progress], Scored]] = {
    "forced": _forced,
    "choice": _choice,
    "generate": _generate,
    "execute": _execute,
}


def metric_rows(task: Task, split: str, rows: Sequence[Example], scored: Scored) -> list[dict]:
    """One row a metric: the task's own first, then those that it reports beside it."""
    return [
        {
            "task": task.name,
            "split": split,
            "metric": name,
            "value": metric(name, scored),
            "n": len(rows),
            "majority": majority_score(name, _answers(task, rows), [row.target for row in rows]),
            "loss": float(np.mean(scored.loss)),
        }
        for name in (task.metric, *task.also)
    ]


def _answers(task: Task, rows: Sequence[Example]) -> list[str]:
    """What a constant answer is compared with: a generated answer is judged by its target, not by its wording."""
    if task.scoring == "generate":
        return [row.answer if row.target is None else str(row.target) for row in rows]
    return [row.answer for row in rows]


def prediction_rows(task: str, split: str, scored: Scored) -> pd.DataFrame:
    """One row an example; a column ``completions``, a list of texts a row, where answers were generated."""
    columns = {"correct": scored.correct, "predicted": scored.predicted, "target": scored.target, "loss": scored.loss}
    frame = pd.DataFrame({"task": task, "split": split, "row": np.arange(len(scored.loss)), **columns})
    return frame if scored.completions is None else frame.assign(completions=scored.completions)

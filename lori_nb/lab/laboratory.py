"""How a spec is carried out: load the base and the rows, train or merge, score, and hand back what is to be kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lori_nb.analysis.merging import merge
from lori_nb.lab.evaluation import Scored, majority_score, metric, score_rows
from lori_nb.lab.methods import get_method, initial_live
from lori_nb.lab.models import Base, empty_body, load_base
from lori_nb.lab.prefix import RowStates, cached_states, split_at, suffix_body
from lori_nb.lab.specs import MergeSpec, RunSpec, Spec, check
from lori_nb.lab.tasks import Example, get_task
from lori_nb.lab.text import Encoded, encode_decoder_rows, encode_encoder_rows
from lori_nb.lab.training import Report, TaskData, Trained, train
from lori_nb.method.adapters import (
    Adapter,
    Factors,
    attach_factors,
    check_rank,
    random_down_projection,
    subspace_id,
    target_linears,
)


@dataclass
class Outcome:
    """Everything a finished spec leaves: tables, an adapter if one was trained, and facts for the provenance."""

    metrics: pd.DataFrame
    predictions: pd.DataFrame
    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    conflicts: pd.DataFrame = field(default_factory=pd.DataFrame)
    adapter: Adapter | None = None
    facts: dict = field(default_factory=dict)


def carry_out(spec: Spec, folder: Path, adapter_of: Callable[[RunSpec], Adapter], report: Report) -> Outcome:
    """Do what a spec says.

    Args:
        folder: where a checkpoint may be kept.
        adapter_of: gives the adapter of a finished run.
        report: called with (stage, done, total).
    """
    check(spec)
    return {"run": _run, "merge": _merge}[spec.kind](spec, folder, adapter_of, report)


def check_modules(spec: Spec) -> None:
    """ValueError unless the spec's rank, modules and last_layers fit its base; asks for shapes, not for weights."""
    if isinstance(spec, RunSpec) and get_method(spec.method).trains:
        check_rank(spec.rank, target_linears(_shapes_of(spec.base), spec.modules, spec.last_layers))


_shapes_of = functools.lru_cache(maxsize=4)(empty_body)


def _run(spec: RunSpec, folder: Path, adapter_of, report: Report) -> Outcome:
    base = load_base(spec.base, spec.dtype)
    if not get_method(spec.method).trains:
        return _score_base(spec, base, report)
    linears = target_linears(base.body, spec.modules, spec.last_layers)
    first = split_at(base, spec.last_layers)
    body = suffix_body(base, first)
    live = initial_live(spec, {name: tuple(m.weight.shape) for name, m in linears.items()}, adapter_of)
    for low in live.values():
        low.to(base.device)
    tasks = [_task_data(spec, base, name, first, report) for name in spec.tasks]
    trained = train(spec, base, body, live, tasks, folder / "checkpoint.safetensors", report)
    heads = {
        f"head.{t.name}.{part}": p.detach().cpu() for t in tasks if t.head for part, p in t.head.named_parameters()
    }
    inherited = adapter_of(spec.start) if spec.start else None
    adapter = _adapter(spec, base, live, (inherited.extras if inherited else {}) | heads, inherited)
    metrics, predictions = _score(spec, base, body, first, [(adapter.factors, 1.0)], adapter.extras, report)
    return _outcome(spec, base, live, trained, adapter, metrics, predictions)


def _outcome(spec, base, live, trained: Trained, adapter, metrics, predictions) -> Outcome:
    count = sum(p.numel() for low in live.values() for p in low.parameters() if p.requires_grad)
    facts = {
        "trainable_parameters": count,
        "training_seconds": trained.seconds,
        "device": str(base.device),
        "dtype": str(base.dtype),
    }
    history, conflicts = pd.DataFrame(trained.history), pd.DataFrame(trained.conflicts)
    return Outcome(metrics, predictions, history, conflicts, adapter, facts)


def _adapter(spec: RunSpec, base: Base, live, extras: dict[str, Tensor], inherited: Adapter | None) -> Adapter:
    support = {name: low.support() for name, low in live.items()}
    masked = all(mask is not None for mask in support.values())
    frozen = not get_method(spec.method).trains_A and (inherited is None or inherited.frozen_A)
    return Adapter(
        factors={name: low.factors() for name, low in live.items()},
        base=spec.base,
        base_digest=base.digest,
        rank=spec.rank,
        alpha=spec.alpha,
        seed=inherited.seed if inherited else spec.seed,
        subspace=inherited.subspace if inherited else subspace_id(spec.subspace, spec.tasks),
        frozen_A=frozen,
        masks=support if masked else None,
        extras=extras,
    )


def _task_data(spec: RunSpec, base: Base, name: str, first: int, report: Report) -> TaskData:
    rows = _encoded(base, name, "train", spec.train_rows)
    return TaskData(name, rows, _states(base, rows, first, name, report), new_head(spec, base, name))


def new_head(spec: RunSpec, base: Base, task: str, width: int | None = None) -> nn.Module | None:
    """A task's output head on an encoder: one output a class, or one value; seeded. None for decoders."""
    if base.kind == "decoder":
        return None
    classes = len(get_task(task).labels) or 1
    head = nn.Linear(width or base.width, classes)
    with torch.no_grad():
        head.weight.copy_(random_down_projection(spec.seed, f"head/{task}", "head", classes, head.in_features))
        head.bias.zero_()
    return head.to(base.device)


def _encoded(base: Base, task: str, split: str, limit: int, shots: int = 0) -> list[Encoded]:
    shown = get_task(task).rows("train", shots) if shots else ()
    return _encode(base.tokenizer, base.kind, tuple(get_task(task).rows(split, limit)), tuple(shown))


@functools.lru_cache(maxsize=32)  # by the rows themselves: a task registered again may give others
def _encode(tokenizer, kind: str, rows: tuple[Example, ...], shots: tuple[Example, ...]) -> list[Encoded]:
    if kind == "encoder":
        return encode_encoder_rows(tokenizer, rows)
    return encode_decoder_rows(tokenizer, rows, shots, max_length=2048 if shots else 512)


def _states(base: Base, rows: list[Encoded], first: int, task: str, report: Report) -> RowStates | None:
    if first == 0:
        return None
    return cached_states(base, rows, first, lambda done, total: report(f"prefix {task}", done, total))


def _score_base(spec: RunSpec, base: Base, report: Report) -> Outcome:
    first = split_at(base, spec.last_layers) if spec.shots == 0 else 0
    metrics, predictions = _score(spec, base, suffix_body(base, first), first, [], {}, report)
    return Outcome(
        metrics, predictions, facts={"trainable_parameters": 0, "device": str(base.device), "dtype": str(base.dtype)}
    )


def _merge(spec: MergeSpec, folder: Path, adapter_of, report: Report) -> Outcome:
    first_part = spec.parts[0]
    base = load_base(first_part.base, first_part.dtype)
    adapters = [adapter_of(part) for part in spec.parts]
    merged = merge([a.factors for a in adapters], list(spec.weights), spec.merge)
    extras = {name: tensor for a in adapters for name, tensor in a.extras.items()}
    first = split_at(base, first_part.last_layers)
    metrics, predictions = _score(spec, base, suffix_body(base, first), first, [(merged, 1.0)], extras, report)
    return Outcome(metrics, predictions, facts={"device": str(base.device), "dtype": str(base.dtype)})


def _score(
    spec: Spec,
    base: Base,
    body: nn.Module,
    first: int,
    adapters: list[tuple[Mapping[str, Factors], float]],
    extras: Mapping[str, Tensor],
    report: Report,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    metrics, predictions = [], []
    with ExitStack() as stack:
        for factors, weight in adapters:
            on_device = {n: Factors(f.A.to(base.device), f.B.to(base.device), f.scale) for n, f in factors.items()}
            stack.enter_context(attach_factors(base.body, on_device, weight))
        for place, name in enumerate(spec.scored):
            report("scoring", place, len(spec.scored))
            rows = _encoded(base, name, spec.score_on, spec.test_rows, getattr(spec, "shots", 0))
            scored = score_rows(
                base, body, rows, _states(base, rows, first, name, report), _stored_head(base, name, extras)
            )
            metrics.append(_metric_row(spec, name, scored))
            predictions.append(_prediction_rows(name, spec.score_on, scored))
    return pd.DataFrame(metrics), pd.concat(predictions, ignore_index=True)


def _stored_head(base: Base, task: str, extras: Mapping[str, Tensor]) -> nn.Module | None:
    if base.kind == "decoder":
        return None
    classes = len(get_task(task).labels) or 1
    head = nn.Linear(base.width, classes)
    weight = extras.get(f"head.{task}.weight")
    with torch.no_grad():  # a task that was never trained has a head of zeros: it always gives the first class
        head.weight.copy_(torch.zeros_like(head.weight) if weight is None else weight)
        head.bias.copy_(torch.zeros_like(head.bias) if weight is None else extras[f"head.{task}.bias"])
    return head.to(base.device)


def _metric_row(spec: Spec, name: str, scored: Scored) -> dict:
    task = get_task(name)
    rows = task.rows(spec.score_on, spec.test_rows)
    return {
        "task": name,
        "split": spec.score_on,
        "metric": task.metric,
        "value": metric(task.metric, scored),
        "n": len(rows),
        "majority": majority_score(task.metric, [row.answer for row in rows], [row.target for row in rows]),
        "loss": float(np.mean(scored.loss)),
    }


def _prediction_rows(name: str, split: str, scored: Scored) -> pd.DataFrame:
    columns = {"correct": scored.correct, "predicted": scored.predicted, "target": scored.target, "loss": scored.loss}
    return pd.DataFrame({"task": name, "split": split, "row": np.arange(len(scored.loss)), **columns})

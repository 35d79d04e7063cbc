"""How a spec is carried out: load the base and the rows, train or merge, score, and hand back what is to be kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from lori_nb.analysis.merging import merge
from lori_nb.lab import distributed
from lori_nb.lab.baselines import Dora, dora_extras, put_in_place, replacing
from lori_nb.lab.gradients import batch_indices
from lori_nb.lab.methods import FACTORED, LOW_RANK, get_method, initial_live, subspace_of
from lori_nb.lab.models import Base, base_kind, empty_body, load_base
from lori_nb.lab.prefix import split_at, suffix_body
from lori_nb.lab.regression import Unit, unit_of
from lori_nb.lab.resolving import check
from lori_nb.lab.scoring import Asked, Subject, check_can_score, metric_rows, prediction_rows, score_task, states_of
from lori_nb.lab.specs import MergeSpec, RunSpec, Spec
from lori_nb.lab.stages import Earlier, earlier_runs, kept_rows
from lori_nb.lab.tasks import get_task
from lori_nb.lab.text import Encoded, encode_rows
from lori_nb.lab.training import Report, TaskData, Trained, quiet, train
from lori_nb.method.adapters import (
    Adapter,
    Attached,
    Factors,
    LowRank,
    attach_factors,
    check_rank,
    grown,
    layer_number,
    target_linears,
)
from lori_nb.method.subspaces import check_blocks, random_down_projection


@dataclass
class Outcome:
    """Everything a finished spec leaves: tables, an adapter if one was trained, and facts for the provenance."""

    metrics: pd.DataFrame
    predictions: pd.DataFrame
    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    conflicts: pd.DataFrame = field(default_factory=pd.DataFrame)
    adapter: Adapter | None = None
    facts: dict = field(default_factory=dict)
    watched: pd.DataFrame = field(default_factory=pd.DataFrame)


def carry_out(spec: Spec, folder: Path, adapter_of: Callable[[RunSpec], Adapter], report: Report) -> Outcome:
    """Do what a spec says.

    Args:
        folder: where a checkpoint may be kept.
        adapter_of: gives the adapter of a finished run.
        report: called with (stage, done, total).
    """
    check(spec)
    for name in spec.scored:
        check_can_score(get_task(name))
    return {"run": _run, "merge": _merge}[spec.kind](spec, folder, adapter_of, report)


def check_modules(spec: Spec) -> None:
    """ValueError unless the spec's rank, modules and last_layers fit its base; asks for shapes, not for weights."""
    if isinstance(spec, RunSpec) and get_method(spec.method).trains:
        linears = target_linears(_shapes_of(spec.base), spec.modules, spec.last_layers)
        check_rank(spec.rank, linears)
        if spec.subspace == "orthogonal":
            check_blocks(len(spec.family), spec.rank, {name: m.in_features for name, m in linears.items()})


_shapes_of = functools.lru_cache(maxsize=4)(empty_body)


def _run(spec: RunSpec, folder: Path, adapter_of, report: Report) -> Outcome:
    base = load_base(spec.base, spec.dtype)
    if not get_method(spec.method).trains:
        return _score_base(spec, base, report)
    linears = target_linears(base.body, spec.modules, spec.last_layers)
    first = split_at(base, spec.last_layers)
    body = suffix_body(base, first)
    live = _live(spec, base, linears, adapter_of)
    tasks = [_task_data(spec, base, name, first, report) for name in spec.tasks]
    earlier = _earlier(spec, base, first, adapter_of, report)
    inherited = adapter_of(spec.start) if spec.start else None

    def extras() -> dict[str, Tensor]:
        return (inherited.extras if inherited else {}) | _extras(live, tasks)

    def watch(step: int) -> list[dict]:
        shorter = replace(spec, test_rows=spec.watch_rows)
        return _score_attached(shorter, base, body, first, extras(), quiet)[0].assign(step=step).to_dict("records")

    with _frozen(base, inherited if get_method(spec.method).grows else None):
        trained = train(spec, base, body, live, tasks, folder / "checkpoint.safetensors", report, earlier, watch)
        metrics, predictions = _score(spec, base, body, first, live, extras(), report)
    return _outcome(spec, base, live, trained, _adapter(spec, base, live, extras(), inherited), metrics, predictions)


def _frozen(base: Base, adapter: Adapter | None) -> Attached:
    """An earlier adapter on the base, where there is one; nothing of it is trained."""
    return attach_factors(base.body, adapter.factors if adapter else {}, device=base.device)


def _earlier(spec: RunSpec, base: Base, first: int, adapter_of, report: Report) -> list[Earlier]:
    """The stages before a run whose method looks at them, each with its heads as they were left."""
    if get_method(spec.method).begin is None:
        return []
    found = []
    for run in earlier_runs(spec):
        (name,), adapter = run.tasks, adapter_of(run)
        kept = kept_rows(spec)
        rows = _encoded(base, name, run.train_rows, (kept, spec.seed)) if kept else []  # of what that run trained on
        states = states_of(base, rows, first, name, report) if kept else None
        head = _stored_head(base, name, adapter.extras)
        unit = _unit(name, rows, head) if kept else None
        if unit is not None:  # its loss on the scale that it was trained on
            head.load_state_dict(unit.out_of_head(head.state_dict()))
        found.append(Earlier(TaskData(name, rows, states, head, unit), adapter))
    return found


def _live(
    spec: RunSpec, base: Base, linears: Mapping[str, nn.Linear], adapter_of: Callable[[RunSpec], Adapter]
) -> dict:
    """What is trained at each linear module, on the module's device."""
    live = initial_live(spec, {name: tuple(m.weight.shape) for name, m in linears.items()}, adapter_of, base)
    form = get_method(spec.method).form
    modules = live if form == LOW_RANK else replacing(form, linears, live)
    return {name: module.to(linears[name].weight.device) for name, module in modules.items()}


def _extras(live: Mapping[str, nn.Module], tasks: Sequence[TaskData]) -> dict[str, Tensor]:
    """What is trained beside the factors: task heads, a regression's in its target's own unit; DoRA's magnitudes."""
    heads = {f"head.{t.name}.{part}": p for t in tasks if t.head for part, p in _head_parameters(t).items()}
    doras = {name: module for name, module in live.items() if isinstance(module, Dora)}
    return {name: p.detach().cpu() for name, p in heads.items()} | dora_extras(doras)


def _head_parameters(task: TaskData) -> dict[str, Tensor]:
    parameters = dict(task.head.named_parameters())
    return parameters if task.unit is None else task.unit.of_head(parameters)


def _outcome(spec, base, live, trained: Trained, adapter, metrics, predictions) -> Outcome:
    count = sum(p.numel() for low in live.values() for p in low.parameters() if p.requires_grad)
    facts = {
        "trainable_parameters": count,
        "training_seconds": trained.seconds,
        "processes": distributed.count(),
        "device": str(base.device),
        "dtype": str(base.dtype),
    }
    watched = pd.DataFrame(trained.watched)
    return Outcome(metrics, predictions, pd.DataFrame(trained.history), trained.conflicts, adapter, facts, watched)


def _adapter(spec: RunSpec, base: Base, live, extras: dict[str, Tensor], inherited: Adapter | None) -> Adapter | None:
    """The trained adapter; None after full fine-tuning, which leaves whole weights and is kept by its scores alone."""
    if get_method(spec.method).form not in FACTORED:
        return None
    chosen = get_method(spec.method)
    adapter = Adapter(
        factors={name: low.factors() for name, low in live.items()},
        base=spec.base,
        base_digest=base.digest,
        rank=spec.rank,
        alpha=spec.alpha,
        seed=inherited.seed if inherited else spec.seed,
        subspace=inherited.subspace if inherited else subspace_of(spec),
        frozen_A=not chosen.trains_A and (inherited.frozen_A if inherited else chosen.initialise is None),
        masks=_masks(live, inherited),
        extras=extras,
    )
    return grown(inherited, adapter) if inherited and chosen.grows else adapter


def _masks(live: Mapping[str, nn.Module], inherited: Adapter | None) -> dict[str, Tensor] | None:
    """Where B may differ from zero: what is held by this run and those before it; None where B is dense."""
    support = {name: low.support() for name, low in live.items()}
    if any(mask is None for mask in support.values()):
        return None
    # An earlier task holds its entries also where their value happens to be zero.
    before = inherited.masks if inherited and inherited.masks else {}
    return {name: mask | before[name] if name in before else mask for name, mask in support.items()}


def _task_data(spec: RunSpec, base: Base, name: str, first: int, report: Report) -> TaskData:
    rows = _encoded(base, name, spec.train_rows)
    head = new_head(spec, base, name)
    return TaskData(name, rows, states_of(base, rows, first, name, report), head, _unit(name, rows, head))


def _unit(name: str, rows: Sequence[Encoded], head: nn.Module | None) -> Unit | None:
    """The unit of a regression task's targets; None for other tasks."""
    return unit_of(row.target for row in rows) if head is not None and not get_task(name).labels else None


def _encoded(base: Base, name: str, rows: int, drawn: tuple[int, int] | None = None) -> list[Encoded]:
    """The first training rows of a task; where (how many, seed) are ``drawn``, so many of them at random."""
    task = get_task(name)
    chosen = tuple(task.rows("train", rows))
    if drawn is not None:
        kept, seed = drawn
        places = batch_indices(len(chosen), min(kept, len(chosen)), 0, seed, f"kept/{name}")
        chosen = tuple(chosen[place] for place in sorted(places))
    return encode_rows(base.tokenizer, base.kind, chosen, (), task.system)


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


def _score_base(spec: RunSpec, base: Base, report: Report) -> Outcome:
    first = split_at(base, spec.last_layers) if spec.shots == 0 else 0
    metrics, predictions = _score(spec, base, suffix_body(base, first), first, {}, {}, report)
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
    live = {name: LowRank(f, train_A=False).to(base.device) for name, f in merged.items()}
    metrics, predictions = _score(spec, base, suffix_body(base, first), first, live, extras, report)
    return Outcome(metrics, predictions, facts={"device": str(base.device), "dtype": str(base.dtype)})


def score_factors(
    base: str, factors: Mapping[str, Factors], tasks: Sequence[str], rows: int, *, split: str = "test", dtype="auto"
) -> pd.DataFrame:
    """Metrics of factors that no run has made, such as a folder's from elsewhere, on tasks of a decoder.

    Returns:
        One row a task and metric: task, split, metric, value, n, majority, loss.

    Raises:
        ValueError: the base is an encoder, whose tasks need heads; a module is not one of its linear modules, or has
            another shape; what a bare run of the base on these tasks would be refused for.
    """
    spec = RunSpec("base", tuple(tasks), steps=0, base=base, test_rows=rows, score_on=split, dtype=dtype)
    check(spec)
    if base_kind(base) == "encoder":
        raise ValueError(f"base must be a decoder to score adapters without task heads; found the encoder {base}")
    check_fit(base, factors)
    for name in spec.scored:
        check_can_score(get_task(name))
    loaded = load_base(base, dtype)
    layers = len({layer_number(name) for name in target_linears(loaded.body)})
    first = split_at(loaded, layers - min(layer_number(name) for name in factors))
    live = {name: LowRank(f, train_A=False).to(loaded.device) for name, f in factors.items()}
    return _score(spec, loaded, suffix_body(loaded, first), first, live, {}, lambda *_: None)[0]


def check_fit(base: str, factors: Mapping[str, Factors]) -> None:
    """ValueError unless every module is a linear module in a layer of the base, of the update's shape; asks for shapes,
    not for weights.
    """
    linears = {name: tuple(m.weight.shape) for name, m in target_linears(_shapes_of(base)).items()}
    for name, f in factors.items():
        found = (len(f.B), f.A.shape[1])
        if linears.get(name) != found:
            wanted = f"{linears[name]}" if name in linears else "a linear module in a layer"
            raise ValueError(f"module {name!r} must be {wanted} of the base {base}; found an update of shape {found}")


def _score(
    spec: Spec,
    base: Base,
    body: nn.Module,
    first: int,
    live: Mapping[str, nn.Module],
    extras: Mapping[str, Tensor],
    report: Report,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    with put_in_place(base.body, live):
        return _score_attached(spec, base, body, first, extras, report)


def _score_attached(
    spec: Spec, base: Base, body: nn.Module, first: int, extras: Mapping[str, Tensor], report: Report
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores and predictions of the model as it stands."""
    metrics, predictions = [], []
    for place, name in enumerate(spec.scored):
        report("scoring", place, len(spec.scored))
        task, shots = get_task(name), getattr(spec, "shots", 0)
        rows = tuple(task.rows(spec.score_on, spec.test_rows))
        shown = tuple(task.rows("train", shots)) if shots else ()
        asked = Asked(task, rows, shown, _stored_head(base, name, extras))
        scored = score_task(Subject(base, body, first, spec.seed), asked, report)
        metrics += metric_rows(task, spec.score_on, rows, scored)
        predictions.append(prediction_rows(name, spec.score_on, scored))
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

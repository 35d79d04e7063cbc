"""What a run is: a frozen description whose SHA-256 names the run's folder.

A :class:`RunSpec` trains one adapter (or evaluates the bare base) and scores it; a :class:`MergeSpec` merges finished
adapters and scores the result. Both carry the digests of everything that decides the result, so that equal hashes mean
equal results.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import ClassVar

from lori_nb.analysis import merging
from lori_nb.analysis.merging import MERGE_METHODS
from lori_nb.lab import evaluation, prefix, text
from lori_nb.lab.extensions import is_own, source_digest
from lori_nb.lab.models import base_digest, base_kind, resolve_dtype
from lori_nb.lab.tasks import SPLITS, get_task, rows_digest
from lori_nb.lab.tasks.reading import DATA_VARIABLE
from lori_nb.method import adapters, masks, projection
from lori_nb.method.adapters import POLICIES
from lori_nb.method.masks import SCOPES

RECIPE = 1  # of the training loop; raise when the same spec gives another adapter
OPTIONS = ("grouping", "reduction", "order", "reference")  # switches of Ortho-LoRA


def recipes() -> dict[str, int]:
    """The recipe number of every module that decides a result, as far as the hash shows it.

    A module of the upper rooms is named from recipe 2 on: recipe 1 is what every hash without its name stands for.
    """
    below = {"training": RECIPE, "prefix": prefix.RECIPE, "evaluation": evaluation.RECIPE, "text": text.RECIPE}
    above = {"adapters": adapters, "masks": masks, "projection": projection, "merging": merging}
    return below | {name: module.RECIPE for name, module in above.items() if module.RECIPE > 1}


@dataclass(frozen=True)
class RunSpec:
    """One training run. Counts are in rows and steps; ``learning_rate`` is AdamW's peak.

    ``tasks`` with several names means one adapter trained jointly; ``batch_size`` rows a step are shared among them.
    ``start`` is the run whose
    adapter training goes on from (continual learning); ``calibration`` is the run whose B a mask is taken from.
    ``evaluate`` are the tasks
    scored at the end (None: those trained on), on split ``score_on``. ``digests`` are filled by :func:`resolve`.
    """

    method: str
    tasks: tuple[str, ...]
    seed: int = 0
    base: str = "smollm2-135m-instruct"
    rank: int = 16
    alpha: float = 32.0
    modules: str = "all-linear"
    last_layers: int | None = 8
    subspace: str = "independent"
    sparsity: float = 0.0
    mask_scope: str = "model"
    learning_rate: float = 1e-3
    steps: int = 100
    batch_size: int = 16
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    train_rows: int = 512
    test_rows: int = 256
    score_on: str = "test"
    evaluate: tuple[str, ...] | None = None
    shots: int = 0
    dtype: str = "auto"
    options: tuple[tuple[str, str], ...] = ()
    start: RunSpec | None = None
    calibration: RunSpec | None = None
    digests: tuple[tuple[str, str], ...] = field(default=())

    kind: ClassVar[str] = "run"

    @property
    def scored(self) -> tuple[str, ...]:
        """The tasks whose rows are scored."""
        return self.evaluate or self.tasks

    @property
    def parents(self) -> tuple[RunSpec, ...]:
        """Runs that must be finished first."""
        return tuple(parent for parent in (self.start, self.calibration) if parent is not None)

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON; ValueError before :func:`resolve`."""
        return spec_hash(self)

    @property
    def label(self) -> str:
        """A short line for progress displays."""
        after = f" after {'+'.join(self.start.tasks)}" if self.start else ""
        sparse = f" {self.sparsity:g}" if self.sparsity else ""
        shots = f" {self.shots} shots" if self.method == "base" else f" lr {self.learning_rate:g}"
        return f"{self.method}{sparse} · {'+'.join(self.tasks)}{after} ·{shots} · seed {self.seed}"


@dataclass(frozen=True)
class MergeSpec:
    """Finished adapters merged without training: Σ weight · ΔW_i by ``merge``, scored on the tasks of its parts."""

    parts: tuple[RunSpec, ...]
    weights: tuple[float, ...]
    merge: str = "cat"
    test_rows: int = 256
    score_on: str = "test"
    digests: tuple[tuple[str, str], ...] = field(default=())

    kind: ClassVar[str] = "merge"

    @property
    def scored(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task for part in self.parts for task in part.tasks))

    @property
    def parents(self) -> tuple[RunSpec, ...]:
        return self.parts

    @property
    def base(self) -> str:
        return self.parts[0].base

    @property
    def seed(self) -> int:
        return self.parts[0].seed

    @property
    def method(self) -> str:
        return self.parts[0].method

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.scored

    @property
    def hash(self) -> str:
        return spec_hash(self)

    @property
    def label(self) -> str:
        return f"merge {self.merge} · {self.method} × {len(self.parts)} · weight {self.weights[0]:g} · seed {self.seed}"


Spec = RunSpec | MergeSpec


def resolve(spec: Spec) -> Spec:
    """The spec with its parents resolved, dtype settled, and the digests of base, rows and recipes filled in."""
    if spec.digests:
        return spec
    check(spec)
    if isinstance(spec, MergeSpec):
        parts = tuple(resolve(part) for part in spec.parts)
        digests = (*_rows_digests(spec, ()), *_recipe_digests(), *_extension_digests(spec))
        return replace(spec, parts=parts, digests=digests)
    start = resolve(spec.start) if spec.start else None
    calibration = resolve(spec.calibration) if spec.calibration else None
    digests = (
        ("base", base_digest(spec.base)),
        *_rows_digests(spec, spec.tasks),
        *_recipe_digests(),
        *_extension_digests(spec),
    )
    return replace(spec, dtype=resolve_dtype(spec.dtype), start=start, calibration=calibration, digests=digests)


def _rows_digests(spec: Spec, trained: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    trains = getattr(spec, "steps", 0) > 0 or getattr(spec, "shots", 0) > 0
    needed = max(getattr(spec, "train_rows", 0), getattr(spec, "shots", 0))  # few-shot examples are training rows
    train = [(f"train:{name}", _digest_of_rows(name, "train", needed)) for name in trained if trains]
    return (
        *train,
        *((f"{spec.score_on}:{name}", _digest_of_rows(name, spec.score_on, spec.test_rows)) for name in spec.scored),
    )


def _digest_of_rows(name: str, split: str, limit: int) -> str:
    return _rows_digest_from(name, split, limit, get_task(name).load, os.environ.get(DATA_VARIABLE))


@functools.lru_cache(maxsize=1024)  # keyed by the loader too: a task may be registered again
def _rows_digest_from(name: str, split: str, limit: int, load: Callable, folder: str | None) -> str:
    return rows_digest(get_task(name).rows(split, limit))


def _recipe_digests() -> tuple[tuple[str, str], ...]:
    return tuple((f"recipe:{name}", str(number)) for name, number in recipes().items())


def _extension_digests(spec: Spec) -> tuple[tuple[str, str], ...]:
    """Digests of the source of what was registered from outside the package; the kit's own parts count by recipe."""
    from lori_nb.lab.methods import get_method  # methods build on specs

    tasks = [get_task(name) for name in dict.fromkeys((*spec.tasks, *spec.scored))]
    functions = {f"metric:{task.metric}": evaluation.get_metric(task.metric) for task in tasks}
    found = [(f"task:{task.name}", task.source_digest) for task in tasks if not is_own(task.load)]
    if isinstance(spec, MergeSpec):
        functions[f"merge:{spec.merge}"] = MERGE_METHODS[spec.merge]
    elif not get_method(spec.method).built_in:
        found.append(("method", get_method(spec.method).source_digest))
    return (*found, *((label, source_digest((f,))) for label, f in functions.items() if not is_own(f)))


def spec_json(spec: Spec) -> dict:
    """The spec as plain JSON data, parents by their hashes."""
    plain = {}
    for f in fields(spec):
        value = getattr(spec, f.name)
        if isinstance(value, RunSpec):
            value = value.hash
        elif f.name == "parts":
            value = [part.hash for part in value]
        plain[f.name] = value
    return {"kind": spec.kind, **plain}


def canonical_json(spec: Spec) -> str:
    """Sorted keys, no spaces: the text that is hashed."""
    return json.dumps(spec_json(spec), sort_keys=True, separators=(",", ":"))


def spec_hash(spec: Spec) -> str:
    """First 32 hex digits of the SHA-256 of the canonical JSON (128 bits)."""
    if not spec.digests:
        raise ValueError(f"spec must be resolved before it is hashed; found an unresolved one: {spec.label}")
    return hashlib.sha256(canonical_json(spec).encode()).hexdigest()[:32]


def with_parents(specs: list[Spec]) -> list[Spec]:
    """Every spec once, each after all the specs it depends on."""
    ordered: dict[str, Spec] = {}
    for spec in specs:
        for each in _ancestry(spec):
            ordered.setdefault(each.hash, each)
    return list(ordered.values())


def _ancestry(spec: Spec) -> Iterator[Spec]:
    for parent in spec.parents:
        yield from _ancestry(parent)
    yield spec


def to_payload(spec: Spec) -> dict:
    """A spec as JSON data that :func:`from_payload` turns back; parents whole."""
    return {"kind": spec.kind, **asdict(spec)}


def from_payload(data: dict | None) -> Spec | None:
    """The spec of :func:`to_payload`."""
    if data is None:
        return None
    data = dict(data)
    kind = data.pop("kind", "run")
    pairs = tuple(tuple(pair) for pair in data["digests"])
    if kind == "merge":
        parts = tuple(from_payload(part) for part in data["parts"])
        return MergeSpec(**{**data, "parts": parts, "weights": tuple(data["weights"]), "digests": pairs})
    changed = {
        "tasks": tuple(data["tasks"]),
        "evaluate": tuple(data["evaluate"]) if data["evaluate"] else None,
        "options": tuple(tuple(pair) for pair in data["options"]),
        "start": from_payload(data["start"]),
        "calibration": from_payload(data["calibration"]),
        "digests": pairs,
    }
    return RunSpec(**{**data, **changed})


def check(spec: Spec) -> None:
    """ValueError for a setting outside its range, before any work: names the setting, what was required and found."""
    {"run": _check_run, "merge": _check_merge}[spec.kind](spec)
    _require("test_rows", spec.test_rows, spec.test_rows >= 1, "at least 1")
    _require("score_on", spec.score_on, spec.score_on in SPLITS, f"one of {', '.join(SPLITS)}")
    _check_tasks(spec)


def _require(name: str, found: object, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name} must be {wanted}; found {found!r}")


def _check_run(spec: RunSpec) -> None:
    for name in ("rank", "batch_size", "train_rows"):
        _require(name, getattr(spec, name), getattr(spec, name) >= 1, "at least 1")
    for name in ("steps", "shots", "seed", "weight_decay"):
        _require(name, getattr(spec, name), getattr(spec, name) >= 0, "at least 0")
    for name in ("alpha", "clip") if spec.method == "base" else ("learning_rate", "alpha", "clip"):
        _require(name, getattr(spec, name), getattr(spec, name) > 0, "above 0")
    _require("warmup", spec.warmup, 0 <= spec.warmup <= 1, "in [0, 1], a share of the steps")
    _require("sparsity", spec.sparsity, 0 <= spec.sparsity < 1, "in [0, 1)")
    for name, known in (("subspace", POLICIES), ("mask_scope", tuple(SCOPES))):
        _require(name, getattr(spec, name), getattr(spec, name) in known, f"one of {', '.join(known)}")
    for name, _ in spec.options:
        _require("options", name, name in OPTIONS, f"among {', '.join(OPTIONS)}")
    _require("tasks", spec.tasks, len(spec.tasks) >= 1, "at least one")
    least = len(spec.tasks)
    _require("batch_size", spec.batch_size, spec.batch_size >= least, f"at least one row a task, {least}")
    _check_parents(spec)


def _check_parents(spec: RunSpec) -> None:
    from lori_nb.lab.methods import get_method  # methods build on specs

    if get_method(spec.method).masked and spec.calibration is None:
        raise ValueError(f"calibration must be a run for method {spec.method!r}; found none")
    same = ("base", "rank", "modules", "last_layers")
    for place, parent, names in (("start", spec.start, (*same, "alpha")), ("calibration", spec.calibration, same)):
        for name in names if parent is not None else ():
            own, theirs = getattr(spec, name), getattr(parent, name)
            _require(f"{name} of the {place} run", theirs, own == theirs, f"that of the run itself, {own!r}")


def _check_merge(spec: MergeSpec) -> None:
    _require("parts", spec.parts, len(spec.parts) >= 1, "at least one run")
    _require("weights", spec.weights, len(spec.weights) == len(spec.parts), f"{len(spec.parts)} numbers, one a part")
    _require("merge", spec.merge, spec.merge in MERGE_METHODS, f"one of {', '.join(sorted(MERGE_METHODS))}")
    bases = {(part.base, part.last_layers) for part in spec.parts}
    _require("parts", sorted(map(str, bases)), len(bases) == 1, "runs with one base and the same last_layers")


def _check_tasks(spec: Spec) -> None:
    kind = base_kind(spec.base)
    for name in dict.fromkeys((*spec.tasks, *spec.scored)):
        task = get_task(name)
        evaluation.get_metric(task.metric)
        if kind == "encoder" and task.reads != "encoder":
            raise ValueError(
                f"task {name!r} must be a classification or regression task for the encoder {spec.base}; "
                "it has free answers"
            )
        if kind == "decoder" and task.metric in evaluation.OF_PREDICTIONS:
            raise ValueError(
                f"task {name!r} must have a metric of right and wrong answers for the decoder {spec.base}; "
                f"{task.metric} needs an encoder's predictions"
            )

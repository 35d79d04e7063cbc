"""What a run is: a frozen description whose SHA-256 names the run's folder.

A :class:`RunSpec` trains one adapter (or evaluates the bare base) and scores it; a :class:`MergeSpec` merges finished
adapters and scores the result. Both carry the digests of everything that decides the result, so that equal hashes mean
equal results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import ClassVar

SCHEDULES = ("linear", "constant")  # linear decay to zero after the warm-up, or none


def _later(default):
    """A field that came after runs were stored: at its default it is not part of the hash, so that they stay valid."""
    return field(default=default, metadata={"hashed_at_default": False})


@dataclass(frozen=True)
class RunSpec:
    """One training run. Counts are in rows and steps; ``learning_rate`` is AdamW's peak.

    ``tasks`` with several names means one adapter trained jointly; ``batch_size`` rows a step are shared among them.
    ``start`` is the run whose adapter training goes on from (continual learning); ``calibration`` is the run whose B a
    mask is taken from. ``evaluate`` are the tasks scored at the end (None: those trained on), on split ``score_on``.
    ``digests`` are filled by ``lori_nb.lab.resolving.resolve``.

    ``family`` are the tasks that share a basis under subspace "orthogonal". ``mask_origin`` says where a mask comes
    from (a key of ``lori_nb.lab.methods.MASK_ORIGINS``), ``mask_structure`` whether it keeps entries or rows of B.
    ``stop_after`` ends training after so many of the schedule's ``steps``, as a calibration by a part of a run does.
    ``micro_batch_rows`` rows, of all tasks, are computed at a time (None: all), and with ``checkpointing`` the backward
    pass computes activations again instead of keeping them: less memory; the former rounds sums in another order.
    After each of the steps in ``watch`` the scored tasks are scored on their first ``watch_rows`` rows.
    ``task_weights`` holds w_t > 0 for each of several tasks, empty for ones: what the tasks share is trained on the
    gradients w_t g_t, by every method and conflict solver; task heads are not weighted.
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
    family: tuple[str, ...] = _later(())
    mask_origin: str = _later("same-a")
    mask_structure: str = _later("entries")
    stop_after: int | None = _later(None)
    schedule: str = _later("linear")
    micro_batch_rows: int | None = _later(None)
    checkpointing: bool = _later(False)
    watch: tuple[int, ...] = _later(())
    watch_rows: int = _later(32)
    task_weights: tuple[float, ...] = _later(())

    kind: ClassVar[str] = "run"

    @property
    def trained_steps(self) -> int:
        """How many steps are taken of the schedule's ``steps``."""
        return self.steps if self.stop_after is None else self.stop_after

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
        """SHA-256 of the canonical JSON; ValueError before the spec is resolved."""
        return spec_hash(self)

    @property
    def label(self) -> str:
        """A short line for progress displays."""
        after = f" after {'+'.join(self.start.tasks)}" if self.start else ""
        told = {"subspace": "independent", "mask_scope": "model", "mask_origin": "same-a", "mask_structure": "entries"}
        after += "".join(f" · {getattr(self, name)}" for name, usual in told.items() if getattr(self, name) != usual)
        after += f" · rank {self.rank}" if self.rank != RunSpec.rank else ""
        after += f" · first {self.stop_after} steps" if self.stop_after else ""
        after += "".join(f" · {name} {value}" for name, value in self.options)
        after += f" · weights {':'.join(f'{w:g}' for w in self.task_weights)}" if self.task_weights else ""
        sparse = f" {self.sparsity:g}" if self.sparsity else ""
        shots = f" {self.shots} shots" if self.method == "base" else f" lr {self.learning_rate:g}"
        return f"{self.method}{sparse} · {'+'.join(self.tasks)}{after} ·{shots} · seed {self.seed}"


@dataclass(frozen=True)
class MergeSpec:
    """Finished adapters merged without training: Σ weight · ΔW_i by ``merge``, scored on the tasks of its parts, or on
    those of ``evaluate``.
    """

    parts: tuple[RunSpec, ...]
    weights: tuple[float, ...]
    merge: str = "cat"
    test_rows: int = 256
    score_on: str = "test"
    digests: tuple[tuple[str, str], ...] = field(default=())
    evaluate: tuple[str, ...] | None = _later(None)

    kind: ClassVar[str] = "merge"

    @property
    def scored(self) -> tuple[str, ...]:
        """The tasks whose rows are scored."""
        return self.evaluate or self.tasks

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
        """The tasks of the parts, each once."""
        return tuple(dict.fromkeys(task for part in self.parts for task in part.tasks))

    @property
    def hash(self) -> str:
        return spec_hash(self)

    @property
    def label(self) -> str:
        return f"merge {self.merge} · {self.method} × {len(self.parts)} · weight {self.weights[0]:g} · seed {self.seed}"


Spec = RunSpec | MergeSpec


def spec_json(spec: Spec) -> dict:
    """The spec as plain JSON data, parents by their hashes."""
    plain = {}
    for f in fields(spec):
        value = getattr(spec, f.name)
        if value == f.default and not f.metadata.get("hashed_at_default", True):
            continue
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


def with_parents(specs: Iterable[Spec]) -> list[Spec]:
    """Every spec once, each after all the specs it depends on."""
    return list(dict.fromkeys(each for spec in specs for each in _ancestry(spec)))


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
        evaluate = tuple(data["evaluate"]) if data.get("evaluate") else None
        lists = {"parts": parts, "weights": tuple(data["weights"]), "digests": pairs, "evaluate": evaluate}
        return MergeSpec(**{**data, **lists})
    changed = {
        "tasks": tuple(data["tasks"]),
        "evaluate": tuple(data["evaluate"]) if data["evaluate"] else None,
        "options": tuple(tuple(pair) for pair in data["options"]),
        "family": tuple(data.get("family", ())),
        "watch": tuple(data.get("watch", ())),
        "task_weights": tuple(data.get("task_weights", ())),
        "start": from_payload(data["start"]),
        "calibration": from_payload(data["calibration"]),
        "digests": pairs,
    }
    return RunSpec(**{**data, **changed})

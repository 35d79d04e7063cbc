"""A spec made ready to be carried out: its settings checked, its dtype settled, and the digests of base, rows, recipes
and extensions filled in, so that equal hashes mean equal results.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

from lori_nb.analysis import elementwise_merging, merging, spectral_merging
from lori_nb.analysis.merging import AS_STORED, MERGE_METHODS, options_of
from lori_nb.lab import (
    baselines,
    continual,
    evaluation,
    generation,
    gradients,
    prefix,
    regression,
    scoring,
    telemetry,
    text,
)
from lori_nb.lab.extensions import is_own, source_digest
from lori_nb.lab.methods import LOW_RANK, METHODS, get_mask_origin, get_method, subspace_of
from lori_nb.lab.models import base_digest, base_kind, resolve_dtype
from lori_nb.lab.options import check_options, require, solver_of
from lori_nb.lab.specs import SCHEDULES, MergeSpec, RunSpec, Spec
from lori_nb.lab.stages import earlier_runs
from lori_nb.lab.tasks import SPLITS, Task, get_task, rows_digest
from lori_nb.lab.tasks.reading import DATA_VARIABLE
from lori_nb.method import adapters, conflicts, masks, projection, solvers, subspaces, task_gradients
from lori_nb.method.masks import SCOPES, STRUCTURES
from lori_nb.method.subspaces import POLICIES, subspace_id

RECIPE = 2  # of the training loop; raise when the same spec gives another adapter


def recipes() -> dict[str, int]:
    """The recipe number of every module that decides a result, as far as the hash shows it.

    A module of the upper rooms, or one younger than the first runs, is named from recipe 2 on: recipe 1 is what every
    hash without its name stands for. What decides some runs alone counts for those: see :func:`resolve`.
    """
    below = {"training": RECIPE, "prefix": prefix.RECIPE, "evaluation": evaluation.RECIPE, "text": text.RECIPE}
    above = {"adapters": adapters, "masks": masks, "projection": projection, "merging": merging}
    younger = {"subspaces": subspaces, "baselines": baselines, "scoring": scoring}
    return below | {name: module.RECIPE for name, module in (above | younger).items() if module.RECIPE > 1}


def resolve(spec: Spec) -> Spec:
    """The spec with its parents resolved, dtype settled, and the digests of base, rows and recipes filled in."""
    if spec.digests:
        return spec
    check(spec)
    if isinstance(spec, MergeSpec):
        parts = tuple(resolve(part) for part in spec.parts)
        digests = (*_rows_digests(spec), *_recipe_digests(), *_extension_digests(spec), *_answer_digests(spec))
        return replace(spec, parts=parts, digests=digests)
    start = resolve(spec.start) if spec.start else None
    calibration = resolve(spec.calibration) if spec.calibration else None
    digests = (
        ("base", base_digest(spec.base)),
        *_rows_digests(spec),
        *_recipe_digests(),
        *_regression_digests(spec),
        *_joint_digests(spec),
        *_extension_digests(spec),
        *_answer_digests(spec),
    )
    settled = {"dtype": resolve_dtype(spec.dtype), "start": start, "calibration": calibration}
    if all(weight == 1 for weight in spec.task_weights):
        settled["task_weights"] = ()  # ones weigh as none do
    return replace(spec, digests=digests, **settled)


def _rows_digests(spec: Spec) -> tuple[tuple[str, str], ...]:
    return tuple((f"{split}:{name}", _rows(name, split, limit)[0]) for name, split, limit in _asked_rows(spec))


def _asked_rows(spec: Spec) -> list[tuple[str, str, int]]:
    """(task, split, number) of all rows that a run reads: those it learns from, then those it is scored on."""
    trains = getattr(spec, "steps", 0) > 0 or getattr(spec, "shots", 0) > 0
    needed = max(getattr(spec, "train_rows", 0), getattr(spec, "shots", 0))  # few-shot examples are training rows
    scored = max(spec.test_rows, spec.watch_rows if getattr(spec, "watch", ()) else 0)
    learned = spec.tasks if isinstance(spec, RunSpec) and trains else ()
    return [(name, "train", needed) for name in learned] + [(name, spec.score_on, scored) for name in spec.scored]


def _rows(name: str, split: str, limit: int) -> tuple[str, int]:
    """The digest of a task's rows, and the bytes of the longest."""
    return _rows_from(name, split, limit, get_task(name).load, os.environ.get(DATA_VARIABLE))


@functools.lru_cache(maxsize=1024)  # keyed by the loader too: a task may be registered again
def _rows_from(name: str, split: str, limit: int, load: Callable, folder: str | None) -> tuple[str, int]:
    rows = get_task(name).rows(split, limit)
    return rows_digest(rows), max(map(text.text_bytes, rows))


def _answer_digests(spec: Spec) -> tuple[tuple[str, str], ...]:
    """What decides only a decoder's runs that have long rows, or whose answers are generated."""
    if base_kind(spec.base) == "encoder":
        return ()
    longest: dict[str, int] = {}
    for name, split, limit in _asked_rows(spec):
        longest[name] = max(longest.get(name, 0), _rows(name, split, limit)[1])
    shots = getattr(spec, "shots", 0)
    cut = any(text.may_be_cut(most, shots, get_task(name).system) for name, most in longest.items())
    generates = any(get_task(name).scoring in scoring.GENERATED for name in spec.scored)
    found = {"cut": (cut, text.CUT_RECIPE), "generation": (generates, generation.RECIPE)}
    return tuple((f"recipe:{name}", str(number)) for name, (counts, number) in found.items() if counts)


def _recipe_digests() -> tuple[tuple[str, str], ...]:
    return tuple((f"recipe:{name}", str(number)) for name, number in recipes().items())


def _regression_digests(spec: RunSpec) -> tuple[tuple[str, str], ...]:
    """How regression is trained, for runs that do it alone: an encoder's on tasks without classes."""
    if not get_method(spec.method).trains or base_kind(spec.base) == "decoder":
        return ()
    regresses = any(not get_task(name).labels for name in spec.tasks)
    return (("recipe:regression", str(regression.RECIPE)),) if regresses else ()


def _joint_digests(spec: RunSpec) -> tuple[tuple[str, str], ...]:
    """What decides runs on several tasks alone: how their gradients are found, and what is recorded of them."""
    if len(spec.tasks) == 1:
        return ()
    deciding = {"task_gradients": task_gradients, "gradients": gradients, "conflicts": conflicts}
    deciding |= {"solvers": solvers, "telemetry": telemetry}
    name = solver_of(dict(spec.options))
    solver = solvers.get_solver(name)
    found = [(f"recipe:{each}", str(module.RECIPE)) for each, module in deciding.items()]
    found += [("recipe:heads", str(gradients.HEADS_RECIPE))] if base_kind(spec.base) == "encoder" else []
    found += [("torchjd", version("torchjd"))] if name in solvers.WEIGHTINGS else []
    return (*found, *([] if is_own(solver) else [("solver", source_digest((solver,)))]))


def _scoring_digest(task: Task) -> str:
    """SHA-256 of how a task's answers are asked for and scored; a judge of the kit's own counts by its recipe."""
    judge = source_digest((task.judge,)) if task.judge is not None and not is_own(task.judge) else ""
    settings = (task.metric, task.also, task.scoring, task.labels, task.system, sorted(task.extra.items()), judge)
    return hashlib.sha256(repr(settings).encode()).hexdigest()


def _extension_digests(spec: Spec) -> tuple[tuple[str, str], ...]:
    """How every task is scored, and digests of the source of what was registered from outside the package.

    The kit's own functions count by recipe.
    """
    tasks = [get_task(name) for name in dict.fromkeys((*spec.tasks, *spec.scored))]
    functions = {f"metric:{task.metric}": evaluation.get_metric(task.metric) for task in tasks}
    found = [(f"scored:{task.name}", _scoring_digest(task)) for task in tasks]
    found += [(f"task:{task.name}", task.source_digest) for task in tasks if not is_own(task.load)]
    if isinstance(spec, MergeSpec):
        functions[f"merge:{spec.merge}"] = MERGE_METHODS[spec.merge]
        found += merge_recipe(spec.merge)
    elif not get_method(spec.method).built_in:
        found.append(("method", get_method(spec.method).source_digest))
    if getattr(spec, "start", None) is not None and get_method(spec.method).begin is not None:
        # what its hooks may use of the kit: gradients row by row, projection, the kit's own ways
        deciding = {"continual": continual, "gradients": gradients, "task_gradients": task_gradients}
        deciding |= {"conflicts": conflicts}
        found += [(f"recipe:{name}", str(module.RECIPE)) for name, module in deciding.items()]
    return (*found, *((label, source_digest((f,))) for label, f in functions.items() if not is_own(f)))


def merge_recipe(name: str) -> list[tuple[str, str]]:
    """What the hash of a merge says of its way beside the recipe of all merges: that of merges on cores, or of DARE's
    draws.
    """
    deciding = {spectral_merging: name in AS_STORED, elementwise_merging: "seed" in options_of(name)}
    return [
        (f"recipe:{module.__name__.rpartition('.')[2]}", str(module.RECIPE))
        for module, counts in deciding.items()
        if counts and MERGE_METHODS[name].__module__ == module.__name__
    ]


def check(spec: Spec) -> None:
    """ValueError for a setting outside its range, before any work: names the setting, what was required and found."""
    {"run": _check_run, "merge": _check_merge}[spec.kind](spec)
    require("test_rows", spec.test_rows, spec.test_rows >= 1, "at least 1")
    require("score_on", spec.score_on, spec.score_on in SPLITS, f"one of {', '.join(SPLITS)}")
    _check_tasks(spec)


def _check_run(spec: RunSpec) -> None:
    for name in ("rank", "batch_size", "train_rows", "watch_rows"):
        require(name, getattr(spec, name), getattr(spec, name) >= 1, "at least 1")
    for name in ("steps", "shots", "seed", "weight_decay"):
        require(name, getattr(spec, name), getattr(spec, name) >= 0, "at least 0")
    for name in ("alpha", "clip") if spec.method == "base" else ("learning_rate", "alpha", "clip"):
        require(name, getattr(spec, name), getattr(spec, name) > 0, "above 0")
    require("schedule", spec.schedule, spec.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
    require("warmup", spec.warmup, 0 <= spec.warmup <= 1, "in [0, 1], a share of the steps")
    require("sparsity", spec.sparsity, 0 <= spec.sparsity < 1, "in [0, 1)")
    known_words = {"subspace": POLICIES, "mask_scope": tuple(SCOPES), "mask_structure": STRUCTURES}
    for name, known in known_words.items():
        require(name, getattr(spec, name), getattr(spec, name) in known, f"one of {', '.join(known)}")
    if spec.subspace == "orthogonal":
        subspace_id(spec.subspace, spec.tasks, spec.family)
    if spec.stop_after is not None:
        require("stop_after", spec.stop_after, 1 <= spec.stop_after <= spec.steps, f"between 1 and {spec.steps}, steps")
    rows = spec.micro_batch_rows
    require("micro_batch_rows", rows, rows is None or rows >= 1, "at least 1, or none")
    require("watch", spec.watch, all(1 <= step <= spec.trained_steps for step in spec.watch), "steps of the run")
    check_options(get_method(spec.method), dict(spec.options))
    solvers.check_orders(dict(spec.options).get("order", "random"), len(spec.tasks))
    require("tasks", spec.tasks, len(spec.tasks) >= 1, "at least one")
    least = len(spec.tasks)
    require("batch_size", spec.batch_size, spec.batch_size >= least, f"at least one row a task, {least}")
    weights = spec.task_weights
    require("task_weights", weights, len(weights) in (0, least), f"empty, or {least} numbers, one a task")
    good = all(0 < weight < math.inf for weight in weights)
    require("task_weights", weights, good, "finite numbers above 0")
    _check_parents(spec)


def _check_parents(spec: RunSpec) -> None:
    if get_method(spec.method).masked:
        _check_mask_origin(spec)
    for place in ("start", "calibration"):
        parent = getattr(spec, place)
        if parent is not None:
            _require_low_rank(f"method of the {place} run", parent)
    if spec.start is not None:
        _require_low_rank("method of a run that goes on from another", spec)
        grown, grows = (get_method(each.method).grows for each in (spec.start, spec))
        wanted = "one that leaves the rank as it was, or the run's own to be one that adds factors too"
        require("method of the start run", spec.start.method, grows or not grown, wanted)
        if get_method(spec.method).begin is not None:
            several = [run.tasks for run in (*earlier_runs(spec), spec) if len(run.tasks) > 1]
            require("tasks of a sequence's runs", several, not several, f"one each for method {spec.method}")
    same = ("base", "rank", "modules", "last_layers")
    for place, parent, names in (("start", spec.start, (*same, "alpha")), ("calibration", spec.calibration, same)):
        for name in names if parent is not None else ():
            own, theirs = getattr(spec, name), getattr(parent, name)
            require(f"{name} of the {place} run", theirs, own == theirs, f"that of the run itself, {own!r}")


def _check_mask_origin(spec: RunSpec) -> None:
    origin, start = get_mask_origin(spec.mask_origin), spec.start
    wanted = "a run" if origin.calibrated else f"None with mask_origin {spec.mask_origin}"
    found = spec.calibration
    label = None if found is None else found.label
    require(f"calibration of method {spec.method}", label, origin.calibrated == bool(found), wanted)
    goes_on = None if start is None else start.label
    require("start", goes_on, start is None or not origin.fresh_A, "None with fresh-a, which draws another A")
    if origin.disjoint and start is not None:
        masked = get_method(start.method).masked
        require("method of the start run", start.method, masked, f"one under masks with mask_origin {spec.mask_origin}")
    if origin.calibrated:
        require("tasks of the calibration run", found.tasks, found.tasks == spec.tasks, f"the run's own, {spec.tasks}")
    if origin.calibrated and not origin.fresh_A and start is None:
        own, theirs = ((each.seed, subspace_of(each)) for each in (spec, found))
        require("seed and subspace of the calibration run", theirs, own == theirs, f"the run's own, {own}, for one A")


def _require_low_rank(name: str, spec: RunSpec) -> None:
    low_rank = [known for known, chosen in METHODS.items() if chosen.form == LOW_RANK and chosen.trains]
    get_method(spec.method)
    require(name, spec.method, spec.method in low_rank, f"one whose update is s·B A ({', '.join(low_rank)})")


def _check_merge(spec: MergeSpec) -> None:
    require("parts", spec.parts, len(spec.parts) >= 1, "at least one run")
    require("weights", spec.weights, len(spec.weights) == len(spec.parts), f"{len(spec.parts)} numbers, one a part")
    require("merge", spec.merge, spec.merge in MERGE_METHODS, f"one of {', '.join(sorted(MERGE_METHODS))}")
    for part in spec.parts:
        _require_low_rank("method of a merge's parts", part)
    bases = {(part.base, part.last_layers) for part in spec.parts}
    require("parts", sorted(map(str, bases)), len(bases) == 1, "runs with one base and the same last_layers")


def _check_tasks(spec: Spec) -> None:
    kind = base_kind(spec.base)
    learns = isinstance(spec, RunSpec) and (get_method(spec.method).trains or spec.shots > 0)
    for name in dict.fromkeys((*spec.tasks, *spec.scored)):
        task = get_task(name)
        if learns and name in spec.tasks:
            require(
                f"splits of task {name!r} that a run learns from",
                task.splits,
                "train" in task.splits,
                "some with train",
            )
        if name in spec.scored:
            require(f"score_on for task {name!r}", spec.score_on, spec.score_on in task.splits, ", ".join(task.splits))
        for metric in (task.metric, *task.also):
            evaluation.get_metric(metric)
        if kind == "encoder" and task.reads != "encoder":
            raise ValueError(
                f"task {name!r} must be a classification or regression task for the encoder {spec.base}; "
                "it has free answers"
            )
        of_predictions = [metric for metric in (task.metric, *task.also) if metric in evaluation.OF_PREDICTIONS]
        if kind == "decoder" and of_predictions:
            raise ValueError(
                f"task {name!r} must have a metric of right and wrong answers for the decoder {spec.base}; "
                f"{of_predictions[0]} needs an encoder's predictions"
            )

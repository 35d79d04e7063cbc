"""Adapters that were trained anywhere, merged by every way and weight of the settings: folders, checks, and scores.

Every merge is written as a PEFT folder and read again; one of full rank (TIES and its like), which would have the size
of the model, is cut module by module to the sum of the adapters' ranks. Where the base of the settings has the
adapters' modules, merges and single adapters are scored on its tasks: with no more to go by, every adapter on every
task.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from lori_nb.analysis import merging
from lori_nb.analysis.elementwise_merging import FULL_RANK
from lori_nb.analysis.merging import merge
from lori_nb.analysis.overlap import norm
from lori_nb.lab.extensions import is_own, source_digest
from lori_nb.lab.folders import Folder, read_folders, write_merged
from lori_nb.lab.laboratory import check_fit, score_factors
from lori_nb.lab.models import BaseModelError, base_kind
from lori_nb.lab.paths import data_folder
from lori_nb.lab.resolving import merge_recipe
from lori_nb.method.adapters import Factors
from lori_nb.study.notebook import shared_lines
from lori_nb.study.settings import Settings

METHOD = "adapters"  # what tables call them
RANK = "sum"  # that a merge may have at most: its adapters' ranks together
COLUMNS = ["merge", "weight", "modules", "rank", "apart", "reloads", "folder", "note"]
_known: dict[str, pd.DataFrame] = {}  # a notebook asks for the same scores several times


def merged_folders(settings: Settings) -> pd.DataFrame:
    """One row a way to merge and weight: ``modules``, the largest ``rank``, how far ``apart`` the merge is from the
    weighted sum of updates (‖merged − Σ w ΔW‖ / ‖Σ w ΔW‖), whether the folder that was written ``reloads`` to the same
    bits, and the folder; a way that refuses these adapters has its reason in ``note`` and nothing else.
    """
    found = read_folders(settings.adapters) if settings.adapters else {}
    grid = itertools.product(settings.merges, settings.weights) if found else ()
    return pd.DataFrame([_merged(found, way, weight) for way, weight in grid], columns=COLUMNS)


def _merged(found: Mapping[str, Folder], way: str, weight: float) -> dict:
    try:
        factors = _factors_of(found, way, weight)
    except ValueError as error:
        return {"merge": way, "weight": weight, "note": str(error)}
    folder = _written(found, factors, way, weight)
    (again,) = read_folders([str(folder)]).values()
    rank = max(len(f.A) for f in factors.values())
    about = {"merge": way, "weight": weight, "modules": len(factors), "rank": rank, "note": ""}
    about |= {"apart": _apart(factors, _factors_of(found, "cat", weight))}
    return about | {"reloads": _same(again.factors, factors), "folder": str(folder)}


def _factors_of(found: Mapping[str, Folder], way: str, weight: float) -> dict[str, Factors]:
    return merge([folder.stored for folder in found.values()], [weight] * len(found), way, RANK)


def _written(found: Mapping[str, Folder], factors: Mapping[str, Factors], way: str, weight: float) -> Path:
    """The folder of a merge, named by what it is made of and how; one that is there was made of the same."""
    about = {"method": way, "weights": [weight] * len(found), "rank": RANK}
    first = next(iter(found.values()))  # whose base and task the folder names
    made_of = [about, _made_of(found, [way]), first.base, first.config.get("task_type")]
    name = f"{way}-{weight:g}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]}"
    folder = data_folder() / "merged" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder if folder.is_dir() else write_merged(folder, factors, found, about=about)


def _made_of(found: Mapping[str, Folder], ways: Sequence[str]) -> list:
    """What decides the factors of merges by some ways: the adapters, and recipes, or the source of an own way."""
    recipes = [[way, merging.RECIPE, merge_recipe(way), *_own_source(way)] for way in ways]
    return [[folder.digest for folder in found.values()], recipes]


def _own_source(way: str) -> list[str]:
    function = merging.MERGE_METHODS[way]
    return [] if is_own(function) else [source_digest((function,))]


def _apart(merged: Mapping[str, Factors], exact: Mapping[str, Factors]) -> float:
    """‖merged − exact‖ / ‖exact‖ over all modules, from factors: their difference is a concatenation too."""
    difference = merge([merged, exact], [1.0, -1.0])
    sizes = [math.sqrt(sum(norm(f) ** 2 for f in each.values())) for each in (difference, exact)]
    return sizes[0] / sizes[1] if sizes[1] else math.nan


def _same(again: Mapping[str, Factors], merged: Mapping[str, Factors]) -> bool:
    """Whether a folder holds the merge: the bits of both factors in float32, and the scale."""
    pairs = [(again.get(name, f), f) for name, f in merged.items()]
    equal = all(torch.equal(x.A, f.A.float()) and torch.equal(x.B, f.B.float()) for x, f in pairs)
    return again.keys() == merged.keys() and equal and all(x.scale == f.scale for x, f in pairs)


def folder_lines(settings: Settings) -> list[str]:
    """What is merged, what the adapters do not share, and why they are not scored where they are not."""
    if not settings.adapters:
        return ["No adapters from elsewhere: `adapters` may list PEFT folders or hub ids, to be merged instead."]
    cut = [way for way in settings.merges if way in FULL_RANK]
    said = [f"{', '.join(cut)}: of full rank, cut to the sum of the adapters' ranks in each module"] if cut else []
    why = unscored(settings)
    return shared_lines(settings) + said + ([f"not scored: {why}"] if why else [])


def unscored(settings: Settings) -> str:
    """Why adapters from elsewhere cannot be scored on the base and tasks of the settings; "" where they can."""
    try:
        if base_kind(settings.base) == "encoder":
            return f"{settings.base} is an encoder, whose tasks need heads that are not merged"
        for folder in read_folders(settings.adapters).values():
            check_fit(settings.base, folder.factors)
    except (BaseModelError, ValueError, OSError) as error:
        return str(error)
    return ""


def scores(settings: Settings) -> pd.DataFrame:
    """Scores as a table of runs has them: every adapter alone (``adapter``, no ``merge``) on the test rows, and every
    merge and weight on those and on rows held out of training (``split``). Empty where they cannot be scored.
    """
    if unscored(settings):
        return pd.DataFrame(columns=_SCORED)
    # a folder of the same name may hold another adapter by now
    key = repr((settings, _made_of(read_folders(settings.adapters), settings.merges)))
    if key not in _known:
        _known[key] = _scores(settings)
    return _known[key]


_SCORED = ["method", "kind", "adapter", "merge", "weight", "task", "seed", "split", "metric", "value", "n"]


def _scores(settings: Settings) -> pd.DataFrame:
    found, frames = read_folders(settings.adapters), []
    parts = {(name, None, math.nan): folder.factors for name, folder in found.items()}
    for way, weight in itertools.product(settings.merges, settings.weights):
        try:
            parts[None, way, weight] = _factors_of(found, way, weight)
        except ValueError:  # merged_folders says why
            continue
    for (adapter, way, weight), factors in parts.items():
        for split, rows in {"test": settings.test_rows, "tune": settings.tune_rows}.items():
            if split == "test" or way is not None:
                table = score_factors(
                    settings.base, factors, settings.tasks, rows, split=split, dtype=settings.dtype
                ).drop_duplicates("task")
                frames.append(table.assign(adapter=adapter, merge=way, weight=weight))
    table = pd.concat(frames, ignore_index=True)
    kinds = ["run" if way is None else "merge" for way in table["merge"]]
    return table.assign(method=METHOD, seed=0, kind=kinds)[_SCORED]


def best_alone(settings: Settings) -> pd.DataFrame:
    """The rows of :func:`scores` of the adapter that is best on each task: what a merge could at best keep."""
    table = scores(settings)
    alone = table[table["kind"] == "run"]
    return alone.loc[alone.groupby("task", sort=False)["value"].idxmax()]


def by_adapter(settings: Settings) -> pd.DataFrame:
    """Every adapter alone on every task, as rows of scores."""
    table = scores(settings)
    return table[table["kind"] == "run"]


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table of :func:`merged_folders` as people read it: "–" for what a refused merge does not have."""
    forms = {"modules": ".0f", "rank": ".0f", "apart": ".3g"}
    text = {name: ["–" if pd.isna(v) else format(v, form) for v in table[name]] for name, form in forms.items()}
    return table.assign(**text).fillna("–").set_index(["merge", "weight"])

"""What each task's adapter does to the other tasks' activations, beside what random adapters of its size would do."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from scipy import stats

from lori_nb.analysis.continual import forgetting
from lori_nb.analysis.functional import COLUMNS, interference_of
from lori_nb.lab.activations import responses
from lori_nb.lab.models import Base, load_base
from lori_nb.lab.runs import Run, Store
from lori_nb.lab.specs import RunSpec
from lori_nb.lab.tasks import get_task
from lori_nb.lab.text import encode_rows
from lori_nb.method.adapters import Factors
from lori_nb.study import adapter_records
from lori_nb.study.geometry import adapter_sets
from lori_nb.study.notebook import Results, adapters_of
from lori_nb.study.sequence_runs import matrix_of
from lori_nb.study.sequences import JOINT, MERGED, chain_of, orders_of
from lori_nb.study.settings import Settings
from lori_nb.study.style import null_of, title_of
from lori_nb.study.summary import as_columns, seeds_interval

ROWS = 16  # of a task's test rows, prompt and answer: their tokens are several hundred inputs
RECIPE = 1  # raise when the interference of the same adapters comes out otherwise
_NULL_OF = "null of "
Adapters = Mapping[str, Mapping[str, Factors]]


def functional_interference(results: Results, rows: int = ROWS) -> pd.DataFrame:
    """I(i, j) of every method's single-task adapters, on the base's activations over each task's test rows.

    Returns:
        Columns method, seed, task (i), adapter (j), module, ``value``, and ``null``: the same where adapter j has its
        own singular values in random directions, with an A drawn under the policy. Empty without own adapters.
    """
    settings = results.settings
    frames = []
    for seed in settings.seed if not settings.adapters else ():  # those of elsewhere come without rows
        known: dict[tuple[str, str, bool], Mapping[str, Factors]] = {}  # (method, task, whether it is a null) → factors
        sets = adapter_sets(results, seed)
        for method in (name for name in sets if null_of(name) in sets):
            known |= {(method, task, False): modules for task, modules in sets[method].items()}
            known |= {(method, task, True): modules for task, modules in sets[null_of(method)].items()}
        if known:
            base = load_base(settings.base, settings.dtype)
            frames.append(_compared(_responses(base, known, rows), known).assign(seed=seed))
    columns = ["method", "seed", *COLUMNS, "null"]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def functional_of(
    base: Base, adapters: Adapters, null: Adapters, rows: int = ROWS, tasks: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """I(i, j) of one set of adapters, name → module → factors, beside the same of a null set.

    Args:
        rows: of each adapter's own task, from its test rows.
        tasks: adapter → that task; None where each adapter is named as its task.

    Returns:
        Columns task (the name of i), adapter (j), module, ``value`` and ``null``.

    Raises:
        ValueError: an unknown task, or a module that the base lacks or that takes other inputs.
    """
    known = {("", name, False): modules for name, modules in adapters.items()}
    known |= {("", name, True): modules for name, modules in null.items()}
    return _compared(_responses(base, known, rows, tasks), known).drop(columns="method")


def _responses(
    base: Base, known: Mapping[tuple, Mapping[str, Factors]], rows: int, tasks: Mapping[str, str] | None = None
) -> dict[str, pd.DataFrame]:
    """Name → what all known adapters do to its task's activations, from one pass a task; adapters go by their place in
    ``known``.
    """
    adapters = {str(place): modules for place, modules in enumerate(known.values())}
    names = dict.fromkeys(name for _, name, _ in known)
    task_of = {name: name if tasks is None else tasks[name] for name in names}
    tables = {}
    for task in map(get_task, dict.fromkeys(task_of.values())):
        encoded = encode_rows(base.tokenizer, base.kind, tuple(task.rows("test", rows)), (), task.system)
        tables[task.name] = responses(base, adapters, encoded)
    return {name: tables[get_task(task).name] for name, task in task_of.items()}


def _compared(tables: Mapping[str, pd.DataFrame], known: Mapping[tuple, Mapping[str, Factors]]) -> pd.DataFrame:
    keys = list(known)
    frames = []
    for method in dict.fromkeys(method for method, _, _ in keys):
        own = {str(place): key for place, key in enumerate(keys) if key[0] == method}
        names = {place: f"{_NULL_OF}{task}" if null else task for place, (_, task, null) in own.items()}
        chosen = {
            task: table[table["adapter"].isin(own)].assign(adapter=lambda each, names=names: each["adapter"].map(names))
            for task, table in tables.items()
            if (method, task, False) in known
        }
        found = interference_of(chosen)
        is_null = found["adapter"].str.startswith(_NULL_OF)
        chance = found[is_null].rename(columns={"value": "null"})
        chance["adapter"] = chance["adapter"].str.removeprefix(_NULL_OF)
        frames.append(found[~is_null].merge(chance, on=["task", "adapter", "module"]).assign(method=method))
    return pd.concat(frames, ignore_index=True)


def later_interference(results: Results, rows: int = ROWS) -> pd.DataFrame:
    """:func:`interference_and_forgetting`'s interference, mean over seeds.

    Returns:
        Columns way, value, low, high, n, of, seeds.
    """
    found = []
    for way, part in interference_and_forgetting(results, rows).groupby("way", sort=False):
        interval = seeds_interval(part["interference"].tolist())
        found.append({"way": way} | as_columns(interval, "seeds") | {"seeds": len(part)})
    return pd.DataFrame(found, columns=["way", "value", "low", "high", "n", "of", "seeds"])


def interference_and_forgetting(results: Results, rows: int = ROWS) -> pd.DataFrame:
    """How far what was learned later moves the first task's activations, beside the forgetting that it should predict.

    Returns:
        One row for each way and seed, of the way's first order: way, seed, ``interference`` ‖(ΔW_end − ΔW_1) x‖ /
        ‖ΔW_1 x‖, mean over modules, with ΔW_1 the adapter after the first task and x what the base alone feeds the
        modules on that task's test rows, and ``lost``, the first task's forgetting. Where adapters are merged, all with
        one weight, ΔW_end is their sum. Of ways and seeds that are scored, and whose adapters are in the store, or were
        there and left their record (:mod:`lori_nb.study.adapter_records`).
    """
    settings, found = results.settings, []
    for (way, seed), (first, later) in _updates(settings).items():
        R = matrix_of(results, way, orders_of(settings, way)[0], seed)
        moved = _moved(results, first, later, rows) if R is not None else None
        if moved is not None:
            found.append({"way": way, "seed": seed, "interference": moved, "lost": float(forgetting(R)[0])})
    return pd.DataFrame(found, columns=["way", "seed", "interference", "lost"])


def record(settings: Settings, store: Store) -> None:
    """Keep with the ledger the interference of every way and seed whose adapters are in the store."""
    for first, later in _updates(settings).values():
        _moved(adapters_of(settings, (first, *later), store), first, later, ROWS, lasting=True)


def interference_line(found: pd.DataFrame) -> str:
    """Whether ways that move the first task's activations further forget more of it, in one sentence."""
    means = found.groupby("way", sort=False)[["interference", "lost"]].mean()
    if len(means) < 3 or (means.nunique() < 2).any():
        return f"{len(means)} ways, too few or too alike to rank."
    rho = stats.spearmanr(means["interference"], means["lost"]).statistic
    return (
        f"Spearman's ρ between interference and the first task's forgetting, means over seeds of {len(means)} ways: "
        f"{rho:+.2f} (n = {len(means)}, which share their first runs: no test)."
    )


def _updates(settings: Settings) -> dict[tuple[str, int], tuple[RunSpec, list[RunSpec]]]:
    """(way, seed) → the run of the first task, and what holds the later tasks: of the way's first order the last run,
    which goes on from the first, or the other adapters that are merged with it.
    """
    ways = [way for way in settings.ways if way != JOINT] if len(settings.sequence) > 1 else []
    found = {}
    for way, seed in itertools.product(ways, settings.seed):
        order = orders_of(settings, way)[0]
        chain = {run.tasks: run for run in chain_of(settings, way, order, seed)}
        first, *others = (chain[(task,)] for task in order)
        found[way, seed] = first, others if way == MERGED else others[-1:]
    return found


def _moved(
    results: Results, first: RunSpec, later: Sequence[RunSpec], rows: int, lasting: bool = False
) -> float | None:
    """How far the later tasks' update moves the first task's activations; None where the adapters are not in the store,
    and left no record.
    """
    there = all(isinstance(results.run(spec), Run) for spec in (first, *later))
    about = {"what": "sequence", "recipe": RECIPE, "rows": rows, "first": results.hash_of(first)}
    about |= {"last": ",".join(map(results.hash_of, later))}
    compute = partial(_computed, results, first, later, rows) if there else None
    table = adapter_records.kept(about, compute, lasting)
    return None if table is None else float(table["moved"].iloc[0])


def _computed(results: Results, first: RunSpec, later: Sequence[RunSpec], rows: int) -> pd.DataFrame:
    settings, before = results.settings, results.run(first).adapter.factors
    after = [results.run(spec).adapter.factors for spec in later]
    if later[-1].start is not None:  # it holds the first task's update too
        after.append({name: replace(f, B=-f.B) for name, f in before.items()})
    update = {name: _sum([each[name] for each in after]) for name in before}
    task, base = get_task(settings.sequence[0]), load_base(settings.base, settings.dtype)
    encoded = encode_rows(base.tokenizer, base.kind, tuple(task.rows("test", rows)), (), task.system)
    moved = interference_of({task.name: responses(base, {task.name: before, "later": update}, encoded)})
    return pd.DataFrame({"moved": [float(moved["value"].mean())]})


def _sum(several: Sequence[Factors]) -> Factors:
    """Σ ΔW as one pair of factors."""
    return Factors(torch.cat([f.A for f in several]), torch.cat([f.scale * f.B for f in several], 1), 1.0)


def functional_matrix(chosen: pd.DataFrame, column: str = "value") -> pd.DataFrame:
    """Whose activations × whose adapter, of one method: mean over modules and seeds; the diagonal, 1 by definition, is
    left empty.
    """
    tasks = list(dict.fromkeys(chosen["task"]))
    means = chosen.groupby(["task", "adapter"])[column].mean()
    return pd.DataFrame(
        [[np.nan if a == b else means.get((a, b), np.nan) for b in tasks] for a in tasks], index=tasks, columns=tasks
    )


def functional_lines(found: pd.DataFrame) -> list[str]:
    """One sentence a method: mean interference on another task's activations, beside the null's."""
    if found.empty:
        return [
            "Not measured: which rows the adapters were trained on is not known; `lori-nb overlap --tasks` names them."
        ]
    lines = []
    for method, part in found.groupby("method", sort=False):
        value, null = part["value"].mean(), part["null"].mean()
        lines.append(
            f"{title_of(method)}: another task's adapter moves a task's activations {value:.2f} times as far as the "
            f"task's own does; a random adapter of its size {null:.2f} times."
        )
    return lines

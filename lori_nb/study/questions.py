"""What each notebook asks of its finished runs, as tidy tables: one row a measurement, with n and interval.

Notebook 01 ``method_scores``; 02 ``sparsity_scores``; 03 ``arrangement_scores``, ``conflict_rates``, ``gaps``; 05 ``merged_scores``; 06
``forgetting_scores``. Where adapters overlap and where masks fall is in :mod:`lori_nb.study.geometry`; verdicts on the papers' claims are in
:mod:`lori_nb.study.claims`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from lori_nb.analysis.statistics import Interval, proportion_interval, t_interval
from lori_nb.lab.runs import Run
from lori_nb.lab.specs import RunSpec
from lori_nb.study.geometry import module_kinds
from lori_nb.study.notebook import Results
from lori_nb.study.plans import base_runs, joint, plan_interference, plan_masks, plan_merging, single
from lori_nb.study.profiles import Settings
from lori_nb.study.summary import difference, group_word, row_groups, summarise

MARGIN = 0.10  # ten points: a method beats a reference when it is at least so far above it
ARRANGEMENTS = {"single": "single-task LoRA", "joint": "joint LoRA", "ortho-lora": "Ortho-LoRA"}


def as_columns(interval: Interval, of: str) -> dict:
    """An interval as the columns that every table here has."""
    return {"value": interval.mean, "low": interval.low, "high": interval.high, "n": interval.n, "of": of}


# 01: accuracy against trainable parameters


def single_scores(results: Results) -> pd.DataFrame:
    """Table rows of the single-task adapters of every method."""
    return results.rows_of(plan_interference(results.settings))


def method_scores(results: Results) -> pd.DataFrame:
    """Score and trainable parameters of every method on every task."""
    rows = single_scores(results)
    sizes = rows.groupby(["method", "task"], sort=False)["trainable_parameters"].first().reset_index()
    return summarise(rows, ["method", "task"]).merge(sizes, on=["method", "task"])


def reference_scores(results: Results) -> pd.DataFrame:
    """One row a task: the ``majority`` answer's score, and the base's, as it is (``base``) and shown examples (``few_shot``).

    An encoder answers through a trained head only, so its base has no score (NaN).
    """
    settings = results.settings
    table = pd.DataFrame(
        index=pd.Index(settings.tasks, name="task"), columns=["majority", "base", "few_shot"], dtype=float
    )
    table["majority"] = single_scores(results).groupby("task")["majority"].first()
    base = results.rows_of(base_runs(settings)).set_index(["task", "shots"])["value"]
    for column, shots in {"base": 0, "few_shot": settings.shots}.items():
        table[column] = [base.get((task, shots), np.nan) for task in settings.tasks]
    return table


def beaten_references(results: Results, margin: float = MARGIN) -> pd.DataFrame:
    """For every method the tasks where its score is at least ``margin`` above the majority answer and the base shown examples."""
    best = reference_scores(results)[["majority", "few_shot"]].max(axis=1)  # NaN references are passed over
    scores = method_scores(results)
    scores["beats"] = scores["value"] >= scores["task"].map(best) + margin
    return pd.DataFrame(
        {
            "method": method,
            "tasks beaten": int(part["beats"].sum()),
            "of": len(part),
            "which": ", ".join(part.loc[part["beats"], "task"]) or "none",
        }
        for method, part in scores.groupby("method", sort=False)
    )


# 02: sparsity


def sparsity_scores(results: Results) -> pd.DataFrame:
    """Score of LoRI at every sparsity on every task of the sweep; sparsity 0 is LoRI-D."""
    rows = results.rows_of(plan_masks(results.settings))
    return summarise(rows, ["task", "sparsity"]).sort_values(["task", "sparsity"], ignore_index=True)


def training_losses(results: Results) -> pd.DataFrame:
    """Loss at every step of the sweep's first task and seed: columns step, loss, sparsity, run."""
    settings = results.settings
    chosen = [s for s in plan_masks(settings) if s.tasks[0] == settings.mask_tasks[0] and s.seed == settings.seed[0]]
    runs = [run for run in map(results.run, chosen) if run is not None]
    frames = [run.history[["step", "loss"]].assign(sparsity=run.spec.sparsity, run=run.hash) for run in runs]
    return pd.concat(frames, ignore_index=True)


# 03: several tasks, one adapter


def arrangement_specs(settings: Settings, seed: int) -> dict[str, list[RunSpec]]:
    """For each way to learn all tasks, one spec a task: one adapter each, or one for all, plain or projected."""
    many = len(settings.tasks)
    return {
        "single": [single(settings, "lora", task, seed) for task in settings.tasks],
        "joint": [joint(settings, "lora", seed)] * many,
        "ortho-lora": [joint(settings, "ortho-lora", seed)] * many,
    }


def arrangement_scores(results: Results) -> pd.DataFrame:
    """Score on every task of single-task LoRA, joint LoRA and Ortho-LoRA."""
    frames = []
    for name in ARRANGEMENTS:
        specs = [spec for seed in results.settings.seed for spec in arrangement_specs(results.settings, seed)[name]]
        frames.append(results.rows_of(specs).assign(arrangement=name))
    return summarise(pd.concat(frames), ["arrangement", "task"])


def gaps(results: Results) -> pd.DataFrame:
    """Mean over tasks: what joint training loses against single tasks, and what Ortho-LoRA gains on joint training."""
    asked = {"single − joint": ("single", "joint"), "Ortho-LoRA − joint": ("ortho-lora", "joint")}
    rows = []
    for name, (a, b) in asked.items():
        pairs = run_pairs(
            results,
            lambda seed, a=a: arrangement_specs(results.settings, seed)[a],
            lambda seed, b=b: arrangement_specs(results.settings, seed)[b],
        )
        interval = difference(pairs, results.settings.tasks)
        rows.append({"difference": name, **as_columns(interval, unit_of(pairs, results.settings.tasks))})
    return pd.DataFrame(rows)


def run_pairs(results: Results, specs_a, specs_b) -> dict[int, list[tuple[Run, Run]]]:
    """Seed → pairs of finished runs, from two functions of the seed; seeds that lack a run are left out."""
    found = {}
    for seed in results.settings.seed:
        pairs = [(results.run(a), results.run(b)) for a, b in zip(specs_a(seed), specs_b(seed), strict=True)]
        if all(run is not None for pair in pairs for run in pair):
            found[seed] = pairs
    return found


def unit_of(pairs: dict, tasks: Sequence[str]) -> str:
    """What n of :func:`difference` counts."""
    return "seeds" if len(pairs) > 1 else group_word(tasks)


def conflict_rates(results: Results) -> pd.DataFrame:
    """Share of pairs of task gradients with a negative inner product: one row for each step, tensor and kind of pair.

    Columns arrangement, seed, step, module (kind), factor ("A" or "B"), pairs ("between" two tasks, or "within" one task: two halves of its
    batch, what noise alone gives), rate. Undefined rates (B is zero at the start, so A has no gradient) are left out.
    """
    frames = []
    for seed in results.settings.seed:
        for name in ("joint", "ortho-lora"):
            run = results.run(arrangement_specs(results.settings, seed)[name][0])
            if run is not None and not run.conflicts.empty:
                frames.append(run.conflicts.assign(arrangement=name, seed=seed))
    if not frames:
        return pd.DataFrame(columns=["arrangement", "seed", "step", "module", "factor", "pairs", "rate"])
    table = pd.concat(frames, ignore_index=True)
    table[["module", "factor"]] = table["tensor"].str.rsplit(".", n=1, expand=True)
    table["module"] = table["module"].map(module_kinds(table["module"].unique()))
    kept = ["arrangement", "seed", "step", "module", "factor"]
    return table.melt(kept, ["between", "within"], "pairs", "rate").dropna(subset="rate")


def conflict_summary(rates: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Mean conflict rate by some columns: a t interval over seeds, or with one seed over the steps looked at.

    Steps of one run draw their rows apart from each other but share the adapter, so an interval over steps says little about other runs.
    """
    unit = "seed" if rates["seed"].nunique() > 1 else "step"
    rows = []
    for key, part in rates.groupby(list(by), sort=False):
        values = part.groupby(unit)["rate"].mean()
        rows.append(dict(zip(by, key, strict=True)) | as_columns(t_interval(values), f"{unit}s"))
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high", "n", "of"])


def excess_conflict(rates: pd.DataFrame, arrangement: str = "joint") -> tuple[Interval, str]:
    """Conflict rate between tasks minus that within tasks, and what its n counts."""
    chosen = rates[rates["arrangement"] == arrangement]
    unit = "seed" if chosen["seed"].nunique() > 1 else "step"
    wide = chosen.pivot_table(index=unit, columns="pairs", values="rate")
    return t_interval(wide["between"] - wide["within"]), f"{unit}s"


# 05: merging


def merged_scores(results: Results) -> pd.DataFrame:
    """Mean score over all tasks of the merged adapters, for every method, merge and weight."""
    specs = [spec for spec in plan_merging(results.settings) if spec.kind == "merge"]
    return summarise(results.rows_of(specs), ["method", "merge", "weight"])


def alone_scores(results: Results) -> pd.DataFrame:
    """Mean score over all tasks of every method's adapters, each on its own task: what a merge could at best keep."""
    return summarise(single_scores(results), ["method"])


def best_weights(results: Results) -> pd.DataFrame:
    """For every method and merge the weight with the best mean score, chosen on the very rows that are reported."""
    scores = merged_scores(results)
    return scores.loc[scores.groupby(["method", "merge"], sort=False)["value"].idxmax()].reset_index(drop=True)


def scores_at_best(results: Results) -> pd.DataFrame:
    """Score on every task at the best weight; ``how`` is "method, merge, weight"."""
    rows = results.table[results.table["kind"] == "merge"]
    best = best_weights(results)[["method", "merge", "weight"]]
    chosen = rows.merge(best, on=["method", "merge", "weight"])
    how = chosen["method"] + ", " + chosen["merge"] + ", " + chosen["weight"].map("{:g}".format)
    return summarise(chosen.assign(how=how), ["how", "task"])


# 06: forgetting


def later_tasks(settings: Settings) -> list[str]:
    """The tasks that are trained after the first."""
    return [task for task in settings.tasks if task != settings.first]


def continued(settings: Settings, method: str, task: str, seed: int) -> tuple[RunSpec, RunSpec]:
    """(first task alone, the other task trained after it in the same adapter)."""
    before = single(settings, method, settings.first, seed)
    return before, single(settings, method, task, seed, start=before, evaluate=(settings.first, task))


def accuracy_matrix(results: Results, method: str) -> pd.DataFrame:
    """Stages × tasks, means over seeds: the first task alone, then each other task after it; NaN where not scored."""
    settings = results.settings
    columns = [settings.first, *later_tasks(settings)]
    matrix = pd.DataFrame(index=[f"{settings.first} alone"], columns=columns, dtype=float)
    for task in later_tasks(settings):
        pairs = [[results.run(spec) for spec in continued(settings, method, task, seed)] for seed in settings.seed]
        done = [pair for pair in pairs if None not in pair]
        if done:
            matrix.loc[f"{settings.first} alone", settings.first] = np.mean([a.value(settings.first) for a, _ in done])
            for scored in (settings.first, task):
                matrix.loc[f"then {task}", scored] = np.mean([b.value(scored) for _, b in done])
    return matrix


def forgetting_scores(results: Results) -> pd.DataFrame:
    """For every method and later task: the first task's score ``before`` and ``after``, and what was forgotten with its interval."""
    settings, rows = results.settings, []
    for method in settings.method:
        for task in later_tasks(settings):
            both = {seed: continued(settings, method, task, seed) for seed in settings.seed}
            pairs = run_pairs(results, lambda seed, b=both: [b[seed][0]], lambda seed, b=both: [b[seed][1]])
            if pairs:
                interval = difference(pairs, [settings.first])
                before = np.mean([a.value(settings.first) for ((a, _),) in pairs.values()])
                about = {"method": method, "then": task, "before": before, "after": before - interval.mean}
                rows.append(about | as_columns(interval, unit_of(pairs, [settings.first])) | {"seeds": len(pairs)})
    return pd.DataFrame(rows)


def kept_answers(results: Results, target: int | None = None) -> pd.DataFrame:
    """Of the first task's rows that were right before, the share that is right after each later task.

    Args:
        target: only rows of this class; for the refusal set 1 is harmful, so that the share is that of refusals kept.
    """
    settings, rows = results.settings, []
    for method in settings.method:
        for task in later_tasks(settings):
            kept = [
                pair
                for pair in map(lambda seed, m=method, t=task: _kept(results, m, t, seed, target), settings.seed)
                if pair
            ]
            if kept:
                shares = [right / asked for right, asked in kept]
                of = "seeds" if len(kept) > 1 else group_word([settings.first])
                interval = t_interval(shares) if len(kept) > 1 else proportion_interval(*kept[0])
                rows.append({"method": method, "then": task, **as_columns(interval, of), "seeds": len(kept)})
    return pd.DataFrame(rows, columns=["method", "then", "value", "low", "high", "n", "of", "seeds"])


def _kept(results: Results, method: str, task: str, seed: int, target: int | None) -> tuple[float, int] | None:
    """(groups' worth of rows still right, groups of rows that were right before); None without runs or without a right row."""
    first = results.settings.first
    runs = [results.run(spec) for spec in continued(results.settings, method, task, seed)]
    if None in runs:
        return None
    before, after = (run.predictions.loc[run.predictions.task == first].sort_values("row") for run in runs)
    asked = before["correct"].to_numpy(float) == 1
    if target is not None:
        asked &= before["target"].to_numpy(float) == target
    if not asked.any():
        return None
    groups = len(np.unique(row_groups(first, len(before))[asked]))
    return float(after["correct"].to_numpy(float)[asked].mean()) * groups, groups


def forgetting_lines(results: Results) -> Iterator[str]:
    """One sentence a method: how much of the first task it forgot on average."""
    for method, part in forgetting_scores(results).groupby("method", sort=False):
        worst = part.loc[part["value"].idxmax()]
        yield f"{method}: lost {part['value'].mean():.2f} on average, {worst['value']:.2f} after {worst['then']}"

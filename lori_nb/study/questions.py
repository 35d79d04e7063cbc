"""What each notebook asks of its finished runs, as tidy tables: one row a measurement, with n and interval.

Notebooks 01, 02 and 05 are answered here, 03 in :mod:`lori_nb.study.sharing` and :mod:`lori_nb.study.conflict`, 04 and
the places of masks in :mod:`lori_nb.study.geometry`, 06 in :mod:`lori_nb.study.forgetting` and
:mod:`lori_nb.study.sequence_effects`; verdicts on the papers' claims are in :mod:`lori_nb.study.claims`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from lori_nb.lab.specs import RunSpec
from lori_nb.study import foreign_merging
from lori_nb.study.cells import base_runs
from lori_nb.study.notebook import Results
from lori_nb.study.plans import held_out_merges, merge_specs, method_specs, paper_weights, sparsity_specs
from lori_nb.study.style import title_of
from lori_nb.study.summary import Pair, group_word, summarise

MARGIN = 0.10  # ten points: a method beats a reference when it is at least so far above it


# 01: accuracy against trainable parameters


def single_scores(results: Results) -> pd.DataFrame:
    """Table rows of the single-task adapters of every method."""
    return results.rows_of(method_specs(results.settings))


def method_scores(results: Results) -> pd.DataFrame:
    """Score and trainable parameters of every method on every task."""
    rows = single_scores(results)
    sizes = rows.groupby(["method", "task"], sort=False)["trainable_parameters"].first().reset_index()
    return summarise(rows, ["method", "task"]).merge(sizes, on=["method", "task"])


def reference_scores(results: Results) -> pd.DataFrame:
    """One row a task: scores of the most frequent answer and of the bare base.

    Columns ``majority``, ``base`` (as it is) and ``few_shot`` (shown examples in its prompt). An encoder answers
    through a trained head only, so its base has no score (NaN).
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
    """For every method the tasks where it beats the majority answer and the base shown examples, each by ``margin``."""
    best = reference_scores(results)[["majority", "few_shot"]].max(axis=1)  # NaN references are passed over
    scores = method_scores(results)
    scores["beats"] = scores["value"] >= scores["task"].map(best) + margin
    return pd.DataFrame(
        {
            "method": method,
            "tasks_beaten": int(part["beats"].sum()),
            "of": len(part),
            "which": ", ".join(part.loc[part["beats"], "task"]),
        }
        for method, part in scores.groupby("method", sort=False)
    )


def beaten_lines(results: Results) -> list[str]:
    """One sentence a method on the tasks where it beats both references."""
    lines = []
    for row in beaten_references(results).itertuples():
        which = f" ({row.which})" if row.tasks_beaten else ""
        tasks = f"{row.tasks_beaten} of {row.of} tasks{which}"
        lines.append(f"{title_of(row.method)} beats both references by {MARGIN:g} or more on {tasks}.")
    return lines


def has_learned(results: Results, method: str) -> bool:
    """Whether a method's mean score is ``MARGIN`` or more above that of the majority answers; else matching is easy."""
    rows = single_scores(results)
    rows = rows[rows["method"] == method]
    return bool((rows["value"] - rows["majority"]).mean() >= MARGIN)


# 02: sparsity


def sparsity_scores(results: Results) -> pd.DataFrame:
    """Score of LoRI at every sparsity on every task of the sweep; sparsity 0 is LoRI-D."""
    rows = results.rows_of(sparsity_specs(results.settings))
    return summarise(rows, ["task", "sparsity"]).sort_values(["task", "sparsity"], ignore_index=True)


def training_losses(results: Results) -> pd.DataFrame:
    """Loss at every step of the sweep's first task and seed: columns step, loss, sparsity, run."""
    settings = results.settings
    chosen = [
        s for s in sparsity_specs(settings) if s.tasks[0] == settings.mask_tasks[0] and s.seed == settings.seed[0]
    ]
    runs = [run for run in map(results.run, chosen) if run is not None]
    frames = [run.history[["step", "loss"]].assign(sparsity=run.spec.sparsity, run=run.hash) for run in runs]
    return pd.concat(frames, ignore_index=True)


Specs = Callable[[int], list[RunSpec]]


def run_pairs(results: Results, specs_a: Specs, specs_b: Specs) -> dict[int, list[Pair]]:
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


# 05: merging


def merged_scores(results: Results) -> pd.DataFrame:
    """Mean score over all tasks of the merged adapters on the test rows, for every method, merge and weight."""
    return summarise(merge_rows(results), ["method", "merge", "weight"])


def merge_rows(results: Results, split: str = "test") -> pd.DataFrame:
    """Table rows of all merges on a split: of this study's adapters, or of those from elsewhere."""
    settings = results.settings
    if settings.adapters:
        table = foreign_merging.scores(settings)
        return table[(table["kind"] == "merge") & (table["split"] == split)]
    return results.rows_of(merge_specs(settings) if split == "test" else held_out_merges(settings))


def alone_scores(results: Results) -> pd.DataFrame:
    """Mean score over all tasks of every method's adapters, each on its own task: what a merge could at best keep.
    Of adapters from elsewhere the best one on each task counts.
    """
    settings = results.settings
    rows = foreign_merging.best_alone(settings) if settings.adapters else single_scores(results)
    return summarise(rows, ["method"])


def chosen_weights(results: Results) -> pd.DataFrame:
    """For every method and merge the weight with the best mean score over tasks and seeds on rows held out of training
    and of the test, of all ``weights``; the smallest among equals. Columns method, merge, weight and ``tuned``, that
    score.
    """
    scores = summarise(merge_rows(results, "tune"), ["method", "merge", "weight"]).rename(columns={"value": "tuned"})
    scores = scores.sort_values("weight", kind="stable")
    best = scores.loc[scores.groupby(["method", "merge"], sort=False)["tuned"].idxmax()]
    order = {key: place for place, key in enumerate((*results.settings.method, *results.settings.merges))}
    best = best.sort_values(["method", "merge"], key=lambda names: names.map(order), ignore_index=True)
    return best[["method", "merge", "weight", "tuned"]]


def best_weights(results: Results) -> pd.DataFrame:
    """Scores on the test rows at :func:`chosen_weights`, which saw none of them."""
    return chosen_weights(results).merge(merged_scores(results), on=["method", "merge", "weight"])


def paper_scores(results: Results) -> pd.DataFrame:
    """Scores on the test rows at the LoRI authors' weights for so many adapters, where they give one for the method."""
    settings = results.settings
    weights = {(method, weight) for method in settings.method for weight in paper_weights(settings, method)}
    scores = merged_scores(results)
    return scores[[(row.method, row.weight) in weights for row in scores.itertuples()]].reset_index(drop=True)


def best_and_paper(results: Results) -> pd.DataFrame:
    """Every method and merge at its chosen weight and at the paper's, named in ``how``, beside the adapters alone."""
    parts = {"chosen": best_weights(results), "paper's": paper_scores(results)}
    frames = [alone_scores(results).assign(how="not merged")]
    for title, part in parts.items():
        how = [f"{row.merge}, {title} weight {row.weight:g}" for row in part.itertuples()]
        frames += [part.assign(how=how)] if len(part) else []
    return pd.concat(frames, ignore_index=True)


def scores_at_best(results: Results) -> pd.DataFrame:
    """Score on every task at the chosen weight; ``how`` is "method, merge, weight"."""
    rows = merge_rows(results)
    best = chosen_weights(results)[["method", "merge", "weight"]]
    chosen = rows.merge(best, on=["method", "merge", "weight"])
    how = [f"{title_of(row.method)}, {row.merge}, {row.weight:g}" for row in chosen.itertuples()]
    return summarise(chosen.assign(how=how), ["how", "task"])


def merge_lines(results: Results) -> list[str]:
    """One sentence a method: what its best merge, chosen on held-out rows, keeps of the score of its adapters alone."""
    alone = alone_scores(results).set_index("method")["value"]
    best = best_weights(results).sort_values("tuned").drop_duplicates("method", keep="last").set_index("method")
    return [
        f"{title_of(method)}: mean score {alone[method]:.2f} alone, {row['value']:.2f} in the merge that was best on "
        f"held-out rows ({row['merge']}, weight {row['weight']:g}; n = {int(row['n'])} {row['of']})."
        for method, row in best.loc[[m for m in alone.index if m in best.index]].iterrows()
    ]

"""Does orthogonality predict what a merge costs? Tables of the study of pairs (:mod:`lori_nb.study.pairs`).

For every ordered pair of tasks: what task i loses when adapter j is merged with its own, beside how the two adapters
meet, by several measures, each as excess over its null. And for merges of more and more adapters, what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lori_nb.analysis.association import adapter_interval, mantel, without_main_effects
from lori_nb.analysis.interference import ELEMENTWISE
from lori_nb.analysis.nulls import INNER, TOTAL, by_pair, expected, norms, null_draws, null_set, where_defined
from lori_nb.analysis.overlap import REGISTERED, overlap_table
from lori_nb.analysis.statistics import t_interval
from lori_nb.lab.models import load_base
from lori_nb.lab.runs import Run, Store
from lori_nb.lab.specs import RunSpec
from lori_nb.lab.tasks import get_task
from lori_nb.method.adapters import Factors
from lori_nb.study import adapter_records, functional
from lori_nb.study.geometry import drawn_A
from lori_nb.study.notebook import Results, adapters_of
from lori_nb.study.pairs import alone_specs, bare_specs, joint_specs, pair_merges, pair_settings, subset_merges
from lori_nb.study.settings import Settings
from lori_nb.study.style import title_of
from lori_nb.study.summary import as_columns, p_text, text_of

FUNCTIONAL = "functional"  # of :mod:`lori_nb.analysis.functional`, on task i's activations
SHOWN = {  # in the order of the panels
    "cosine_size": "|cosine| of ΔW",
    TOTAL: "cosine of whole updates",
    "row_overlap": "overlap of A's row spaces",
    "column_overlap": "overlap of B's column spaces",
    "row_grassmann": "Grassmann distance of row spaces",
    "column_grassmann": "Grassmann distance of column spaces",
    "row_chordal": "chordal distance of row spaces",
    "column_chordal": "chordal distance of column spaces",
    "alignment": "alignment of j with i",
    "singular_interference": "singular task interference",
    "sign_conflict": "entries that differ in sign",
    "magnitude_overlap": "overlap of the largest entries",
    "mask_overlap": "overlap of B's masks",
    FUNCTIONAL: "‖ΔWⱼ x‖ / ‖ΔWᵢ x‖ on task i's activations",
}
MEASURES = tuple(name for name in SHOWN if name not in (TOTAL, FUNCTIONAL))
# Sets of null adapters behind the null of each pair, whose noise is in every excess: 16 cost 12 adapters of 56 modules
# at rank 16 some 2 minutes of a core. Entries of dense updates cost twice as much as all other measures, and their null
# is a mean over millions of them.
DRAWS = 16
ENTRY_DRAWS = 2
DIGITS = 9  # of an excess: what a frozen A decides is the same in the null, but for rounding that must not be ranked
ROWS = 8  # of a task's test rows, whose tokens are the inputs of the functional measure
RECIPE = 2  # raise when overlaps of the same adapters come out otherwise; 1 took all of A's rows, whatever ΔW held
NO_STUDY = "Not measured: `pair_tasks` names no tasks for it; those of profile standard take hours."
PAIR = ["method", "seed", "task", "adapter"]


def pair_losses(results: Results) -> pd.DataFrame:
    """One row an ordered pair: columns method, seed, task (i), adapter (j), ``value``: the loss of task i with adapter
    j merged in, minus its loss with its own adapter alone (nats an answer token, the same rows), and ``n`` rows.
    """
    if not results.settings.pair_tasks:
        return pd.DataFrame(columns=[*PAIR, "value", "n"])
    alone = alone_specs(results.settings)
    losses = _losses(results)
    rows = []
    for each in pair_merges(results.settings):
        for task, other in (each.tasks, each.tasks[::-1]):
            own = losses.get((results.hash_of(alone[each.method, each.seed, task]), task))
            merged = losses.get((results.hash_of(each.spec), task))
            if own is not None and merged is not None:
                rows.append((each.method, each.seed, task, other, merged[0] - own[0], merged[1]))
    return pd.DataFrame(rows, columns=[*PAIR, "value", "n"])


def _losses(results: Results) -> dict[tuple[str, str], tuple[float, int]]:
    """(run, task) → its mean loss and number of rows."""
    table = results.table
    return {(r.run, r.task): (r.loss, r.n) for r in table[table["split"] == "test"].itertuples()}


def pair_overlaps(results: Results) -> pd.DataFrame:
    """One row an ordered pair and measure: columns method, seed, task (i), adapter (j), measure, ``value``, ``null``
    and ``excess``, the mean over modules minus the null's. Of every method and seed whose adapters are in the store, or
    were all there once and left their record (:mod:`lori_nb.study.adapter_records`); of a set that is there in part,
    what is there.

    The null has each adapter's singular values and rows in the A that its policy drew; one stream draws it for all
    adapters of a set, in the order of their tasks' names.
    """
    frames = []
    for (method, seed), specs in _sets(results.settings).items():
        there = {task: spec for task, spec in specs.items() if isinstance(results.run(spec), Run)}
        table = _kept(results, seed, specs, len(there) == len(specs))
        if table is None and len(there) > 1:
            table = _kept(results, seed, there, True)
        frames += [] if table is None else [table.assign(method=method, seed=seed)]
    columns = [*PAIR, "measure", "value", "null", "excess"]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def record(settings: Settings, store: Store) -> None:
    """Keep with the ledger what :func:`pair_overlaps` gives of every set of adapters that is whole in the store."""
    for (_, seed), specs in _sets(settings).items():
        results = adapters_of(settings, specs.values(), store)
        _kept(results, seed, specs, len(results.runs) == len(specs), lasting=True)


def _sets(settings: Settings) -> dict[tuple[str, int], dict[str, RunSpec]]:
    """(method, seed) → task, in the order of names, → the run of its adapter; none without a study of pairs."""
    sets: dict[tuple[str, int], dict[str, RunSpec]] = {}
    for (method, seed, task), spec in alone_specs(settings).items() if settings.pair_tasks else ():
        sets.setdefault((method, seed), {})[task] = spec
    return {key: dict(sorted(specs.items())) for key, specs in sets.items()}


def _kept(
    results: Results, seed: int, specs: Mapping[str, RunSpec], there: bool, lasting: bool = False
) -> pd.DataFrame | None:
    about = {
        "what": "pairs",
        "recipes": [RECIPE, functional.RECIPE],
        "measures": MEASURES,
        "digits": DIGITS,
        "draws": [DRAWS, ENTRY_DRAWS],
        "rows": ROWS,
        "seed": seed,
        "runs": {task: results.hash_of(spec) for task, spec in specs.items()},
    }
    return adapter_records.kept(about, partial(_overlaps_of, results, seed, specs) if there else None, lasting)


def _overlaps_of(results: Results, seed: int, specs: Mapping[str, RunSpec]) -> pd.DataFrame:
    runs = {task: results.run(spec) for task, spec in specs.items()}
    adapters = {task: run.adapter.factors for task, run in runs.items()}
    A = {task: drawn_A(run.adapter) for task, run in runs.items()}
    of_weights = both_ways(excess_of(adapters, A, seed))
    null = null_set(adapters, torch.Generator().manual_seed(seed), A)
    own = pair_settings(results.settings)
    of_outputs = functional.functional_of(load_base(own.base, own.dtype), adapters, null, ROWS)
    of_outputs = of_outputs.groupby(["task", "adapter"], sort=False)[["value", "null"]].mean().reset_index()
    table = pd.concat([of_weights, of_outputs.assign(measure=FUNCTIONAL)], ignore_index=True)
    return table.assign(excess=(table["value"] - table["null"]).round(DIGITS))


def excess_of(
    adapters: Mapping[str, Mapping[str, Factors]], A: Mapping[str, Mapping[str, Tensor]] | None, seed: int
) -> pd.DataFrame:
    """Columns adapter_a, adapter_b, measure, ``value`` (mean over modules) and ``null`` of every pair of adapters.

    Args:
        A: what the null's rows lie in, as :func:`~lori_nb.analysis.nulls.null_draws` takes it.
    """
    keys, sizes = ["adapter_a", "adapter_b", "measure"], norms(adapters)
    measures = [INNER, *MEASURES]  # of which the cosine of the whole updates is made
    draws = null_draws(adapters, DRAWS, seed, [name for name in measures if name not in ELEMENTWISE], A)
    of_entries = null_draws(adapters, ENTRY_DRAWS, seed, ELEMENTWISE, A)  # the first of the same sets
    found, draws = where_defined(overlap_table(adapters, measures), pd.concat([draws, of_entries], ignore_index=True))
    chance = expected(by_pair(draws, sizes, ["draw"]), keys)[[*keys, "null"]]
    table = by_pair(found, sizes).merge(chance, on=keys)
    return table[table["measure"] != INNER]


def both_ways(pairs: pd.DataFrame) -> pd.DataFrame:
    """Ordered pairs (task i, adapter j) of pairs of adapters: what is symmetric holds both ways; of the others
    adapter_a is the one that is seen, j, from adapter_b, i.
    """
    seen = pairs.rename(columns={"adapter_a": "adapter", "adapter_b": "task"})
    symmetric = pairs["measure"].map(lambda name: name == TOTAL or REGISTERED[name].symmetric)
    turned = pairs[symmetric].rename(columns={"adapter_a": "task", "adapter_b": "adapter"})
    return pd.concat([seen, turned], ignore_index=True)[["task", "adapter", "measure", "value", "null"]]


def joined(losses: pd.DataFrame, overlaps: pd.DataFrame) -> pd.DataFrame:
    """One row an ordered pair and measure: ``excess`` and ``loss`` (what task i loses), with ``n`` rows behind it."""
    return overlaps.merge(losses.rename(columns={"value": "loss"}), on=PAIR)


def correlations(pairs: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of excess overlap and loss over ordered pairs, a row a method and measure; none for a measure
    that is the same for all pairs, such as the overlap of masks where nothing is masked, or of a frozen A's row spaces,
    which the null has too.

    Columns method, measure, ``value`` (Spearman, mean over seeds) with ``low`` and ``high`` (95 %, adapters and seeds
    drawn again), ``p`` (adapters permuted) and ``chance_low`` and ``chance_high`` (between which 95 % of these
    permutations lie), ``n`` adapters, pairs and seeds; ``within`` and ``within_p`` the same without main effects: how
    sensitive each task and how strong each adapter is in all its pairs.
    """
    rows = []
    for (method, measure), part in pairs.groupby(["method", "measure"], sort=False):
        tasks = list(dict.fromkeys([*part["task"], *part["adapter"]]))
        if len(tasks) < 3 or part["excess"].nunique() < 2:
            continue
        x, y = (stacked(part, tasks, column) for column in ("excess", "loss"))
        tested, within = mantel(x, y), mantel(without_main_effects(x), without_main_effects(y))
        interval = adapter_interval(x, y)
        rows.append(
            {"method": method, "measure": measure}
            | as_columns(interval, "adapters")
            | {"p": tested.p, "chance_low": tested.low, "chance_high": tested.high}
            | {"within": within.correlation, "within_p": within.p}
            | {"pairs": len(tasks) * (len(tasks) - 1), "seeds": len(x)}
        )
    columns = ["method", "measure", "value", "low", "high", "n", "of", "p", "chance_low", "chance_high"]
    return pd.DataFrame(rows, columns=[*columns, "within", "within_p", "pairs", "seeds"])


def stacked(part: pd.DataFrame, tasks: Sequence[str], column: str) -> np.ndarray:
    """Matrices (seeds × T × T) of a column, [s, i, j] of adapter j seen from task i; NaN where there is none."""
    wide = [each.pivot(index="task", columns="adapter", values=column) for _, each in part.groupby("seed")]
    return np.stack([each.reindex(index=tasks, columns=tasks).to_numpy(float) for each in wide])


def correlation_lines(found: pd.DataFrame) -> list[str]:
    """One sentence a method: the measure that goes along most with what merging costs."""
    if found.empty:
        return [NO_STUDY]
    lines = []
    for method, part in found.dropna(subset="value").groupby("method", sort=False):
        best = part.loc[part["value"].abs().idxmax()]
        lines.append(
            f"{title_of(method)}: of {len(part)} measures, {SHOWN[best['measure']]} goes along most with the loss, "
            f"ρ = {text_of(best)} over {int(best['n'])} adapters; adapters exchanged give {best['chance_low']:.2f} to "
            f"{best['chance_high']:.2f}, {p_text(best['p'], name='p')} (not corrected for {len(part)} measures)."
        )
    return lines


def readable(found: pd.DataFrame) -> pd.DataFrame:
    """The table of :func:`correlations` as people read it: a row a method and measure."""
    text = [text_of(row) for _, row in found.iterrows()]
    table = pd.DataFrame({"method": found["method"].map(title_of), "measure": found["measure"].map(SHOWN)})
    chance = [f"{row['chance_low']:.2f} to {row['chance_high']:.2f}" for _, row in found.iterrows()]
    table = table.assign(**{"ρ [95 %]": text, "adapters exchanged": chance})
    for name in ("p", "within", "within_p"):
        table[name.replace("_", " ")] = found[name].map("{:.3f}".format)
    counts = [f"{r.n} adapters, {r.pairs} pairs, {r.seeds} seed{'s' * (r.seeds > 1)}" for r in found.itertuples()]
    return table.assign(n=counts).set_index(["method", "measure"])


# Merges of more and more adapters


def scaling(results: Results) -> pd.DataFrame:
    """What is left of 2, 3, … adapters when merged, beside each alone, one adapter for all tasks, and the base.

    Columns series (a method, "<method> alone", "joint", "base"), size, measure ("mean" or "worst" task of the subset),
    value, low, high, n, of, seeds: mean over random subsets; intervals over seeds, or over subsets with one seed.
    """
    table = scaling_scores(results)
    rows = []
    for key, part in table.groupby(["series", "size", "measure"], sort=False):
        by_seed = part.groupby("seed")["value"].mean()
        values, of = (by_seed, "seeds") if len(by_seed) > 1 else (part["value"], "subsets")
        about = as_columns(t_interval(values.to_numpy()), of) | {"seeds": len(by_seed), "metric": "mean of metrics"}
        rows.append(dict(zip(("series", "size", "measure"), key, strict=True)) | about)
    columns = ["series", "size", "measure", "value", "low", "high", "n", "of", "seeds", "metric"]
    return pd.DataFrame(rows, columns=columns)


def scaling_scores(results: Results) -> pd.DataFrame:
    """One row a series, seed and subset: columns series, seed, size, subset, measure and value."""
    settings = results.settings
    columns = ["series", "seed", "size", "subset", "measure", "value"]
    if not settings.pair_tasks:
        return pd.DataFrame(columns=columns)
    table = results.table[results.table["split"] == "test"]
    scores = {(r.run, r.task): r.value for r in table.itertuples() if r.metric == get_task(r.task).metric}
    alone, joint = alone_specs(settings), joint_specs(settings)
    bare = {spec.tasks[0]: results.hash_of(spec) for spec in bare_specs(settings)}
    rows = []
    for each in subset_merges(settings):
        own = [results.hash_of(alone[each.method, each.seed, task]) for task in each.tasks]
        shared = results.hash_of(joint[each.seed]) if joint else None
        runs = {each.method: results.hash_of(each.spec), f"{each.method} alone": own, "joint": shared}
        runs |= {"base": [bare.get(task) for task in each.tasks]}
        for series, hashes in runs.items():
            hashes = [hashes] * len(each.tasks) if isinstance(hashes, str | None) else hashes
            values = [scores.get(key) for key in zip(hashes, each.tasks, strict=True)]
            if None not in values:
                about = (series, each.seed, len(each.tasks), "+".join(each.tasks))
                rows += [(*about, "mean", float(np.mean(values))), (*about, "worst", min(values))]
    return pd.DataFrame(rows, columns=columns).drop_duplicates(columns[:-1], ignore_index=True)


def scaling_lines(found: pd.DataFrame) -> list[str]:
    """One sentence a method: what a merge of few and of all adapters keeps of their own scores."""
    if found.empty:
        return [NO_STUDY]
    mean = found[found["measure"] == "mean"].set_index(["series", "size"])["value"]
    lines = []
    for method in dict.fromkeys(series.removesuffix(" alone") for series, _ in mean.index if " alone" in series):
        sizes = [size for series, size in mean.index if series == method]
        if sizes:
            kept = [
                f"{mean[method, n]:.2f} of {mean[f'{method} alone', n]:.2f} with {n}" for n in (min(sizes), max(sizes))
            ]
            lines.append(f"{title_of(method)}: mean score merged, of that alone, {' and '.join(kept)} adapters.")
    return lines

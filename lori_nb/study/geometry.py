"""Where adapters are: which entries a mask keeps, and how far the subspaces of two tasks' adapters overlap.

Overlap is read against a null of :mod:`lori_nb.analysis.nulls` drawn under the same policy: the singular values of the
adapters themselves, rows in the A's as the seeds made them, before any training. A shared draw of A alone moves the
overlap of rows from near r / d_in to 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lori_nb.analysis.interference import similarity_curve
from lori_nb.analysis.nulls import null_set
from lori_nb.analysis.overlap import MEASURES, met, overlap_table
from lori_nb.analysis.statistics import t_interval
from lori_nb.lab.folders import comparable, read_folders
from lori_nb.lab.methods import FACTORED, get_method
from lori_nb.lab.runs import Run
from lori_nb.lab.specs import RunSpec
from lori_nb.method.adapters import Adapter, Factors, layer_number
from lori_nb.method.masks import kept, kept_in_all
from lori_nb.method.subspaces import down_projection
from lori_nb.study.arms import arm_spec
from lori_nb.study.cells import single
from lori_nb.study.choices import choice_arms
from lori_nb.study.notebook import Results
from lori_nb.study.plans import sparsity_specs
from lori_nb.study.style import null_of, title_of
from lori_nb.study.summary import as_columns

GIVEN = "adapters"  # what tables call those from elsewhere
SIDES = {"A": "rows of A (what is read)", "B": "columns of B (what is written)"}


def module_kinds(names: Iterable[str]) -> dict[str, str]:
    """Module name → its kind, the same in every layer: "q_proj".

    Where the last part of a name is ambiguous, the whole path below the layer: "attention.output.dense".
    """
    below = {name: name.split(f".{layer_number(name)}.", 1)[-1] for name in names}
    paths = set(below.values())
    last = [path.rpartition(".")[2] for path in paths]
    return {name: (end if last.count(end := path.rpartition(".")[2]) == 1 else path) for name, path in below.items()}


def with_places(table: pd.DataFrame) -> pd.DataFrame:
    """A table with a column ``module`` and what its modules' names say: ``layer`` (NaN outside layers), ``kind``."""
    kinds = module_kinds(dict.fromkeys(table["module"]))
    layers = [np.nan if (n := layer_number(name)) is None else n for name in table["module"]]
    return table.assign(layer=layers, kind=table["module"].map(kinds))


def _reading_place(kind: str) -> int:
    # attention before the feed-forward part, as the signal passes them
    parts = ("q_proj", "query", "k_proj", "key", "v_proj", "value", "o_proj", "attention.output", "gate", "up", "inter")
    return next((place for place, part in enumerate(parts) if kind.startswith(part)), len(parts))


def mask_shares(results: Results) -> pd.DataFrame:
    """Share of B's entries that the mask keeps, layers × kinds of module: mean over tasks and seeds of the sweep.

    At the sweep's sparsity nearest to the setting ``sparsity``.
    """
    settings = results.settings
    sparsity = shown_sparsity(results)
    chosen = [s for s in sparsity_specs(settings) if s.sparsity == sparsity]
    runs = [run for run in map(results.run, chosen) if run is not None]
    shares: dict[str, list[float]] = {}
    for run in runs:
        for name, mask in run.adapter.masks.items():
            shares.setdefault(name, []).append(float(mask.float().mean()))
    kinds = module_kinds(shares)
    rows = [{"layer": layer_number(name), "module": kinds[name], "share": np.mean(v)} for name, v in shares.items()]
    table = pd.DataFrame(rows, columns=["layer", "module", "share"])
    order = sorted(set(table["module"]), key=lambda kind: (_reading_place(kind), kind))
    return table.pivot(index="layer", columns="module", values="share")[order]


def shown_sparsity(results: Results) -> float:
    """The sweep's sparsity above 0 that is nearest to the setting ``sparsity``; ValueError where the sweep has none."""
    swept = [s for s in results.settings.sparsities if s > 0]
    if not swept:
        raise ValueError(f"sparsities must hold a value above 0 for a mask; found {list(results.settings.sparsities)}")
    return min(swept, key=lambda s: abs(s - results.settings.sparsity))


def trained_runs(results: Results) -> list[Run]:
    """The runs that left an adapter: no merge, not the bare base, not full fine-tuning."""
    chosen = {run.hash: get_method(run.spec.method) for run in results.runs.values() if run.spec.kind == "run"}
    return [results.runs[name] for name, method in chosen.items() if method.trains and method.form in FACTORED]


def masks_are_exact(results: Results) -> bool:
    """Whether every mask of a fresh adapter keeps exactly k entries, and B is zero off its mask.

    An adapter that was trained on keeps the entries of its first mask beside those of the second.
    """
    masked = [run for run in trained_runs(results) if run.spec.sparsity > 0 and run.spec.start is None]
    return all(_is_exact(run.adapter, run.spec) for run in masked)


def _is_exact(adapter: Adapter, spec: RunSpec) -> bool:
    off = all(not f.B[~adapter.masks[name]].any() for name, f in adapter.factors.items())
    shapes = {name: tuple(mask.shape) for name, mask in adapter.masks.items()}
    return off and kept(adapter.masks) == kept_in_all(shapes, spec.sparsity, spec.mask_scope, spec.mask_structure)


def drawn_A(adapter: Adapter) -> dict[str, Tensor]:
    """Module → A (r × d_in) as the adapter's policy drew it, before any training."""
    return {
        name: down_projection(adapter.seed, adapter.subspace, name, *f.A.shape) for name, f in adapter.factors.items()
    }


def adapter_sets(results: Results, seed: int) -> dict[str, dict[str, dict[str, Factors]]]:
    """Method → task → factors of one seed's single-task adapters, and :func:`null_of` each method.

    A null has the singular values of the adapters that it stands for, and rows in the A's that the policy drew. Where
    the setting ``adapters`` names folders: "adapters" → folder → factors, and their null by :func:`null_rows`.
    """
    settings = results.settings
    if settings.adapters:
        given, _ = comparable(read_folders(settings.adapters))
        rows = null_rows(given, settings.overlap_null)
        return {GIVEN: given, null_of(GIVEN): null_set(given, torch.Generator().manual_seed(seed), rows)}
    return _beside_nulls({method: single_adapters(results, method, seed) for method in settings.method}, seed)


def null_rows(adapters: Mapping[str, Mapping[str, Factors]], null: str) -> dict[str, dict[str, Tensor]] | None:
    """What the rows of a null lie in, as :func:`~lori_nb.analysis.nulls.null_draws` takes it: each adapter's own A's
    under "given", no A under "independent".
    """
    own = {name: {m: f.A for m, f in modules.items()} for name, modules in adapters.items()}
    return own if null == "given" else None


def _beside_nulls(found: Mapping[str, Mapping[str, Adapter]], seed: int) -> dict[str, dict[str, dict[str, Factors]]]:
    """Name → task → factors where there are several tasks, and then their nulls."""
    several = {name: adapters for name, adapters in found.items() if len(adapters) > 1}
    sets = {name: {task: each.factors for task, each in adapters.items()} for name, adapters in several.items()}
    nulls = {}
    for name, adapters in several.items():
        A = {task: drawn_A(adapter) for task, adapter in adapters.items()}
        nulls[null_of(name)] = null_set(sets[name], torch.Generator().manual_seed(seed), A)
    return sets | nulls


def single_adapters(results: Results, method: str, seed: int) -> dict[str, Adapter]:
    """Task → the adapter of one method and seed, where its run is there."""
    settings = results.settings
    runs = {task: results.run(single(settings, method, task, seed)) for task in settings.tasks}
    return {task: run.adapter for task, run in runs.items() if run is not None}


def choice_sets(results: Results, seed: int) -> dict[str, dict[str, dict[str, Factors]]]:
    """Arm → task → factors of one seed, for the methods and the arms of :func:`~lori_nb.study.choices.choice_arms`, and
    :func:`null_of` each.

    On ``arm_tasks``, or on all tasks where that is but one, which overlaps with nothing.
    """
    settings = results.settings
    tasks = settings.arm_tasks if len(settings.arm_tasks) > 1 else settings.tasks
    found: dict[str, dict[str, Adapter]] = {}
    for arm, task in itertools.product(choice_arms(settings), tasks):
        run = results.run(arm_spec(settings, arm, task, seed))
        if run is not None:
            found.setdefault(arm, {})[task] = run.adapter
    return _beside_nulls(found, seed)


def _counted(results: Results, sets_of: Callable[[Results, int], dict]) -> Iterator[tuple[int, str, dict]]:
    """(seed, method, its adapters) of every set. Adapters from elsewhere are the same for every seed: they count once,
    and seeds draw their null again, under the first one's number, so that no interval over seeds is made of them.
    """
    seeds = results.settings.seed
    given = bool(results.settings.adapters) and sets_of is adapter_sets
    for seed in seeds:
        for method, adapters in sets_of(results, seed).items():
            if not given:
                yield seed, method, adapters
            elif seed == seeds[0] or method != GIVEN:
                yield seeds[0], method, adapters


def overlaps(
    results: Results,
    sets_of: Callable[[Results, int], dict] = adapter_sets,
    measures: Sequence[str] = MEASURES,
) -> pd.DataFrame:
    """Overlap of every pair of tasks' adapters, module by module.

    Args:
        sets_of: :func:`adapter_sets` or :func:`choice_sets`.
        measures: names of registered measures.

    Columns method (or the null of one), seed (of adapters from elsewhere always the first), adapter_a and adapter_b
    (tasks), module, measure, value.
    """
    frames = [
        overlap_table(adapters, measures).assign(method=method, seed=seed)
        for seed, method, adapters in _counted(results, sets_of)
    ]
    columns = ["method", "seed", "adapter_a", "adapter_b", "module", "measure", "value"]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def overlap_means(overlaps: pd.DataFrame, measure: str) -> pd.DataFrame:
    """One measure's mean magnitude over modules and seeds: method, adapter_a, adapter_b (tasks), value."""
    chosen = overlaps[overlaps["measure"] == measure]
    pairs = chosen.assign(value=chosen["value"].abs()).groupby(["method", "adapter_a", "adapter_b"], sort=False)
    return pairs["value"].mean().reset_index()


def overlap_matrix(overlaps: pd.DataFrame, method: str, measure: str) -> pd.DataFrame:
    """Task × task, the values of :func:`overlap_means`; the diagonal, 1 by definition, is left empty."""
    means = overlap_means(overlaps[overlaps["method"] == method], measure)
    tasks = list(dict.fromkeys([*means["adapter_a"], *means["adapter_b"]]))
    matrix = pd.DataFrame(np.nan, index=tasks, columns=tasks)
    for a, b, value in means[["adapter_a", "adapter_b", "value"]].itertuples(index=False):
        matrix.loc[a, b] = matrix.loc[b, a] = value
    return matrix


def overlap_places(overlaps: pd.DataFrame) -> pd.DataFrame:
    """Mean magnitude over pairs of tasks and seeds by method, measure, layer and kind of module: ``value``, and
    ``null``, that of the method's null.
    """
    magnitudes = with_places(overlaps).assign(value=overlaps["value"].abs())
    keys = ["method", "measure", "layer", "kind"]
    means = magnitudes.groupby(keys, sort=False, dropna=False)["value"].mean().reset_index()
    of_null = {null_of(method): method for method in means["method"]}
    chance = means[means["method"].isin(of_null)].rename(columns={"value": "null"})
    return means.merge(chance.assign(method=chance["method"].map(of_null)), on=keys)


def mask_overlaps(every: pd.DataFrame, results: Results) -> pd.DataFrame:
    """:func:`overlap_summary` of the share of a mask's entries that another task's has too, of methods with masks and
    of their nulls, the same rows of B in other places. Empty without such a method.

    Args:
        every: of :func:`overlaps`, "mask_overlap" among its measures.
    """
    masked = [name for name in results.settings.method if get_method(name).masked]
    found = every[every["measure"] == "mask_overlap"]
    return overlap_summary(found[found["method"].isin([*masked, *map(null_of, masked)])])


def overlap_summary(overlaps: pd.DataFrame) -> pd.DataFrame:
    """Mean magnitude over modules and pairs of tasks, method × measure, with its interval.

    The t interval is over seeds, or with one seed over pairs of tasks; pairs share tasks, so that one is rough. Of
    adapters from elsewhere over pairs of them: no seed made them (``seeds`` 0).
    """
    given, seeds = GIVEN in set(overlaps["method"]), overlaps["seed"].nunique()
    pairs = "pairs of adapters" if given else "pairs of tasks"
    unit, of = (["seed"], "seeds") if seeds > 1 else (["adapter_a", "adapter_b"], pairs)
    rows = []
    for key, part in overlaps.groupby(["method", "measure"], sort=False):
        values = part["value"].abs().groupby([part[name] for name in unit]).mean().dropna()
        if len(values):
            rows.append(dict(zip(("method", "measure"), key, strict=True)) | as_columns(t_interval(values), of))
    columns = ["method", "measure", "value", "low", "high", "n", "of"]
    return pd.DataFrame(rows, columns=columns).assign(seeds=0 if given else seeds)


def overlap_lines(overlaps: pd.DataFrame) -> list[str]:
    """One sentence a measure: every method's mean overlap beside its null's."""
    return summary_lines(overlap_summary(overlaps))


def summary_lines(summary: pd.DataFrame) -> list[str]:
    """:func:`overlap_lines` of a table of :func:`overlap_summary`."""
    table = summary.pivot(index="measure", columns="method", values="value")
    methods = [name for name in table.columns if null_of(name) in table.columns]
    return [
        f"{measure.replace('_', ' ')}: "
        + ", ".join(f"{title_of(m)} {100 * row[m]:.2f} % (by chance {100 * row[null_of(m)]:.2f} %)" for m in methods)
        + "."
        for measure, row in table.iterrows()
    ]


def frozen_A_line(results: Results) -> str:
    """Whether every LoRI adapter's A still is, bit for bit, what its seed makes, in one sentence."""
    adapters = [run.adapter for run in trained_runs(results) if run.adapter.frozen_A]
    if not adapters:
        return "No LoRI adapter was trained here, whose A would have to be its random draw."
    drawn = [
        torch.equal(f.A, A) for a in adapters for f, A in zip(a.factors.values(), drawn_A(a).values(), strict=True)
    ]
    return f"A of every LoRI adapter still is its random draw: {all(drawn)}"


def angle_spectra(results: Results) -> pd.DataFrame:
    """Principal angles between tasks, sorted.

    Columns method, side ("A": row spaces, "B": column spaces), index (1 the smallest), degrees, low, high.
    ``degrees`` is the median over pairs of tasks, modules and seeds, ``low`` and ``high`` are its quartiles.
    """
    frames = [angles_between(adapters).assign(method=method) for _, method, adapters in _counted(results, adapter_sets)]
    return quartiles(pd.concat(frames, ignore_index=True), ["method", "side", "index"])


def angles_between(adapters: Mapping[str, Mapping[str, Factors]]) -> pd.DataFrame:
    """Principal angles of every pair of adapters, in every module of both: columns side, index, ``angle`` (degrees)."""
    rows = []
    for _, _, _, pair in met(adapters):
        for side, angles in (("A", pair.row_angles), ("B", pair.column_angles)):
            rows += [(side, place, angle) for place, angle in enumerate(np.degrees(angles.numpy()), 1)]
    return pd.DataFrame(rows, columns=["side", "index", "angle"])


def similarity_between(adapters: Mapping[str, Mapping[str, Factors]]) -> pd.DataFrame:
    """φ(i, j) of :func:`~lori_nb.analysis.interference.similarity_curve`: columns side, i, j and ``value``, the mean
    over the pairs and modules with so many directions. j counts those of the adapter that comes second.
    """
    most = max(len(f.A) for modules in adapters.values() for f in modules.values())
    sums, counts = (np.zeros((len(SIDES), most, most)) for _ in range(2))
    for _, _, _, pair in met(adapters):
        for place, side in enumerate(("rows", "columns")):
            curve = similarity_curve(pair.f, pair.g, side).numpy()
            where = (place, *map(slice, curve.shape))
            sums[where] += curve
            counts[where] += 1
    known = np.argwhere(counts)
    table = pd.DataFrame(known + [0, 1, 1], columns=["side", "i", "j"])
    return table.assign(side=table["side"].map(dict(enumerate(SIDES))), value=sums[counts > 0] / counts[counts > 0])


def quartiles(angles: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Median ``degrees`` and quartiles ``low`` and ``high`` of angles, by some keys."""
    found = angles.groupby(keys, sort=False)["angle"].quantile([0.25, 0.5, 0.75]).unstack()
    return found.set_axis(["low", "degrees", "high"], axis=1).reset_index()

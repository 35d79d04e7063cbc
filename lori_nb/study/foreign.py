"""Interference between adapters that were trained anywhere: tables and figures from their factors alone.

Every number stands beside its null: what random adapters of the same shapes and spectra have, with independent rows
("independent") or with each adapter's own A ("given", where A was frozen at a draw that is to be in the null too).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure

from lori_nb.analysis.interference import ALL, ELEMENTWISE
from lori_nb.analysis.nulls import TOTAL, by_pair, expected, norms, null_draws, null_set, where_defined
from lori_nb.analysis.overlap import overlap_table
from lori_nb.lab.laboratory import check_fit
from lori_nb.lab.models import load_base
from lori_nb.lab.paths import write_atomically
from lori_nb.lab.provenance import kit_version
from lori_nb.method.adapters import Factors, layer_number
from lori_nb.study import figures, functional, layouts, style
from lori_nb.study.geometry import (
    SIDES,
    angles_between,
    null_rows,
    overlap_matrix,
    quartiles,
    similarity_between,
    with_places,
)
from lori_nb.study.settings import NULLS

Adapters = Mapping[str, Mapping[str, Factors]]
MOVED = "‖ΔWⱼ x‖ / ‖ΔWᵢ x‖"
MAPPED = {"cosine_size": "|cosine| of ΔW"} | {
    name: figures.MEASURE_LABELS[name] for name in ("row_overlap", "column_overlap")
}  # what the figures show
BESIDE = 7  # adapters that a heat map of half a page's width has room for
PAIR = ["adapter_a", "adapter_b", "measure"]
ABOUT = "about.json"
FUNCTIONAL = "functional"  # its table and figure are there where activations were asked for
TABLES = ("modules", "layers", "kinds", "pairs", "angles", "similarity", FUNCTIONAL)
PRINTED = ("layers", "kinds", "pairs", "angles", FUNCTIONAL)  # the others have thousands of rows


@dataclass(frozen=True)
class Activations:
    """Whose activations adapters move: those of a base model on the first test rows of each adapter's own task.

    Attributes:
        base: a name or hub id, the model that the adapters are for.
        tasks: adapter → task.
        rows: of each task.
    """

    base: str
    tasks: Mapping[str, str]
    rows: int = functional.ROWS


@dataclass(frozen=True)
class Interference:
    """What was measured of some adapters.

    Attributes:
        modules: one row a pair, module and measure: ``value``, and the null's ``null``, ``null_low`` and ``null_high``
            (one more random draw would lie between with 95 %).
        layers, kinds: the same by layer and by kind of module ("q_proj"): the mean over the modules there; of inner
            products the sum, and "total_cosine", the cosine of these modules' updates side by side.
        pairs: the same over all modules of both, with the ``excess`` over the null.
        angles: principal angles in degrees, sorted: median and quartiles over pairs and modules, of the adapters and of
            the null.
        similarity: φ(i, j) of :func:`~lori_nb.analysis.interference.similarity_curve`, mean over pairs and modules, of
            the adapters and of the null.
        functional: ‖ΔW_j x‖ / ‖ΔW_i x‖ on the activations x of adapter i's task, ``task`` the name of i, ``adapter``
            that of j: ``value`` and ``null``, means over modules. Empty where no activations were asked for.
        settings: how the null was drawn, and whose activations were moved.
        notes: what was left out, a sentence each.
    """

    modules: pd.DataFrame
    layers: pd.DataFrame
    kinds: pd.DataFrame
    pairs: pd.DataFrame
    angles: pd.DataFrame
    similarity: pd.DataFrame
    functional: pd.DataFrame
    settings: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def measured(
    adapters: Adapters,
    *,
    null: str = "independent",
    draws: int = 8,
    seed: int = 0,
    elementwise: bool = False,
    activations: Activations | None = None,
) -> Interference:
    """Every measure of every pair, beside the null.

    Args:
        elementwise: also signs and magnitudes of the entries of ΔW, which need it dense, one module at a time.
        activations: also what each adapter does to the others' activations.

    Raises:
        ValueError: fewer than two adapters, an unknown null, fewer than two draws of it, adapters without a module in
            common, one that is zero in every module, a base that lacks an adapter's modules, or what
            :func:`~lori_nb.analysis.overlap.overlap_table` refuses.
    """
    if null not in NULLS:
        raise ValueError(f"null must be one of {', '.join(NULLS)}; found {null!r}")
    if draws < 2:
        raise ValueError(f"draws must be at least 2, between which limits lie; found {draws}")
    sizes = norms(adapters)
    for name, of_modules in sizes.items():
        if not any(of_modules.values()):
            raise ValueError(f"adapters must be trained; found {name!r} with ΔW = 0 in every module")
    inside, outside = _in_layers(adapters) if activations else (adapters, [])
    for name, modules in inside.items() if activations else ():  # before the null, which takes longest
        if not modules:
            raise ValueError(f"adapters must have modules in layers to move activations; found none of {name!r}")
        check_fit(activations.base, modules)
    measures = [name for name in ALL if elementwise or name not in ELEMENTWISE]
    table = overlap_table(adapters, measures)
    if table.empty:
        raise ValueError("adapters must have at least one module in common; found none")
    own = null_rows(adapters, null)
    chance = null_draws(adapters, draws, seed, measures, own)
    keys = [*PAIR, "module"]
    modules = table.merge(expected(chance, keys), on=keys)
    both = where_defined(table, chance)
    pairs = _beside(*both, sizes)
    counts = both[0].groupby(PAIR, sort=False)["value"].count().rename("modules").reset_index()
    pairs = pairs.assign(excess=pairs["value"] - pairs["null"]).merge(counts, on=PAIR, how="left")
    places = {place: _beside(*map(with_places, both), sizes, [place]) for place in ("layer", "kind")}
    random = null_set(adapters, torch.Generator().manual_seed(seed), own)
    sets = {"adapters": adapters, "random": random}
    angles, similarity = (
        pd.concat([of(each).assign(method=name) for name, each in sets.items()], ignore_index=True)
        for of in (angles_between, similarity_between)
    )
    return Interference(
        modules,
        places["layer"].astype({"layer": int}),
        places["kind"],
        pairs,
        quartiles(angles, ["method", "side", "index"]),
        similarity,
        _on_activations(inside, random, activations),
        {"null": null, "draws": draws, "seed": seed, "elementwise": elementwise}
        | ({} if activations is None else {"activations": asdict(activations)}),
        (f"modules outside layers are left out on activations ({', '.join(outside)})",) if outside else (),
    )


def _in_layers(adapters: Adapters) -> tuple[dict[str, dict[str, Factors]], list[str]]:
    """(the adapters' modules in layers, the names of all others: embeddings, which take no activations, and heads)."""
    inside = {
        name: {module: f for module, f in modules.items() if layer_number(module) is not None}
        for name, modules in adapters.items()
    }
    return inside, sorted(
        {module for name, modules in adapters.items() for module in modules if module not in inside[name]}
    )


def _on_activations(adapters: Adapters, random: Adapters, activations: Activations | None) -> pd.DataFrame:
    if activations is None:
        return pd.DataFrame(columns=["task", "adapter", "value", "null"])
    base, null = load_base(activations.base), _in_layers(random)[0]
    found = functional.functional_of(base, adapters, null, activations.rows, activations.tasks)
    return found.groupby(["task", "adapter"], sort=False)[["value", "null"]].mean().reset_index()


def _beside(
    table: pd.DataFrame, draws: pd.DataFrame, sizes: Mapping[str, Mapping[str, float]], by: Sequence[str] = ()
) -> pd.DataFrame:
    """:func:`~lori_nb.analysis.nulls.by_pair` beside what the null's draws give; outside layers there is no "layer"."""
    keys = [*PAIR, *by]
    return by_pair(table, sizes, by).merge(expected(by_pair(draws, sizes, [*by, "draw"]), keys), on=keys)


def by_place(modules: pd.DataFrame, measure: str) -> pd.DataFrame:
    """One measure by layer (NaN outside layers) and kind of module, mean over pairs: its value and its null."""
    table = with_places(modules[modules["measure"] == measure])
    return table.groupby(["layer", "kind"], sort=False, dropna=False)[["value", "null"]].mean().reset_index()


def maps(found: Interference, names: Sequence[str], measure: str) -> Figure:
    """A heat map with values of one measure, pair by pair, beside its null; below it where there are many adapters."""
    columns = 2 if len(names) <= BESIDE else 1
    figure, axes = figures.panels(2, columns=columns, height=0.7 + 0.3 * len(names))
    matrices = {
        title: overlap_matrix(found.pairs.assign(method="", value=found.pairs[column]), "", measure).reindex(
            index=names, columns=names
        )
        for title, column in ((MAPPED[measure], "value"), ("null", "null"))
    }
    figures.heat_maps(axes, matrices, "", ".3f")
    return figure


def spectra(found: Interference) -> Figure:
    """Principal angles of both sides beside the null's."""
    return layouts.angles(found.angles)


def places(found: Interference) -> Figure:
    """Interference by depth, a line a kind of module; dotted, in its colour, the null of that kind."""
    figure, axes = figures.panels(len(MAPPED), columns=1, height=2.1)
    for ax, (measure, label) in zip(axes, MAPPED.items(), strict=True):
        figures.by_depth(ax, by_place(found.modules, measure)).set_ylabel(label)
    figures.shared_legend(figure)
    return figure


def similarity(found: Interference) -> Figure:
    """φ(i, j) for all i and j of both sides, in colours from 0 to 1, beside the null's."""
    figure, axes = figures.panels(2 * len(SIDES), columns=2, height=2.4)
    shown = [(side, method) for side in SIDES for method in ("adapters", "random")]
    for ax, (side, method) in zip(axes, shown, strict=True):
        part = found.similarity[(found.similarity["side"] == side) & (found.similarity["method"] == method)]
        figures.similarity(ax, part).set_title(SIDES[side] if method == "adapters" else "null")
    figure.colorbar(axes[0].images[0], ax=axes, label="φ(i, j)")
    return figure


def moved(found: Interference) -> Figure:
    """Whose activations each adapter moves how far, beside the null."""
    names = found.functional["task"].nunique()
    figure, axes = figures.panels(2, columns=2 if names <= BESIDE else 1, height=0.9 + 0.3 * names)
    columns = {MOVED: "value", "null": "null"}
    matrices = {title: functional.functional_matrix(found.functional, each) for title, each in columns.items()}
    figures.heat_maps(axes, matrices, "")
    figure.supxlabel("adapter j", fontsize=9)
    figure.supylabel("activations of i's task", fontsize=9)
    return figure


def check_report_folder(folder: Path, sources: Mapping[str, str]) -> Path:
    """The folder; ValueError where it holds something else than the report of the same adapters."""
    held = folder / ABOUT
    same = held.is_file() and json.loads(held.read_text()).get("adapters") == dict(sources)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not same):
        raise ValueError(
            f"out must be new, empty, or hold the report of these adapters; found {folder} with other files"
        )
    return folder


def write_report(
    found: Interference, sources: Mapping[str, str], folder: Path, notes: Sequence[str] = (), command: str = ""
) -> list[Path]:
    """Tables as CSV and Parquet, those that fit a page as LaTeX too, figures, and about.json; returns the files. What
    an earlier report had beside is removed.

    Args:
        sources: adapter → the SHA-256 of its file, in the order of rows and columns.
        notes: what the adapters do not share, a sentence each; those of ``found`` follow.
        command: what makes the report again.
    """
    check_report_folder(folder, sources)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{FUNCTIONAL}.*"):  # all others are written each time
        path.unlink()
    about = {"adapters": dict(sources), **found.settings, "notes": [*notes, *found.notes]}
    about |= {"version": kit_version(), "command": command}
    contents: dict[str, str | bytes] = {ABOUT: json.dumps(about, indent=1)}
    for stem in TABLES:
        table: pd.DataFrame = getattr(found, stem)
        if table.empty:
            continue
        contents |= {f"{stem}.csv": table.to_csv(index=False), f"{stem}.parquet": table.to_parquet(index=False)}
        if stem in PRINTED:
            contents[f"{stem}.tex"] = table.to_latex(index=False, float_format="%.4f", escape=True)
    paths = []
    for name, content in contents.items():
        paths.append(folder / name)
        write_atomically(paths[-1], content)
    style.use()
    drawn = {
        f"map_{measure}": (f"{label}, pair by pair, beside the null", maps(found, list(sources), measure))
        for measure, label in MAPPED.items()
    }
    drawn |= {
        "spectra": ("Principal angles between adapters, beside the null", spectra(found)),
        "similarity": ("Subspace similarity of adapters, beside the null", similarity(found)),
        "depth": ("Interference between adapters by layer and kind of module", places(found)),
    }
    if len(found.functional):
        drawn[FUNCTIONAL] = "What adapters do to each other's activations, beside the null", moved(found)
    for stem, (title, figure) in drawn.items():
        paths += style.save(figure, folder, stem, {"title": title, "provenance": json.dumps(about)})
        plt.close(figure)
    return paths


def lines(found: Interference) -> list[str]:
    """One line a pair: the cosine of the whole updates and the overlaps, each beside what chance gives; then one an
    ordered pair whose activations were looked at.
    """
    shown = {TOTAL: "cosine", "row_overlap": "row overlap", "column_overlap": "column overlap"}
    wide = found.pairs.set_index(PAIR)
    out = []
    for a, b in found.pairs.loc[found.pairs["measure"] == TOTAL, PAIR[:2]].itertuples(index=False):
        rows = {label: wide.loc[(a, b, name)] for name, label in shown.items()}
        parts = [f"{label} {r.value:.4f} (null {r.null_low:.4f} to {r.null_high:.4f})" for label, r in rows.items()]
        out.append(f"{a} · {b}: " + ", ".join(parts))
    out += [
        f"{row.task}'s activations: {row.adapter} moves them {row.value:.2f} times as far as {row.task} does "
        f"(null {row.null:.2f})"
        for row in found.functional.itertuples()
    ]
    return out

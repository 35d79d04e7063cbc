"""Interference between adapters that were trained anywhere: tables and figures from their factors alone.

Every number stands beside its null: what random adapters of the same shapes and spectra have, with independent rows
("independent") or with each adapter's own A ("given", where A was frozen at a draw that is to be in the null too).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lori_nb.analysis.interference import ALL, ELEMENTWISE
from lori_nb.analysis.nulls import mean_over_modules, null_set, null_table
from lori_nb.analysis.overlap import overlap_table, principal_angles, total_cosine
from lori_nb.lab.paths import write_atomically
from lori_nb.method.adapters import Factors, layer_number
from lori_nb.study import figures, style
from lori_nb.study.geometry import module_kinds
from lori_nb.study.style import GREY

Adapters = Mapping[str, Mapping[str, Factors]]
NULLS = ("independent", "given")
MAPPED = ("cosine", "row_overlap", "column_overlap")  # those that a heat map shows
KEYS = ["adapter_a", "adapter_b", "measure"]


@dataclass(frozen=True)
class Interference:
    """What was measured of some adapters.

    Attributes:
        modules: one row a pair, module and measure, as :func:`~lori_nb.analysis.overlap.overlap_table` gives them.
        pairs: one row a pair and measure: ``value`` (mean over modules), ``null`` with ``null_low`` and ``null_high``
            (95 % of ``draws``), ``excess`` over the null, and the number of ``modules``.
        angles: principal angles in degrees, sorted: median and quartiles over pairs and modules, of the adapters and of
            the null.
    """

    modules: pd.DataFrame
    pairs: pd.DataFrame
    angles: pd.DataFrame


def measured(
    adapters: Adapters, *, null: str = "independent", draws: int = 8, seed: int = 0, elementwise: bool = False
) -> Interference:
    """Every measure of every pair, beside the null.

    Args:
        elementwise: also signs and magnitudes of the entries of ΔW, which need it dense, one module at a time.

    Raises:
        ValueError: fewer than two adapters, an unknown null, adapters without a module in common, or what
            :func:`~lori_nb.analysis.overlap.overlap_table` refuses.
    """
    if null not in NULLS:
        raise ValueError(f"null must be one of {', '.join(NULLS)}; found {null!r}")
    measures = [name for name in ALL if elementwise or name not in ELEMENTWISE]
    modules = overlap_table(adapters, measures)
    if modules.empty:
        raise ValueError("adapters must have at least one module in common; found none")
    own = (
        {name: {m: f.A for m, f in factors.items()} for name, factors in adapters.items()} if null == "given" else None
    )
    chance = null_table(adapters, draws, seed, measures, own)
    pairs = mean_over_modules(modules).merge(chance, on=KEYS)
    counts = modules.groupby(KEYS, sort=False)["module"].count().rename("modules").reset_index()
    whole = [
        (a, b, "total_cosine", total_cosine(adapters[a], adapters[b])) for a, b in itertools.combinations(adapters, 2)
    ]
    pairs = pairs.assign(excess=pairs["value"] - pairs["null"]).merge(counts, on=KEYS)
    pairs = pd.concat([pairs, pd.DataFrame(whole, columns=[*KEYS, "value"])], ignore_index=True)
    spectra = [("adapters", adapters), ("random", null_set(adapters, torch.Generator().manual_seed(seed), own))]
    return Interference(modules, pairs, pd.concat([_angles(each).assign(method=name) for name, each in spectra]))


def _angles(adapters: Adapters) -> pd.DataFrame:
    rows = []
    for f, g in itertools.combinations(adapters.values(), 2):
        for module in f.keys() & g.keys():
            for side, X, Y in (("A", f[module].A.T, g[module].A.T), ("B", f[module].B, g[module].B)):
                degrees = np.degrees(principal_angles(X, Y).numpy())
                rows += [(side, place, angle) for place, angle in enumerate(degrees, 1)]
    grouped = pd.DataFrame(rows, columns=["side", "index", "angle"]).groupby(["side", "index"])["angle"]
    return grouped.quantile([0.25, 0.5, 0.75]).unstack().set_axis(["low", "degrees", "high"], axis=1).reset_index()


def matrix_of(pairs: pd.DataFrame, measure: str, names: Sequence[str], column: str = "value") -> pd.DataFrame:
    """Adapter × adapter of one measure; the diagonal is left empty."""
    matrix = pd.DataFrame(np.nan, index=list(names), columns=list(names))
    for row in pairs[pairs["measure"] == measure].itertuples():
        matrix.loc[row.adapter_a, row.adapter_b] = matrix.loc[row.adapter_b, row.adapter_a] = getattr(row, column)
    return matrix


def by_place(modules: pd.DataFrame, measure: str) -> pd.DataFrame:
    """One measure by layer and kind of module: mean magnitude over pairs. Columns layer (NaN outside layers), kind,
    value.
    """
    chosen = modules[modules["measure"] == measure]
    kinds = module_kinds(dict.fromkeys(chosen["module"]))
    layers = [np.nan if (n := layer_number(f".{name}")) is None else n for name in chosen["module"]]
    table = chosen.assign(layer=layers, kind=chosen["module"].map(kinds), value=chosen["value"].abs())
    return table.groupby(["layer", "kind"], sort=False, dropna=False)["value"].mean().reset_index()


def maps(found: Interference, names: Sequence[str]) -> Figure:
    """Heat maps with values: each measure beside its null, pair by pair."""
    figure, axes = figures.panels(2 * len(MAPPED), columns=2, height=0.7 + 0.3 * len(names))
    magnitudes = found.pairs.assign(value=found.pairs["value"].abs(), null=found.pairs["null"].abs())
    for place, measure in enumerate(MAPPED):
        shown = axes[2 * place : 2 * place + 2]
        matrices = {
            figures.MEASURE_LABELS[measure]: matrix_of(magnitudes, measure, names),
            "null": matrix_of(magnitudes, measure, names, "null"),
        }
        figures.heat_maps(shown, matrices, "", ".3f")
        for ax in shown if place + 1 < len(MAPPED) else ():
            ax.tick_params(bottom=False, labelbottom=False)
    return figure


def spectra(found: Interference) -> Figure:
    """Principal angles of both sides beside the null's."""
    figure, axes = figures.panels(2)
    for ax, (side, title) in zip(
        axes, {"A": "rows of A (what is read)", "B": "columns of B (what is written)"}.items(), strict=True
    ):
        figures.spectra(ax, found.angles[found.angles["side"] == side]).set_title(title)
        ax.set_ylabel("angle between adapters (degrees)")
    figures.shared_legend(figure)
    return figure


def places(found: Interference) -> Figure:
    """Interference by depth, a line a kind of module."""
    figure, axes = figures.panels(len(MAPPED), columns=1, height=2.1)
    for ax, measure in zip(axes, MAPPED, strict=True):
        by_depth(ax, by_place(found.modules, measure)).set_ylabel(figures.MEASURE_LABELS[measure])
        chance = found.pairs[found.pairs["measure"] == measure]["null"].abs().mean()
        ax.axhline(chance, color=GREY, linestyle=":", label="null")
    figures.shared_legend(figure)
    return figure


def by_depth(ax: Axes, table: pd.DataFrame) -> Axes:
    """A line a kind of module over the layers of :func:`by_place`."""
    looks = style.looks_of(table["kind"].unique())
    for kind, part in table.dropna(subset="layer").sort_values("layer").groupby("kind", sort=False):
        ax.plot(part["layer"], part["value"], label=kind, markersize=4, **looks[kind])
    ax.set_xlabel("layer")
    return ax


def write_report(found: Interference, names: Sequence[str], folder: Path) -> list[Path]:
    """Tables as CSV, Parquet and LaTeX, and figures; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for stem, table in (("modules", found.modules), ("pairs", found.pairs), ("angles", found.angles)):
        contents = {"csv": table.to_csv(index=False), "parquet": table.to_parquet(index=False)}
        if stem == "pairs":
            contents["tex"] = table.to_latex(index=False, float_format="%.4f", escape=True)
        for ending, content in contents.items():
            paths.append(folder / f"{stem}.{ending}")
            write_atomically(paths[-1], content)
    style.use()
    drawn = {
        "maps": ("Interference between adapters, pair by pair, beside the null", maps(found, names)),
        "spectra": ("Principal angles between adapters, beside the null", spectra(found)),
        "depth": ("Interference between adapters by layer and kind of module", places(found)),
    }
    for stem, (title, figure) in drawn.items():
        paths += style.save(figure, folder, stem, {"title": title, "provenance": f"adapters {', '.join(names)}"})
        plt.close(figure)
    return paths


def lines(found: Interference) -> list[str]:
    """One line a pair: the cosine of the whole updates and the overlaps, each beside what chance gives."""
    wide = found.pairs.set_index(KEYS)
    out = []
    for a, b in dict.fromkeys(zip(found.pairs["adapter_a"], found.pairs["adapter_b"], strict=True)):
        if (a, b, "total_cosine") not in wide.index:
            continue  # the other direction of a pair
        parts = [f"cosine {wide.loc[(a, b, 'total_cosine'), 'value']:+.4f}"]
        for name in ("row_overlap", "column_overlap"):
            row = wide.loc[(a, b, name)]
            parts.append(f"{name.replace('_', ' ')} {row['value']:.4f} (null {row['null']:.4f})")
        out.append(f"{a} · {b}: " + ", ".join(parts))
    return out

"""Plots: each function takes a matplotlib ``Axes`` and a tidy table, draws, and returns the ``Axes``.

Tables come from :mod:`lori_nb.study.questions` and :mod:`lori_nb.study.geometry`; bars at points are 95 % intervals.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from lori_nb.analysis.statistics import interval_text
from lori_nb.study.style import GREY, WIDTH, is_null, look_of, looks_of, title_in, title_of
from lori_nb.study.summary import SHARES, n_text

METRIC_LABELS = {
    "exact_match": "exact match (share)",
    "accuracy": "accuracy (share)",
    "balanced_accuracy": "balanced accuracy (share)",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "mean of metrics": "mean score over tasks",
}
MEASURE_LABELS = {
    "cosine": "|cosine| of ΔW",
    "row_overlap": "overlap of A's row spaces",
    "column_overlap": "overlap of B's column spaces",
}
LONG = 14  # letters of a name that has one line beside a heat map
MEASURE_FORMS = {"cosine": ".2f", "row_overlap": ".1f", "column_overlap": ".1f"}  # of percents in heat maps


def panels(count: int, columns: int | None = None, height: float = 2.5) -> tuple[Figure, list[Axes]]:
    """A figure as wide as a page with ``count`` axes, each row ``height`` inches high.

    Two columns, or three where they fill the rows, unless ``columns`` says otherwise.
    """
    columns = min(columns or (2 if count % 3 else 3), count)
    rows = math.ceil(count / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(WIDTH, height * rows + 0.4), squeeze=False, layout="constrained"
    )
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def shared_legend(figure: Figure) -> None:
    """One legend below all axes, every label once."""
    found: dict[str, object] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    for columns in range(min(4, len(found)), 0, -1):
        legend = figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()


def metric_label(metrics: Iterable[str]) -> str:
    """Axis label with units for one metric, or for scores of several."""
    metrics = set(metrics)
    return METRIC_LABELS.get(name := metrics.pop(), name) if len(metrics) == 1 else "score (each task's own metric)"


def points(
    ax: Axes,
    x: Sequence[float],
    part: pd.DataFrame,
    name: str,
    label: str | None = None,
    line: bool = True,
    look: Mapping[str, object] | None = None,
) -> Axes:
    """One series with its intervals, in the look of ``name`` unless one is given."""
    look = dict(look or look_of(name))
    if not line:
        look["linestyle"] = "none"
    reach = np.array([part["value"] - part["low"], part["high"] - part["value"]])
    ax.errorbar(
        x,
        part["value"],
        yerr=np.nan_to_num(reach).clip(0),
        capsize=2.5,
        elinewidth=1,
        label=label or title_of(name),
        **look,
    )
    return ax


def score_limits(ax: Axes, metrics: Iterable[str]) -> Axes:
    """Shares from 0 to 1 with room for markers; correlations keep their own range below 0."""
    metrics = set(metrics)
    low = -0.03 if metrics <= SHARES else max(-1.03, min(-0.03, ax.get_ylim()[0] - 0.05))
    ax.set_ylim(low, 1.03)
    return ax


def score_against_parameters(
    ax: Axes, scores: pd.DataFrame, majority: float, few_shot: float = math.nan, shots: int = 0
) -> Axes:
    """A task's score of every method against its trainable parameters (log), beside the two references.

    Args:
        scores: one row a method of :func:`questions.method_scores`, of one task.
        majority: score of the most frequent answer, a line.
        few_shot: score of the base shown ``shots`` examples, a line; NaN for an encoder.
    """
    for method, part in scores.groupby("method", sort=False):
        points(ax, part["trainable_parameters"], part, method, line=False)
    ax.axhline(majority, color=GREY, linestyle=":", linewidth=1.2, label="most frequent answer")
    if not math.isnan(few_shot):
        ax.axhline(few_shot, color=GREY, linestyle="--", linewidth=1.2, label=f"base with {shots} examples")
    ax.set_xscale("log")
    sizes = scores["trainable_parameters"]
    ax.set_xlim(sizes.min() / 2, sizes.max() * 2)
    ax.set(xlabel="trainable parameters (log)", ylabel=metric_label(scores["metric"]))
    ax.set_title(f"{scores['task'].iloc[0]} ({n_text(scores)})")
    return score_limits(ax, scores["metric"])


def score_against_sparsity(ax: Axes, scores: pd.DataFrame) -> Axes:
    """A task's score at every sparsity; the axis is the share of B that is trained (log, from dense to sparse)."""
    kept = 1 - scores["sparsity"]
    for method, part in (("lori-d", scores[kept == 1]), ("lori-s", scores[kept < 1])):  # each at its own rate
        if len(part):
            points(ax, kept[part.index], part, method)
    ax.set_xscale("log")
    ax.set_xlim(kept.max() * 1.4, kept.min() / 1.4)
    ax.xaxis.set_major_locator(FixedLocator(kept.tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(kept.tolist(), [f"{100 * share:g} %" for share in kept.round(6)])
    ax.set(
        xlabel="share of B trained (log)",
        ylabel=metric_label(scores["metric"]),
    )
    ax.set_title(f"{scores['task'].iloc[0]} ({n_text(scores)})")
    return score_limits(ax, scores["metric"])


def score_against_weight(ax: Axes, merged: pd.DataFrame, alone: pd.DataFrame) -> Axes:
    """Mean score of one way to merge against the weight, a line a method; thin level lines are the adapters alone."""
    if merged.empty:
        return nothing(ax)
    for method, aside in places_aside(merged).items():
        part = merged[merged["method"] == method].sort_values("weight")
        points(ax, part["weight"] + aside, part, method)
        look = {key: look_of(method)[key] for key in ("color", "linestyle")}
        for level in alone.loc[alone["method"] == method, "value"]:
            ax.axhline(level, linewidth=0.8, alpha=0.8, **look)
    ax.plot([], [], color=GREY, linewidth=0.8, label="thin: adapters alone")
    ax.set(xlabel="weight of each adapter", ylabel=metric_label(merged["metric"]))
    ax.set_title(f"merge: {merged['merge'].iloc[0]} ({n_text(merged)})")
    return score_limits(ax, merged["metric"])


def places_aside(merged: pd.DataFrame) -> dict[str, float]:
    """Method → how far aside of the weight it is drawn, so that intervals do not hide each other."""
    methods = list(dict.fromkeys(merged["method"]))
    step = 0.012 * (np.ptp(merged["weight"]) or 1.0)
    return {method: step * (number - (len(methods) - 1) / 2) for number, method in enumerate(methods)}


def nothing(ax: Axes, why: str = "not measured") -> Axes:
    """Empty axes that say so."""
    ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", va="center", color=GREY, wrap=True)
    ax.set_axis_off()
    return ax


def grouped_points(ax: Axes, table: pd.DataFrame, category: str, series: str, ylabel: str) -> Axes:
    """Points with intervals, one place a ``category``, the ``series`` side by side in it."""
    places = {name: place for place, name in enumerate(dict.fromkeys(table[category]))}
    names = list(dict.fromkeys(table[series]))
    for number, name in enumerate(names):
        part = table[table[series] == name]
        x = part[category].map(places) + 0.6 * ((number + 0.5) / len(names) - 0.5)
        points(ax, x, part, name, label=title_in(series, name), line=False)
    ax.set_xticks(list(places.values()), [str(name).replace("_", "_\u200b") for name in places])
    ax.set_xlim(-0.5, len(places) - 0.5)
    ax.grid(axis="x", visible=False)
    for edge in range(1, len(places)):
        ax.axvline(edge - 0.5, color="#DDDDDD", linewidth=0.8)
    ax.set_ylabel(ylabel)
    return ax


def heat_map(ax: Axes, matrix: pd.DataFrame, limits: tuple[float, float], form: str = ".2f") -> Axes:
    """A matrix with its numbers in the cells, in colours that colour-blind eyes can order, two of them around 0 where
    the limits are; missing cells stay empty.
    """
    values = matrix.to_numpy(dtype=float)
    image = ax.imshow(
        values, cmap="PuOr" if limits[0] == -limits[1] else "cividis", vmin=limits[0], vmax=limits[1], aspect="auto"
    )
    size = min(8, 140 / len(matrix.columns))  # points: numbers of a map as wide as a page do not touch
    for (i, j), value in np.ndenumerate(values):
        if not math.isnan(value):
            r, g, b, _ = image.cmap(image.norm(value))
            ink = "black" if 0.299 * r + 0.587 * g + 0.114 * b > 0.5 else "white"  # by the luminance of the cell
            ax.text(j, i, format(value, form), ha="center", va="center", color=ink, fontsize=size)
    columns, rows = ([_in_two(str(name)) for name in names] for names in (matrix.columns, matrix.index))
    ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor", linespacing=0.9)
    ax.set_yticks(range(len(rows)), rows, linespacing=0.9)
    ax.set(xlabel=matrix.columns.name or "", ylabel=matrix.index.name or "")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return ax


def _in_two(name: str) -> str:
    """A long name in two lines, broken after the underscore nearest to its middle."""
    places = [i + 1 for i, letter in enumerate(name) if letter == "_"]
    if len(name) <= LONG or not places:
        return name
    middle = min(places, key=lambda place: abs(place - len(name) / 2))
    return f"{name[:middle]}\n{name[middle:]}"


def heat_maps(axes: Sequence[Axes], matrices: Mapping[str, pd.DataFrame], label: str, form: str = ".2f") -> None:
    """Matrices of the same rows side by side under their titles, with one colour scale: from 0 up, or around 0 where
    some values are negative.
    """
    values = np.concatenate([matrix.to_numpy(dtype=float).ravel() for matrix in matrices.values()])
    reach = float(np.nanmax(np.abs(values)))
    limits = (-reach if np.nanmin(values) < 0 else 0.0), reach
    columns = axes[0].get_subplotspec().get_gridspec().ncols
    for place, (ax, (title, matrix)) in enumerate(zip(axes, matrices.items(), strict=True)):
        heat_map(ax, matrix, limits, form).set_title(textwrap.fill(title, 60 // columns))
        if place % columns:
            ax.tick_params(left=False, labelleft=False)
        if place + columns < len(axes):  # another map of the same columns stands below
            ax.tick_params(bottom=False, labelbottom=False)
    axes[0].figure.colorbar(axes[0].images[0], ax=list(axes), label=label)


def loss_curves(ax: Axes, losses: pd.DataFrame) -> Axes:
    """Training loss against step, a line a sparsity, averaged over ten steps."""
    steps = max(1, min(10, losses["step"].nunique() // 4))
    shades = plt.get_cmap("cividis")(np.linspace(0, 0.85, losses["sparsity"].nunique()))
    styles = ("-", "--", "-.", ":", (0, (5, 1)))
    for number, (sparsity, part) in enumerate(losses.groupby("sparsity")):
        smooth = part.sort_values("step").rolling(steps, on="step", min_periods=1)["loss"].mean()
        ax.plot(
            part["step"],
            smooth,
            color=shades[number],
            linestyle=styles[number % len(styles)],
            label=f"sparsity {sparsity:g}",
        )
    ax.set(xlabel="step", ylabel="loss (nats)" if steps == 1 else f"loss (nats, mean of {steps} steps)")
    return ax


def spectra(ax: Axes, table: pd.DataFrame) -> Axes:
    """Sorted principal angles: median and quartiles of every method, the median of every null as a thin line."""
    for method, part in table.groupby("method", sort=False):
        look = look_of(method)
        if is_null(method):
            look |= {"marker": "", "linewidth": 1}
        else:
            ax.fill_between(part["index"], part["low"], part["high"], color=look["color"], alpha=0.15, linewidth=0)
        ax.plot(part["index"], part["degrees"], label=title_of(method), markevery=2, **look)
    ax.set(xlabel="principal angle, smallest first", ylabel="angle between adapters (degrees)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))  # they are counted
    ax.set_yticks(range(0, 91, 15))
    ax.set_ylim(15 * math.floor(table["low"].min() / 15), 92)
    return ax


def similarity(ax: Axes, table: pd.DataFrame) -> Axes:
    """φ(i, j) over i (upwards) and j, in colours from 0 to 1."""
    matrix = table.pivot(index="i", columns="j", values="value")
    extent = (0.5, len(matrix.columns) + 0.5, 0.5, len(matrix) + 0.5)  # cells lie around their numbers
    ax.imshow(matrix, cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto", extent=extent)
    ax.set(xlabel="j leading directions of the second", ylabel="i of the first")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(visible=False)
    return ax


def verdicts(ax: Axes, judged: pd.DataFrame) -> Axes:
    """The differences of :func:`claims.judged`, one a line from the top; dashed ticks are bounds other than 0."""
    shown = judged.dropna(subset="value").iloc[::-1].reset_index(drop=True)
    reach = np.nan_to_num(np.array([shown["value"] - shown["low"], shown["high"] - shown["value"]])).clip(0)
    ax.axvline(0, color=GREY, linewidth=0.9)
    ax.errorbar(shown["value"], shown.index, xerr=reach, fmt="none", ecolor="black", capsize=2.5, elinewidth=1)
    kinds = shown["verdict"].str.partition(" (")[0]
    for kind in dict.fromkeys(kinds):
        part = shown[kinds == kind]
        ax.plot(part["value"], part.index, label=kind, **look_of(kind))
    for place, least in shown.loc[shown["least"] != 0, "least"].items():
        ax.plot([least] * 2, [place - 0.3, place + 0.3], color=GREY, linestyle="--", linewidth=1)
    for place, row in shown.iterrows():
        where = {"xy": (1, place), "xycoords": ax.get_yaxis_transform(), "textcoords": "offset points"}
        text = interval_text(row["value"], row["low"], row["high"], 3, signed=True)
        ax.annotate(text, xytext=(6, 0), va="center", fontsize=8, annotation_clip=False, **where)
    ax.set_yticks(list(shown.index), [textwrap.fill(words, 40) for words in shown["measured as"]])
    ax.set(xlabel="difference of scores, rates or cosines", ylim=(-0.6, len(shown) - 0.4))
    ax.grid(axis="y", visible=False)
    return ax


def by_depth(ax: Axes, table: pd.DataFrame) -> Axes:
    """A line a kind of module over layers, and its null: columns layer, kind, value and null."""
    looks = looks_of(table["kind"].unique())
    for kind, part in table.dropna(subset="layer").sort_values("layer").groupby("kind", sort=False):
        ax.plot(part["layer"], part["value"], label=kind, markersize=4, **looks[kind])
        ax.plot(part["layer"], part["null"], color=looks[kind]["color"], linestyle=":", linewidth=0.9)
    ax.plot([], [], color=GREY, linestyle=":", linewidth=0.9, label="null, in the kind's colour")
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax

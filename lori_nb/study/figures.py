"""Plots: each function takes a matplotlib ``Axes`` and a tidy table, draws, and returns the ``Axes``.

Tables come from :mod:`lori_nb.study.questions` and :mod:`lori_nb.study.geometry`; bars at points are 95 % intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from lori_nb.study.geometry import NULL
from lori_nb.study.style import GREY, WIDTH, look_of, title_of
from lori_nb.study.summary import SHARES, n_text

METRIC_LABELS = {
    "exact_match": "exact match (share of rows)",
    "accuracy": "accuracy (share of rows)",
    "balanced_accuracy": "balanced accuracy (share)",
    "f1": "F1 (0 to 1)",
    "matthews": "Matthews correlation (−1 to 1)",
    "pearson": "Pearson correlation (−1 to 1)",
    "spearman": "Spearman correlation (−1 to 1)",
    "mean of metrics": "mean score over tasks",
}
MEASURE_LABELS = {
    "cosine": "cosine of ΔW",
    "row_overlap": "overlap of A's row spaces (0 to 1)",
    "column_overlap": "overlap of B's column spaces (0 to 1)",
}


def panels(count: int, columns: int = 2, height: float = 2.5) -> tuple[Figure, list[Axes]]:
    """A figure as wide as a page with ``count`` axes, ``columns`` in a row, each row ``height`` inches high."""
    columns = min(columns, count)
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
    if found:
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(4, len(found)))


def metric_label(metrics: Iterable[str]) -> str:
    """Axis label with units for one metric, or for scores of several."""
    metrics = set(metrics)
    return METRIC_LABELS.get(name := metrics.pop(), name) if len(metrics) == 1 else "score (each task's own metric)"


def points(
    ax: Axes, x: Sequence[float], part: pd.DataFrame, name: str, label: str | None = None, line: bool = True
) -> Axes:
    """One series with its intervals, in the look of ``name``."""
    look = look_of(name)
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
    low = min(-0.03, ax.get_ylim()[0]) if not metrics <= SHARES else -0.03
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
    ax.axhline(majority, color=GREY, linestyle=":", linewidth=1.2, label="majority answer")
    if not math.isnan(few_shot):
        ax.axhline(few_shot, color=GREY, linestyle="--", linewidth=1.2, label=f"base with {shots} examples")
    ax.set_xscale("log")
    sizes = scores["trainable_parameters"]
    ax.set_xlim(sizes.min() / 2, sizes.max() * 2)
    ax.set(xlabel="trainable parameters (count, log scale)", ylabel=metric_label(scores["metric"]))
    ax.set_title(f"{scores['task'].iloc[0]} ({n_text(scores)})")
    return score_limits(ax, scores["metric"])


def score_against_sparsity(ax: Axes, scores: pd.DataFrame) -> Axes:
    """A task's score at every sparsity; the axis is the share of B that is trained (log, from dense to sparse)."""
    kept = 1 - scores["sparsity"]
    points(ax, kept, scores, "lori-s", label="LoRI-S (sparsity 0: LoRI-D)")
    ax.set_xscale("log")
    ax.set_xlim(kept.max() * 1.4, kept.min() / 1.4)
    ax.xaxis.set_major_locator(FixedLocator(kept.tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(kept.tolist(), [f"{100 * share:g} %" for share in kept.round(6)])
    ax.set(
        xlabel="share of B that is trained (log scale; sparsity grows to the right)",
        ylabel=metric_label(scores["metric"]),
    )
    ax.set_title(f"{scores['task'].iloc[0]} ({n_text(scores)})")
    return score_limits(ax, scores["metric"])


def score_against_weight(ax: Axes, merged: pd.DataFrame, alone: pd.DataFrame) -> Axes:
    """Mean score of one way to merge against the weight, a line a method; level lines are the adapters alone."""
    for method, part in merged.groupby("method", sort=False):
        part = part.sort_values("weight")
        points(ax, part["weight"], part, method)
        level = alone.loc[alone["method"] == method, "value"]
        ax.axhline(
            level.iloc[0],
            color=look_of(method)["color"],
            linestyle=look_of(method)["linestyle"],
            linewidth=0.8,
            alpha=0.7,
        )
    ax.set(xlabel="weight of each adapter", ylabel=metric_label(merged["metric"]))
    ax.set_title(f"merge: {merged['merge'].iloc[0]} ({n_text(merged)})")
    return score_limits(ax, merged["metric"])


def grouped_points(
    ax: Axes, table: pd.DataFrame, category: str, series: str, ylabel: str, titles: dict[str, str] | None = None
) -> Axes:
    """Points with intervals, one place a ``category``, the ``series`` side by side in it."""
    places = {name: place for place, name in enumerate(dict.fromkeys(table[category]))}
    names = list(dict.fromkeys(table[series]))
    for number, name in enumerate(names):
        part = table[table[series] == name]
        x = part[category].map(places) + 0.6 * ((number + 0.5) / len(names) - 0.5)
        points(ax, x, part, name, label=(titles or {}).get(name), line=False)
    ax.set_xticks(list(places.values()), [str(name).replace("_", "_\u200b") for name in places])
    ax.set_xlim(-0.5, len(places) - 0.5)
    ax.grid(axis="x", visible=False)
    for edge in range(1, len(places)):
        ax.axvline(edge - 0.5, color="#DDDDDD", linewidth=0.8)
    ax.set_ylabel(ylabel)
    return ax


def heat_map(
    ax: Axes,
    matrix: pd.DataFrame,
    label: str,
    limits: tuple[float, float] | None = None,
    form: str = ".2f",
    colour: str = "cividis",
) -> Axes:
    """A labelled matrix with its numbers in the cells; missing cells stay empty. Cividis reads the same for colour-blind eyes."""
    values = matrix.to_numpy(dtype=float)
    low, high = limits or (float(np.nanmin(values)), float(np.nanmax(values)))
    image = ax.imshow(values, cmap=colour, vmin=low, vmax=high, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not math.isnan(value):
            r, g, b, _ = image.cmap(image.norm(value))
            ink = "black" if 0.299 * r + 0.587 * g + 0.114 * b > 0.5 else "white"
            ax.text(j, i, format(value, form), ha="center", va="center", color=ink, fontsize=8)
    ax.set_xticks(range(matrix.shape[1]), matrix.columns, rotation=30, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(matrix.shape[0]), matrix.index)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(image, ax=ax, label=label, shrink=0.9)
    return ax


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
    ax.set(xlabel="step", ylabel=f"training loss (nats, mean of {steps} steps)")
    return ax


def conflict_points(ax: Axes, summary: pd.DataFrame) -> Axes:
    """Conflict rate by kind of module, between tasks beside within a task (the null). One row a module and kind of pair."""
    looks = {"between": "ortho-lora", "within": NULL}
    titles = {"ortho-lora": "between tasks", NULL: "within a task (two halves of its batch)"}
    grouped_points(
        ax, summary.assign(look=summary["pairs"].map(looks)), "module", "look", "conflicting pairs (%)", titles
    )
    ax.tick_params(axis="x", rotation=30)
    for tick in ax.get_xticklabels():
        tick.set(ha="right", rotation_mode="anchor")
    ax.axhline(0.5, color=GREY, linewidth=0.8)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    return ax


def conflict_steps(ax: Axes, summary: pd.DataFrame) -> Axes:
    """Conflict rate over training, between tasks beside within a task. One row a step and kind of pair."""
    for pairs, name in (("between", "ortho-lora"), ("within", NULL)):
        part = summary[summary["pairs"] == pairs].sort_values("step")
        look = look_of(name)
        ax.plot(
            part["step"],
            part["rate"],
            label={"between": "between tasks"}.get(pairs, "within a task (two halves of its batch)"),
            **look,
        )
    ax.axhline(0.5, color=GREY, linewidth=0.8)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    ax.set(xlabel="step", ylabel="conflicting pairs (%)")
    return ax


def spectra(ax: Axes, table: pd.DataFrame) -> Axes:
    """Sorted principal angles, median and quartiles, a line a method and the null."""
    for method, part in table.groupby("method", sort=False):
        look = look_of(method)
        ax.plot(
            part["index"],
            part["degrees"],
            label="null (before training)" if method == NULL else title_of(method),
            markevery=2,
            **look,
        )
        ax.fill_between(part["index"], part["low"], part["high"], color=look["color"], alpha=0.12, linewidth=0)
    ax.set(xlabel="principal angle, smallest first", ylabel="angle between tasks (degrees)", ylim=(0, 92))
    ax.set_yticks(range(0, 91, 15))
    return ax


def differences(ax: Axes, table: pd.DataFrame, labels: str) -> Axes:
    """Differences with intervals, one a line from the top; the zero line, and what each must exceed as a tick where it is not 0."""
    shown = table.dropna(subset="value").iloc[::-1].reset_index(drop=True)
    reach = np.nan_to_num(np.array([shown["value"] - shown["low"], shown["high"] - shown["value"]])).clip(0)
    ax.axvline(0, color=GREY, linewidth=0.9)
    ax.errorbar(shown["value"], shown.index, xerr=reach, fmt="none", ecolor="black", capsize=2.5, elinewidth=1)
    for place, row in shown.iterrows():
        look = look_of(row["look"]) if "look" in shown else look_of("lora")
        ax.plot(row["value"], place, marker=look["marker"], color=look["color"], linestyle="none")
        if row.get("least", 0.0):
            ax.plot([row["least"]] * 2, [place - 0.3, place + 0.3], color=GREY, linestyle="--", linewidth=1)
    ax.set_yticks(list(shown.index), shown[labels])
    ax.set_ylim(-0.6, len(shown) - 0.4)
    ax.grid(axis="y", visible=False)
    return ax

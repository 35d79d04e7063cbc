"""Figures of LoRI beside LoRA: paired differences, learning rates, and cost.

Like those of :mod:`lori_nb.study.figures`: each function takes ``Axes`` and a tidy table, draws, and returns the
``Axes``. Differences are shown in points, hundredths of a score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lori_nb.analysis.statistics import interval_text
from lori_nb.study.arms import get_arm
from lori_nb.study.comparison import marked_verdict
from lori_nb.study.figures import MEASURE_LABELS, metric_label, points
from lori_nb.study.style import BLACK, GREY, look_of, looks_of, null_of, title_of
from lori_nb.study.summary import n_text

POINTS = 100  # a score of 1 is a hundred points
ROW_INCHES = 0.235
COLUMN_POINTS = (6, 104)  # of the numbers and the verdicts, right of the axes
FAR = 2.5
NULL_LOOK = {"color": GREY, "marker": "x"}
MILLION = 10**6
COST_LABELS = {
    "trainable_parameters": "million trainable parameters (log)",
    "training_pflops": "PFLOPs of training, with calibration (log)",
}


def forest_height(compared: pd.DataFrame) -> float:
    """Inches that :func:`forest` needs for its rows, for ``figures.panels(1, height=…)``."""
    return ROW_INCHES * (len(compared) + compared["task"].nunique()) + 0.9


def forest(ax: Axes, compared: pd.DataFrame, seeds: pd.DataFrame, against: str = "tuned LoRA") -> Axes:
    """Points against LoRA: for every task a block, for every arm a row of seed dots, mean and interval.

    Args:
        compared: of :func:`comparison.compared`.
        seeds: of :func:`comparison.differences`, the single seeds behind it.
        against: what all arms are compared with.

    The shaded band is the margin of equivalence: an arm is equivalent where its 90 % interval lies inside it. At the
    right stand n of every block, and the numbers and verdict of every row.
    """
    margin = POINTS * compared["margin"].iloc[0]
    ax.axvspan(-margin, margin, color=GREY, alpha=0.16, linewidth=0, label=f"margin, ± {margin:g}")
    ax.axvline(0, color=BLACK, linewidth=1)
    place, rows, far = 0.0, {}, _far_arm(compared, margin)
    for task, block in compared.groupby("task", sort=False):
        _heading(ax, place, task, n_text(block))
        for _, row in block.iterrows():
            place += 1
            values = seeds.loc[(seeds["arm"] == row["arm"]) & (seeds["task"] == task), "value"]
            _numbers(ax, place, row)
            if row["arm"] == far:
                _pointer(ax, place, row["value"])
            else:
                _difference(ax, place, row, POINTS * values)
            rows[place] = row["title"]
        place += 1.25
    ax.set_yticks(list(rows), list(rows.values()))
    ax.set_ylim(place - 0.6, -0.7)  # the first row at the top
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(f"points against {against}")
    _forest_legend(ax, compared, far)
    return ax


def _far_arm(compared: pd.DataFrame, margin: float) -> str | None:
    """The arm that reaches more than :data:`FAR` times as far as every other and the margin, which would squeeze them
    together; None where there is none.
    """
    sizes = compared.assign(reach=POINTS * compared[["low", "value", "high"]].abs().max(axis=1))
    reach = sizes.groupby("arm")["reach"].max().sort_values()
    others = max([margin, *reach.iloc[:-1]])
    return str(reach.index[-1]) if len(reach) > 1 and reach.iloc[-1] > FAR * others else None


def _heading(ax: Axes, place: float, task: str, count: str) -> None:
    ax.text(0.01, place, task, transform=ax.get_yaxis_transform(), va="center", weight="bold", fontsize=8)
    _beside(ax, place, count, color=GREY)


def _beside(ax: Axes, place: float, text: str, column: int = 0, **look) -> None:
    """Text right of the axes, in a column whose distance does not change with the width of the axes."""
    where = {"xy": (1, place), "xycoords": ax.get_yaxis_transform(), "textcoords": "offset points"}
    ax.annotate(
        text, xytext=(COLUMN_POINTS[column], 0), va="center", fontsize=8, annotation_clip=False, **where, **look
    )


def _difference(ax: Axes, place: float, row: pd.Series, values: pd.Series) -> None:
    look = look_of(row["method"])
    ax.plot(
        values, np.full(len(values), place), "o", markersize=3.4, markerfacecolor="none", color=look["color"], zorder=2
    )
    low, mean, high = (POINTS * row[name] for name in ("low", "value", "high"))
    if not np.isnan(low):
        ax.plot([low, high], [place, place], color=BLACK, linewidth=1.3, zorder=3)
    ax.plot(mean, place, look["marker"], color=look["color"], markeredgecolor=BLACK, markeredgewidth=0.8, zorder=4)


def _pointer(ax: Axes, place: float, value: float) -> None:
    """A mark at the edge beyond which a row lies."""
    edge, marker = (0.015, "<") if value < 0 else (0.985, ">")
    ax.plot(edge, place, marker, color=GREY, transform=ax.get_yaxis_transform())


def _numbers(ax: Axes, place: float, row: pd.Series) -> None:
    bounds = (POINTS * row[name] for name in ("value", "low", "high"))
    _beside(ax, place, interval_text(*bounds, 1, signed=True))
    if row["seeds"] > 1:  # one seed decides nothing
        _beside(ax, place, marked_verdict(row), 1)


def _forest_legend(ax: Axes, compared: pd.DataFrame, far: str | None) -> None:
    """Handles that say what dots, markers and bars are; drawn by ``figures.shared_legend``."""
    if far is not None:
        ax.plot([], [], "<", color=GREY, label="off the axis")
    if compared["seeds"].max() > 1:
        ax.plot([], [], "o", markersize=3.4, markerfacecolor="none", color=GREY, label="one seed")
    if compared["low"].notna().any():
        over = "seeds and rows" if compared["seeds"].max() > 1 else "rows"
        label = f"mean, 95 % interval over {over}"
        ax.plot([], [], "-s", color=BLACK, markerfacecolor=GREY, linewidth=1.3, label=label)


def overlap_by_choice(axes: Sequence[Axes], table: pd.DataFrame) -> None:
    """How far two tasks' adapters overlap by draw of A and structure of masks: a panel a measure, a row an arm.

    Args:
        axes: one for each of :data:`~lori_nb.study.figures.MEASURE_LABELS`.
        table: of ``geometry.overlap_summary`` over ``geometry.choice_sets``, with the nulls of the arms.
    """
    arms = [name for name in dict.fromkeys(table["method"]) if null_of(name) in set(table["method"])]
    for ax, (measure, label) in zip(axes, MEASURE_LABELS.items(), strict=True):
        rows = table[table["measure"] == measure].set_index("method")
        for place, arm in enumerate(arms):
            for name, look, aside in ((arm, look_of(get_arm(arm).method), -0.14), (null_of(arm), NULL_LOOK, 0.14)):
                if name in rows.index:
                    _bar(ax, place + aside, rows.loc[name], look)
        ax.set_yticks(range(len(arms)), [get_arm(arm).title for arm in arms])
        ax.set_ylim(len(arms) - 0.5, -0.5)
        ax.set_xlim(left=0)
        ax.set_xlabel(label.replace(" of ", "\nof ", 1))  # three panels share the width of a page
        ax.grid(axis="y", visible=False)
        if ax is not axes[0]:
            ax.tick_params(axis="y", labelleft=False)
    axes[0].plot([], [], "s", color=GREY, markeredgecolor=BLACK, label="adapters of two tasks")
    axes[0].plot([], [], NULL_LOOK["marker"], color=NULL_LOOK["color"], label="null: random adapters, same draw of A")


def _bar(ax: Axes, place: float, row: pd.Series, look: Mapping[str, object]) -> None:
    if not np.isnan(row["low"]):
        ax.plot([row["low"], row["high"]], [place, place], color=look["color"], linewidth=1.3)
    ax.plot(row["value"], place, look["marker"], color=look["color"], markersize=5)


def rate_curves(ax: Axes, grid: pd.DataFrame, paper: Mapping[str, float] | None = None) -> Axes:
    """Validation score against learning rate (log), a line a method: mean over tasks and seeds, a dot a seed.

    A ring marks the chosen rate, with an arrow where it is the first or last that was tried: then a better one may lie
    beyond.

    Args:
        grid: the tuning table: arm, learning_rate, task, seed, value, n, chosen.
        paper: arm → the rate that its paper used, marked on the axis. It belongs to another model.
    """
    per_seed = grid.groupby(["arm", "learning_rate", "seed"], sort=False)["value"].mean().reset_index()
    for arm, part in per_seed.groupby("arm", sort=False):
        means = part.groupby("learning_rate")["value"].mean()
        look = look_of(arm)
        ax.plot(means.index, means, label=title_of(arm), **look)
        ax.plot(part["learning_rate"], part["value"], "o", markersize=3.4, markerfacecolor="none", color=look["color"])
        chosen = grid.loc[(grid["arm"] == arm) & grid["chosen"], "learning_rate"]
        if len(chosen):
            _mark_chosen(ax, means, float(chosen.iloc[0]), look["color"])
    ax.set_xscale("log")
    if paper:
        _mark_papers(ax, {arm: rate for arm, rate in paper.items() if arm in set(grid["arm"])})
    if grid["seed"].nunique() > 1:
        ax.plot([], [], "o", markersize=3.4, markerfacecolor="none", color=GREY, label="one seed")
    ax.plot([], [], "o", markersize=10, markerfacecolor="none", color=BLACK, label="chosen")
    ax.set(xlabel="learning rate (log)", ylabel=metric_label({"mean of metrics"}))
    ax.set_title(_grid_title(grid))
    return ax


def _mark_chosen(ax: Axes, means: pd.Series, rate: float, color: str) -> None:
    at = (rate, float(means[rate]))
    ax.plot(*at, "o", markersize=10, markerfacecolor="none", color=BLACK, markeredgewidth=1.1, zorder=4)
    edges = {means.index.min(): (-34, "right"), means.index.max(): (34, "left")}
    if rate in edges and len(means) > 1:
        shift, side = edges[rate]
        arrow = {"arrowstyle": "<-", "color": color}
        ax.annotate(
            "edge", at, (shift, 0), textcoords="offset points", arrowprops=arrow, ha=side, va="center", fontsize=8
        )


def _mark_papers(ax: Axes, rates: Mapping[str, float]) -> None:
    """A mark of each method at the foot of the axis, one above another where rates are equal."""
    foot, seen = ax.get_xaxis_transform(), list(rates.values())
    for number, (arm, rate) in enumerate(rates.items()):
        height = 0.07 * seen[:number].count(rate)
        look = look_of(arm) | {"linestyle": "none"}
        ax.plot(rate, height, transform=foot, markersize=5, markeredgecolor=BLACK, clip_on=False, zorder=5, **look)
    for rate in dict.fromkeys(seen):
        ax.axvline(rate, color=GREY, linewidth=0.9, linestyle=":", zorder=1)
    ax.plot([], [], color=GREY, linewidth=0.9, linestyle=":", label="the LoRI paper's rates (8B models)")


def _grid_title(grid: pd.DataFrame) -> str:
    seeds, tasks = grid["seed"].nunique(), grid["task"].nunique()
    rows = grid.drop_duplicates("task")["n"].sum()
    return f"{tasks} task{'s' * (tasks > 1)}, {rows:,} rows held out of training, {seeds} seed{'s' * (seeds > 1)}"


def score_against_cost(ax: Axes, costs: pd.DataFrame, cost: str) -> Axes:
    """Mean score over tasks against what training costs (log), a point an arm.

    Args:
        costs: of :func:`comparison.costs`, or of :func:`sharing.arrangement_costs`.
        cost: its column "trainable_parameters" or "training_pflops".
    """
    if costs[cost].isna().all():
        ax.text(0.5, 0.5, "not measured", ha="center", va="center", transform=ax.transAxes)
        ax.set_axis_off()
        return ax
    looks = looks_of(costs["arm"])
    for arm, part in costs.groupby("arm", sort=False):
        points(ax, part[cost], part, arm, label=part["title"].iloc[0], line=False, look=looks[arm])
    ax.set_xscale("log")
    ax.set_xlim(costs[cost].min() / 2, costs[cost].max() * 2)
    near = costs[cost].max() < 20 * costs[cost].min()  # within a decade or so, powers of ten alone are too few ticks
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,)))
    unit = MILLION if cost == "trainable_parameters" else 1
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value / unit:,g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel=COST_LABELS[cost], ylabel=metric_label({"mean of metrics"}))
    ax.set_title(n_text(costs))
    return ax

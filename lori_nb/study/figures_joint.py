"""Figures of notebook 03: conflicts between tasks' gradients, and what each way to share one adapter wins back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import PercentFormatter

from lori_nb.study.conflict import BETWEEN
from lori_nb.study.figures import grouped_points
from lori_nb.study.style import GREY, look_of, looks_of, title_of

HATCH = "////"
MISSING = "#DDDDDD"
RECOVERY_LIMITS = (-3.0, 4.0)  # what is further out stands as a number at the edge


def conflict_points(ax: Axes, summary: pd.DataFrame) -> Axes:
    """Conflict rate by kind of module, between tasks and within a task; a row for each module and kind."""
    if summary.empty:
        return _not_measured(ax)
    grouped_points(ax, summary, "module", "pairs", "conflicting pairs (%)")
    ax.tick_params(axis="x", rotation=30)
    for tick in ax.get_xticklabels():
        tick.set(ha="right", rotation_mode="anchor")
    return _percent(ax)


def conflict_steps(ax: Axes, summary: pd.DataFrame) -> Axes:
    """Conflict rate over training, between tasks and within a task; a row for each step and kind."""
    if summary.empty:
        return _not_measured(ax)
    for pairs, part in summary.groupby("pairs", sort=False):
        part = part.sort_values("step")
        ax.plot(part["step"], part["value"], label=title_of(pairs), **look_of(pairs))
    ax.set(xlabel="step", ylabel="conflicting pairs (%)")
    return _percent(ax)


def _not_measured(ax: Axes) -> Axes:
    ax.text(0.5, 0.5, "not measured", ha="center", va="center", transform=ax.transAxes)
    ax.set_axis_off()
    return ax


def _percent(ax: Axes) -> Axes:
    ax.axhline(0.5, color=GREY, linewidth=0.8)  # what two gradients without relation give
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, -0.02), min(high, 1.02))
    return ax


def conflict_map(axes: Sequence[Axes], table: pd.DataFrame) -> None:
    """Mean cosine between tasks by step and layer, a panel a factor; hatched where it is not below 0, and below that of
    two batches of one task, beyond noise.

    Args:
        axes: one for A and one for B.
        table: of :func:`lori_nb.study.conflict.conflict_map`.
    """
    if table.empty:
        for ax in axes:
            _not_measured(ax)
        return
    reach = max(float(table[BETWEEN].abs().max()), 1e-3)
    norm, missing = TwoSlopeNorm(0.0, -reach, reach), False
    for ax, factor in zip(axes, "AB", strict=True):
        part = table[table["factor"] == factor]
        ax.set_title(f"gradients of {factor}")
        if part.empty:
            _not_measured(ax)
            continue
        cells, inside = (part.pivot(index="layer", columns="step", values=name) for name in (BETWEEN, "inside"))
        steps, layers = _edges(cells.columns), _edges(cells.index)
        image = ax.pcolormesh(steps, layers, cells.to_numpy(float), cmap="PuOr", norm=norm, rasterized=True)
        for i, j in np.argwhere(inside.fillna(False).to_numpy(bool)):
            place, size = (steps[j], layers[i]), (steps[j + 1] - steps[j], layers[i + 1] - layers[i])
            ax.add_patch(Rectangle(place, *size, fill=False, hatch=HATCH, edgecolor=GREY, linewidth=0))
        ax.set_facecolor(MISSING)
        missing |= bool(np.isnan(cells.to_numpy(float)).any()) or cells.shape[1] < table["step"].nunique()
        ax.set(xlabel="step", ylabel="layer", xlim=_edges(table["step"].drop_duplicates().sort_values())[[0, -1]])
        ax.grid(False)
    axes[-1].figure.colorbar(image, ax=list(axes), label="cosine between tasks' half batches", shrink=0.9)
    several = bool((table["n"] > 1).all())
    label = (
        "inside the null: 0, or as far apart as a task's own halves"
        if several
        else "one seed: not tested against the null"
    )
    hatch = HATCH if several else None
    handles = [Patch(facecolor="none", edgecolor=GREY, hatch=hatch, label=label, linewidth=1.0 if several else 0)]
    if missing:
        handles.append(Patch(facecolor=MISSING, label="no gradient (of A, while B is zero)"))
    axes[0].figure.legend(handles=handles, loc="outside lower center", frameon=False, ncols=2)


def _edges(centres: pd.Index | pd.Series) -> np.ndarray:
    """Cell borders halfway between sorted centres, the outer ones as far out as their neighbours."""
    places = centres.to_numpy(float)
    if len(places) == 1:
        return np.array([places[0] - 0.5, places[0] + 0.5])
    middle = (places[1:] + places[:-1]) / 2
    return np.concatenate([[2 * places[0] - middle[0]], middle, [2 * places[-1] - middle[-1]]])


def recovery(ax: Axes, table: pd.DataFrame) -> Axes:
    """Share of the gap that each way wins back, with Fieller's interval: 0 is joint training, 1 an adapter a task.

    A row of :func:`lori_nb.study.sharing.gap_recovery` whose gap is not distinguishable from zero has a hollow marker.
    """
    looks = looks_of(table["arrangement"])
    tasks, ways = list(dict.fromkeys(table["task"])), list(looks)
    for row in table.itertuples():
        y = -(tasks.index(row.task) + (ways.index(row.arrangement) - (len(ways) - 1) / 2) * 0.8 / len(ways))
        look = looks[row.arrangement]
        if np.isnan(row.value):  # a gap of exactly zero
            continue
        if not RECOVERY_LIMITS[0] < row.value < RECOVERY_LIMITS[1]:  # the ratio of a gap near zero
            _at_edge(ax, y, row.value, look["color"])
            continue
        fill = look["color"] if row.shown else "none"
        ax.plot(row.value, y, marker=look["marker"], color=look["color"], markerfacecolor=fill, linestyle="none")
        if np.isfinite(row.low):
            ax.plot([row.low, row.high], [y, y], color=look["color"], linewidth=1.2)
    for name in ways:
        ax.plot(
            [], [], label=title_of(name), linestyle="none", color=looks[name]["color"], marker=looks[name]["marker"]
        )
    if not table["shown"].all():
        label = "hollow: the gap itself is not shown (or of one seed)"
        ax.plot([], [], "o", color=GREY, markerfacecolor="none", label=label)
    for place in (0.0, 1.0):
        ax.axvline(place, color=GREY, linewidth=0.8)
    ax.set_yticks([-place for place in range(len(tasks))], tasks)
    ax.set(xlabel="share of the gap won back", ylim=(-len(tasks) + 0.4, 0.6))
    low, high = np.nanmin([-0.5, *table["value"]]), np.nanmax([1.5, *table["value"]])
    ax.set_xlim(max(low - 0.2, RECOVERY_LIMITS[0]), min(high + 0.2, RECOVERY_LIMITS[1]))
    return ax


def _at_edge(ax: Axes, y: float, value: float, color: str) -> None:
    place, side, text = (0.99, "right", f"{value:.1f} →") if value > 0 else (0.01, "left", f"← {value:.1f}")
    look = {"ha": side, "va": "center", "color": color, "fontsize": 8}
    ax.text(place, y, text, transform=ax.get_yaxis_transform(), **look)


def change_lines(ax: Axes, table: pd.DataFrame) -> Axes:
    """Distance from joint training's gradient over training; table of :func:`lori_nb.study.conflict.changes`."""
    if table.empty:
        return _not_measured(ax)
    looks = looks_of(table["arrangement"])
    for name, part in table.groupby("arrangement", sort=False):
        line = part.groupby("step")["value"].mean()
        line = line.groupby(line.index // 5 * 5).mean()  # five steps a point, so that a line can be followed
        look = looks[name] | {"marker": ""}
        ax.plot(line.index, line, label=title_of(name), **look)
    ax.set(xlabel="step", ylabel="‖∇ − S‖ / ‖S‖")
    ax.set_ylim(bottom=0)
    return ax

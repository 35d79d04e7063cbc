"""Plots of what sequences of tasks leave: while a task trains, between old and new tasks, and when entries run out.

Each function takes a matplotlib ``Axes`` and a table of :mod:`lori_nb.study.forgetting`, draws, and returns the
``Axes``; bars are 95 % intervals. Of an empty table the axes say that nothing was measured.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lori_nb.study.figures import grouped_points, metric_label, nothing, points, score_limits
from lori_nb.study.forgetting import OVER_REFUSED
from lori_nb.study.sequence_runs import ARROW
from lori_nb.study.style import GREY, look_of, title_of, way_title
from lori_nb.study.summary import n_text

ROLES = {"old": "first task", "new": "task that trains"}


def scores_by_step(ax: Axes, table: pd.DataFrame, role: str) -> Axes:
    """Score of the old or of the new task while the new one trains, a line a way; step 0 is before it."""
    part = table[table["role"] == role]
    if part.empty:
        return nothing(ax)
    ways = list(dict.fromkeys(part["way"]))
    gaps = np.diff(np.unique(part["step"]))
    width = 0.5 * gaps.min(initial=part["step"].max() or 1) / len(ways)  # side by side, yet nearest to their own step
    for number, way in enumerate(ways):
        own = part[part["way"] == way].sort_values("step")
        points(ax, own["step"] + width * (number - (len(ways) - 1) / 2), own, way, label=way_title(way))
    ax.set(
        xlabel=f"step of {'its training' if role == 'new' else 'the second task'}", ylabel=metric_label(part["metric"])
    )
    other = "" if part["same_rows"].all() else "; before and after on other rows"
    ax.set_title(f"{ROLES[role]}: {part['task'].iloc[0]}\n({n_text(part)}{other})")
    return score_limits(ax, part["metric"])


def plasticity_against_stability(ax: Axes, table: pd.DataFrame) -> Axes:
    """One point a way: new tasks' score when learned against old tasks' score at the end; up and right is better."""
    if table.empty:
        return nothing(ax)
    for row in table.itertuples():
        old, new = (np.nan_to_num(_reach(row, kind)).clip(0) for kind in ("old", "new"))
        look = {**look_of(row.way), "linestyle": "none"}
        ax.errorbar(
            row.value_old,
            row.value_new,
            xerr=old,
            yerr=new,
            capsize=2.5,
            elinewidth=1,
            label=way_title(row.way),
            **look,
        )
    of = table.rename(columns={"n_old": "n", "of_old": "of", "seeds_old": "seeds"})
    ax.set(xlabel=f"old tasks at the end: mean score ({n_text(of)})", ylabel="new tasks when learned: mean score")
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    if (orders := table["orders"].iloc[0]) > 1:
        ax.set_title(f"mean over {orders} orders, the same for every way")
    return ax


def _reach(row, kind: str) -> np.ndarray:
    value, low, high = (getattr(row, f"{name}_{kind}") for name in ("value", "low", "high"))
    return np.array([[value - low], [high - value]])


def safety_plane(ax: Axes, table: pd.DataFrame) -> Axes:
    """Harmful requests refused against harmless ones refused, before (small, pale) and after all tasks, a way each with
    an arrow between; up and left is better. Where over-refusal is not known, against harmless ones helped with, and up
    and right is better.
    """
    if table.empty:
        return nothing(ax)
    known = OVER_REFUSED in set(table["request"])
    harmless = OVER_REFUSED if known else "harmless"
    for way, part in table.groupby("way", sort=False):
        at = part.pivot(index="when", columns="request", values="value")
        look = {key: look_of(way)[key] for key in ("color", "marker")}
        start, end = (at.loc[when, [harmless, "harmful"]].to_numpy(float) for when in ("before", "after"))
        ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": look["color"], "linewidth": 0.9})
        ax.plot(*start, alpha=0.5, markersize=4, linestyle="none", **look)
        ends = part[part["when"] == "after"].set_index("request")
        reach = {
            axis: _interval_reach(ends.loc[request]) for axis, request in (("xerr", harmless), ("yerr", "harmful"))
        }
        ax.errorbar(*end, capsize=2.5, elinewidth=1, linestyle="none", label=way_title(way), **reach, **look)
    what = "refused: over-refusal" if known else "helped with"
    ax.set(xlabel=f"harmless requests {what} (share)", ylabel="harmful requests refused (share)")
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    ax.set_title(f"requests of each kind: {n_text(table)}")
    return ax


def _interval_reach(row: pd.Series) -> np.ndarray:
    return np.nan_to_num(np.array([[row["value"] - row["low"]], [row["high"] - row["value"]]])).clip(0)


def interference_against_forgetting(ax: Axes, table: pd.DataFrame) -> Axes:
    """The first task's forgetting against how far later updates move its activations: a point a way, its mean over
    seeds, and a small pale one each seed.
    """
    if table.empty:
        return nothing(ax)
    for way, part in table.groupby("way", sort=False):
        look = {key: look_of(way)[key] for key in ("color", "marker")} | {"linestyle": "none"}
        ax.plot(part["interference"], part["lost"], alpha=0.4, markersize=3, **look)
        ax.plot(part["interference"].mean(), part["lost"].mean(), label=way_title(way), **look)
    ax.set(xlabel="length of later updates / first update, on the first task", ylabel="first task: score lost")
    seeds = table["seed"].nunique()
    ax.set_title("one seed" if seeds == 1 else f"n = {seeds} seeds")
    return ax


def score_by_order(ax: Axes, table: pd.DataFrame, joint: Sequence[float] = ()) -> Axes:
    """Mean score after the last task in every order, ways side by side; a level line for ``joint`` training. Tasks go
    by letters, but the first where all orders have the same.
    """
    if table.empty:
        return nothing(ax)
    orders = {each: each.split(ARROW) for each in table["order"]}
    given = orders[table["order"].iloc[0]]
    held = 1 if all(order[0] == given[0] for order in orders.values()) else 0
    letters = {task: letter for task, letter in zip(given[held:], "ABCDEFGHIJ", strict=False)}
    names = {each: " ".join(letters.get(task, task) for task in order[held:]) for each, order in orders.items()}
    grouped_points(ax, table.assign(short=table["order"].map(names)), "short", "way", metric_label(table["metric"]))
    for level in joint:
        ax.axhline(level, color=GREY, linestyle="--", linewidth=1, label=way_title("joint"))
    key = ", ".join(f"{letter} {task}" for task, letter in letters.items())
    title = f"after {given[0]}: {key} ({n_text(table)})" if held else f"{key} ({n_text(table)})"
    ax.set_title(textwrap.fill(title, 90))
    ax.set_xlabel("order")
    return score_limits(ax, table["metric"])


def score_of_nth_task(ax: Axes, table: pd.DataFrame, fits: int) -> Axes:
    """Score of the n-th task under disjoint masks beside that of the task alone; the line is the last one that fits."""
    if table.empty:
        return nothing(ax)
    for number, (kind, look) in enumerate((("in sequence", "lori-s-disjoint"), ("alone", "lori-s"))):
        part = table[table["kind"] == kind].sort_values("place")
        label = f"{title_of(look)}: {kind}"
        points(ax, part["place"] + 0.3 * (number - 0.5), part, look, label=label, line=False)
    ax.axvline(fits + 0.5, color=GREY, linestyle="--", linewidth=1, label=f"{fits} tasks fit")
    tasks = table.drop_duplicates("place").sort_values("place")
    names = [f"{place} {task}" for place, task in zip(tasks["place"], tasks["task"], strict=True)]
    ax.set_xticks(tasks["place"], names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set(xlabel="place in the sequence, and task", ylabel=metric_label(table["metric"]))
    ax.set_title(n_text(table))
    return score_limits(ax, table["metric"])

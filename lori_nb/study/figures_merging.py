"""Figures of merging: weights, what interferes beside what is lost, and merges of more and more adapters.

Like those of :mod:`lori_nb.study.figures`: each function takes ``Axes`` and a tidy table, draws, and returns the
``Axes``.
"""

from __future__ import annotations

import textwrap

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from lori_nb.study.figures import metric_label, nothing, places_aside, points, score_against_weight, score_limits
from lori_nb.study.mergeability import SHOWN
from lori_nb.study.style import BLACK, GREY, look_of, title_of
from lori_nb.study.summary import n_text, p_text, text_of


def score_and_choice(
    ax: Axes, merged: pd.DataFrame, alone: pd.DataFrame, chosen: pd.DataFrame, paper: pd.DataFrame
) -> Axes:
    """:func:`figures.score_against_weight` of one way to merge, with a ring around each method's weight that was chosen
    on held-out rows and a square around the LoRI authors'.

    Args:
        chosen, paper: columns method, merge, weight and value, on the test rows.
    """
    score_against_weight(ax, merged, alone)
    if merged.empty:
        return ax
    aside = places_aside(merged)
    rings = {"o": (chosen, "weight chosen on held-out rows"), "s": (paper, "the LoRI authors' weight")}
    for marker, (table, label) in rings.items():
        part = table[table["merge"] == merged["merge"].iloc[0]] if len(table) else table
        look = {"linestyle": "none", "marker": marker, "markersize": 11, "markerfacecolor": "none"}
        if len(part):
            x = part["weight"] + part["method"].map(aside)
            ax.plot(x, part["value"], markeredgecolor=BLACK, markeredgewidth=1, zorder=4, label=label, **look)
    return ax


def loss_against_overlap(ax: Axes, pairs: pd.DataFrame, found: pd.DataFrame, measure: str) -> Axes:
    """What task i loses when adapter j is merged in, against the excess of one measure over its null: a dot an ordered
    pair, mean over seeds; the title gives each method's rank correlation, its interval, and the p value of adapters
    permuted.

    Args:
        pairs: of :func:`mergeability.joined`.
        found: of :func:`mergeability.correlations`.
    """
    shown = pairs[pairs["measure"] == measure].dropna(subset=["excess", "loss"])
    shown = shown.groupby(["method", "task", "adapter"], sort=False)[["excess", "loss"]].mean().reset_index()
    if shown.empty:
        return nothing(ax)
    for method, part in shown.groupby("method", sort=False):
        if part["excess"].nunique() < 2:
            continue  # no mask has no overlap, and a frozen A none beyond its null's
        look = {key: look_of(method)[key] for key in ("color", "marker")}
        ax.plot(
            part["excess"], part["loss"], linestyle="none", markersize=2.6, alpha=0.55, label=title_of(method), **look
        )
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set_yscale("symlog", linthresh=0.1)  # some losses grow a hundredfold, most hardly
    ax.xaxis.set_major_locator(MaxNLocator(3))
    name = textwrap.fill(SHOWN.get(measure, measure), 24)
    ax.set(xlabel=f"{name}\n(excess over the null)", ylabel="loss of i (nats)")
    rows = found[found["measure"] == measure]
    lines = [f"{title_of(r['method'])} ρ = {text_of(r)}, p {p_text(r['p'], 2)}" for _, r in rows.iterrows()]
    # a line is as wide as the panel with its labels: flush right it ends with the panel, and not beyond the figure
    ax.set_title("\n".join(lines), fontsize=8, loc="right")
    return ax


def correlation_title(found: pd.DataFrame) -> str:
    """What n of all panels is, for the figure's title."""
    if found.empty:
        return "loss of task i when adapter j is merged in: not measured"
    counts = found.iloc[0]
    seeds = "one seed" if counts["seeds"] == 1 else f"{counts['seeds']} seeds"
    return (
        f"what task i loses when adapter j is merged in\n"
        f"n = {int(counts['n'])} adapters, {int(counts['pairs'])} ordered pairs, means over {seeds}; "
        "ρ [95 % over adapters], p of adapters permuted"
    )


def scaling(ax: Axes, table: pd.DataFrame, measure: str) -> Axes:
    """Score of the mean or the worst task of a subset against how many adapters are merged: merges in full lines with
    intervals, each method's adapters alone thin, one adapter for all tasks and the base in grey.

    Args:
        table: of :func:`mergeability.scaling`.
    """
    shown = table[table["measure"] == measure].sort_values("size")
    if shown.empty:
        return nothing(ax)
    for series, part in shown.groupby("series", sort=False):
        method = series.removesuffix(" alone")
        if series == "base":
            ax.plot(part["size"], part["value"], color=GREY, linestyle=":", linewidth=1.2, label="base")
        elif series == "joint":
            ax.plot(part["size"], part["value"], label="LoRA on all tasks jointly", **_thin("joint"))
        elif series == method:
            points(ax, part["size"], part, method, label=f"{title_of(method)}, merged")
        else:
            ax.plot(part["size"], part["value"], label=f"{title_of(method)}, alone", **_thin(method))
    sizes = sorted(set(shown["size"]))
    ax.xaxis.set_major_locator(FixedLocator(sizes))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="adapters merged", ylabel=metric_label(shown["metric"]).replace("mean score over tasks", "score"))
    merged = shown[~shown["series"].isin(["base", "joint"]) & ~shown["series"].str.endswith(" alone")]
    ax.set_title(f"{measure} task of a subset ({n_text(merged[merged['size'] == sizes[0]])})")
    return score_limits(ax, {"exact_match"})


def _thin(name: str) -> dict:
    return {"color": look_of(name)["color"], "linestyle": look_of(name)["linestyle"], "linewidth": 0.8, "alpha": 0.9}

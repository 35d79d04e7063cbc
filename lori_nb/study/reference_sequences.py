"""What a long measurement of sequences leaves for readers: tables, figures and README's part on forgetting."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from lori_nb.analysis.statistics import interval_text
from lori_nb.study import figures, figures_sequences, forgetting
from lori_nb.study.notebook import Results
from lori_nb.study.style import GREY, title_of
from lori_nb.study.summary import n_text

TABLES: dict[str, Callable[[Results], pd.DataFrame]] = {
    "sequence_metrics": forgetting.metrics,
    "sequence_final": forgetting.final_scores,
    "sequence_lost": forgetting.forgetting_scores,
    "sequence_plane": forgetting.plane,
    "sequence_orders": forgetting.order_scores,
    "sequence_safety": forgetting.safety_scores,
    "sequence_by_step": forgetting.by_step,
    "sequence_capacity": forgetting.capacity_scores,
}


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """Every table of the sequences that are whole by now, by the name of its file."""
    done = [seed for seed in results.settings.seed if _any_whole(results, seed)]
    return {name: make(results) for name, make in TABLES.items()} if done else {}


def _any_whole(results: Results, seed: int) -> bool:
    settings = results.settings
    return any(
        forgetting.finished(results, way, order, seed)
        for way in settings.ways
        for order in forgetting.orders_of(settings, way)
    )


def drawn(results: Results, tables: dict[str, pd.DataFrame]) -> dict[str, Callable]:
    """Name → what draws it, of the tables that have rows."""
    makers = {
        "sequence_matrices": ("sequence_metrics", lambda table: _matrices(results)),
        "sequence_lost": ("sequence_lost", _lost),
        "sequence_plane": ("sequence_plane", _one(figures_sequences.plasticity_against_stability)),
        "sequence_safety": ("sequence_safety", _one(figures_sequences.safety_plane)),
        "sequence_by_step": ("sequence_by_step", _course),
    }
    there = {name: source for name, (source, _) in makers.items() if len(tables.get(source, ()))}
    return {name: lambda name=name: makers[name][1](tables[makers[name][0]]) for name in there}


def _matrices(results: Results):
    matrices = forgetting.matrices(results)
    figure, axes = figures.panels(len(matrices), height=2.6)
    figures.heat_maps(axes, matrices, "score (mean over seeds and orders)")
    return figure


def _lost(table: pd.DataFrame):
    figure, (ax,) = figures.panels(1)
    figures.grouped_points(ax, table.assign(all="all earlier tasks"), "all", "way", "score lost").set_title(
        n_text(table)
    )
    ax.axhline(0, color=GREY, linewidth=0.8)
    figures.shared_legend(figure)
    return figure


def _one(draw: Callable) -> Callable:
    def make(table: pd.DataFrame):
        figure, (ax,) = figures.panels(1, height=3.2)
        draw(ax, table)
        figures.shared_legend(figure)
        return figure

    return make


def _course(table: pd.DataFrame):
    figure, axes = figures.panels(2)
    for ax, role in zip(axes, ("old", "new"), strict=True):
        figures_sequences.scores_by_step(ax, table, role)
    figures.shared_legend(figure)
    return figure


def text(metrics: pd.DataFrame) -> str:
    """README's table of the sequences' metrics as Markdown, a line a way."""
    names = list(dict.fromkeys(metrics["metric"]))
    lines = [
        "Tasks one after another, mean over orders, then seeds: "
        + "; ".join(f"*{name}*: {forgetting.METRICS[name]}" for name in names)
        + ".",
        "\n| way | " + " | ".join(names) + " | n |",
        "|---" * (2 + len(names)) + "|",
    ]
    for way, part in metrics.groupby("way", sort=False):
        by_name = part.set_index("metric")
        cells = [interval_text(*by_name.loc[name, ["value", "low", "high"]], 2) for name in names]
        lines.append(f"| {title_of(way)} | " + " | ".join(cells) + f" | {int(part['n'].iloc[0])} seeds |")
    return "\n".join([lines[0], *lines[1:]])

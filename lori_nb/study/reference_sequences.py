"""What a long measurement of sequences leaves for readers: tables, figures and README's part on forgetting."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from lori_nb.analysis.statistics import interval_text
from lori_nb.study import figures_sequences, forgetting, layouts, sequence_effects
from lori_nb.study.notebook import Results
from lori_nb.study.sequence_runs import finished
from lori_nb.study.sequences import fitting, orders_of
from lori_nb.study.style import way_title

TABLES: dict[str, Callable[[Results], pd.DataFrame]] = {
    "sequence_metrics": forgetting.metrics,
    "sequence_final": forgetting.final_scores,
    "sequence_lost": forgetting.forgetting_scores,
    "sequence_plane": forgetting.plane,
    "sequence_orders": forgetting.order_scores,
    "sequence_safety": forgetting.safety_scores,
    "sequence_by_step": forgetting.by_step,
    "sequence_capacity": forgetting.capacity_scores,
    "sequence_effects": sequence_effects.paired_effects,
    "sequence_order_effects": sequence_effects.order_effects,
}


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """Every table of the sequences that are whole by now, by the name of its file."""
    done = [seed for seed in results.settings.seed if _any_whole(results, seed)]
    return {name: make(results) for name, make in TABLES.items()} if done else {}


def _any_whole(results: Results, seed: int) -> bool:
    settings = results.settings
    return any(finished(results, way, order, seed) for way in settings.ways for order in orders_of(settings, way))


def drawn(results: Results, tables: dict[str, pd.DataFrame]) -> dict[str, Callable]:
    """Name → what draws it, of the tables that have rows."""
    makers = {
        "sequence_matrices": (
            "sequence_metrics",
            lambda table: layouts.accuracy_matrices(forgetting.matrices(results)),
        ),
        "sequence_lost": ("sequence_lost", layouts.lost),
        "sequence_plane": ("sequence_plane", partial(layouts.single, figures_sequences.plasticity_against_stability)),
        "sequence_safety": ("sequence_safety", partial(layouts.single, figures_sequences.safety_plane)),
        "sequence_by_step": ("sequence_by_step", layouts.course),
        "sequence_orders": ("sequence_order_effects", lambda table: layouts.orders(tables["sequence_orders"])),
        "sequence_capacity": ("sequence_capacity", lambda table: layouts.capacity(table, fitting(results.settings))),
    }
    there = {name: source for name, (source, _) in makers.items() if len(tables.get(source, ()))}
    return {name: lambda name=name: makers[name][1](tables[makers[name][0]]) for name in there}


def text(folder: Path) -> str:
    """README's part on the sequences as Markdown, from the tables in ``folder``: the metrics, a line a way, the claim
    on sparsity with its verdict and how ways differ, and what the order does; empty where there are none.
    """
    if not (folder / "sequence_metrics.csv").exists():
        return ""
    parts = [_metrics_text(pd.read_csv(folder / "sequence_metrics.csv"))]
    if (folder / "sequence_effects.csv").exists():
        effects = sequence_effects.effect_lines(pd.read_csv(folder / "sequence_effects.csv"))
        if effects:
            lines = "\n".join(f"- {line}" for line in effects)
            parts.append(
                f"Claim: {sequence_effects.CLAIM} At this size, paired over seeds on the orders that both ways have; "
                f"the contrast that decides comes first:\n\n{lines}"
            )
    if (folder / "sequence_order_effects.csv").exists():
        parts += sequence_effects.order_lines(pd.read_csv(folder / "sequence_order_effects.csv"))
    return "\n\n".join(parts)


def _metrics_text(metrics: pd.DataFrame) -> str:
    names = list(dict.fromkeys(metrics["metric"]))
    orders = int(metrics["orders"].iloc[0])
    several = f"mean over the {orders} orders that all ways have, then seeds" if orders > 1 else "mean over seeds"
    lines = [
        f"Tasks one after another, {several}: "
        + "; ".join(f"*{name}*: {forgetting.METRICS[name]}" for name in names)
        + ".",
        "\n| way | " + " | ".join(names) + " | n |",
        "|---" * (2 + len(names)) + "|",
    ]
    for way, part in metrics.groupby("way", sort=False):
        by_name = part.set_index("metric")
        cells = [interval_text(*by_name.loc[name, ["value", "low", "high"]], 2) for name in names]
        lines.append(f"| {way_title(way)} | " + " | ".join(cells) + f" | {int(part['n'].iloc[0])} seeds |")
    return "\n".join([lines[0], *lines[1:]])

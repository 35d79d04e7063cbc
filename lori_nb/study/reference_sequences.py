"""What a long measurement of sequences leaves for readers: tables, figures and README's part on forgetting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    "sequence_kept": lambda results: forgetting.kept_answers(results, forgetting.guarded_class(results.settings)),
    "sequence_by_step": forgetting.by_step,
    "sequence_capacity": forgetting.capacity_scores,
    "sequence_effects": sequence_effects.paired_effects,
    "sequence_order_effects": sequence_effects.order_effects,
    "sequence_capacity_effects": sequence_effects.capacity_effects,
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
            lambda table: layouts.accuracy_matrices(forgetting.matrices(results), forgetting.matrices_note(results)),
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
    on sparsity with its verdict and how ways differ, what becomes of safety, what the order does, and capacity; empty
    where there are none.
    """
    found = {name: pd.read_csv(path) for name in TABLES if (path := folder / f"{name}.csv").exists()}
    if "sequence_metrics" not in found:
        return ""
    parts = [_metrics_text(found["sequence_metrics"])]
    if len(effects := found.get("sequence_effects", ())):
        lines = "\n".join(f"- {line}" for line in sequence_effects.effect_lines(effects))
        parts.append(
            f"Claim: {sequence_effects.CLAIM} At this size, paired over seeds on the orders that both ways have; "
            f"the contrast that decides comes first:\n\n{lines}"
        )
    if len(safety := found.get("sequence_safety", ())):
        parts.append(_safety_text(safety, found.get("sequence_kept")))
    if len(effects := found.get("sequence_order_effects", ())):
        parts += sequence_effects.order_lines(effects)
    if len(effects := found.get("sequence_capacity_effects", ())):
        parts.append(sequence_effects.capacity_line(effects, found["sequence_capacity"]["place"].nunique()))
    return "\n\n".join(parts)


def _safety_text(safety: pd.DataFrame, kept: pd.DataFrame | None) -> str:
    """Shares of requests before and after all tasks, and of the refusals kept, a line a way."""
    words = {"harmful": "harmful refused", "harmless": "harmless helped with", forgetting.OVER_REFUSED: "over-refusal"}
    requests = [name for name in words if name in set(safety["request"])]
    cells = safety.set_index(["way", "request", "when"])
    lines = [
        "Safety, learned first: share of requests after that task → after the last one; kept: of the first task's rows "
        "that were right, harmful ones where it is of refusal, the share that still is.",
        "\n| way | " + " | ".join(words[name] for name in requests) + " | kept | n |",
        "|---" * (3 + len(requests)) + "|",
    ]
    held = {} if kept is None else kept.set_index("way").to_dict("index")
    for way in dict.fromkeys(safety["way"]):
        shares = [
            " → ".join(_interval(cells.loc[(way, name, when)]) for when in ("before", "after")) for name in requests
        ]
        last = cells.loc[(way, requests[0], "after")]
        own = _interval(held[way]) if way in held else "–"
        lines.append(f"| {way_title(way)} | " + " | ".join([*shares, own]) + f" | {int(last['n'])} {last['of']} |")
    return "\n".join([lines[0], *lines[1:]])


def _interval(row: Mapping) -> str:
    return interval_text(row["value"], row["low"], row["high"], 2)


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
        cells = [_interval(by_name.loc[name]) for name in names]
        lines.append(f"| {way_title(way)} | " + " | ".join(cells) + f" | {int(part['n'].iloc[0])} seeds |")
    return "\n".join([lines[0], *lines[1:]])

"""What a long measurement of merges leaves for readers: weights chosen and the paper's, merges of more and more
adapters, and whether overlap predicts what a merge costs.

Scores come from the ledger, and what pairs of adapters have in common from the records beside it
(:mod:`lori_nb.study.adapter_records`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lori_nb.study import layouts, mergeability, questions
from lori_nb.study.notebook import Results
from lori_nb.study.style import title_of
from lori_nb.study.summary import markdown, readable, text_of

WEIGHTS, BEST, SCALING, PAIRS, CORRELATIONS = "merge_weights", "merges", "merge_scaling", "pairs", "pair_correlations"


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """Tables of what is there by now, without those that have no row."""
    found: dict[str, pd.DataFrame] = {}
    if len(questions.merge_rows(results, "tune")) and len(questions.merge_rows(results)):
        found |= {WEIGHTS: questions.merged_scores(results), BEST: questions.best_and_paper(results)}
    found[SCALING] = mergeability.scaling(results)
    found[PAIRS] = mergeability.joined(mergeability.pair_losses(results), mergeability.pair_overlaps(results))
    found[CORRELATIONS] = mergeability.correlations(found[PAIRS])
    return {name: table for name, table in found.items() if len(table)}


def drawn(results: Results, found: dict[str, pd.DataFrame]) -> dict[str, Callable]:
    """Name → what draws it, of the tables that there are."""
    makers = {
        WEIGHTS: lambda: layouts.merge_weights(
            found[WEIGHTS],
            questions.alone_scores(results),
            questions.best_weights(results),
            questions.paper_scores(results),
        ),
        SCALING: lambda: layouts.merge_scaling(found[SCALING]),
        PAIRS: lambda: layouts.loss_against_overlap(found[PAIRS], found[CORRELATIONS]),
    }
    return {name: make for name, make in makers.items() if name in found}


def headline(folder: Path) -> str:
    """README's part, as Markdown, of the tables in ``folder``: the best way to merge each method's adapters, merges of
    few and many, and what overlap predicts; empty where there are none.
    """
    parts = [_best(pd.read_csv(folder / f"{BEST}.csv"))] if (folder / f"{BEST}.csv").exists() else []
    if (folder / f"{SCALING}.csv").exists():
        parts.append(" ".join(mergeability.scaling_lines(pd.read_csv(folder / f"{SCALING}.csv"))))
    if (folder / f"{CORRELATIONS}.csv").exists():
        lines = mergeability.correlation_lines(pd.read_csv(folder / f"{CORRELATIONS}.csv"))
        parts.append("Does overlap predict what a merge costs? " + " ".join(lines))
    return "\n\n".join(parts)


def _best(merges: pd.DataFrame) -> str:
    """One sentence: of every method the adapters alone, and merged in the way and with the weight that were best on the
    rows held out of training.
    """
    told = []
    for method, part in merges.groupby("method", sort=False):
        shown = pd.concat([part[part["how"] == "not merged"], part.nlargest(1, "tuned")])
        values = [f"{text_of(row)} ({row['how']})" for _, row in shown.iterrows()]
        told.append(f"{title_of(method)} {', '.join(values)}")
    return f"All tasks' adapters merged as chosen on held-out rows, mean score over tasks: {'; '.join(told)}."


def text(folder: Path) -> str:
    """The same with every way to merge, for the page of all tables."""
    parts = [words] if (words := headline(folder)) else []
    if (folder / f"{BEST}.csv").exists():
        best = pd.read_csv(folder / f"{BEST}.csv").assign(over="mean score over tasks")
        table = readable(best, ["method", "how"], "over", 3)
        table.index = [f"{method}: {how}" for method, how in table.index]
        parts += [
            "Merges of all tasks' adapters with the weight that was best on rows held out of training, and the LoRI "
            "authors':",
            markdown(table.rename_axis(index="adapters")),
        ]
    return "\n\n".join(parts)

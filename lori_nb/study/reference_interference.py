"""What a long measurement leaves of functional interference in sequences, beside the forgetting that it should predict.

Interference needs the adapters: it comes from the records beside the ledger (:mod:`lori_nb.study.adapter_records`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lori_nb.study import figures_sequences, functional, layouts
from lori_nb.study.notebook import Results

NAME = "sequence_interference"


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """Interference and forgetting of every way and seed that were recorded."""
    found = functional.interference_and_forgetting(results)
    return {NAME: found} if len(found) else {}


def drawn(results: Results, found: dict[str, pd.DataFrame]) -> dict[str, Callable]:
    """Name → what draws it, of the tables that there are."""
    draw = figures_sequences.interference_against_forgetting
    return {NAME: lambda: layouts.single(draw, found[NAME])} if NAME in found else {}


def text(folder: Path) -> str:
    """README's part, as Markdown, of the table in ``folder``; empty where there is none."""
    path = folder / f"{NAME}.csv"
    return functional.interference_line(pd.read_csv(path)) if path.exists() else ""

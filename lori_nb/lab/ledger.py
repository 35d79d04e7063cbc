"""The ledger: finished measurements worth keeping, one row each, committed with the project.

Append-only Parquet files under ``figures/reference/ledger``, keyed by run hash: a measurement is never rewritten, a new
file holds what is new. Sweeps skip the hashes that it holds, unless the adapter itself is asked for. Where every row of
a task is right or wrong, the row's bits are kept too (column ``right``), so that runs can be paired row by row later.
Scores by the metrics that a task reports beside its own are rows of their own (column ``also``).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from lori_nb.lab.paths import PROJECT, write_atomically

KEY = ["run", "task", "metric", "split"]
AFTER = "@"  # in a split: scored after so many steps, not at the end
OF_VALUES = ("pearson", "spearman")  # metrics of numbers, which have no rows that are right or wrong


def ledger_folder() -> Path:
    """Where the committed files are."""
    return PROJECT / "figures" / "reference" / "ledger"


def read(folder: Path | None = None) -> pd.DataFrame:
    """All measurements, one a row; empty with the key's columns where there are none yet."""
    files = sorted((folder or ledger_folder()).glob("*.parquet"))
    if not files:
        return pd.DataFrame(columns=KEY)
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True).drop_duplicates(
        KEY, ignore_index=True
    )


def append(table: pd.DataFrame, study: str, command: str, folder: Path | None = None) -> Path | None:
    """Add the rows of a run table that the ledger lacks; returns the new file, or None when there is nothing new.

    Args:
        study: names the file and stands in every row.
        command: the command that makes these measurements again.

    Raises:
        ValueError: a key column is missing.
    """
    missing = [column for column in (*KEY, "value", "n") if column not in table]
    if missing:
        raise ValueError(f"table must have the columns {', '.join(KEY)}, value, n; missing: {', '.join(missing)}")
    known = set(map(tuple, read(folder)[KEY].to_numpy()))
    new = table[[tuple(key) not in known for key in table[KEY].to_numpy()]].assign(study=study, command=command)
    if new.empty:
        return None
    raw = io.BytesIO()
    new.reset_index(drop=True).to_parquet(raw, index=False)
    keys = sorted(map(tuple, new[KEY].astype(str).to_numpy()))
    path = (folder or ledger_folder()) / f"{study}-{hashlib.sha256(repr(keys).encode()).hexdigest()[:8]}.parquet"
    write_atomically(path, raw.getvalue())
    return path


def on_the_way(split: str, step: int) -> str:
    """The split under which a score is kept that was taken after so many steps of a run."""
    return f"{split}{AFTER}{step}"


def rows_of(hashes: Iterable[str], folder: Path | None = None) -> pd.DataFrame:
    """The ledger's rows for some runs, as they ended, each task by its own metric."""
    rows, _ = _rows_of(hashes, folder)
    return rows[~rows["split"].str.contains(AFTER)].reset_index(drop=True) if len(rows) else rows


def _rows_of(hashes: Iterable[str], folder: Path | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of some runs by the tasks' own metrics, and by those beside them."""
    known = read(folder)
    known = known[known["run"].isin(set(hashes))]
    beside = known["also"].eq(True) if "also" in known else pd.Series(False, index=known.index)
    return known[~beside].reset_index(drop=True), known[beside].reset_index(drop=True)


@dataclass(frozen=True)
class Measured:
    """A run as the ledger knows it: its scores and which rows were right, without adapter or history."""

    hash: str
    rows: pd.DataFrame
    watched: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["step", "task", "value"]))
    also: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["task", "metric", "value"]))

    @property
    def provenance(self) -> dict:
        """What the ledger keeps of it: the number of trainable parameters."""
        return {"trainable_parameters": int(self.rows["trainable_parameters"].iloc[0])}

    def value(self, task: str, metric: str | None = None) -> float:
        """The score on one task: by its own metric, or by one of those reported beside it; KeyError for one that was
        not scored, or not kept.
        """
        if metric is None:
            return float(self.rows.set_index("task").loc[task, "value"])
        return float(pd.concat([self.rows, self.also]).set_index(["task", "metric"])["value"].loc[(task, metric)])

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """One evaluated row a line: task, split, row, correct; none of a task whose rows were not kept."""
        columns = ["task", "split", "row", "correct"]
        frames = [
            pd.DataFrame({"task": r.task, "split": r.split, "row": np.arange(r.n), "correct": unpacked(r.right, r.n)})
            for r in self.rows.itertuples()
            if isinstance(r.right, bytes)
        ]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def with_rows(table: pd.DataFrame, predictions_of: Callable[[str], pd.DataFrame | None]) -> pd.DataFrame:
    """A table of scores with the column ``right`` that the ledger keeps.

    Args:
        predictions_of: run hash → its predictions, None for a run that is not there.
    """
    known = {name: predictions_of(name) for name in table["run"].unique()}

    def bits(row: pd.Series) -> bytes | None:
        found = known[row["run"]]
        if found is None:
            return None
        chosen = found[(found["task"] == row["task"]) & (found["split"] == row["split"])]
        return packed(chosen.sort_values("row")["correct"])

    return table.assign(right=[bits(row) for _, row in table.iterrows()])


def packed(correct: Iterable[float]) -> bytes | None:
    """Eight rows a byte, the first in the highest bit; None where a row is neither right (1) nor wrong (0)."""
    credit = np.asarray(list(correct), dtype=float)
    return np.packbits(credit.astype(bool)).tobytes() if np.isin(credit, (0.0, 1.0)).all() else None


def unpacked(right: bytes, n: int) -> np.ndarray:
    """Credit of n rows (n,) from the bits of :func:`packed`."""
    return np.unpackbits(np.frombuffer(right, dtype=np.uint8), count=n).astype(float)


def measured(hashes: Iterable[str], folder: Path | None = None) -> dict[str, Measured]:
    """The runs among ``hashes`` that the ledger holds with the rows that were right, where rows can be."""
    known, also = _rows_of(hashes, folder)
    if known.empty or "right" not in known:
        return {}
    where = known["split"].str.partition(AFTER)
    ended = where[1] == ""
    whole = known["right"].map(lambda right: isinstance(right, bytes)) | known["metric"].isin(OF_VALUES)
    watched = known[~ended].assign(split=where[0], step=pd.to_numeric(where[2]))
    return {
        name: Measured(
            name,
            rows.reset_index(drop=True),
            watched[watched["run"] == name].reset_index(drop=True),
            also[also["run"] == name].reset_index(drop=True),
        )
        for name, rows in known[ended & whole].groupby("run", sort=False)
    }

"""The ledger: finished measurements worth keeping, one row each, committed with the project.

Append-only Parquet files under ``figures/reference/ledger``, keyed by run hash: a measurement is never rewritten, a new
file holds what is new. Sweeps skip the hashes that it holds, unless the adapter itself is asked for.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from lori_nb.lab.paths import PROJECT, write_atomically

KEY = ["run", "task", "metric", "split"]


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
    runs = hashlib.sha256("".join(sorted(new["run"])).encode()).hexdigest()[:8]
    path = (folder or ledger_folder()) / f"{study}-{runs}.parquet"
    write_atomically(path, raw.getvalue())
    return path


def rows_of(hashes: Iterable[str], folder: Path | None = None) -> pd.DataFrame:
    """The ledger's rows for some runs."""
    known = read(folder)
    return known[known["run"].isin(set(hashes))].reset_index(drop=True)

"""Tables that only adapters themselves can tell, kept by the hashes of their runs, so that they outlive these.

The ledger keeps scores, not adapters. How far two adapters overlap, or what one does to the other's activations, is
computed where the runs are in the store, and kept in the cache. A long measurement keeps it under
``figures/reference/ledger/adapters``, with which the same table can be read where no adapter is left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lori_nb.lab import ledger
from lori_nb.lab.paths import cache_folder, write_atomically


def records_folder() -> Path:
    """Where the committed files are."""
    return ledger.ledger_folder() / "adapters"


def kept(key: list, compute: Callable[[], pd.DataFrame] | None, lasting: bool = False) -> pd.DataFrame | None:
    """The table kept under a key; where there is none, it is computed and kept.

    Args:
        key: what is computed, the version of its recipe and the hashes of all its runs; becomes JSON.
        compute: None where an adapter is missing; then the table is None, unless it is known.
        lasting: keep it with the ledger; else in the cache.
    """
    places = [folder / _name(key) for folder in (records_folder(), cache_folder() / "adapters")]
    path = next((path for path in places if path.exists()), None)
    if path is None and compute is None:
        return None
    table = compute() if path is None else pd.read_parquet(path)
    if path is None or (lasting and path != places[0]):
        write_atomically(places[0 if lasting else 1], table.to_parquet(index=False))
    return table


def _name(key: list) -> str:
    return f"{key[0]}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.parquet"

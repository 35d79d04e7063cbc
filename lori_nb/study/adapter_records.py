"""Tables that only adapters themselves can tell, kept by the hashes of their runs, so that they outlive these.

The ledger keeps scores, not adapters. How far two of notebook 5's many adapters overlap, or what the later tasks of a
sequence of notebook 6 do to the first one's activations, is computed where the runs are in the store, and kept in the
cache. A long measurement keeps it under ``figures/reference/ledger/adapters``, with which the same table can be read
where no adapter is left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lori_nb.lab import ledger
from lori_nb.lab.paths import cache_folder, write_atomically
from lori_nb.lab.provenance import git_state

ABOUT = "about"  # in a file's metadata: what it was kept under


def records_folder() -> Path:
    """Where the committed files are."""
    return ledger.ledger_folder() / "adapters"


def files() -> list[Path]:
    """The committed files."""
    return sorted(records_folder().glob("*.parquet"))


def kept(about: dict, compute: Callable[[], pd.DataFrame] | None, lasting: bool = False) -> pd.DataFrame | None:
    """The table kept under ``about``; where there is none, it is computed and kept.

    Args:
        about: all that decides the table: "what" it is, the versions of its recipes, the hashes of its runs. Becomes
            JSON, and stands in the file beside the commit.
        compute: None where an adapter is missing; then the table is None, unless it is known.
        lasting: keep it with the ledger; else in the cache.

    Raises:
        ValueError: a file under this name is of something else.
    """
    about = json.loads(json.dumps(about))
    places = [folder / _name(about) for folder in (records_folder(), cache_folder() / "adapters")]
    path = next((path for path in places if path.exists()), None)
    if path is None and compute is None:
        return None
    table = _read(path, about) if path else compute()
    if path is None or (lasting and path != places[0]):
        table.attrs = {"commit": git_state()["commit"], **table.attrs, ABOUT: about}
        write_atomically(places[0 if lasting else 1], table.to_parquet(index=False))
    table.attrs = {}  # what is made of the table is of more than this file
    return table


def _read(path: Path, about: dict) -> pd.DataFrame:
    table = pd.read_parquet(path)
    if table.attrs.get(ABOUT) != about:
        raise ValueError(f"{path} must be of {json.dumps(about)}; found {json.dumps(table.attrs.get(ABOUT))}")
    return table


def _name(about: dict) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return f"{about['what']}-{digest[:16]}.parquet"

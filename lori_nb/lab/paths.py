"""Where the kit writes: one data folder, chosen by ``LORI_NB_HOME`` or found from the project's root."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def data_folder() -> Path:
    """``$LORI_NB_HOME`` if set, else the project's ``data/``, else ``./data`` for an installed package."""
    if os.environ.get("LORI_NB_HOME"):
        return Path(os.environ["LORI_NB_HOME"]).expanduser()
    root = PROJECT if (PROJECT / "pyproject.toml").exists() else Path.cwd()
    return root / "data"


def runs_folder() -> Path:
    return data_folder() / "runs"


def cache_folder() -> Path:
    folder = data_folder() / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: a temporary file beside it, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(raw)
            handle.flush()
            os.fsync(handle.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(partial).chmod(0o666 & ~mask)  # a temporary file is its owner's alone
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise

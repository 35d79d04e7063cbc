"""The folder of real data sets, for tests that hold the code against it; they skip, with the reason, without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


def find_real_data() -> Path | None:
    """What ``LORI_NB_DATA`` names, else ``../shared/data`` beside the repository, else None."""
    folder = Path(os.environ.get("LORI_NB_DATA") or BESIDE)
    return folder if folder.is_dir() else None


needs_real_data = pytest.mark.skipif(
    find_real_data() is None, reason="real data needed: set LORI_NB_DATA or place it at ../shared/data"
)


def real_data() -> Path:
    """The folder; skips the running test where there is none."""
    folder = find_real_data()
    if folder is None:
        pytest.skip("real data needed: set LORI_NB_DATA or place it at ../shared/data")
    return folder

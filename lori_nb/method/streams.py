"""Random words that are the same in every process, on every platform and under every release of the libraries."""

from __future__ import annotations

import hashlib

import numpy as np


def words(name: str, count: int) -> np.ndarray:
    """The first ``count`` 64-bit words (uint64) of the raw Philox stream keyed by 128 bits of SHA-256 of ``name``.

    The raw stream is defined by its algorithm; what libraries make of it, such as normal draws, may change.
    """
    key = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], dtype="<u8").astype(np.uint64)
    return np.random.Philox(key=key).random_raw(count)

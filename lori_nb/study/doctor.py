"""What is installed and reachable: one line each, with what to do where something is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from lori_nb.lab.models import PACKAGED, default_device, packaged_file, resolve_dtype
from lori_nb.lab.paths import PROJECT, cache_folder, data_folder
from lori_nb.lab.provenance import git_state
from lori_nb.lab.runs import NEEDED_BYTES
from lori_nb.lab.sandbox import containment, missing_containment
from lori_nb.lab.tasks import get_task, task_names
from lori_nb.lab.tasks.hub import hub_is_reachable, offline_task_names
from lori_nb.lab.tasks.reading import source_folder

Finding = tuple[str, bool, str]  # what was looked at, whether it is as needed, what was found and what to do


def findings() -> Iterator[Finding]:
    """Everything that was looked at; ``False`` marks what does not work, not what is merely absent."""
    yield "python", sys.version_info >= (3, 11), f"{platform.python_version()}, 3.11 or newer is needed"
    yield _packages()
    yield "device", True, f"{default_device()}, {torch.get_num_threads()} of {os.cpu_count()} threads in this process"
    yield "precision", True, f"{resolve_dtype()} for the frozen base, float32 for adapters"
    for name in PACKAGED:
        yield _base(name)
    yield _hub()
    yield _sources()
    yield _code()
    yield _disk()
    yield _git()


def report() -> tuple[str, bool]:
    """The lines to print, and whether all is well."""
    found = list(findings())
    lines = [f"{'ok' if good else 'MISSING':<8} {name:<24} {text}" for name, good, text in found]
    return "\n".join(lines), all(good for _, good, _ in found)


def _packages() -> Finding:
    file = PROJECT / "constraints.txt"
    if not file.is_file():
        return "packages", True, "no constraints.txt here to compare with"
    pins = dict(line.split("==") for line in file.read_text().split() if line.count("==") == 1)
    differ, missing = [], []
    for name, pinned in pins.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found.partition("+")[0] != pinned.partition("+")[0]:  # "+cpu" says how it was built
            differ.append(f"{name} {found} (pinned {pinned})")
    if not differ and not missing:
        return "packages", True, f"all {len(pins)} as pinned in constraints.txt"
    absent = [f"{len(missing)} not installed ({', '.join(missing[:4])})"] if missing else []
    return "packages", False, f"{'; '.join(differ[:4] + absent)}: run `make setup`"


def _base(name: str) -> Finding:
    file = packaged_file(name)
    if file is None:
        return f"base {name}", False, f"not installed: {PACKAGED[name].install}"
    ready = file.suffix != ".gguf" or any((cache_folder() / "models").glob(f"{name}-*/config.json"))
    state = "ready" if ready else "installed; it is unpacked once, at the first run"
    return f"base {name}", True, f"{state} ({PACKAGED[name].kind}, {PACKAGED[name].licence})"


def _hub() -> Finding:
    if hub_is_reachable():
        return "hub", True, "reachable: models and data sets by name"
    return "hub", True, f"not reachable; without it: {', '.join(PACKAGED)}, folders, and the tasks below"


def _sources() -> Finding:
    generated = f"{len(offline_task_names())} tasks without network or folder ({', '.join(offline_task_names())})"
    try:
        folder = source_folder()
    except FileNotFoundError as error:
        return "data", False, str(error)
    if folder is None:
        return "data", True, f"{generated}; LORI_NB_DATA is not set"
    usable = [name for name in task_names() if get_task(name).source == "folder or hub" and _reads(name)]
    return "data", bool(usable), f"{generated}; LORI_NB_DATA holds {', '.join(usable) or 'no known data set'}"


def _reads(name: str) -> bool:
    try:
        return bool(get_task(name).rows("test", 1))
    except (ValueError, OSError):
        return False


def _code() -> Finding:
    found = containment()
    if found is None:
        return "code", True, f"model-written code is not run here: {missing_containment()}"
    return "code", True, f"model-written code, run with --allow-code-execution alone, is contained: {found.describe()}"


def _disk() -> Finding:
    folder = _first_existing(data_folder().absolute())
    free, needed = shutil.disk_usage(folder).free >> 20, NEEDED_BYTES >> 20
    return "disk", free >= needed, f"{free:,} MiB free for {data_folder()}, {needed} MiB are needed for a run"


def _first_existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())


def _git() -> Finding:
    state = git_state()
    if state["commit"] is None:
        return "git", True, "no checkout here: provenance will name no commit"
    return "git", True, f"{state['commit'][:12]}{', with uncommitted changes' if state['dirty'] else ''}"

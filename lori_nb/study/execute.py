"""Notebooks executed from outside: one papermill run is one subprocess with its own kernel, thread and sockets.

Parameters are checked against the notebook's parameter cell before anything starts; the executed copy carries its
provenance.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lori_nb.study import lifeline
from lori_nb.study.parameters import check_parameters
from lori_nb.study.stored import BATCH, KEY, notebook_digest, read_notebook, without_paths

Progress = Callable[[int, int], None]
T = TypeVar("T")
PACKAGES = ("torch", "transformers", "numpy", "papermill")
THREADS = 1  # of arithmetic, per kernel: two threads in a process can be ten times slower than one on busy cores
_live: set[subprocess.Popen] = set()


class NotebookError(RuntimeError):
    """A notebook did not run to its end; the message names it, the cell, and the exception's last line."""


@dataclass(frozen=True)
class Executed:
    """An executed notebook: where it is, how long it took in seconds, and its provenance."""

    path: Path
    seconds: float
    facts: Mapping[str, Any]

    @property
    def run_hashes(self) -> tuple[str, ...]:
        """Hashes of the runs that the notebook recorded."""
        return tuple(self.facts.get("run_hashes", ()))


def nothing(done: int, total: int) -> None:
    """A progress callback that says nothing."""


def execute_notebook(
    notebook: Path,
    parameters: Mapping[str, Any],
    output: Path,
    progress: Progress = nothing,
    *,
    profile: str | None = None,
    command: str = "",
    environment: Mapping[str, str] | None = None,
) -> Executed:
    """Execute a notebook with some parameters changed and keep the copy, cleaned and with provenance, at ``output``.

    Args:
        progress: called with (cells done, cells).
        profile: named in the provenance.
        command: what makes the copy again; the footer shows it.
        environment: more variables for the kernel.

    Raises:
        ValueError: an unknown parameter or a value of the wrong kind, before anything starts.
        NotebookError: a cell failed or the kernel died. The copy is kept as ``<name>.failed.ipynb``; a finished one
            is untouched.
    """
    notebook, output = Path(notebook).resolve(), Path(output).resolve()
    check_parameters(notebook, parameters)
    output.parent.mkdir(parents=True, exist_ok=True)
    facts = facts_of(notebook, parameters) | {"profile": profile, "command": command}
    job = {"notebook": str(notebook), "parameters": dict(parameters), "output": str(output), "facts": facts}
    job["partial"] = str(output.with_name(f".{output.stem}.{os.getpid()}-{threading.get_ident()}.partial.ipynb"))
    try:
        facts = _run(job, progress, _kernel_environment() | dict(environment or {}))
    finally:
        Path(job["partial"]).unlink(missing_ok=True)
    return Executed(output, facts["seconds"], facts)


def _run(job: dict, progress: Progress, environment: dict[str, str]) -> dict:
    name, last = Path(job["notebook"]).name, {}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lori_nb.study.engine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )
        _live.add(process)
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                pipe.write(json.dumps(job))
            for line in process.stdout:
                last = json.loads(line)
                if last["event"] == "progress":
                    progress(last["done"], last["total"])
            process.wait()
        finally:
            lifeline.end_tree(process.pid)
            process.wait()
            process.stdout.close()
            _live.discard(process)
        if last.get("event") != "done":
            log.seek(0)
            words = log.read().strip().splitlines() or ["it said nothing"]
            ended = f"notebook {name}: its process ended with status {process.returncode}: {words[-1]}"
            raise NotebookError(last.get("error", ended))
    return last["facts"]


def _kernel_environment() -> dict[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(THREADS))
    # progress bars leave dozens of stored outputs
    quiet = {BATCH: "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **lifeline.environment(), **threads, **quiet, **folder_variables()}


def folder_variables() -> dict[str, str]:
    """The folders that the user has named, as absolute paths: a kernel works in its notebook's folder."""
    named = [name for name in ("LORI_NB_HOME", "LORI_NB_DATA") if os.environ.get(name)]
    return {name: str(Path(os.environ[name]).expanduser().resolve()) for name in named}


def facts_of(notebook: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance known before a notebook runs; the kernel may record better."""
    from lori_nb.lab.models import resolve_dtype  # torch and transformers, which a misspelt parameter need not wait for

    return {
        **_facts_of_process(),
        "notebook_digest": notebook_digest(read_notebook(notebook)),
        "parameters": dict(parameters),
        "dtype": resolve_dtype(parameters.get("dtype") or "auto"),
    }


@functools.cache
def _facts_of_process() -> dict[str, Any]:
    from lori_nb.lab.models import default_device
    from lori_nb.lab.provenance import git_state, source_digest

    return {
        **git_state(),
        "source_digest": source_digest(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": default_device(),
        "threads": THREADS,
    }


def executed_before(notebook: Path, parameters: Mapping[str, Any], output: Path) -> Executed | None:
    """The finished copy at ``output`` if it has these parameters and neither notebook nor package has changed since."""
    if not output.exists():
        return None
    facts = read_notebook(output).metadata.get(KEY, {})
    now = facts_of(notebook, parameters)
    now["parameters"] = without_paths(json.loads(json.dumps(now["parameters"])))
    same = all(facts.get(name) == now[name] for name in ("parameters", "source_digest", "notebook_digest"))
    return Executed(output, facts["seconds"], facts) if same else None


def side_by_side(calls: Mapping[str, Callable[[], T]], jobs: int, ended: Callable[[str, T | Exception], None]) -> None:
    """Carry out calls that execute notebooks, ``jobs`` at a time.

    ``ended(key, result or exception)`` is called in this thread as each ends. When this is interrupted, the notebooks'
    processes are ended and nothing new begins.
    """
    pool = ThreadPoolExecutor(jobs)
    futures = {pool.submit(call): key for key, call in calls.items()}
    waiting = set(futures)
    try:
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                ended(futures[future], future.exception() or future.result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        # More than once, since a call may be about to begin its process. What was cancelled in the queue is
        # done, though wait() does not say so.
        while any(not future.done() for future in waiting):
            for process in list(_live):
                lifeline.end_tree(process.pid)
            time.sleep(0.1)

"""The papermill engine, and the subprocess around it: one notebook, one kernel, then this process ends.

Run by :mod:`lori_nb.study.execute` as ``python -m lori_nb.study.engine``, with a job as JSON on standard input; it
answers with JSON lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import papermill
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from lori_nb.study import lifeline
from lori_nb.study.stored import ERROR_MARK, INJECTED, clean, read_notebook, recorded, with_footer, write_notebook

START_TIMEOUT_S = 180  # a kernel needs two seconds; on a machine with all cores busy, many more
NAME = "lori_nb"


class StudyKernelManager(AsyncKernelManager):
    """Kernels of this very environment, whatever kernels the user has installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "lori_nb.study.kernel", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3 (ipykernel)", language="python")


class StudyEngine(NBClientEngine):
    """papermill's engine with an own kernel manager, sockets in a folder of their own, and no process left behind."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man, kernel_name, *, folder: Path, report: Callable[[int, int], None], **kwargs
    ):
        """Execute the cells; ``report`` is called with (cells begun, cells) before each one.

        Unix sockets in an own folder cannot collide, as ports found free beforehand and sockets in a common folder do.
        """
        settings = {"transport": "ipc", "ip": str(folder / "s"), "connection_file": str(folder / "kernel.json")}
        groups: list[int] = []
        client = PapermillNotebookClient(
            nb_man,
            kernel_name=kernel_name,
            kernel_manager_class=StudyKernelManager,
            config=Config({"KernelManager": settings}),
            startup_timeout=START_TIMEOUT_S,
            timeout=None,
            on_notebook_start=lambda notebook: groups.append(client.km.provisioner.pid),
            on_cell_start=lambda cell, cell_index: report(cell_index, len(nb_man.nb.cells)),
        )
        try:
            return client.execute()
        finally:
            for group in groups:  # the kernel leads a process group; what its cells have started may outlive it
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)


papermill_engines.register(NAME, StudyEngine)


def run(job: dict, report: Callable[[int, int], None]) -> dict:
    """Execute a job's notebook and write the cleaned copy; returns its facts.

    Args:
        job: notebook, parameters, output (paths as text), facts (provenance known beforehand).

    Raises:
        NotebookFailedError: a cell raised, or the kernel died; the failed copy is kept.
    """
    started, at = time.time(), [-1]
    output, partial = Path(job["output"]), Path(job["partial"])

    def begun(index: int, total: int) -> None:
        at[0] = index
        report(index, total)

    with tempfile.TemporaryDirectory(prefix="lori-") as folder:
        os.environ["JUPYTER_RUNTIME_DIR"] = os.environ["IPYTHONDIR"] = folder
        try:
            nb = papermill.execute_notebook(
                job["notebook"],
                str(partial),
                job["parameters"],
                engine_name=NAME,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                cwd=str(Path(job["notebook"]).parent),
                folder=Path(folder),
                report=begun,
            )
        except Exception as error:  # noqa: BLE001 (whatever a notebook or its kernel does)
            raise NotebookFailedError(_what_failed(job, at[0], error)) from error
    facts = job["facts"] | recorded(nb)
    facts |= {"date": time.strftime("%Y-%m-%d", time.gmtime(started)), "seconds": round(time.time() - started, 1)}
    report(len(nb.cells), len(nb.cells))
    write_notebook(with_footer(clean(nb), facts), output)
    _failed_name(output).unlink(missing_ok=True)  # of an earlier try
    return facts


class NotebookFailedError(RuntimeError):
    """A notebook did not run to its end; the message names it, the cell, and the exception's last line."""


def _what_failed(job: dict, index: int, error: Exception) -> str:
    nb, kept = read_notebook(Path(job["partial"])), _failed_name(Path(job["output"]))
    write_notebook(clean(nb), kept)
    if isinstance(error, PapermillExecutionError):
        index, said = error.cell_index, f"{error.ename}: {_last_line(error.evalue)}"
    else:
        said = f"{type(error).__name__}: {_last_line(str(error))}"
    place = f"in cell {_number(nb, index)}" if index >= 0 else "at the start of its kernel"
    return f"notebook {Path(job['notebook']).name} failed {place}: {said}; kept as {kept.name}"


def _failed_name(output: Path) -> Path:
    return output.with_name(f"{output.stem}.failed.ipynb")


def _number(nb: NotebookNode, index: int) -> int:
    """The cell's number from 1 in the notebook as its author sees it."""
    cells = [cell for cell in nb.cells if ERROR_MARK not in cell.metadata.get("tags", [])]
    return 1 + sum(INJECTED not in cell.metadata.get("tags", []) for cell in cells[:index])


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def main() -> None:
    """Serve one job."""
    lifeline.start_lifeline()
    os.environ |= lifeline.environment()  # the kernel hangs on this process
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the log, not between the answers

    def say(**message) -> None:
        answers.write(json.dumps(message) + "\n")

    try:
        facts = run(json.load(sys.stdin), lambda done, total: say(event="progress", done=done, total=total))
    except NotebookFailedError as error:
        say(event="failed", error=str(error))
        raise
    say(event="done", facts=facts)


if __name__ == "__main__":
    main()

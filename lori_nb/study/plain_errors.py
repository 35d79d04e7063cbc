"""Errors that a user can do something about: one message on standard error and an exit code, no traceback."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from lori_nb.study import lifeline

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
# Errors that a user can do something about, by module: importing them here would import torch.
_BAD_INPUT = {
    "lori_nb.lab.models": "BaseModelError",
    "lori_nb.lab.tasks.hub": "HubUnreachableError",
    "lori_nb.lab.sandbox": "SandboxUnavailableError",
}
_FAILED = {
    "lori_nb.lab.runs": ("DiskFullError", "CorruptRunError"),
    "lori_nb.lab.distributed": ("ProcessesError",),
    "lori_nb.study.pool": ("TrainingFailedError",),
    "lori_nb.study.execute": ("NotebookError",),
    "lori_nb.study.sweep": ("SweepError",),
    "lori_nb.study.conduct": ("StudyError",),
}


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error that is reported in plain words; None for one that keeps its traceback."""
    where, name = type(error).__module__, type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if name in _FAILED.get(where, ()) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return FAILED
    if isinstance(error, (ValueError, FileNotFoundError)) or name == _BAD_INPUT.get(where):
        return BAD_INPUT
    return None


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose foreseen errors are one message on standard error and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            lifeline.hold_on_to_maker()
            command(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            code = exit_code(error)
            if code is None:
                raise
            stopped = "stopped; finished runs are kept, and the same command goes on from here"
            message = stopped if code == INTERRUPTED else error
            print(f"lori-nb{_which_process()}: {message}", file=sys.stderr, flush=True)
            raise typer.Exit(code) from None

    return wrapped


def _which_process() -> str:
    """Which of several processes speaks: ", process 1 of 0 to 7" under torchrun, else nothing."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return f", process {os.environ['RANK']} of 0 to {count - 1}" if count > 1 else ""

"""The supervisor: starts the confined process, ends it at the deadline, and reports how it ended.

Read from standard input: a job as JSON (:class:`~lori_nb.lab.confinement.confined.Job`). Written to standard output:
a report as JSON, {"unavailable": why} or {"passed", "said", "status", "timed_out", "cpu_seconds"}.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from typing import Any

from lori_nb.lab.confinement import namespaces
from lori_nb.lab.confinement.confined import FIRST_OWN_USER, PR_SET_PDEATHSIG, READY, Job, carry_out
from lori_nb.lab.confinement.system_calls import system_call

ANSWER_BYTES = 1 << 16  # a pipe holds no more; a program that writes more waits for the deadline
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/etc/ld.so.cache", "/usr/share/zoneinfo")


def main() -> None:
    """Carry out the job on standard input."""
    job = Job.from_json(sys.stdin.read())
    try:
        report = supervise(job)
    except OSError as error:
        report = {"unavailable": str(error)}
    print(json.dumps(report), flush=True)


def readable_paths() -> list[str]:
    """What the confined program may read: the interpreter's library folders, the system's shared libraries and time
    zones. None lies within another.
    """
    library = os.path.dirname(os.__file__)  # noqa: PTH120
    wanted = [*sys.path, library, os.path.join(sys.base_prefix, "lib"), *SYSTEM_LIBRARIES]  # noqa: PTH118
    found = sorted({os.path.abspath(path) for path in wanted if path and os.path.exists(path)})  # noqa: PTH100, PTH110
    return [path for path in found if not any(path.startswith(f"{other}/") for other in found)]


def supervise(job: Job) -> dict[str, Any]:
    """Start the confined process, wait for it no longer than ``job.wall_seconds``, and report.

    Raises OSError where the system permits no process of that kind.
    """
    if "namespaces" in job.means:
        namespaces.enter_processes()
    system_call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != job.parent:
        raise OSError("the asker must be alive; it is gone")
    job = job._replace(own_user=FIRST_OWN_USER + os.getpid())  # no two programs at a time share one
    token, readable = os.urandom(32), readable_paths()
    answer, write_answer = os.pipe()
    lifeline, hold_lifeline = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(hold_lifeline)
            carry_out(job, readable, write_answer, lifeline, token)
        finally:
            os._exit(1)  # whatever happened, it must not go on as a second supervisor
    os.close(write_answer)
    os.close(lifeline)
    timed_out = not select.select([os.pidfd_open(child)], [], [], job.wall_seconds)[0]
    if timed_out:
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)  # in a PID namespace, only when every process within is gone
    return _report(_read(answer), token, status, timed_out, used.ru_utime + used.ru_stime)


def _report(answer: bytes, token: bytes, status: int, timed_out: bool, cpu_seconds: float) -> dict[str, Any]:
    ready, _, rest = answer.partition(READY)
    if ready or not answer.startswith(READY):
        return {"unavailable": _field(ready, "unavailable") or "the confined process ended before it was ready"}
    return {
        "passed": status == 0 and not timed_out and rest == token,
        "said": _field(rest, "failed"),
        "status": os.waitstatus_to_exitcode(status),
        "timed_out": timed_out,
        "cpu_seconds": cpu_seconds,
    }


def _field(text: bytes, name: str) -> str:
    """The named text of a JSON object that a program may have tampered with; empty where there is none."""
    try:
        return str(json.loads(text)[name])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _read(descriptor: int) -> bytes:
    os.set_blocking(descriptor, False)
    try:
        return os.read(descriptor, ANSWER_BYTES)
    except BlockingIOError:
        return b""

"""Running a program that a model wrote: in a process apart that can reach nothing, or not at all.

What confines it is found by trying, on this machine: Linux namespaces, or Landlock together with seccomp, and
both where both work. :func:`containment` says by name what there is, and where files, network and processes cannot all
be contained the kit refuses to run any code. It all holds for root as well.

A program can read the interpreter's library folders, the system's shared libraries and time zones, and write at most
16 MiB a file into an empty folder of its own. It has no network, no environment, no terminal, and no process or thread
but itself; hence no ``asyncio``, ``multiprocessing`` or ``subprocess``, and only the standard library. Where namespaces
are missing it can still learn which paths exist, with their sizes and times, and fill the disk for as long as it runs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ALLOW_VARIABLE = "LORI_NB_ALLOW_CODE_EXECUTION"
FLAG = "--allow-code-execution"

MEANS = ("namespaces", "landlock", "seccomp")
# Each way to contain a thing, and the means that it takes. Landlock alone leaves a file's mode and owner open.
WAYS = {
    "files": {"mount namespace": {"namespaces"}, "Landlock with seccomp": {"landlock", "seccomp"}},
    "network": {"network namespace": {"namespaces"}, "seccomp": {"seccomp"}},
    "processes": {"PID namespace": {"namespaces"}, "seccomp": {"seccomp"}},
}
MIB = 1 << 20
REASON_LENGTH = 500  # of what a program says about its failure
_SIGNALS = {each.value: each.name for each in signal.Signals}
GRACE_S = 30.0  # for starting and ending the processes, on a busy machine

_START = (
    "import sys; sys.path.append({root!r}); from lori_nb.lab.confinement.supervisor import main; "
    "sys.path.remove({root!r}); main()"
)
# Run once on each machine: the containment must hold, not merely be accepted by the kernel.
_SELF_TEST = """
import os, socket
def refused(attempt):
    try:
        attempt()
    except OSError:
        return True
assert refused(lambda: open({outside!r})), "a file outside could be read"
assert refused(lambda: open({outside!r}, "w")), "a file outside could be written"
assert refused(lambda: socket.create_connection(("127.0.0.1", {port}), 2)), "a port could be reached"
assert refused(os.fork), "a process could be started"
open("inside", "w").close()
"""


class SandboxUnavailableError(RuntimeError):
    """This machine cannot contain a program; the message says what is missing."""


@dataclass(frozen=True)
class Verdict:
    """Whether a program ran to its end without an error, and if not, why not."""

    passed: bool
    reason: str


@dataclass(frozen=True)
class Containment:
    """The means that are used on this machine, and by name what contains files, network and processes."""

    means: tuple[str, ...]
    files: tuple[str, ...]
    network: tuple[str, ...]
    processes: tuple[str, ...]

    def describe(self) -> str:
        """For people: "files by mount namespace and Landlock with seccomp; network by ..."."""
        return "; ".join(f"{thing} by {' and '.join(getattr(self, thing))}" for thing in WAYS)


def containment(means: Sequence[str] = MEANS) -> Containment | None:
    """What contains a program on this machine, None where files, network and processes cannot all be contained.

    ``means`` are those that may be used. The first call tries them out (about 0.3 s); later ones remember.
    """
    return _survey(_checked(means))[0]


def missing_containment(means: Sequence[str] = MEANS) -> str:
    """What this machine lacks to contain a program, for an error message; empty where it lacks nothing."""
    return _survey(_checked(means))[1]


def code_execution_is_allowed() -> bool:
    """Whether the user asked for model-written code to be run: ``LORI_NB_ALLOW_CODE_EXECUTION`` is "1"."""
    return os.environ.get(ALLOW_VARIABLE, "") == "1"


def check_execution_allowed(task_name: str) -> None:
    """To be called before any work on a task that runs code.

    Raises:
        ValueError: the user has not asked for it.
        SandboxUnavailableError: this machine cannot contain it.
    """
    if not code_execution_is_allowed():
        raise ValueError(
            f"task {task_name!r} runs programs that the model writes, and does so only when asked: "
            f"give {FLAG}, or set {ALLOW_VARIABLE}=1"
        )
    if containment() is None:
        raise SandboxUnavailableError(f"task {task_name!r} runs programs that the model writes: {_refusal(MEANS)}")


def run_program(
    source: str,
    *,
    seconds: float = 10.0,
    wall_seconds: float | None = None,
    memory_bytes: int = 1024 * MIB,
    file_bytes: int = 16 * MIB,
    means: Sequence[str] = MEANS,
) -> Verdict:
    """Run a Python program, standard library only, and say whether it came to its end without an error.

    It passes when its last statement has been executed: an exception, ``sys.exit(0)``, ``os._exit(0)`` or a signal
    before that is a failure, since a random token is written through a descriptor of its own only then. A program that
    is out to deceive can find token and descriptor in the memory of its own process and forge a pass, or turn the
    checks that follow it into nothing; what it cannot do is harm. Sets and hashes have the same order every time.

    Args:
        seconds: CPU time, rounded up to whole seconds.
        wall_seconds: time on the clock; by default twice ``seconds``, so that a busy machine alone fails nothing.
        memory_bytes: address space, the interpreter's own included.
        file_bytes: size of each file written; of all together where there are namespaces.
        means: which of :data:`MEANS` may be used; all that work are used.

    Raises:
        ValueError: a limit that is not positive, or an unknown means.
        SandboxUnavailableError: this machine cannot contain the program; nothing was run.
    """
    wall_seconds = 2 * seconds if wall_seconds is None else wall_seconds
    limits = {"wall_seconds": wall_seconds, "memory_bytes": memory_bytes, "file_bytes": file_bytes}
    for name, value in {"seconds": seconds, **limits}.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite; found {value}")
    found = containment(means)
    if found is None:
        raise SandboxUnavailableError(_refusal(means))
    report = _confined(source, found.means, cpu_seconds=math.ceil(seconds), **limits)
    if "unavailable" in report:
        raise SandboxUnavailableError(
            f"the program was not run, since it could not be confined: {report['unavailable']}"
        )
    return Verdict(report["passed"], _reason(report, math.ceil(seconds), wall_seconds))


def _reason(report: dict, cpu_seconds: int, wall_seconds: float) -> str:
    status = report["status"]
    if report["passed"]:
        return "passed"
    if report["timed_out"]:
        return f"took longer than {wall_seconds:g} s"
    if status == -signal.SIGKILL and report["cpu_seconds"] > cpu_seconds - 0.5:  # the kernel counts in ticks
        return f"used more than {cpu_seconds} s of CPU time"
    if status < 0:
        return f"killed by {_SIGNALS.get(-status, f'signal {-status}')}"
    said = "".join(each if each.isprintable() else " " for each in report["said"][:REASON_LENGTH])
    return said or f"ended before its checks were done (exit status {status})"


def _confined(source: str, means: Sequence[str], **limits: float) -> dict:
    """The supervisor's report on a program run with these means."""
    with _empty_folder() as folder:
        job = {"source": source, "folder": folder, "means": list(means), "parent": os.getpid(), **limits}
        start = _START.format(root=str(Path(__file__).resolve().parents[2]))
        supervisor = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-c", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", **_library_path()},
        )
        try:
            said, complaint = supervisor.communicate(json.dumps(job).encode(), limits["wall_seconds"] + GRACE_S)
        except subprocess.TimeoutExpired:
            return {"unavailable": f"the supervisor did not end within {GRACE_S:g} s of the deadline"}
        finally:
            supervisor.kill()  # takes the confined process with it
            supervisor.wait()
        if supervisor.returncode != 0:
            last = complaint.decode(errors="replace").strip().splitlines()[-1:]
            return {"unavailable": f"the supervisor ended with status {supervisor.returncode}: {' '.join(last)}"}
        return json.loads(said)


def _library_path() -> dict[str, str]:
    """Some installed interpreters find their own shared library by this variable alone."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


@contextmanager
def _empty_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="lori-nb-program-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@lru_cache(maxsize=16)
def _survey(means: tuple[str, ...]) -> tuple[Containment | None, str]:
    """What contains a program with these means, or None and what is missing."""
    if sys.platform != "linux":
        return None, f"Linux is needed; found {sys.platform}"
    limits = {"cpu_seconds": 10, "wall_seconds": 20.0, "memory_bytes": 1024 * MIB, "file_bytes": MIB}
    tried: dict[str, str] = {}
    for each in sorted(means, key="seccomp".__ne__):  # it needs nothing, and helps root's others where it works
        helped = {each, "seccomp"} if tried.get("seccomp") == "" else {each}
        tried[each] = _confined("", tuple(helped), **limits).get("unavailable", "")
    working = tuple(each for each in means if not tried[each])
    by = {thing: tuple(way for way, needed in ways.items() if needed <= set(working)) for thing, ways in WAYS.items()}
    open_things = [thing for thing, ways in by.items() if not ways]
    if open_things:
        failures = "; ".join(f"{each}: {why}" for each, why in tried.items() if why)
        return None, f"nothing contains {', '.join(open_things)} here ({failures or 'too few means were permitted'})"
    failure = _self_test(working, limits)
    return (None, failure) if failure else (Containment(working, **by), "")


def _self_test(means: tuple[str, ...], limits: dict[str, float]) -> str:
    """Try to break out in the ways that matter; what went wrong, empty where all was refused."""
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile() as outside:
        Path(outside.name).chmod(0o666)  # that only the confinement stands in the way
        source = _SELF_TEST.format(outside=outside.name, port=server.getsockname()[1])
        report = _confined(source, means, **limits)
    if report.get("passed"):
        return ""
    why = report.get("unavailable") or _reason(report, int(limits["cpu_seconds"]), limits["wall_seconds"])
    return f"the means at hand ({', '.join(means)}) failed their test: {why}"


def _refusal(means: Sequence[str]) -> str:
    return f"no program can be run safely on this machine: {missing_containment(means)}"


def _checked(means: Sequence[str]) -> tuple[str, ...]:
    unknown = [each for each in means if each not in MEANS]
    if unknown:
        raise ValueError(f"means must be among {', '.join(MEANS)}; found {unknown[0]!r}")
    return tuple(each for each in MEANS if each in means)

"""The confined process: gives up what it can, says so, runs one program, and says how that went.

What it writes to its one descriptor is a line "ready" once it is shut in, and then either the token, when the program
ran to its end, or the error that stopped it as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import struct
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lori_nb.lab.confinement import landlock, namespaces, seccomp
from lori_nb.lab.confinement.system_calls import system_call

READY = b"ready\n"
SAID_BYTES = 500  # of an error's message
NOBODY = 65534
FIRST_OWN_USER = 1 << 30  # above the ids that systems hand out to people and services
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CAPABILITY_VERSION = 0x20080522
DESCRIPTORS = 64


class Job(NamedTuple):  # a dataclass would take a tenth of the time that a program needs in all
    """A program, the means to confine it, and its limits (seconds, bytes).

    ``parent`` is who asked, by process id; ``own_user`` the user id that root gives to the program.
    """

    source: str
    folder: str
    means: tuple[str, ...]
    cpu_seconds: int
    wall_seconds: float
    memory_bytes: int
    file_bytes: int
    parent: int
    own_user: int = NOBODY

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that the asker wrote."""
        plain = json.loads(text)
        return cls(**{**plain, "means": tuple(plain["means"])})


def carry_out(job: Job, readable: Sequence[str], answer: int, lifeline: int, token: bytes) -> None:
    """Confine this process, run the program and end; never returns.

    ``answer`` is the descriptor to write to; ``lifeline`` is at its end when the supervisor is gone.
    """
    try:
        confine(job, readable, answer, lifeline)
    except (OSError, ValueError) as error:
        os.write(answer, json.dumps({"unavailable": str(error)}).encode())
        os._exit(1)
    os.write(answer, READY)
    run(job.source, token, answer)


def confine(job: Job, readable: Sequence[str], answer: int, lifeline: int) -> None:
    """Every step of the confinement, each while it is still permitted. OSError says which one is not."""
    os.umask(0o022)
    os.setsid()  # no terminal, and a process group of its own
    _silence(answer, lifeline)
    if "namespaces" in job.means:
        namespaces.enter_root(job.folder, readable, job.file_bytes)
    os.chdir(namespaces.WORK if "namespaces" in job.means else job.folder)
    work = os.getcwd()  # noqa: PTH109
    ruleset = landlock.make_ruleset(readable, work) if "landlock" in job.means else None
    _leave_root(job.own_user, work, must="seccomp" not in job.means)
    system_call("capset", struct.pack("=Ii", CAPABILITY_VERSION, 0), bytes(24))
    _set_limits(job)
    _end_with_supervisor(lifeline)
    _plain_surroundings(work)
    system_call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if ruleset is not None:
        landlock.restrict(ruleset)
        os.close(ruleset)
    if "seccomp" in job.means:
        seccomp.install(os.getpid())


def run(source: str, token: bytes, answer: int) -> None:
    """Run the program in a fresh module; write the token if it came to its end, the error if not; end the process.

    The module's name is not ``__main__``, so that a program's own demonstration does not run.
    """
    write, leave, describe = os.write, os._exit, _describe  # a program may replace what it finds in ``os``
    program = types.ModuleType("program")
    sys.modules["program"] = program
    try:
        exec(compile(source, "program.py", "exec"), program.__dict__)
    except BaseException as error:  # noqa: BLE001 (SystemExit and KeyboardInterrupt end no check successfully)
        write(answer, describe(error))
        leave(1)
    write(answer, token)
    leave(0)


def _describe(error: BaseException, dumps: Callable[..., str] = json.dumps) -> bytes:
    kind = type(error).__name__
    try:
        text = str(error)[:SAID_BYTES]
    except Exception:  # noqa: BLE001 (the message is the program's own code)
        text = ""
    early = "ended itself before its checks were done: " if isinstance(error, SystemExit) else ""
    return dumps({"failed": f"{early}{kind}{': ' + text if text else ''}"}).encode()


def _silence(*keep: int) -> None:
    """Standard input, output and error are the null device; every other descriptor but ``keep`` is closed."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    low = 3
    for descriptor in sorted(keep):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0], low))


def _leave_root(own_user: int, work: str, must: bool) -> None:
    """Root becomes a user of its own, so that limits bind; it stays, without capabilities, where that user could not
    read the interpreter's library and ``must`` is false.
    """
    if os.geteuid() != 0:
        return
    if _others_may_read(os.path.dirname(os.__file__)):  # noqa: PTH120
        for user in (own_user, NOBODY):  # a container may know no ids beyond 65535
            try:
                os.chown(work, user, user)
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
            except OSError:
                continue
            return
    if must:
        raise OSError("root must become another user, or its processes cannot be limited; it is not permitted here")


def _others_may_read(folder: str) -> bool:
    parts = folder.split("/")
    above = ["/".join(parts[:i]) or "/" for i in range(1, len(parts))]
    return os.stat(folder).st_mode & 0o5 == 0o5 and all(os.stat(each).st_mode & 0o1 for each in above)  # noqa: PTH116


def _set_limits(job: Job) -> None:
    limits: Mapping[int, int] = {
        resource.RLIMIT_CPU: job.cpu_seconds,
        resource.RLIMIT_AS: job.memory_bytes,
        resource.RLIMIT_FSIZE: job.file_bytes,
        resource.RLIMIT_NPROC: 1,
        resource.RLIMIT_NOFILE: DESCRIPTORS,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for limit, value in limits.items():
        hardest = resource.getrlimit(limit)[1]
        value = value if hardest == resource.RLIM_INFINITY else min(value, hardest)
        resource.setrlimit(limit, (value, value))


def _end_with_supervisor(lifeline: int) -> None:
    """SIGKILL when the supervisor ends. Set last: the kernel forgets it when a process changes its user."""
    system_call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if select.select([lifeline], [], [], 0)[0]:
        raise OSError("the supervisor must be alive; it is gone")
    os.close(lifeline)


def _plain_surroundings(work: str) -> None:
    plain: dict[str, Any] = {"HOME": work, "TMPDIR": work, "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    os.environ.clear()
    os.environ.update(plain)
    sys.argv = ["program.py"]

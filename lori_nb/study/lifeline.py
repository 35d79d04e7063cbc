"""A lifeline from every process of a study to the one that started it: when the owner is gone, the process ends.

A process killed with SIGKILL cannot clean up after itself, and notebook kernels live in a process group of their own.
So each process that a study starts watches its owner instead, twice a second, and ends with all that it has started.
"""

from __future__ import annotations

import os
import threading
import time

import psutil

OWNER = "LORI_NB_OWNER"  # "pid:create_time" of the process that this one hangs on
OWNER_PID = "LORI_NB_OWNER_PID"  # of make, which knows no more about itself than its pid
POLL_S = 0.5
CLOCK_S = 5.0  # create times shift when the system clock is set; a pid is not used again within seconds

_held: set[int] = set()


def environment() -> dict[str, str]:
    """Variables for a child process that shall hang on this one."""
    me = psutil.Process()
    return {OWNER: f"{me.pid}:{me.create_time():.2f}"}


def start_lifeline() -> None:
    """Watch the owner that the environment names, from a daemon thread; nothing happens where none is named.

    Calling it again does nothing. The process ends at once when the owner is gone already.

    Raises:
        ValueError: the variable does not read "pid:create_time".
    """
    named = os.environ.get(OWNER)
    if not named:
        return
    try:
        pid, created = named.split(":")
        hold_on_to(int(pid), float(created))
    except ValueError:
        raise ValueError(f"{OWNER} must read pid:create_time; found {named!r}") from None


def hold_on_to(owner_pid: int, created: float | None = None) -> None:
    """End this process as soon as the owner has ended, is a zombie, or its pid belongs to another process.

    Args:
        created: when the owner was started, in seconds since the epoch; None takes whoever has the pid now.
    """
    if owner_pid in _held:
        return
    try:
        owner = psutil.Process(owner_pid)
        if created is not None and abs(owner.create_time() - created) > CLOCK_S:
            _end()
    except psutil.NoSuchProcess:
        _end()
    _held.add(owner_pid)
    threading.Thread(target=_watch, args=(owner,), name=f"lifeline to {owner_pid}", daemon=True).start()


def hold_on_to_maker() -> None:
    """Hang on the process that ``LORI_NB_OWNER_PID`` names, if any; children do not inherit that."""
    maker = os.environ.pop(OWNER_PID, "")
    if maker and not maker.isdecimal():
        raise ValueError(f"{OWNER_PID} must be a process id; found {maker!r}")
    if maker:
        hold_on_to(int(maker))


def end_tree(pid: int) -> None:
    """Kill a process and everything that it has started, whatever process groups they are in."""
    try:
        top = psutil.Process(pid)
        family = [*top.children(recursive=True), top]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _alive(owner: psutil.Process) -> bool:
    try:
        return owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _watch(owner: psutil.Process) -> None:
    while _alive(owner):
        time.sleep(POLL_S)
    _end()


def _end() -> None:
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(1)  # no clean-up that could wait for the one who is gone

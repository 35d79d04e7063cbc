"""Namespaces: a process that has its own root folder and network, and sees no process but its own.

Root takes them by its privilege, another user through a user namespace where the system permits that. Needs Linux 5.12
or newer.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from lori_nb.lab.confinement.system_calls import system_call

# linux/sched.h, linux/mount.h, linux/fcntl.h
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE, MNT_DETACH = -100, 0x8000, 2

WORK = "/work"  # the writable folder, as the program sees it
FILES = 1024  # how many the writable folder may hold


def enter_processes() -> None:
    """The next child of this process is the first of a PID namespace; when it ends, the kernel kills all within.

    Raises OSError where neither the caller's privilege nor a user namespace permits it.
    """
    try:
        system_call("unshare", CLONE_NEWPID)
    except PermissionError:
        user, group = os.geteuid(), os.getegid()
        system_call("unshare", CLONE_NEWUSER | CLONE_NEWPID)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")


def enter_root(folder: str, readable: Iterable[str], writable_bytes: int) -> None:
    """No network, and a root that holds the ``readable`` paths read-only, the null device, and the empty folder
    :data:`WORK`, where at most ``writable_bytes`` can be written; it becomes the working folder.

    The root is laid over ``folder``, in this process's sight alone, and is gone when the process is. There is no
    ``/proc``.
    """
    system_call("unshare", CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC)
    system_call("mount", None, "/", None, MS_REC | MS_PRIVATE, None)
    system_call("mount", "tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m")
    for path in readable:
        _bind(path, folder + path)
    _make_file(folder + os.devnull)
    os.mkdir(folder + WORK)  # noqa: PTH102
    attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
    system_call("mount_setattr", AT_FDCWD, folder, AT_RECURSIVE, attributes, len(attributes))
    system_call("mount", os.devnull, folder + os.devnull, None, MS_BIND, None)
    options = f"mode=0777,size={writable_bytes},nr_inodes={FILES}"
    system_call("mount", "tmpfs", folder + WORK, "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(folder)
    system_call("pivot_root", ".", ".")  # stacks the old root on the new one, and the next call takes it away
    system_call("umount2", ".", MNT_DETACH)
    os.chdir(WORK)


def _bind(path: str, target: str) -> None:
    if os.path.isdir(path):  # noqa: PTH112
        os.makedirs(target, exist_ok=True)  # noqa: PTH103
    else:
        _make_file(target)
    system_call("mount", path, target, None, MS_BIND | MS_REC, None)


def _make_file(path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
    _write(path, "")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:  # noqa: PTH123
        file.write(text)

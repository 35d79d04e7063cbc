"""Landlock: from here on this process reaches no file but the named ones, whoever it is.

The rules hold for root too and cannot be lifted. From version 4 on TCP is closed as well, from version 6 on abstract
unix sockets and signals to processes outside.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from lori_nb.lab.confinement.system_calls import system_call

LEAST_VERSION = 3  # the first that also stops truncating a file by its path

# linux/landlock.h, access rights on files
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, MAKE_FIFO, MAKE_SYM, TRUNCATE = (
    1 << bit for bit in (1, 2, 3, 5, 8, 10, 12, 14)
)
READ = READ_FILE | READ_DIR
WRITE = WRITE_FILE | TRUNCATE
ON_FILES = READ_FILE | WRITE  # the rights that a rule on a single file may name
# No folders within the folder: a program that nests them thousands deep could not be cleaned up after.
WORK = READ | WRITE | REMOVE_FILE | MAKE_REG | MAKE_FIFO | MAKE_SYM
CREATE_RULESET_VERSION, RULE_PATH_BENEATH = 1, 1


def version() -> int:
    """The version of Landlock's interface that the kernel offers; OSError where it offers none."""
    return system_call("landlock_create_ruleset", None, 0, CREATE_RULESET_VERSION)


def handled(abi: int) -> bytes:
    """struct landlock_ruleset_attr for a version: every right that it knows is refused unless a rule grants it."""
    files = (1 << (15 if abi < 5 else 16)) - 1
    sizes = 8 if abi < 4 else 16 if abi < 6 else 24
    return struct.pack("=QQQ", files, 0b11, 0b11)[:sizes]  # binding and connecting TCP; abstract sockets and signals


def make_ruleset(readable: Iterable[str], work: str) -> int:
    """A descriptor of the rules: read the ``readable`` files and folders, write in the folder ``work`` and to the null
    device.

    Raises OSError where the kernel offers no Landlock of :data:`LEAST_VERSION` or newer.
    """
    abi = version()
    if abi < LEAST_VERSION:
        raise OSError(f"Landlock must be of version {LEAST_VERSION} or newer; found {abi}")
    attributes = handled(abi)
    ruleset = system_call("landlock_create_ruleset", attributes, len(attributes), 0)
    for path in readable:
        _add_rule(ruleset, path, READ)
    _add_rule(ruleset, os.devnull, READ_FILE | WRITE_FILE)
    _add_rule(ruleset, work, WORK)
    return ruleset


def restrict(ruleset: int) -> None:
    """Put this process under the rules; PR_SET_NO_NEW_PRIVS must be set before."""
    system_call("landlock_restrict_self", ruleset, 0)


def _add_rule(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        granted = rights if os.path.isdir(path) else rights & ON_FILES  # noqa: PTH112 (pathlib costs start-up time)
        system_call("landlock_add_rule", ruleset, RULE_PATH_BENEATH, struct.pack("=Qi", granted, descriptor), 0)
    finally:
        os.close(descriptor)

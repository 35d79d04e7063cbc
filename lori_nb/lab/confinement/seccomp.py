"""Seccomp: a filter in the kernel that refuses system calls by number, for good and without any privilege.

Refused are the calls by which a program could start a process or thread, reach a network or another process, change
a file's owner, mode, times or attributes (Landlock does not), or hold memory outside its address space. A refused call
fails with EPERM, an unknown newer one with ENOSYS.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from lori_nb.lab.confinement.system_calls import NEWEST, number_of, system_call

PROCESSES = "clone clone3 execve execveat fork vfork setns unshare"
SOCKETS = "socket socketpair io_uring_setup"
OTHER_PROCESSES = """kcmp ioprio_set migrate_pages move_pages pidfd_getfd pidfd_open pidfd_send_signal process_madvise
    process_mrelease process_vm_readv process_vm_writev ptrace rt_sigqueueinfo rt_tgsigqueueinfo sched_setaffinity
    sched_setattr sched_setparam sched_setscheduler setpgid setpriority tkill mq_open mq_unlink msgget semget shmget
    add_key keyctl request_key"""
METADATA = """chmod chown fchmod fchmodat fchown fchownat fremovexattr fsetxattr futimesat inotify_init inotify_init1
    lchown lremovexattr lsetxattr removexattr setxattr utime utimensat utimes fanotify_init name_to_handle_at
    open_by_handle_at"""
MEMORY = "memfd_create memfd_secret userfaultfd"
# What needs a privilege that the program does not have either; refused here so that two things must fail.
SYSTEM = """acct adjtimex bpf chroot clock_adjtime clock_settime delete_module finit_module fsconfig fsmount fsopen
    fspick init_module ioperm iopl kexec_file_load kexec_load mount mount_setattr move_mount open_tree
    perf_event_open personality pivot_root quotactl quotactl_fd reboot setdomainname sethostname settimeofday swapoff
    swapon syslog umount2 vhangup"""
REFUSED = " ".join([PROCESSES, SOCKETS, OTHER_PROCESSES, METADATA, MEMORY, SYSTEM]).split()
OF_ITSELF = ("kill", "prlimit64", "tgkill")  # permitted where the first argument is 0 or the program's own id
# Refused where one argument, counted from 0, has one of these values: a program must not spare itself the signal that
# ends it with its supervisor (PR_SET_PDEATHSIG), nor have a pipe send signals to another (F_SETOWN, F_SETOWN_EX).
REFUSED_VALUES = {"prctl": (0, (1,)), "fcntl": (1, (8, 15))}

# linux/bpf_common.h, linux/seccomp.h, linux/audit.h, linux/prctl.h
LOAD, EQUAL, GREATER, RETURN = 0x20, 0x15, 0x25, 0x06
ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
AT_NUMBER, AT_ARCHITECTURE, AT_ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; little-endian machines
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand
EPERM: Instruction = (RETURN, 0, 0, ERRNO | errno.EPERM)
PERMIT: Instruction = (RETURN, 0, 0, ALLOW)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def filter_program(own_id: int) -> list[Instruction]:
    """The filter for a process whose id, as it sees it itself, is ``own_id``."""
    program = [
        (LOAD, 0, 0, AT_ARCHITECTURE),
        (EQUAL, 1, 0, ARCHITECTURE[os.uname().machine]),
        (RETURN, 0, 0, KILL_PROCESS),  # a 32-bit call has other numbers
        (LOAD, 0, 0, AT_NUMBER),
        (GREATER, 0, 1, NEWEST),
        (RETURN, 0, 0, ERRNO | errno.ENOSYS),
    ]
    for name in REFUSED:
        program += _on_call(name, [EPERM])
    for name in OF_ITSELF:
        program += _on_call(name, _by_argument(0, (0, own_id), PERMIT, EPERM))
    for name, (place, values) in REFUSED_VALUES.items():
        program += _on_call(name, _by_argument(place, values, EPERM, PERMIT))
    return [*program, PERMIT]


def install(own_id: int) -> None:
    """Put this process under the filter; PR_SET_NO_NEW_PRIVS must be set before. OSError where it cannot be."""
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in filter_program(own_id))
    program = _Program(len(packed) // 8, packed)
    system_call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0)


def _on_call(name: str, then: list[Instruction]) -> list[Instruction]:
    number = number_of(name)
    return [] if number is None else [(EQUAL, 0, len(then), number), *then]


def _by_argument(place: int, values: tuple[int, ...], among: Instruction, other: Instruction) -> list[Instruction]:
    """``among`` where the argument's lower half is one of the values, else ``other``."""
    tests = [(EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [(LOAD, 0, 0, AT_ARGUMENTS + 8 * place), *tests, other, among]

"""The child side of :mod:`lori_nb.lab.sandbox`: a process that shuts itself in, then runs one program.

Two processes, started fresh and from the standard library alone. The supervisor (``supervisor``) never runs foreign
code: it starts the confined process (``confined``), kills it at the deadline, and reports how it ended. The confined
process gives up what it can, in an order in which each step is still permitted, and only then runs the program:

- ``namespaces``: a root folder of its own, no network, no sight of other processes;
- ``landlock``: no file but the named ones, enforced by the kernel on paths, also for root;
- ``seccomp``: system calls that make processes or sockets, or change a file's owner, mode or times, are refused;
- an unprivileged user, no capabilities, no new privileges, and limits on CPU time, memory, file size and processes.

``system_calls`` holds the numbers of the system calls (Linux on x86_64 and aarch64).
"""

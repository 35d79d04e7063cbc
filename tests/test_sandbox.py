"""Programs that try to break out, run for real: with each sufficient set of means, as root and as another user.

Most programs here check for themselves that what they try is refused, and pass when it is; the same programs must
succeed in harming where they run plainly, or they would prove nothing.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from contained import REQUIRED, lacking, need_containment

from lori_nb.lab import sandbox
from lori_nb.lab.confinement.system_calls import NUMBERS
from lori_nb.lab.paths import PROJECT
from lori_nb.lab.sandbox import MIB, SandboxUnavailableError, containment, missing_containment, run_program

SUFFICIENT = [("namespaces",), ("landlock", "seccomp"), sandbox.MEANS]
OTHER_USER = 65534

TRY = """
import os
done = []
def attempt(name, function):
    try:
        function()
    except (OSError, RuntimeError):
        return
    done.append(name)
"""
END = "\nassert not done, done\n"

WRITING = """
from pathlib import Path
import shutil
Path("mine").write_text("x")
os.symlink("{outside}", "link")
for place in ("{outside}", "link", "{home}", "{project}", "/tmp", "/var/tmp", "/dev/shm", "/", "/etc", "/proc/self"):
    attempt("write " + place, lambda: Path(place, "{name}").write_text("x"))
    attempt("folder " + place, lambda: Path(place, "{name}-folder").mkdir())
file = "{outside}/file"
attempt("overwrite", lambda: Path(file).write_text("x"))
attempt("append", lambda: open(file, "a"))
attempt("truncate", lambda: os.truncate(file, 0))
attempt("mode", lambda: os.chmod(file, 0))
attempt("times", lambda: os.utime(file, (0, 0)))
attempt("owner", lambda: os.chown(file, os.getuid(), os.getgid()))
attempt("attribute", lambda: os.setxattr(file, "user.x", b"x"))
attempt("remove", lambda: os.unlink(file))
attempt("rename", lambda: os.rename(file, "{outside}/other"))
attempt("take", lambda: os.rename(file, "taken"))
attempt("give", lambda: os.rename("mine", "{outside}/given"))
attempt("hard link", lambda: os.link(file, "hard"))
attempt("read the link's file", lambda: Path("link/file").read_text())
"""
READING = """
def look(path):
    if len(os.listdir(path)) < 2:  # a root of its own shows the way to the interpreter's library, and no more
        raise OSError
for path in ("{outside}/file", "{project}/pyproject.toml", "{project}", "{home}", "/etc/passwd", "/proc/1/environ",
             "/proc/{asker}/environ", "/proc/{asker}/mem", "/proc/self/root{outside}/file", "/root", "/home", "/tmp"):
    attempt(path, lambda: look(path))
    attempt(path, lambda: open(path, "rb").read(1))
"""
ENVIRONMENT = """
import ctypes, glob
found = [repr(dict(os.environ)), repr(ctypes.CDLL(None).getenv(b"{secret_name}"))]
for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline"):
    attempt("", lambda: found.append(open(path, "rb").read()))
done = [each for each in found if "{secret}" in str(each)]
if found[1] != "0":
    done.append("the C library's")
"""
SOCKETS = """
import socket
attempt("TCP", lambda: socket.create_connection(("127.0.0.1", {port}), 2))
attempt("unix", lambda: socket.socket(socket.AF_UNIX).connect("{outside}/socket"))
attempt("abstract", lambda: socket.socket(socket.AF_UNIX).connect("\\0{name}"))
attempt("UDP", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {port})))
attempt("name", lambda: socket.getaddrinfo("example.org", 80))
attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
attempt("pair", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b"x", "{outside}/datagrams"))
"""
OTHER_PROCESSES = """
import ctypes, resource, signal
def ptrace(pid):
    if ctypes.CDLL(None).ptrace(16, pid, 0, 0) < 0:  # PTRACE_ATTACH
        raise OSError
import fcntl
for pid in ({victim}, {asker}, os.getppid() or {victim}):
    attempt("signal by a pipe", lambda: fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, pid))
    attempt("ptrace", lambda: ptrace(pid))
    attempt("signal", lambda: os.kill(pid, signal.SIGCONT))
    attempt("limits", lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE))
    attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
    attempt("memory", lambda: open(f"/proc/{{pid}}/mem", "rb"))
"""
STARTING = """
import subprocess, threading
attempt("fork", os.fork)
attempt("spawn", lambda: os.posix_spawn("/bin/true", ["true"], dict()))
attempt("run", lambda: subprocess.run(["/bin/true"]))
attempt("execute", lambda: os.execv("/bin/true", ["true"]))
attempt("thread", lambda: threading.Thread(target=print).start())
"""
# Each passes where everything that it attempts is refused.
ATTACKS = {
    "writing": WRITING,
    "reading": READING,
    "environment": ENVIRONMENT,
    "sockets": SOCKETS,
    "other processes": OTHER_PROCESSES,
    "starting processes": STARTING,
}


@dataclass(frozen=True)
class Surroundings:
    """What a program must not reach: a folder open to all users, listeners, a process, a secret."""

    values: dict[str, str | int]
    listeners: tuple[socket.socket, ...]
    folder: Path

    def attack(self, name: str) -> str:
        return TRY + ATTACKS[name].format(**self.values) + END

    def untouched(self) -> bool:
        """Nothing in the folder changed, and nobody connected or sent anything."""
        for listener in self.listeners:
            try:
                listener.accept() if listener.type == socket.SOCK_STREAM else listener.recv(9)
            except BlockingIOError:
                continue
            return False
        if sorted(each.name for each in self.folder.iterdir()) != ["datagrams", "file", "socket"]:
            return False
        file = self.folder / "file"
        return file.read_text() == "secret" and file.stat().st_mode & 0o777 == 0o666 and file.stat().st_mtime == 1e9


@pytest.fixture
def surroundings(monkeypatch) -> Iterator[Surroundings]:
    monkeypatch.setenv("SECRET_NAME", "secret of the caller")
    name = f"lori-nb-test-{os.getpid()}"
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "outside")
        folder.mkdir()
        (folder / "file").write_text("secret")
        os.utime(folder / "file", (1e9, 1e9))
        listeners = (
            _listener(socket.AF_INET, ("127.0.0.1", 0)),
            _listener(socket.AF_UNIX, f"{folder}/socket"),
            _listener(socket.AF_UNIX, f"\0{name}"),
            _listener(socket.AF_UNIX, f"{folder}/datagrams", socket.SOCK_DGRAM),
        )
        for path, mode in ((place, 0o755), (folder, 0o777), *((each, 0o666) for each in folder.iterdir())):
            Path(path).chmod(mode)
        values = {
            "outside": str(folder),
            "home": str(Path.home()),
            "project": str(PROJECT),
            "name": name,
            "asker": os.getpid(),
            "victim": victim.pid,
            "port": listeners[0].getsockname()[1],
            "secret": "secret of the caller",
            "secret_name": "SECRET_NAME",
        }
        yield Surroundings(values, listeners, folder)
        for listener in listeners:
            listener.close()
        victim.kill()
        victim.wait()


def _listener(family: int, address: object, kind: int = socket.SOCK_STREAM) -> socket.socket:
    made = socket.socket(family, kind)
    made.bind(address)
    made.setblocking(False)
    if kind == socket.SOCK_STREAM:
        made.listen()
    return made


@pytest.fixture(params=SUFFICIENT, ids="+".join)
def means(request) -> tuple[str, ...]:
    """Each set of means that is enough by itself, and all together."""
    need_containment(request.param)
    return request.param


class Watch:
    """How many processes bear a name, at most and at the end; a program takes it by :attr:`LINE`."""

    def __init__(self):
        self.name = f"lori{os.getpid()}"[-15:]
        self.line = f"import ctypes; ctypes.CDLL(None).prctl(15, b'{self.name}', 0, 0, 0)\n"
        self.most, self._over = 0, threading.Event()

    def now(self) -> int:
        return sum(each.info["name"] == self.name for each in psutil.process_iter(["name"]))

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.is_set():
            self.most = max(self.most, self.now())
            self._over.wait(0.02)


@pytest.mark.parametrize("name", ATTACKS)
def test_what_a_program_attempts_is_refused(name, means, surroundings):
    verdict = run_program(surroundings.attack(name), means=means)
    assert verdict == sandbox.Verdict(True, "passed")
    assert surroundings.untouched()


# Starting processes is left out: what it attempts plainly would replace the process that tells of it.
@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("writing", ["overwrite", "truncate", "mode", "times", "owner", "remove", "write {outside}", "write link"]),
        ("reading", ["{outside}/file", "{project}/pyproject.toml", "/proc/{asker}/environ", "{home}"]),
        ("environment", ["the C library's", "{secret}"]),
        ("sockets", ["TCP", "unix", "abstract", "UDP", "pair"]),
        ("other processes", ["signal", "signal by a pipe", "limits", "priority"]),
    ],
)
def test_the_same_attempts_succeed_without_the_sandbox(name, harm, surroundings, tmp_path):
    elsewhere = '"{home}", "{project}", "/tmp", "/var/tmp", "/dev/shm", "/", "/etc", '
    source = ATTACKS[name].replace(elsewhere, "")  # the tests' own folder shows as much
    values = surroundings.values | {"asker": surroundings.values["victim"]}
    program = TRY + source.format(**values) + END
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "AssertionError" in done.stderr
    assert [each for each in harm if each.format(**values) not in done.stderr] == []
    if name in {"writing", "sockets"}:
        assert not surroundings.untouched()


BOMB = "import os, time\nfor _ in range(1000):\n    try: os.fork()\n    except OSError: pass\ntime.sleep(0.3)"
LIMITED = [  # (program, limits, why it fails)
    ("while True: pass", {"seconds": 1, "wall_seconds": 60}, "used more than 1 s of CPU time"),
    ("import time; time.sleep(99)", {"wall_seconds": 0.5}, "took longer than 0.5 s"),
    ("x = b'x' * (1 << 30)", {"memory_bytes": 256 * MIB}, "MemoryError"),
    ("x = []\nwhile True: x.append(bytes(1 << 20))", {"memory_bytes": 256 * MIB}, "MemoryError"),
    ("open('f', 'wb').write(bytes(3 << 20))", {"file_bytes": 2 * MIB}, r"OSError: \[Errno (27|28)\].*"),
    ("import os; os.ftruncate(os.open('f', 66), 1 << 40)", {}, r"OSError: \[Errno 27\].*"),
    ("x = [open(str(i), 'w') for i in range(100)]", {}, r"OSError: \[Errno 24\].*"),
]


@pytest.mark.skipif(os.geteuid() != 0, reason="root is needed to become another user; the tests above ran as one")
def test_it_holds_for_another_user_too(surroundings):
    """Attacks, a fork bomb and the limits, under every set of means that this user has: as many verdicts of each."""
    watch = Watch()
    programs = {name: (surroundings.attack(name), {}, "passed") for name in ATTACKS}
    programs |= {"bomb": (watch.line + BOMB, {}, "passed")}
    programs |= {f"limit {place}": each for place, each in enumerate(LIMITED)}
    asked = [[means, name, *programs[name][:2]] for means in SUFFICIENT for name in programs]
    with watch:
        rows = _run_as_other_user(asked)
    assert watch.most == 1 and watch.now() == 0
    if not rows:
        lacking("another user finds no means to contain a program")
    counts = Counter(name for name, *_ in rows)
    assert set(counts) == set(programs) and len(set(counts.values())) == 1
    wrong = [row for row in rows if not re.fullmatch(programs[row[0]][2], row[3]) or row[2] != (row[3] == "passed")]
    assert wrong == []
    assert surroundings.untouched()
    if os.environ.get(REQUIRED) == "1":
        assert len(rows) == len(asked), "every set of means contains for another user"


def _run_as_other_user(asked: list) -> list[list]:
    """[name, means, passed, reason] of each [means, name, program, limits] whose means that user has."""
    script = (
        "import json, sys; sys.path.append(sys.argv[1])\n"
        "from lori_nb.lab.sandbox import containment, run_program\n"
        "for means, name, source, limits in json.load(sys.stdin):\n"
        "    if containment(means):\n"
        "        print(json.dumps([name, means, *vars(run_program(source, means=means, **limits)).values()]))"
    )
    done = _as_other_user([_interpreter_of_other_user(), "-c", script, str(PROJECT)], input=json.dumps(asked))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _as_other_user(command: list[str], **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, user=OTHER_USER, group=OTHER_USER, extra_groups=[], cwd="/", capture_output=True, text=True, **more
    )


def _interpreter_of_other_user() -> str:
    """A Python that the other user may run; its version and the project's place decide, so it is tried."""
    check = "import sys; sys.path.append(sys.argv[1]); import lori_nb.lab.sandbox; assert sys.version_info >= (3, 11)"
    for each in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            if _as_other_user([each, "-c", check, str(PROJECT)]).returncode == 0:
                return each
        except OSError:
            continue
    return lacking("no interpreter of 3.11 or newer is here that another user can run, with the project in its sight")


def test_a_fork_bomb_makes_no_process_and_leaves_none(means):
    watch = Watch()
    with watch:
        verdict = run_program(watch.line + BOMB, means=means)
    assert verdict.passed
    assert watch.most == 1 and watch.now() == 0


def test_a_program_that_outlives_its_welcome_is_killed(means):
    watch = Watch()
    daemon = watch.line + (
        "import os, time, signal\n"
        "for number in range(1, 32): signal.signal(number, signal.SIG_IGN) if number not in (9, 19) else None\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        if os.fork(): os._exit(0)\n"
        "        os.setsid()\n"
        "    except OSError: pass\n"
        "time.sleep(300)"
    )
    with watch:
        verdict = run_program(daemon, means=means, wall_seconds=1.0)
    assert verdict == sandbox.Verdict(False, "took longer than 1 s")
    assert watch.most == 1 and watch.now() == 0


def test_a_program_ends_with_the_process_that_asked_for_it(means, tmp_path):
    watch = Watch()
    source = watch.line + "import ctypes, time; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0); time.sleep(300)"
    if "seccomp" not in means:
        source = source.replace("prctl(1, ", "getpid(1, ")  # only seccomp keeps a program from asking to be spared
    asker = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.path.append(sys.argv[1])\nfrom lori_nb.lab.sandbox import run_program\n"
         "run_program(sys.argv[2], seconds=300, means=sys.argv[3].split())", str(PROJECT), source, " ".join(means)],
        env=os.environ | {"TMPDIR": str(tmp_path)},  # a process killed like this leaves its folder behind
    )  # fmt: skip
    _wait_until(lambda: watch.now() == 1)
    asker.kill()
    asker.wait()
    _wait_until(lambda: watch.now() == 0)


def _wait_until(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("source", "limits", "reason"),
    [
        *LIMITED,
        ("import os\nfor fd in range(3, 64):\n  try: os.write(fd, bytes(1 << 20))\n  except OSError: pass",
         {"wall_seconds": 1}, "took longer than 1 s"),
        ("raise ValueError('x' * 10**7)", {}, "ValueError: x{488}"),
        ("import os; os.kill(os.getpid(), 40)",
         {"means": ("landlock", "seccomp")}, "killed by signal 40"),
        ("import ctypes; ctypes.string_at(0)", {}, "killed by SIGSEGV"),
        ("import os; os.abort()", {}, "killed by SIG(ABRT|SEGV)"),
        ("assert 1 == 2, 'not equal'", {}, "AssertionError: not equal"),
        ("def f(:", {}, "SyntaxError: .*"),
        ("a\0b", {}, "(SyntaxError|ValueError): .*"),
        ("x = '\udcff'", {}, "UnicodeEncodeError: .*"),
        ("raise Exception('\\udcff\\n\\033[1mA')", {}, r"Exception:    \[1mA"),
        ("class E(Exception):\n  def __str__(self): raise E\nraise E", {}, "E"),
        ("input()", {}, "EOFError: .*"),
        ("import torch", {}, "ModuleNotFoundError: .*"),
        ("import os; os.mkdir('folder'); os.mkdir('folder/folder')", {}, "PermissionError: .*"),
    ],
)  # fmt: skip
def test_a_program_that_fails_says_why(contained, source, limits, reason):
    verdict = run_program(source, **limits)
    assert not verdict.passed and re.fullmatch(reason, verdict.reason), verdict


@pytest.mark.parametrize("way_out", [
    "import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "exit()", "raise KeyboardInterrupt",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "import os; os.execv('/bin/true', ['true'])",
    "import threading; threading.main_thread = None; raise GeneratorExit",
    "import os\nfor fd in range(3, 64):\n  try: os.close(fd)\n  except OSError: pass",
    "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'passed')\n  except OSError: pass",
    "import os; os.write = lambda *_: None; os._exit = None; raise Exception",
])  # fmt: skip
def test_ending_before_the_checks_is_no_pass(contained, way_out):
    if "namespaces" in containment().means and "SIGKILL" in way_out:
        way_out += "\nassert False"  # the first process of a namespace cannot kill itself, and goes on
    assert not run_program(f"{way_out}\n").passed
    assert run_program(f"if 0:\n  {way_out.splitlines()[0]}\n").passed


@pytest.mark.parametrize("source", [
    "print('x' * (64 << 20))",
    "import os, sys; os.write(1, b'\\xff\\xfe'); os.write(2, b'\\x80'); sys.stdout.buffer.write(b'\\xff')",
    "import sys; sys.stderr.write('\\udcff'.encode('utf-8', 'surrogateescape').decode('latin-1'))",
    "open('a', 'w').write('é'); assert open('a').read() == 'é'; import os; os.remove('a'); assert os.listdir() == []",
    "import tempfile; tempfile.TemporaryFile().write(b'x'); open('/dev/null', 'w').write('x')",
    "import math, re, heapq, collections, json, random, datetime, decimal, ssl, sqlite3, zoneinfo, hashlib, typing",
    "import os, sys; assert len(os.environ) < 6 and sys.argv == ['program.py'] and os.listdir() == []",
    "import sys; assert not {'torch', 'numpy', 'psutil'} & set(sys.modules)",
    "from dataclasses import dataclass\n@dataclass\nclass P:\n  x: 'int'\nassert P(1) == P(1)",
    "import sys; sys.setrecursionlimit(20000)\ndef f(n): return n and f(n - 1)\nf(10000)",
    "if __name__ == '__main__': raise SystemExit",
    "x = 1  # é \u2028 \U0001f600",
    "",
])  # fmt: skip
def test_a_correct_program_passes(contained, source):
    assert run_program(source) == sandbox.Verdict(True, "passed")


@pytest.mark.skipif(os.geteuid() != 0, reason="root is needed to see what root becomes")
def test_a_program_of_root_s_runs_as_an_unprivileged_user_of_its_own():
    need_containment(("namespaces",))
    source = "import os; raise ValueError(os.getresuid(), os.getresgid(), os.getgroups(), os.getpid())"
    said = {run_program(source, means=("namespaces",)).reason for _ in range(2)}
    ids = [re.fullmatch(r"ValueError: \(\((\d+), \1, \1\), \(\1, \1, \1\), \[\], 1\)", each) for each in said]
    assert all(ids) and len(ids) == 2 and all(int(each[1]) >= 1000 for each in ids)


def test_the_order_of_sets_does_not_change_from_run_to_run(contained):
    reasons = {run_program("raise ValueError(list({'a', 'b', 'c', 'd', 'e', 'f'}))").reason for _ in range(3)}
    assert len(reasons) == 1


def test_the_folder_is_gone_afterwards(means, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = "import os\nfor i in range(50): open(str(i), 'w').write('x')\nos.symlink('0', 'link'); os.mkfifo('fifo')"
    assert run_program(source, means=means).passed
    assert not run_program(source + "\nwhile True: pass", means=means, wall_seconds=0.5).passed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("few", [(), ("landlock",), ("seccomp",)])
def test_without_enough_means_nothing_is_run(few, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert containment(few) is None
    with pytest.raises(SandboxUnavailableError, match="no program can be run safely on this machine: nothing contains"):
        run_program("open('ran', 'w')", means=few)
    assert "files" in missing_containment(few)


def test_what_contains_is_named(contained):
    found = containment()
    assert found.files and found.network and found.processes
    assert re.fullmatch(r"files by \w.*; network by \w.*; processes by \w.*", found.describe())
    assert missing_containment() == ""


@pytest.mark.parametrize(("value", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_where_containment_is_required_its_lack_fails(value, outcome, monkeypatch):
    """Landlock alone is not enough on any machine."""
    monkeypatch.setenv(REQUIRED, value)
    with pytest.raises(outcome, match="this machine cannot contain a program by landlock: .*"):
        need_containment(("landlock",))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seconds": 0}, "seconds must be positive and finite; found 0"),
        ({"wall_seconds": float("inf")}, "wall_seconds must be positive"),
        ({"memory_bytes": -1}, "memory_bytes must be positive"),
        ({"means": ("jail",)}, "means must be among namespaces, landlock, seccomp; found 'jail'"),
    ],
)
def test_bad_limits_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        run_program("", **arguments)


def test_code_runs_only_when_asked_for(monkeypatch):
    for value in ("", "0", "yes"):
        monkeypatch.setenv(sandbox.ALLOW_VARIABLE, value)
        with pytest.raises(ValueError, match="task 'mbpp' runs programs .* give --allow-code-execution, or set"):
            sandbox.check_execution_allowed("mbpp")
    monkeypatch.setenv(sandbox.ALLOW_VARIABLE, "1")
    if containment() is not None:
        sandbox.check_execution_allowed("mbpp")


def test_system_call_numbers_are_those_of_the_headers():
    files = {0: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), 1: Path("/usr/include/asm-generic/unistd.h")}
    if not all(file.is_file() for file in files.values()):
        pytest.skip("the Linux headers of both machines are needed")
    for column, file in files.items():
        found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", file.read_text()))
        assert {name: found.get(name) for name in NUMBERS} == {
            name: None if numbers[column] is None else str(numbers[column]) for name, numbers in NUMBERS.items()
        }


def test_a_program_killed_from_outside_is_no_pass(means):
    watch = Watch()
    verdicts: list[sandbox.Verdict] = []
    source = watch.line + "import time; time.sleep(60)"
    runner = threading.Thread(target=lambda: verdicts.append(run_program(source, seconds=60, means=means)))
    runner.start()
    _wait_until(lambda: watch.now() == 1)
    next(p for p in psutil.process_iter(["name"]) if p.info["name"] == watch.name).send_signal(signal.SIGKILL)
    runner.join(60)
    assert verdicts == [sandbox.Verdict(False, "killed by SIGKILL")]

"""Nothing that a study starts outlives it: real processes, really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from small_notebooks import small_notebook

from lori_nb.study import lifeline

WITHIN_S = 10.0  # polls are half a second apart, and three processes hang on one another
WATCHER = "from lori_nb.study.lifeline import *; {}; print('holding', flush=True); import time; time.sleep(600)"


def gone_within(pids: list[int], seconds: float) -> bool:
    """Whether all processes end in time; a zombie does nothing more."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(_runs(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start(code: str, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture
def owner():
    """A process to hang on; killed and not waited for, it becomes a zombie."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def named(process: subprocess.Popen, later: float = 0.0) -> str:
    return f"{process.pid}:{psutil.Process(process.pid).create_time() + later:.2f}"


def test_a_process_ends_when_its_owner_is_a_zombie(owner):
    held = start(WATCHER.format("start_lifeline()"), LORI_NB_OWNER=named(owner))
    assert held.stdout.readline() == "holding\n"
    assert not gone_within([held.pid], 3 * lifeline.POLL_S)  # as long as the owner lives, so does it
    owner.kill()
    assert held.wait(WITHIN_S) == 1


def test_a_pid_that_now_belongs_to_another_process_is_no_owner(owner):
    held = start(WATCHER.format("start_lifeline()"), LORI_NB_OWNER=named(owner, later=-1000.0))
    assert held.wait(WITHIN_S) == 1
    assert held.stdout.read() == ""


def test_without_an_owner_nothing_ends():
    held = start(WATCHER.format("start_lifeline()").replace("time.sleep(600)", "time.sleep(1)"), LORI_NB_OWNER="")
    assert held.wait(WITHIN_S) == 0


def test_the_maker_is_an_owner_that_children_do_not_inherit(owner):
    code = WATCHER.format("hold_on_to_maker(); import os; assert 'LORI_NB_OWNER_PID' not in os.environ")
    held = start(code, LORI_NB_OWNER_PID=str(owner.pid))
    assert held.stdout.readline() == "holding\n"
    owner.kill()
    assert held.wait(WITHIN_S) == 1


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("LORI_NB_OWNER", "make", "must read pid:create_time"), ("LORI_NB_OWNER_PID", "make", "must be a process id")],
)
def test_a_name_that_is_no_process_is_an_error(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        {"LORI_NB_OWNER": lifeline.start_lifeline, "LORI_NB_OWNER_PID": lifeline.hold_on_to_maker}[name]()


@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["the top process alone", "its whole process group"])
def test_a_killed_study_leaves_no_executor_kernel_or_cell_process_behind(tmp_path, kill):
    pids = tmp_path / "pids"
    cell = (
        "import os, pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"path = pathlib.Path({str(pids)!r})\n"
        "path.with_suffix('.new').write_text(f'{os.getppid()} {os.getpid()} {child.pid}')\n"
        "path.with_suffix('.new').rename(path)\n"
        "time.sleep(600)"
    )
    notebook = small_notebook(tmp_path / "sleeper.ipynb", cell)
    code = (
        "from pathlib import Path; from lori_nb.study.execute import execute_notebook\n"
        f"execute_notebook(Path({str(notebook)!r}), {{}}, Path({str(tmp_path / 'out.ipynb')!r}))"
    )
    top = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    family = _read_when_there(pids, top)
    assert len(family) == 3 and all(_runs(pid) for pid in family)
    assert os.getpgid(family[1]) != top.pid  # the kernel is out of reach of the group's signal
    kill(top.pid, signal.SIGKILL)
    top.wait()
    assert gone_within(family, WITHIN_S), [psutil.Process(pid) for pid in family if _runs(pid)]
    assert not (tmp_path / "out.ipynb").exists()


def _read_when_there(path: Path, process: subprocess.Popen, seconds: float = 120.0) -> list[int]:
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < until, "the notebook did not get to its cell"
        time.sleep(0.1)
    return [int(word) for word in path.read_text().split()]

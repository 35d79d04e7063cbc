"""A pool of worker processes that carries out specs, each once and after the specs it depends on.

A worker is one process with one thread of arithmetic: two threads in one process can be slower than one on a busy
machine. Workers take specs as JSON lines
on standard input and answer with JSON lines; when the pipe closes, or the owner dies, they end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lori_nb.lab.runs import Store, done_of
from lori_nb.lab.specs import Spec, to_payload
from lori_nb.study import lifeline
from lori_nb.study.cost import cost_of, prefix_seconds
from lori_nb.study.display import Display


class TrainingFailedError(RuntimeError):
    """Some runs failed; the message names each and why. The others are finished and kept."""


@dataclass
class _Board:
    """What is still to do, shared by the threads that feed the workers."""

    waiting: list[Spec]
    finished: set[str]
    running: dict[str, Spec] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self) -> Spec | None:
        """The next spec whose parents are finished; waits while there may still come one; None when none will."""
        with self.changed:
            while True:
                self._drop_hopeless()
                ready = [s for s in self.waiting if all(p.hash in self.finished for p in s.parents)]
                if ready:
                    chosen = self._preferred(ready)
                    self.waiting.remove(chosen)
                    self.running[chosen.hash] = chosen
                    return chosen
                if not self.waiting or not self.running:
                    return None
                self.changed.wait()

    def _preferred(self, ready: list[Spec]) -> Spec:
        # Two runs on the same task at the same moment would both wait for its one cache of hidden states.
        busy = {task for spec in self.running.values() for task in spec.tasks}
        return next((s for s in ready if not busy & set(s.tasks)), ready[0])

    def _drop_hopeless(self) -> None:
        for spec in [s for s in self.waiting if any(p.hash in self.failed for p in s.parents)]:
            self.waiting.remove(spec)
            self.failed[spec.hash] = f"{spec.label}: not begun, since a run it builds on failed"

    def settle(self, spec: Spec, error: str | None) -> None:
        with self.changed:
            self.running.pop(spec.hash)
            if error is None:
                self.finished.add(spec.hash)
            else:
                self.failed[spec.hash] = f"{spec.label}: {error}"
            self.changed.notify_all()


def train_all(specs: Sequence[Spec], store: Store | None = None, jobs: int = 2, display: Display | None = None) -> int:
    """Carry out every spec that is not finished, with its parents; returns how many were done now.

    Raises:
        TrainingFailedError: after all that could be done is done.
    """
    store = store or Store()
    done, missing = done_of(specs, store)
    damaged = store.set_aside_damaged(done)
    if damaged:
        print("\n".join(damaged), flush=True)
        done, missing = done_of(specs, store)
    if not missing:
        return 0
    store.root.mkdir(parents=True, exist_ok=True)
    seconds = (sum(cost_of(s).seconds for s in missing) + prefix_seconds(missing)) / min(jobs, len(missing))
    display = display or Display(len(missing), seconds)
    board = _Board(list(missing), {spec.hash for spec in done})
    workers = [_Worker(i, store) for i in range(min(jobs, len(missing)))]
    threads = [threading.Thread(target=_feed, args=(worker, board, display), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # a join without a bound could not be interrupted
                thread.join(0.5)
    finally:
        for worker in workers:
            worker.end()
    for spec in (*board.waiting, *board.running.values()):
        board.failed[spec.hash] = f"{spec.label}: not done, since no worker was left"
    if board.failed:
        raise TrainingFailedError("\n".join(board.failed.values()))
    return len(missing)


def _feed(worker: _Worker, board: _Board, display: Display) -> None:
    while (spec := board.take()) is not None:
        try:
            error = _attempt(worker, spec, display)
        except Exception as failure:  # noqa: BLE001 (whatever it is, the other feeders must not wait for this spec)
            error = f"{type(failure).__name__}: {failure}"
        board.settle(spec, error)


def _attempt(worker: _Worker, spec: Spec, display: Display) -> str | None:
    if not worker.alive:
        worker.restart()
    expected = cost_of(spec).seconds
    error = worker.carry_out(
        spec, lambda stage, done, total: display.update(spec.hash, spec.label, stage, done, total, expected)
    )
    display.finish(spec.hash, "done" if error is None else "FAILED")
    return error


class _Worker:
    """One worker process and its log file."""

    def __init__(self, number: int, store: Store):
        self.store = store
        self.log = store.root / "logs" / f"worker-{os.getpid()}-{number}.log"
        self.restart()

    def restart(self) -> None:
        """Start a worker process, in place of one that has ended if there was one."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            **lifeline.environment(),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lori_nb.study.worker", str(self.store.root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def carry_out(self, spec: Spec, report) -> str | None:
        """Do one spec; returns None, or what went wrong."""
        try:
            self.process.stdin.write(json.dumps(to_payload(spec)) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self._last_words()
        for line in self.process.stdout:
            message = json.loads(line)
            if message["event"] == "progress":
                report(message["stage"], message["done"], message["total"])
            else:
                return message.get("error")
        return self._last_words()

    def _last_words(self) -> str:
        code = self.process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"the worker ended with status {code}; see {Path(self.log)}: {lines[-1] if lines else 'no output'}"

    def end(self) -> None:
        self.process.kill()  # a checkpoint is never more than seconds old, and half a file never counts
        self.process.wait()

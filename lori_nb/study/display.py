"""Live progress lines: rewritten in place on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TextIO

PLAIN_EVERY = 15.0  # seconds between two lines of one item where nothing can be rewritten


def clock(seconds: float) -> str:
    """Minutes and seconds, "3:07"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@dataclass
class _Item:
    label: str
    expected: float
    stage: str = "starting"
    done: int = 0
    total: int = 0
    started: float = field(default_factory=time.monotonic)
    printed: float = 0.0


class Display:
    """One line for every item at work, and a count of finished ones; safe to call from several threads."""

    def __init__(self, total: int, expected_seconds: float = 0.0, stream: TextIO | None = None):
        self.total, self.expected = total, expected_seconds
        self.finished = 0
        self.started = time.monotonic()
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._items: dict[str, _Item] = {}
        self._drawn = 0
        self._lock = threading.Lock()

    def update(self, key: str, label: str, stage: str, done: int, total: int, expected: float = 0.0) -> None:
        """Say how far an item is; ``expected`` is its rough length in seconds."""
        with self._lock:
            item = self._items.setdefault(key, _Item(label, expected))
            item.stage, item.done, item.total = stage, done, total
            now = time.monotonic()
            if self._live:
                self._redraw()
            elif now - item.printed > PLAIN_EVERY:
                item.printed = now
                self._write(self._line(item))

    def finish(self, key: str, status: str = "done") -> None:
        """Count an item as finished and leave its last line standing."""
        with self._lock:
            item = self._items.pop(key, None)
            self.finished += 1
            if item is None:
                return
            self._erase()
            seconds = clock(time.monotonic() - item.started)
            self._write(f"[{self.finished}/{self.total}] {item.label}  {status} in {seconds}")
            if self._live:
                self._redraw()

    def say(self, text: str) -> None:
        """A line of its own above the live ones."""
        with self._lock:
            self._erase()
            self._write(text)

    def _line(self, item: _Item) -> str:
        spent = time.monotonic() - item.started
        about = f" of about {clock(max(item.expected, spent))}" if item.expected else ""
        whole = clock(time.monotonic() - self.started)
        left = max(self.expected, time.monotonic() - self.started)
        expected = f" of about {clock(left)}" if self.expected else ""
        steps = f" {item.done}/{item.total}" if item.total else ""
        share = f"{self.finished}/{self.total}, {whole}{expected}"
        return f"[{share}] {item.label}  {item.stage}{steps}  {clock(spent)}{about}"

    def _redraw(self) -> None:
        self._erase()
        for item in self._items.values():
            self._write(self._line(item)[:160])
        self._drawn = len(self._items)

    def _erase(self) -> None:
        if self._live and self._drawn:
            self._stream.write(f"\x1b[{self._drawn}A\x1b[J")
        self._drawn = 0

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

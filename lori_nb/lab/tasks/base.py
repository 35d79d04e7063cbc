"""What a task is: rows with a prompt and an answer, a metric, and where the rows come from.

A task is the same object whether its rows are generated, read from a folder or loaded from the hub. It is
registered by a decorated function that yields the rows of one split, in a fixed order::

    @task("parity", domain="symbolic", metric="exact_match", licence="own")
    def parity(split):
        for number in numbers_of(split):
            yield Example(prompt=f"Is {number} even or odd?", answer="odd" if number % 2 else "even")
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field

from lori_nb.lab.extensions import source_digest

SPLITS = ("train", "tune", "test")


@dataclass(frozen=True)
class Example:
    """One row of a task.

    ``prompt`` is what the model reads; ``second`` is the second text of a sentence pair (encoders read the pair
    as two segments). ``answer`` is what a decoder is trained to write. ``opening`` is the part of the answer, at its
    start, that decides the score; None means the whole answer and the end of text after it. ``target`` is the class
    index or the regression value; text answers with no classes leave it None. ``choices`` are the answers that a task
    scored by likelihood compares, ``target`` being the index of the right one. ``check`` is the program that a
    completion of a code task must pass.
    """

    prompt: str
    answer: str
    second: str | None = None
    target: float | int | None = None
    opening: str | None = None
    choices: tuple[str, ...] = ()
    check: str = ""

    @property
    def key(self) -> str:
        """What must not stand in two splits."""
        return self.prompt if self.second is None else f"{self.prompt}\x1f{self.second}"


@dataclass(frozen=True)
class Task:
    """A named source of rows with a metric.

    ``metric`` names an entry of ``lori_nb.lab.evaluation.METRICS``. ``labels`` are the class words in the order of
    ``Example.target``, empty for free answers and for regression. ``reads`` says which kind of base model the rows are
    written for: "decoder" or "encoder". ``scoring`` says how a decoder's answers are scored: "forced" by teacher
    forcing (exact match without generating), "choice" by the likelihood of each of the row's choices, "generate" by
    ``judge``(row, completion) → credit in [0, 1], "execute" by running the completion against the row's ``check``.
    ``also`` names further metrics of the same scores. ``system`` is the system message of a chat model: None for the
    kit's own short one, empty for what the model's template puts there. ``extra`` holds the settings of a generator,
    or of generation: max_new_tokens (required then), samples (1), temperature (0, greedy), stop (no strings).
    ``splits`` are those that have rows: "test" alone for a set that is for evaluation only. ``repeats`` are those in
    which a prompt may stand twice: the official rows of a benchmark, whose metric counts each.
    """

    name: str
    domain: str
    metric: str
    load: Callable[[str], Iterable[Example]]
    licence: str
    source: str = "generated"
    labels: tuple[str, ...] = ()
    reads: str = "decoder"
    group: str = ""
    scoring: str = "forced"
    judge: Callable[[Example, str], float] | None = None
    also: tuple[str, ...] = ()
    system: str | None = None
    extra: dict = field(default_factory=dict)
    splits: tuple[str, ...] = SPLITS
    repeats: tuple[str, ...] = ()

    def rows(self, split: str, limit: int) -> list[Example]:
        """The first ``limit`` rows of a split, fewer where the source ends earlier; repeated prompts are dropped but in
        the splits of ``repeats``.

        Raises ValueError when the task has no such split, ``limit`` is below 1, or the source has no row at all.
        """
        if split not in self.splits:
            only = " (it is for evaluation only)" if self.splits == ("test",) else ""
            raise ValueError(
                f"split of task {self.name!r} must be one of {', '.join(self.splits)}{only}; found {split!r}"
            )
        if limit < 1:
            raise ValueError(f"limit must be at least 1 row; found {limit}")
        found = self.load(split) if split in self.repeats else _without_repeats(self.load(split))
        rows = list(itertools.islice(found, limit))
        if not rows:
            raise ValueError(f"task {self.name!r} has no row in split {split!r}")
        return rows

    @property
    def source_digest(self) -> str:
        """SHA-256 of the loader's source, metric and labels, and of how its answers are scored where that is not by
        teacher forcing; a task registered outside the package counts by it.
        """
        functions = (self.load,) if self.judge is None else (self.load, self.judge)
        about = f"{self.metric}|{self.labels}|{self.reads}"
        if self.scoring != "forced" or self.system is not None:
            about += f"|{self.scoring}|{self.system}|{sorted(self.extra.items())}"
        return source_digest(functions, about)


def rows_digest(rows: Iterable[Example]) -> str:
    """SHA-256 over the rows as canonical JSON; it changes when any text, target or the order does.

    Choices and check count where a row has them, so that rows without them keep the digest they always had.
    """
    digest = hashlib.sha256()
    for row in rows:
        plain = {k: v for k, v in asdict(row).items() if v or k not in {"choices", "check"}}
        digest.update(json.dumps(plain, sort_keys=True, ensure_ascii=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _without_repeats(rows: Iterable[Example]) -> Iterator[Example]:
    seen: set[str] = set()
    for row in rows:
        if row.key not in seen:
            seen.add(row.key)
            yield row


_TASKS: dict[str, Task] = {}


def register(new: Task) -> Task:
    """Add a task to the registry; registering a name again replaces it, so that a notebook cell can be run twice."""
    _TASKS[new.name] = new
    return new


def task(name: str, **about) -> Callable[[Callable[[str], Iterable[Example]]], Task]:
    """Decorator that registers a function ``split -> rows`` as a task; ``about`` are fields of :class:`Task`."""

    def wrap(load: Callable[[str], Iterable[Example]]) -> Task:
        return register(Task(name=name, load=load, **about))

    return wrap


def get_task(name: str) -> Task:
    """The registered task of that name; ValueError names the known ones."""
    if name not in _TASKS:
        raise ValueError(f"task must be one of {', '.join(sorted(_TASKS))}; found {name!r}")
    return _TASKS[name]


def expand_tasks(names: str | Iterable[str]) -> tuple[str, ...]:
    """Task names from names and group names ("glue"), without repeats, in the order given."""
    if isinstance(names, str):
        names = [part.strip() for part in names.split(",") if part.strip()]
    found: list[str] = []
    for name in names:
        members = [t.name for t in _TASKS.values() if t.group == name] or [get_task(name).name]
        found += [member for member in members if member not in found]
    if not found:
        raise ValueError("tasks must name at least one task; found none")
    return tuple(found)


def task_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_TASKS)

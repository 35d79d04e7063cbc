"""Tasks over published data sets: rows from a folder or from the hub, one schema, splits that share no prompt.

Every data set here has one or two text columns and a label column, and an official train and test part (the labelled
validation part where the official test is not labelled); a set for evaluation only has the test part alone. The
official test part is the task's test split, in file order and whole: a prompt that stands there twice counts twice, as
in the published metric. The official train part is divided into train and tune by a hash of each row's key, so the
division depends on the row alone, never on the file's order or on a seed. Rows whose key also stands in the test part
are left out of both, and a repeated prompt is kept once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from lori_nb.lab.tasks.base import SPLITS, Example, Task, register
from lori_nb.lab.tasks.hub import load_from_hub
from lori_nb.lab.tasks.reading import DATA_VARIABLE, data_file, read_rows, source_folder

PARTS = ("train", "test")
TUNE_SHARE = 10  # one row of this many of the official train part is held out for tuning


@dataclass(frozen=True)
class DataSet:
    """Where a published data set stands in a folder and on the hub, and how a row is read.

    ``train_file`` and ``test_file`` are relative to the folder. ``columns`` are the text columns, then the label
    column; ``header`` names all columns of a file without a header line. ``train_instead`` is the file that stands in
    for a missing ``train_file``, such as one with a part of its rows. ``label`` gives (answer, target) of a label
    as the folder holds it, or raises ValueError in words that follow the column's name; so does ``finish``, which
    completes an example (its choices, say). ``folder_row`` makes a row of ``columns`` out of a row of the files that
    has others. ``hub_columns`` stand in the order of ``columns``, ``hub_text`` and ``hub_label`` turn the hub's values
    into the folder's; where a row of the hub is made otherwise, ``hub_row`` gives the folder's row for it.
    ``blank_texts`` says whether a text may be blank, which is an error else.

    An empty ``train_file`` says that the set is for evaluation only; an empty ``hub_id``, that no hub holds it.
    """

    train_file: str
    test_file: str
    columns: tuple[str, ...]
    label: Callable[[object], tuple[str, float | int | None]]
    hub_id: str
    hub_columns: tuple[str, ...]
    hub_test: str
    hub_config: str | None = None
    hub_text: Callable[[str], str] = str
    hub_label: Callable[[object], object] = str
    header: tuple[str, ...] = ()
    folder_row: Callable[[dict], dict] | None = None
    hub_row: Callable[[dict], dict] | None = None
    finish: Callable[[Example], Example] | None = None
    train_instead: str = ""
    blank_texts: bool = False

    def file(self, part: str, folder: Path | None = None) -> str:
        """The file of an official part, relative to the folder; what stands in where ``folder`` has that alone."""
        name = {"train": self.train_file, "test": self.test_file}[part]
        instead = self.train_instead if part == "train" else ""
        if folder is None or not instead or (folder / name).is_file() or not (folder / instead).is_file():
            return name
        return instead

    @property
    def files(self) -> tuple[str, ...]:
        """The files of all parts that there are."""
        return tuple(file for file in (self.train_file, self.test_file) if file)

    def hub_split(self, part: str) -> str:
        """The hub's name of an official part."""
        return {"train": "train", "test": self.hub_test}[part]


_DATA_SETS: dict[str, DataSet] = {}


def official_task(name: str, data: DataSet, **about) -> Task:
    """Register a task over a published data set; ``about`` are fields of :class:`Task`."""
    _DATA_SETS[name] = data

    def load(split: str) -> Iterable[Example]:
        if split == "test":
            return official_rows(name, "test")
        return split_rows(split, official_rows(name, "train"), official_rows(name, "test"))

    splits = SPLITS if data.train_file else ("test",)
    return register(Task(name=name, load=load, source="folder or hub", splits=splits, repeats=("test",), **about))


def official_rows(name: str, part: str) -> Sequence[Example]:
    """All rows of an official part ("train" or "test") in file order, repeats included.

    They come from the folder that ``LORI_NB_DATA`` names, from the hub where it is unset.

    Raises ValueError for an unknown name or part, the train part of a set for evaluation only, a missing column or a
    value outside its set (naming file, row and column); FileNotFoundError for a missing folder or file;
    HubUnreachableError without a network.
    """
    if name not in _DATA_SETS:
        raise ValueError(f"name must be one of {', '.join(sorted(_DATA_SETS))}; found {name!r}")
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}; found {part!r}")
    data, folder = _DATA_SETS[name], source_folder()
    if not data.file(part):
        raise ValueError(f"split must be test for {name!r}, a set for evaluation only; found its {part} part asked for")
    if folder is None and not data.hub_id:
        raise FileNotFoundError(
            f"{DATA_VARIABLE} must name a folder that holds {' and '.join(data.files)}, which no hub holds for "
            f"{name!r}; found none named"
        )
    if folder is None:
        return _rows_from_hub(data, part)
    path = data_file(folder, data.file(part, folder))
    status = path.stat()
    return _rows_from_file(data, path, status.st_mtime_ns, status.st_size)


def split_rows(split: str, train: Iterable[Example], test: Sequence[Example]) -> list[Example]:
    """Rows of one split of a task from its official parts.

    "test" is the official test part as it stands. "train" and "tune" share out the rest by SHA-256 of the key, one
    row of ten to "tune", in the order of that hash, so that any number of first rows is a random sample. Keys are
    compared with case folded and runs of white space as one space, since a model that folds case cannot tell such
    rows apart.
    """
    if split == "test":
        return list(test)
    in_test = {_digest(row) for row in test}
    marked = ((_digest(row), row) for row in train)
    wanted = {"train": False, "tune": True}[split]
    kept = [(mark, row) for mark, row in marked if mark not in in_test and (mark % TUNE_SHARE == 0) == wanted]
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])]


def examples(data: DataSet, rows: Iterable[dict[str, object]], where: str) -> tuple[Example, ...]:
    """Rows of named fields, as the folder holds them, turned into examples; ``where`` opens every error message."""
    made = tuple(_example(data, row, f"{where}, row {number}") for number, row in enumerate(rows, start=1))
    if not made:
        raise ValueError(f"{where}: must hold at least one row; found none")
    return made


def examples_from_hub(data: DataSet, table: dict[str, list], where: str) -> tuple[Example, ...]:
    """Columns as the hub holds them, turned into the examples that the folder's rows give."""
    missing = [name for name in data.hub_columns if name not in table]
    if missing:
        raise ValueError(f"{where}: column {missing[0]!r} is required; found columns {', '.join(table) or 'none'}")
    if data.hub_row is not None:
        columns = zip(*(table[name] for name in data.hub_columns), strict=True)
        return examples(data, (data.hub_row(dict(zip(data.hub_columns, row, strict=True))) for row in columns), where)
    converters = [data.hub_text] * (len(data.columns) - 1) + [data.hub_label]
    lists = [map(convert, table[name]) for convert, name in zip(converters, data.hub_columns, strict=True)]
    rows = (dict(zip(data.hub_columns, values, strict=True)) for values in zip(*lists, strict=True))
    return examples(replace(data, columns=data.hub_columns), rows, where)


def _example(data: DataSet, row: dict[str, object], where: str) -> Example:
    for name in data.columns:
        if name not in row:
            raise ValueError(f"{where}: column {name!r} is required; found columns {', '.join(row) or 'none'}")
    *texts, label_name = data.columns
    for name in texts:
        if not isinstance(row[name], str) or not (data.blank_texts or row[name].strip()):
            raise ValueError(f"{where}: column {name!r} must be text that is not blank; found {row[name]!r}")
    prompt, *second = (row[name].strip() for name in texts)
    try:
        answer, target = data.label(row[label_name])
        made = Example(prompt=prompt, second=second[0] if second else None, answer=answer, target=target)
        return made if data.finish is None else data.finish(made)
    except ValueError as error:
        raise ValueError(f"{where}: column {label_name!r} {error}") from None


@lru_cache(maxsize=32)
def _rows_from_file(data: DataSet, path: Path, mtime_ns: int, size: int) -> tuple[Example, ...]:
    """Time of change and size are part of the cache's key, so that an edited file is read again."""
    return examples(data, map(data.folder_row or dict, read_rows(path, data.header)), str(path))


@lru_cache(maxsize=32)
def _rows_from_hub(data: DataSet, part: str) -> tuple[Example, ...]:
    split = data.hub_split(part)
    table = load_from_hub(data.hub_id, data.hub_config, split, data.files)
    return examples_from_hub(data, table.to_dict(), " ".join(filter(None, (data.hub_id, data.hub_config, split))))


def _digest(row: Example) -> int:
    folded = " ".join(row.key.casefold().split())
    return int.from_bytes(hashlib.sha256(folded.encode()).digest(), "big")


def classes(words: dict[str, str]) -> Callable[[object], tuple[str, int]]:
    """Reader of a class label: ``words`` gives the answer of each label, in the order of the targets 0, 1, ..."""
    targets = {label: target for target, label in enumerate(words)}

    def read(label: object) -> tuple[str, int]:
        if not isinstance(label, str) or label not in words:
            raise ValueError(f"must be one of {', '.join(words)}; found {label!r}")
        return words[label], targets[label]

    return read

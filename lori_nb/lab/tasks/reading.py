"""Files of a data folder as rows of named fields; every error names the file, the row and what was found.

Row numbers count data rows from 1; a header line is not counted.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

DATA_VARIABLE = "LORI_NB_DATA"


def source_folder() -> Path | None:
    """The folder that ``LORI_NB_DATA`` names, None where it is unset or empty.

    Raises FileNotFoundError when it names something that is not a folder.
    """
    named = os.environ.get(DATA_VARIABLE, "")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{DATA_VARIABLE} must name a folder of data files; found {named!r}, not a folder")
    return folder


def data_file(folder: Path, name: str) -> Path:
    """The file ``name`` (relative, with forward slashes) in the folder; FileNotFoundError says what was looked for."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{DATA_VARIABLE} must hold the file {name}; found none at {path}")
    return path


def read_rows(path: Path, header: tuple[str, ...] = ()) -> Iterator[dict[str, object]]:
    """Rows of a .tsv, .csv, .json or .jsonl file as dictionaries, in file order.

    ``header`` names the columns of a .tsv without a header line. Tabs separate its fields and quote marks are text:
    the GLUE files hold unpaired quotes. In a .csv, quote marks enclose fields. A .json file holds a list of objects, an
    object of such objects by number, or an object of columns, each a list; a column that is empty is left out.

    Raises ValueError naming the file (and the row, where there is one) when the text is not UTF-8, not of the file's
    format, or a row has another number of fields than the header.
    """
    if path.suffix not in _READERS:
        raise ValueError(f"{path} must end in one of {', '.join(_READERS)}; found {path.suffix!r}")
    try:
        yield from _READERS[path.suffix](path, header)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be UTF-8 text in {path.suffix[1:]} format; found {error}") from error


def _read_tsv(path: Path, header: tuple[str, ...]) -> Iterator[dict[str, object]]:
    yield from _read_table(path, header, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_csv(path: Path, header: tuple[str, ...]) -> Iterator[dict[str, object]]:
    yield from _read_table(path, header)


def _read_table(path: Path, header: tuple[str, ...], **form) -> Iterator[dict[str, object]]:
    with path.open(encoding="utf-8-sig", newline="") as file:  # the MRPC files start with a byte order mark
        lines = csv.reader(file, **form)
        names = list(header) or next(lines, [])
        for number, fields in enumerate(lines, start=1):
            if len(fields) != len(names):
                needed = f"must have {len(names)} fields ({', '.join(names)})"
                raise ValueError(f"{path}, row {number}: {needed}; found {len(fields)}")
            yield dict(zip(names, fields, strict=True))


def _read_json(path: Path, header: tuple[str, ...]) -> Iterator[dict[str, object]]:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(rows, dict) and rows and all(isinstance(column, list) for column in rows.values()):
        columns = {name: column for name, column in rows.items() if column}
        if len({len(column) for column in columns.values()}) > 1:
            sizes = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
            raise ValueError(f"{path} must hold columns of one length; found {sizes}")
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if isinstance(rows, dict) and rows and all(isinstance(row, dict) for row in rows.values()):
        rows = list(rows.values())
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of objects; found {type(rows).__name__}")
    yield from (_object(path, number, row) for number, row in enumerate(rows, start=1))


def _read_jsonl(path: Path, header: tuple[str, ...]) -> Iterator[dict[str, object]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            yield _object(path, number, json.loads(line))


def _object(path: Path, number: int, row: object) -> dict[str, object]:
    if not isinstance(row, dict):
        raise ValueError(f"{path}, row {number}: must be an object of named fields; found {type(row).__name__}")
    return row


_READERS: dict[str, Callable[[Path, tuple[str, ...]], Iterator[dict[str, object]]]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
}

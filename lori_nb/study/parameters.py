"""Strict reading of a notebook's parameter cell: what may be set, what it is by default, and why.

papermill itself only warns about an unknown parameter and runs with the defaults, and its inspection skips some lines.
Here the cell is parsed, and anything that does not fit is an error before anything runs.
"""

from __future__ import annotations

import ast
import difflib
import io
import json
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAG = "parameters"
ONE_OR_SEVERAL = frozenset({"seed", "method", "tasks"})  # one value by default, and a list may be given
_KINDS = {bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list", tuple: "a list"}
_KINDS |= {dict: "a mapping", type(None): "nothing"}


@dataclass(frozen=True)
class Parameter:
    """One line of a parameter cell: ``name = default  # comment``."""

    name: str
    default: Any
    comment: str


def read_parameters(path: Path) -> dict[str, Parameter]:
    """The parameters of a notebook, in order.

    Raises:
        ValueError: not exactly one cell is tagged ``parameters``, or it holds more than literals (names the line).
    """
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if c["cell_type"] == "code" and TAG in c["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"notebook {path.name} must have exactly one cell tagged {TAG!r}; found {len(tagged)}")
    source = "".join(tagged[0]["source"])
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"{_where(path, error.lineno)} must be Python; found {(error.text or '').strip()!r}") from None
    comments = _comments(source)
    read = (_parameter(path, source, statement, comments) for statement in statements)
    return {parameter.name: parameter for parameter in read}


def check_parameters(path: Path, given: Mapping[str, Any]) -> None:
    """ValueError for a name that the notebook does not know, or a value of another kind than its default."""
    known = read_parameters(path)
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            listed = ", ".join(known) or "none"
            raise ValueError(f"notebook {path.name} has no parameter {name!r}; known are {listed}{hint}")
        if not _fits(name, known[name].default, value):
            wanted = _describe(known[name].default)
            raise ValueError(f"parameter {name!r} of notebook {path.name} must be {wanted}; found {value!r}")


def parse_value(text: str) -> Any:
    """A value as the command line writes it: a Python literal, a bracketed list of bare words, else the text itself."""
    text = text.strip()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if text.startswith("[") and text.endswith("]"):
            return [parse_value(part) for part in text[1:-1].split(",") if part.strip()]
        return text


def _parameter(path: Path, source: str, statement: ast.stmt, comments: Mapping[int, str]) -> Parameter:
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    try:
        if len(targets) != 1 or not isinstance(targets[0], ast.Name) or isinstance(statement, ast.AugAssign):
            raise ValueError
        default = ast.literal_eval(statement.value)
    except (ValueError, TypeError, AttributeError):
        found = ast.get_source_segment(source, statement)
        raise ValueError(f"{_where(path, statement.lineno)} must be NAME = literal; found {found!r}") from None
    comment = comments.get(statement.end_lineno) or comments.get(statement.lineno, "")
    return Parameter(targets[0].id, default, comment)


def _where(path: Path, line: int | None) -> str:
    return f"notebook {path.name}, cell tagged {TAG!r}, line {line}"


def _comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _describe(default: Any) -> str:
    if not isinstance(default, (list, tuple)):
        return _kind(default)
    inner = sorted({_kind(item).removeprefix("a ") for item in default})
    return f"a list of {' or '.join(inner)}, or one such value" if inner else "a list"


def _fits(name: str, default: Any, value: Any) -> bool:
    # None says "decide for me": whether that is possible, the settings know
    if default is None or value is None:
        return True
    several = isinstance(default, (list, tuple))
    allowed = {_kind(item) for item in default} if several else {_kind(default)}
    if isinstance(value, (list, tuple)):
        return (several or name in ONE_OR_SEVERAL) and (not allowed or {_kind(item) for item in value} <= allowed)
    return not allowed or _kind(value) in allowed

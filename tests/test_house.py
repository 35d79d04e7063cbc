"""The house: rooms import upward only, modules stay short, nothing is left undone, pins agree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lori_nb.lab.paths import PROJECT

PACKAGE = PROJECT / "lori_nb"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# What a module of a room may import from the package; a room may always import from itself.
MAY_IMPORT = {
    "method": set(),
    "analysis": {"method"},
    "lab": {"method", "analysis"},
    "study": {"method", "analysis", "lab"},
    "cli": {"method", "analysis", "lab", "study"},
    "__init__.py": set(),
}
UPPER = {
    "method": {"torch", "numpy", "safetensors", "scipy", "torchjd"},
    "analysis": {"torch", "numpy", "scipy", "statsmodels", "pandas"},
}
STANDARD = {"__future__", "collections", "contextlib", "dataclasses", "fractions", "functools", "hashlib", "itertools"}
STANDARD |= {"inspect", "json", "math", "os", "pathlib", "re", "typing"}


def name_of(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_rooms_import_upward_only(path):
    room = path.relative_to(PACKAGE).parts[0]
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "lori_nb":
            assert parts[1] == room or parts[1] in MAY_IMPORT[room], f"{name_of(path)} imports {module}"
        elif room in UPPER:
            assert parts[0] in UPPER[room] | STANDARD, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_are_short_and_finished(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", text)
    tree = ast.parse(text)
    if text.strip():
        assert ast.get_docstring(tree), "a module begins with what it is for"


def test_every_room_is_there():
    assert {path.relative_to(PACKAGE).parts[0] for path in SOURCES} >= {"method", "analysis", "lab", "study"}


def pins(text: str) -> dict[str, str]:
    """Package → version of every exact pin, names as pip compares them."""
    found = re.findall(r"^\s*(?:- )?([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;#]+)", text, flags=re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_conda_s_pins_are_those_of_pip():
    exact = pins((PROJECT / "constraints.txt").read_text())
    conda = pins((PROJECT / "environment.yml").read_text())
    assert len(conda) >= 10
    assert {name: exact.get(name) for name in conda} == conda


def test_every_dependency_is_pinned():
    exact = pins((PROJECT / "constraints.txt").read_text())
    text = (PROJECT / "pyproject.toml").read_text()
    names = re.findall(r'^    "([a-z0-9-]+)(?:\[[a-z]+\])?[><=!~]', text, flags=re.MULTILINE)
    assert len(names) >= 20
    assert [name for name in names if name not in exact] == []

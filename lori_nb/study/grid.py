"""Grids of a sweep: the command line's axes as points, each checked before anything runs."""

from __future__ import annotations

import hashlib
import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_nb.lab.paths import PROJECT, data_folder
from lori_nb.study.execute import folder_variables
from lori_nb.study.parameters import check_parameters, parse_value, read_parameters

if TYPE_CHECKING:
    from lori_nb.study.settings import Settings

LONGEST_SLUG = 100  # characters of a file name, well below what file systems allow
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_OUTSIDE_BRACKETS = re.compile(r",(?![^\[]*\])")


@dataclass(frozen=True)
class Point:
    """One point of a grid: the values asked for, all parameters that the notebook is given, and where its copy goes."""

    notebook: Path
    profile: str
    values: Mapping[str, Any]
    parameters: Mapping[str, Any]
    output: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.values.items()) or "defaults"

    @property
    def command(self) -> str:
        """What executes this point alone."""
        grid = " ".join(f"-g {shlex.quote(f'{name}={value_text(value)}')}" for name, value in self.values.items())
        return f"lori-nb sweep {self.notebook.stem} {grid} --profile {self.profile}"


def expand_values(text: str) -> list[Any]:
    """ "0..4" (both ends included), "lora,lori-s", "1e-4", "[a,b]" (one list) and mixtures of them, as values."""
    values: list[Any] = []
    for part in _OUTSIDE_BRACKETS.split(text):
        ends = _RANGE.fullmatch(part.strip())
        if ends and int(ends[1]) > int(ends[2]):
            raise ValueError(f"a range must run upwards, as in 0..4; found {part.strip()!r}")
        if not part.strip():
            raise ValueError(f"values must be separated by single commas; found {text!r}")
        values += range(int(ends[1]), int(ends[2]) + 1) if ends else [parse_value(part)]
    return values


def parse_grid(axes: Sequence[str]) -> list[dict[str, Any]]:
    """Points of the product of axes such as "seed=0..4" and "method=lora,lori-s"; the last axis runs fastest.

    Raises:
        ValueError: an axis without "=" or without values, one named twice, or a range that runs downwards.
    """
    values: dict[str, list[Any]] = {}
    for axis in axes:
        name, equals, text = axis.partition("=")
        if not equals or not name.strip() or not text.strip():
            raise ValueError(f"a grid axis must read NAME=VALUES, as in seed=0..4; found {axis!r}")
        if name.strip() in values:
            raise ValueError(f"a grid must name each parameter once; found {name.strip()!r} twice")
        values[name.strip()] = expand_values(text)
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def find_notebook(name: str) -> Path:
    """A notebook by path, or by name among the project's; ValueError lists those."""
    folder = PROJECT / "notebooks"
    places = [Path(name), folder / name, folder / f"{name}.ipynb"]
    found = next((place for place in places if place.suffix == ".ipynb" and place.is_file()), None)
    if found is None:
        known = ", ".join(sorted(path.stem for path in folder.glob("*.ipynb")))
        raise ValueError(f"notebook must be a file or one of {known}; found {name!r}")
    return found.resolve()


def points_of(notebook: Path, grid: Sequence[Mapping[str, Any]], profile: str) -> list[Point]:
    """All points, with every name and value checked.

    The kit's notebooks are given the profile's value of every setting that the grid does not name; another notebook
    keeps its defaults.
    """
    for values in grid:  # first what costs nothing: a misspelt name is answered before torch is imported
        check_parameters(notebook, values)
    return [_point(notebook, values, profile) for values in grid]


def _point(notebook: Path, values: Mapping[str, Any], profile: str) -> Point:
    from lori_nb.study.plans import PLANS
    from lori_nb.study.profiles import as_parameters

    chosen, parameters = {"profile": profile} | dict(values), dict(values)
    if notebook.stem in PLANS:
        settings = settings_at(chosen)
        names = [name for name in read_parameters(notebook) if hasattr(settings, name)]
        parameters |= as_parameters(settings, names)  # folders by whole paths: kernels work in the notebook's folder
        check_parameters(notebook, parameters)
    output = sweep_folder(notebook) / f"{slug(chosen)}.ipynb"
    return Point(notebook, chosen["profile"], dict(values), parameters, output, folder_variables())


def settings_at(values: Mapping[str, Any]) -> Settings:
    """The settings of a point; values that are no settings are the notebook's own affair."""
    from lori_nb.study.profiles import load_settings
    from lori_nb.study.settings import Settings

    known = {f.name for f in fields(Settings)}
    return load_settings(**{name: value for name, value in values.items() if name in known})


def sweep_folder(notebook: Path) -> Path:
    return data_folder().resolve() / "executed" / "sweeps" / notebook.stem


def slug(values: Mapping[str, Any]) -> str:
    """A file name for a point: "quick_seed-0_method-lora"; the profile's name leads.

    Values that a file name cannot hold are replaced by a digest of the point at its end.
    """
    parts = [f"{name}-{value_text(value)}" if name != "profile" else str(value) for name, value in values.items()]
    plain = "_".join(parts)
    safe = re.sub(r"[^\w.+-]+", "-", plain)
    if safe == plain and len(safe) <= LONGEST_SLUG:
        return safe
    return f"{safe[: LONGEST_SLUG - 9]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def value_text(value: Any) -> str:
    """A value as the command line writes it."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(value_text, value))}]"
    return value if isinstance(value, str) and parse_value(value) == value else repr(value)

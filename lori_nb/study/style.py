"""How figures look: one style, colours that colour-blind readers tell apart, files with the same bytes every time."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from lori_nb.lab.methods import METHODS
from lori_nb.lab.paths import write_atomically
from lori_nb.study.arms import ARMS
from lori_nb.study.joint_arms import JOINT_ARMS
from lori_nb.study.sequences import WAYS

# Okabe & Ito's palette, without its yellow, which is too pale for lines on white paper
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#000000",
)
GREY = "#666666"
WIDTH = 7.0  # inches: the text width of a one-column page
FORMATS = ("pdf", "svg", "png")

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "hatch.linewidth": 0.5,
    "lines.markersize": 6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # text stays text in the PDF
    "svg.hashsalt": "lori-nb",  # else every saving draws new random ids
}

_LOOKS = {
    "lora": (BLUE, "o", "-"),
    "lori-d": (ORANGE, "s", "--"),
    "lori-s": (GREEN, "^", "-."),
    "ortho-lora": (VERMILLION, "D", ":"),
    "ortho-lori-d": (PURPLE, "P", (0, (4, 1, 1, 1))),
    "ortho-lori-s": (GREEN, "p", (0, (3, 1, 1, 1))),
    "lori-s-disjoint": (PURPLE, "P", (0, (4, 1, 1, 1))),
    "lori-s-chained": (ORANGE, ">", ":"),
    "ewc": (VERMILLION, "D", ":"),
    "o-lora": (BLUE, "d", (0, (1, 1))),
    "replay": (BLACK, "*", "-."),
    "memory-projection": (VERMILLION, "<", (0, (5, 1))),
    "merged": (GREY, "X", "-"),
    "single": (BLUE, "o", "-"),
    "joint": (SKY, "v", "--"),
    "between": (VERMILLION, "D", "-"),
    "within": (GREY, "x", ":"),
    "null": (GREY, "x", ":"),
    "random": (GREY, "x", ":"),
    "adapters": (BLUE, "o", "-"),
    "held": (GREEN, "^", "none"),
    "not held": (VERMILLION, "X", "none"),
    "cannot tell": (GREY, "o", "none"),
}
_TITLES = {
    "single": "LoRA, one adapter a task",
    "single-longer": "LoRA, one adapter a task, twice the steps",
    "between": "between tasks",
    "within": "within a task (two halves of its batch)",
    "null": "null (before training)",
    "random": "null (random adapters)",
}
_SPARE = [(PURPLE, "X", "-"), (SKY, "v", "--"), (BLACK, "*", "-."), (VERMILLION, "<", (0, (5, 1))), (ORANGE, ">", ":")]
_SPARE += [(GREEN, "p", (0, (3, 1, 1, 1))), (BLUE, "d", (0, (1, 1))), (GREY, "h", "-")]


_NULL, _SEEDS = "null of ", "two seeds of "


def null_of(method: str) -> str:
    """The name under which the null of a method's adapters stands in tables and figures."""
    return _NULL + method


def is_null(name: str) -> bool:
    """Whether a name is :func:`null_of` something."""
    return name.startswith(_NULL)


def seeds_of(method: str) -> str:
    """The name of the other reference: a method's adapters of one task under two seeds."""
    return _SEEDS + method


def look_of(name: str) -> dict:
    """Colour, marker and line style of a method or of a row of numbers; the same name always looks the same."""
    for beside, colour in ((_NULL, GREY), (_SEEDS, BLACK)):
        if name.startswith(beside):  # the method's own marker and line
            return look_of(name.removeprefix(beside)) | {"color": colour}
    if name in _LOOKS:
        look = _LOOKS[name]
    else:
        others = [known for known in METHODS if known not in _LOOKS]
        look = _SPARE[(others.index(name) if name in others else len(others)) % len(_SPARE)]
    return dict(zip(("color", "marker", "linestyle"), look, strict=True))


def looks_of(names: Iterable[str]) -> dict[str, dict]:
    """Name → look, for names that stand in one plot: those without a look of their own get different spare ones."""
    names = list(dict.fromkeys(names))
    spare = itertools.cycle(_SPARE)
    keys = ("color", "marker", "linestyle")
    return {name: look_of(name) if name in _LOOKS else dict(zip(keys, next(spare), strict=True)) for name in names}


def title_of(name: str) -> str:
    """What legends and tables call a method or a row of numbers ("LoRI-S"); unknown names stay as they are."""
    for beside in (_NULL, _SEEDS):
        if name.startswith(beside):
            return beside + title_of(name.removeprefix(beside))
    known = _TITLES | {each.name: each.title for each in (*WAYS.values(), *JOINT_ARMS.values(), *ARMS.values())}
    return METHODS[name].title if name in METHODS else known.get(name, name)


def way_title(way: str) -> str:
    """What a way to go from task to task is called, where a method of its name is not meant: "LoRI-S, independent
    masks".
    """
    return WAYS[way].title if way in WAYS else title_of(way)


def title_in(column: str, name: str) -> str:
    """What a name in a table's column is called: a column "way" holds ways, any other methods and rows of numbers."""
    return way_title(name) if column == "way" else title_of(name)


def use() -> None:
    """Set the style for all figures of this process."""
    mpl.rcParams.update(STYLE)


def save(figure: Figure, folder: Path, stem: str, about: Mapping[str, str]) -> list[Path]:
    """Write a figure as PDF, SVG and PNG, the same bytes for the same figure.

    Args:
        about: "title" and "provenance", kept in the metadata of each file.
    """
    title, provenance = about["title"], about["provenance"]
    metadata = {
        "pdf": {"Title": title, "Subject": provenance, "CreationDate": None},
        "svg": {"Title": title, "Description": provenance, "Date": None},
        "png": {"Title": title, "Description": provenance},
    }
    paths = []
    for kind in FORMATS:
        with io.BytesIO() as buffer, mpl.rc_context(STYLE):
            figure.savefig(buffer, format=kind, metadata=metadata[kind])
            path = folder / f"{stem}.{kind}"
            write_atomically(path, buffer.getvalue())
        paths.append(path)
    return paths

"""What is kept of an executed notebook: outputs without noise or traces of the machine, provenance, and a footer."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_nb.lab.paths import PROJECT, data_folder, write_atomically

if TYPE_CHECKING:  # it takes two seconds (the grammars of jsonschema's formats), and every kernel imports this module
    from nbformat import NotebookNode

RECORD = "application/vnd.lori-nb+json"  # an output that carries facts from the kernel to the notebook's metadata
BATCH = "LORI_NB_BATCH"  # set to 1 where a notebook is executed and no one watches
KEY = "lori_nb"
INJECTED = "injected-parameters"
FOOTER = "lori-nb-footer"
ERROR_MARK = "papermill-error-cell-tag"
_WIDGET = "application/vnd.jupyter.widget-view+json"
_CELL_FILE = re.compile(r"[^\s\"'():]*ipykernel_\d+[/\\]\d+\.py")
_BAR = re.compile(r"\d+%\|.*\|.*\[.*\]|\d+it \[.*\]")
_TEXTS = ("text/", "application/json", "application/javascript", "image/svg+xml")


def record(**facts: Any) -> None:
    """Called in a notebook: put facts (such as ``run_hashes``, ``device``) into the metadata of its executed copy.

    Lists of several calls are joined, other values replaced. Nothing happens in a notebook opened by hand.
    """
    if os.environ.get(BATCH) != "1":
        return
    from IPython.display import display  # only a kernel has it to hand

    display({RECORD: facts, "text/plain": ""}, raw=True)


def recorded(nb: NotebookNode) -> dict[str, Any]:
    """The facts that the cells recorded."""
    facts: dict[str, Any] = {}
    for output in _outputs(nb):
        for name, value in output.get("data", {}).get(RECORD, {}).items():
            if isinstance(value, list):
                value = list(dict.fromkeys([*facts.get(name, []), *value]))
            facts[name] = value
    return facts


def clean(nb: NotebookNode) -> NotebookNode:
    """A copy without progress bars, widgets, time stamps, papermill's own metadata and paths of this machine."""
    nb = copy.deepcopy(nb)
    for name in ("papermill", "widgets"):
        nb.metadata.pop(name, None)
    for cell in nb.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if INJECTED in cell.metadata.get("tags", []) and "id" in cell:
            cell.id = INJECTED  # papermill draws a new one every time
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := _clean_output(output)) is not None]
    return nb


def _clean_output(output: NotebookNode) -> NotebookNode | None:
    if output.output_type == "stream":
        output.text = without_paths(_without_bars(output.text))
        return output if output.text.strip() else None
    if output.output_type == "error":
        output.evalue = without_paths(output.evalue)
        output.traceback = [without_paths(line) for line in output.traceback]
        return output
    if RECORD in output.data or _WIDGET in output.data:
        return None
    for kind, value in output.data.items():
        if kind.startswith(_TEXTS):  # never in base64, where a path could only stand by chance
            output.data[kind] = without_paths(value)
    return output


def _without_bars(text: str) -> str:
    lines = [line.rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(line for line in lines if not _BAR.search(line))


def without_paths(value: Any) -> Any:
    """Text, or lists and mappings of text, with the project's root as ".", the home as "~", other folders by name."""
    if isinstance(value, str):
        value = _CELL_FILE.sub("<cell>", value)
        for path, name in _known_folders():
            value = re.sub(rf"(?<![\w.~-]){re.escape(path)}(?![\w-])", lambda _, name=name: name, value)
        return value
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    return [without_paths(item) for item in value] if isinstance(value, (list, tuple)) else value


def _known_folders() -> list[tuple[str, str]]:
    named = [(data_folder(), "data"), (PROJECT, "."), (Path(sys.prefix), "<environment>"), (Path.home(), "~")]
    # what lies inside the project reads best relative to it
    kept = [(f.absolute(), name) for f, name in named if name in {".", "~"} or not f.resolve().is_relative_to(PROJECT)]
    folders = {str(f): name for folder, name in kept for f in (folder, folder.resolve()) if f != Path("/")}
    return sorted(folders.items(), key=lambda pair: -len(pair[0]))


def with_footer(nb: NotebookNode, facts: Mapping[str, Any]) -> NotebookNode:
    """A copy whose last cell says where its outputs come from, and whose metadata says it in full."""
    from nbformat import v4

    nb = copy.deepcopy(nb)
    nb.metadata[KEY] = without_paths(json.loads(json.dumps(facts)))
    nb.cells = [cell for cell in nb.cells if FOOTER not in cell.metadata.get("tags", [])]
    cell = v4.new_markdown_cell(footer_text(nb.metadata[KEY]), metadata={"tags": [FOOTER]})
    cell.id = FOOTER
    nb.cells.append(cell)
    nb.nbformat_minor = max(nb.nbformat_minor, 5)  # cells have ids from 4.5 on
    return nb


def footer_text(facts: Mapping[str, Any]) -> str:
    """The footer's few lines."""
    commit = (facts.get("commit") or "none")[:12] + (" with uncommitted changes" if facts.get("dirty") else "")
    packages = ", ".join(f"{name} {version}" for name, version in facts.get("packages", {}).items() if version)
    threads = "thread" if facts["threads"] == 1 else "threads"
    count = len(facts.get("run_hashes", ()))
    runs = f" · {count} run{'s' * (count > 1)}, by hash in the metadata" if count else ""
    again = f"\n\nTo make it again: `{facts['command']}`" if facts.get("command") else ""
    return (
        f"---\n*Where these outputs come from.* Commit {commit} · Python {facts['python']}, {packages} · "
        f"{facts['device']}, {facts['dtype']}, {facts['threads']} {threads} · {facts['date']}, "
        f"{facts['seconds']:.0f} s{runs}{again}"
    )


def notebook_digest(nb: NotebookNode) -> str:
    """SHA-256 over the cells' kinds and sources, without what execution adds."""
    added = {INJECTED, FOOTER, ERROR_MARK}
    cells = [[c.cell_type, c.source] for c in nb.cells if not added & set(c.metadata.get("tags", []))]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def read_notebook(path: Path) -> NotebookNode:
    import nbformat

    return nbformat.read(path, as_version=4)


def write_notebook(nb: NotebookNode, path: Path) -> None:
    """Write whole or not at all; keys sorted, so that equal notebooks are equal files."""
    import nbformat

    write_atomically(path, nbformat.writes(nb) + "\n")


def publish(executed: Path, notebook: Path) -> None:
    """Copy the outputs of an executed notebook, and its footer, into the committed one; its sources stay as they are.

    Raises:
        ValueError: the notebook's cells were changed since it was executed.
    """
    done, target = clean(read_notebook(executed)), read_notebook(notebook)
    if notebook_digest(done) != notebook_digest(target):
        raise ValueError(
            f"notebook {notebook.name} must be unchanged since it was executed; found other cells in {executed.name}"
        )
    ran = [c for c in done.cells if not {INJECTED, FOOTER} & set(c.metadata.get("tags", []))]
    target.cells = [c for c in target.cells if FOOTER not in c.metadata.get("tags", [])]
    count = 0
    for cell, source in zip(target.cells, ran, strict=True):
        if cell.cell_type == "code":
            count += 1
            cell.outputs, cell.execution_count = source.outputs, count
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
    write_notebook(with_footer(clean(target), done.metadata[KEY]), notebook)


def _outputs(nb: NotebookNode) -> list[NotebookNode]:
    return [output for cell in nb.cells if cell.cell_type == "code" for output in cell.outputs]

"""Small notebooks for tests of what executes notebooks."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PARAMETERS = (
    'seed = 0  # of everything drawn\nmethod = "lora"  # how adapters are trained\nrates = [0.1, 0.2]\nsteps = 5\n'
)


def small_notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A notebook with a title, a parameter cell and some code cells; ids do not change from call to call."""
    tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nb = new_notebook(cells=[new_markdown_cell("# A question"), tagged, *map(new_code_cell, cells)])
    for number, cell in enumerate(nb.cells):
        cell.id = f"cell-{number}"
    nbformat.write(nb, path)
    return path

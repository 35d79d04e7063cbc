"""Tasks, methods, merges and metrics of a user's own, made known to every process of a study.

``LORI_NB_EXTENSIONS`` names modules or Python files, separated by commas. Importing one registers what its decorators
name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

VARIABLE = "LORI_NB_EXTENSIONS"
_loaded: set[str] = set()


def load_extensions() -> list[str]:
    """Import what ``LORI_NB_EXTENSIONS`` names, each once a process; returns the names.

    Raises:
        ValueError: a file or module that is not there.
    """
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    names = [str(Path(name).expanduser().resolve()) if name.endswith(".py") else name for name in names]
    if names:
        os.environ[VARIABLE] = ",".join(names)  # processes started from here work in other folders
    for name in names:
        if name not in _loaded:
            _loaded.add(name)
            _import(name)
    return names


def _import(name: str) -> None:
    if not name.endswith(".py"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"{VARIABLE} must name modules or Python files; found {name!r} ({error})") from error
        return
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{VARIABLE} must name modules or Python files; there is no file {name!r}")
    found = importlib.util.spec_from_file_location(f"lori_nb_extension_{path.stem}", path)
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)

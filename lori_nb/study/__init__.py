"""A study: a profile expands into runs, the runs are trained once, and notebooks turn them into tables and figures.

What notebooks call: ``begin``, ``collect`` and ``shared_lines``, then ``questions``, ``comparison``, ``geometry``,
``forgetting`` and ``claims`` for tables, and ``figures`` and ``figures_lori`` for plots.
"""

from __future__ import annotations

import importlib

_HOMES = {"begin": "notebook", "collect": "notebook", "shared_lines": "notebook"}
_MODULES = ("claims", "comparison", "figures", "figures_lori", "forgetting", "geometry", "questions", "summary")

__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str):
    # Matplotlib and pandas come in when a notebook asks for them, so that the command line starts without them.
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

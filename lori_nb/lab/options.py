"""What a run's options may be, by name: switches of the conflict solver, the solver's own numbers, and numbers of the
method. All are text, as notebooks and commands give them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from lori_nb.lab.methods import COUNTED, Method
from lori_nb.method import conflicts, projection, solvers

_VALUES = (solvers.SOLVERS, conflicts.GROUPINGS, conflicts.REDUCTIONS, solvers.ORDERS, projection.REFERENCES)
SWITCHES = dict(zip(solvers.SWITCHES, _VALUES, strict=True))  # of the conflict solver, and what each may be


def solver_of(options: Mapping[str, str]) -> str:
    """The conflict solver that they name; Ortho-LoRA's projection where they name none."""
    return options.get("solver", "project")


def solver_settings(options: Mapping[str, str]) -> dict:
    """Keywords of :func:`lori_nb.method.conflicts.combine_stacked`, from options that were checked. Where they are
    silent a mean over tasks is taken.
    """
    strengths = {name: float(options[name]) for name in solvers.strengths_of(solver_of(options)) if name in options}
    chosen = {name: value for name, value in options.items() if name in SWITCHES}
    return {"reduction": "mean", "strengths": strengths} | chosen


def check_solver_options(options: Mapping[str, str]) -> None:
    """ValueError for anything but a switch of the conflict solver with one of its values, or a number of that solver
    in its range.
    """
    _check_names(options, solvers.strengths_of(solver_of(options)))
    for name, value in options.items():
        if name in SWITCHES:
            require(f"option {name}", value, value in SWITCHES[name], f"one of {', '.join(SWITCHES[name])}")
        else:
            label = f"option {name} of solver {solver_of(options)}"
            require(label, value, _is_amount(value, -math.inf), "a finite number")
            solvers.check_strengths(solver_of(options), {name: float(value)})


def _check_names(options: Mapping[str, str], numbers: Iterable[str]) -> None:
    known = (*SWITCHES, *numbers)
    for name in options:
        require("options", name, name in known, f"among {', '.join(known)}")


def check_options(method: Method, options: Mapping[str, str]) -> None:
    """ValueError for an option that is neither one of :func:`check_solver_options` nor a number of the method at which
    that is defined.
    """
    _check_names(options, (*method.strengths, *solvers.strengths_of(solver_of(options))))
    for name, value in options.items():
        if name in method.strengths:
            counted = name in COUNTED
            least = 1 if counted and method.strengths[name] >= 1 else 0
            wanted = f"a {'whole number' if counted else 'number'} of at least {least}"
            require(f"option {name} of {method.name}", value, _is_amount(value, least, counted), wanted)
    check_solver_options({name: value for name, value in options.items() if name not in method.strengths})


def _is_amount(value: str, least: float = 0, whole: bool = False) -> bool:
    try:
        number = float(value)
    except ValueError:
        return False
    return least <= number < math.inf and (number == int(number) or not whole)


def require(name: str, found: object, good: bool, wanted: str) -> None:
    """ValueError that names what is checked, what was wanted and what was found, unless it is good."""
    if not good:
        raise ValueError(f"{name} must be {wanted}; found {found!r}")

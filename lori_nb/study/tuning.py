"""Learning rates chosen for every method by the same rule, with the same budget, on rows held out of training.

Every method gets the same number of rates, a factor of two apart, on the same tasks, steps and seeds. Chosen is the
rate with the
best mean score over tasks on the tuning split; where that is the first or last of the grid, the grid is widened on that
side and all
methods get as many rates in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from lori_nb.lab.runs import Store
from lori_nb.lab.specs import RunSpec
from lori_nb.study.plans import joint, single
from lori_nb.study.pool import train_all
from lori_nb.study.profiles import Settings

FACTOR = 2.0
TUNE_ROWS = 128
ROUNDS = 4  # how often a grid may be widened
ORDER = ("lora", "lori-d", "lori-s", "joint", "ortho-lora")  # LoRI-S is calibrated by LoRI-D at its chosen rate


def tune(
    settings: Settings, starts: dict[str, Sequence[float]], jobs: int = 2, store: Store | None = None
) -> pd.DataFrame:
    """Run the grids and return one measurement a row: method, learning_rate, task, seed, value, n, run, chosen.

    Args:
        starts: method (or "joint") → the rates to begin with.
    """
    store = store or Store()
    rates = {name: sorted(starts[name]) for name in ORDER if name in starts}
    rates |= {name: sorted(values) for name, values in starts.items() if name not in rates}
    chosen = dict(settings.learning_rate)
    tables = []
    for name in rates:
        table, chosen[name] = _tune_one(replace(settings, learning_rate=chosen), name, rates[name], jobs, store)
        tables.append(table.assign(chosen=table["learning_rate"] == chosen[name]))
        print(
            f"{name}: {chosen[name]:g} among {', '.join(f'{r:g}' for r in sorted(table['learning_rate'].unique()))}",
            flush=True,
        )
    return pd.concat(tables, ignore_index=True)


def _tune_one(settings: Settings, name: str, rates: list[float], jobs: int, store: Store) -> tuple[pd.DataFrame, float]:
    for _ in range(ROUNDS):
        specs = [spec for rate in rates for spec in tuning_specs(settings, name, rate)]
        train_all(specs, store, jobs)
        table = store.table(specs).assign(arm=name)
        means = table.groupby("learning_rate")["value"].mean()
        best = float(means.idxmax())
        if best == min(rates):
            rates = [best / FACTOR, *rates]
        elif best == max(rates):
            rates = [*rates, best * FACTOR]
        else:
            break
    return table, best


def tuning_specs(settings: Settings, name: str, rate: float) -> list[RunSpec]:
    """The runs of one method at one rate: each task alone, or one joint run, scored on the tuning split."""
    held_out = {"score_on": "tune", "test_rows": TUNE_ROWS}
    fixed = replace(settings, learning_rate={**settings.learning_rate, name: rate})
    if name in {"joint", "ortho-lora"}:
        method = "lora" if name == "joint" else name
        return [replace(joint(fixed, method, seed), **held_out) for seed in settings.seed]
    singles = [single(fixed, name, task, seed) for task in settings.tasks for seed in settings.seed]
    return [replace(spec, **held_out, calibration=_held_out(spec.calibration, held_out)) for spec in singles]


def _held_out(calibration: RunSpec | None, held_out: dict) -> RunSpec | None:
    # scored on the same split, so that the tuning of LoRI-D has done this very run already
    return None if calibration is None else replace(calibration, **held_out)

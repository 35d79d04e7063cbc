"""The one number of every way from task to task, chosen by the same rule, on rows held out of training.

Of a way that protects earlier tasks it is how strongly, at LoRA's own learning rate; of any other the learning rate
after the first task, which is how far it may move from there; of merged adapters the sum of their weights. Every way,
own ones too, begins with as many values as a method begins with learning rates, on the first two tasks of the sequence.
Chosen is the value with the best mean score over both tasks after the second, on the tuning split; where it is the
first or the last of the grid, the grid grows by one value on that side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from lori_nb.lab import ledger
from lori_nb.lab.methods import COUNTED, get_method
from lori_nb.lab.paths import write_atomically
from lori_nb.lab.runs import Store, unmeasured
from lori_nb.lab.specs import Spec, with_parents
from lori_nb.study.cells import like_of, rate_of
from lori_nb.study.pool import train_all
from lori_nb.study.sequences import JOINT, MERGED, get_way, stage_runs, stages
from lori_nb.study.settings import Settings
from lori_nb.study.tuning import RATES, ROUNDS, TUNE_ROWS

COLUMNS = ["way", "number", "setting", "task", "seed", "metric", "value", "n", "chosen", "run"]


@dataclass(frozen=True)
class Grid:
    """Where the values of a method's number lie: ``centre`` in the middle, each ``factor`` times the one before; counts
    of rows are whole numbers.
    """

    number: str
    centre: float
    factor: float

    @property
    def values(self) -> list[float]:
        """As many as a method begins with learning rates."""
        return [self.settled(self.centre * self.factor**step) for step in range(-(RATES // 2), RATES - RATES // 2)]

    def settled(self, value: float) -> float:
        """The value as a run takes it."""
        return max(1, round(value)) if self.number in COUNTED else float(f"{value:.12g}")  # 0.01, not 0.0100…02

    def is_lowest(self, value: float) -> bool:
        """Whether nothing below makes sense: there is no less than a row."""
        return self.number in COUNTED and value <= 1


RATE = "learning_rate"
GRIDS = {
    "ewc": Grid("strength", 1e3, 10.0),
    "o-lora": Grid("strength", 0.5, 10.0),
    "replay": Grid("rows", 4, 2.0),
    "memory-projection": Grid("rows", 8, 2.0),
    MERGED: Grid("merged_total", 1.2, 1.5),
}


def grid_of(settings: Settings, way: str) -> Grid:
    """Where a way's number is looked for: :data:`GRIDS`; for a method of one's own around the first of the numbers that
    it declares, tenfold apart, or twofold (from one row on) where it counts rows; for a way without numbers around the
    learning rate of its tasks alone, twofold apart.

    Raises:
        ValueError: an unknown way, or joint training, which has no later tasks.
    """
    if way in GRIDS:
        return GRIDS[way]
    if (chosen := get_way(way)).name == JOINT:
        raise ValueError(f"strengths must be of ways that learn one task after another; found {way!r}")
    if not (strengths := get_method(chosen.later).strengths):
        return Grid(RATE, rate_of(settings, chosen.later, *like_of(chosen.later)), 2.0)
    number, default = next(iter(strengths.items()))
    if number in COUNTED:
        return Grid(number, max(default, 2 ** (RATES // 2)), 2.0)
    return Grid(number, default or 1.0, 10.0)  # no multiple of 0 is another value


def specs_at(settings: Settings, way: str, value: float) -> list[Spec]:
    """A way after the second task at one value of its number, one spec a seed, scored on the tuning split."""
    name, method = grid_of(settings, way).number, get_way(way).later
    others = settings.strengths.get(method, {})  # a memory, say, that the study has
    changes = {"strengths": {method: {**others, name: value}}}
    if name == RATE:
        changes = {"sequence_rates": {way: value}}
    elif way == MERGED:
        changes = {name: value}
    fixed = replace(settings, sequence=settings.sequence[:2], watch=(), **changes)
    chain = stages if way == MERGED else stage_runs
    last = [chain(fixed, way, fixed.sequence, seed)[-1] for seed in settings.seed]
    return [replace(spec, score_on="tune", test_rows=TUNE_ROWS, evaluate=fixed.sequence) for spec in last]


def first_specs(settings: Settings, ways: list[str]) -> list[Spec]:
    """Every run of the grids as they begin, once, after those it depends on; errors as in :func:`tune_strengths`."""
    _check(settings, ways)
    grids = {way: grid_of(settings, way).values for way in ways}
    return with_parents(s for way, values in grids.items() for value in values for s in specs_at(settings, way, value))


def _check(settings: Settings, ways: list[str]) -> None:
    for way in ways:
        grid_of(settings, way)
    if len(settings.sequence) < 2:
        raise ValueError(f"sequence must hold at least two tasks; found {', '.join(settings.sequence)}")


def tune_strengths(settings: Settings, ways: list[str], jobs: int = 2, store: Store | None = None) -> pd.DataFrame:
    """Run the grids and return one measurement a row, with :data:`COLUMNS`.

    Raises:
        ValueError: an unknown way or joint training, or a sequence of one task.
    """
    _check(settings, ways)
    store, tables = store or Store(), []
    for way in ways:
        table = _tune_one(settings, way, jobs, store)
        best = _best(table)
        tables.append(table.assign(chosen=table["setting"] == best))
        tried = ", ".join(f"{value:g}" for value in sorted(set(table["setting"])))
        print(f"{way}: {table['number'].iloc[0]} {best:g} among {tried}", flush=True)
    return pd.concat(tables, ignore_index=True)


def _best(table: pd.DataFrame) -> float:
    return float(table.groupby("setting")["value"].mean().idxmax())


def _tune_one(settings: Settings, way: str, jobs: int, store: Store) -> pd.DataFrame:
    grid = grid_of(settings, way)
    values = grid.values
    for widened in range(ROUNDS + 1):
        by_value = {value: specs_at(settings, way, value) for value in values}
        train_all(unmeasured([spec for specs in by_value.values() for spec in specs]), store, jobs)
        frames = [store.table(specs).assign(setting=value) for value, specs in by_value.items()]
        table = pd.concat(frames, ignore_index=True).assign(way=way, number=grid.number)
        best = _best(table)
        lowest = best == min(values) and not grid.is_lowest(best)
        if not (lowest or best == max(values)):
            break
        if widened == ROUNDS:
            print(f"{way}: the best value, {best:g}, is still at the edge of its grid", flush=True)
        lower, higher = grid.settled(best / grid.factor), grid.settled(best * grid.factor)
        values = [lower, *values] if best == min(values) else [*values, higher]
    return table


def publish_strengths(table: pd.DataFrame, name: str, asked: str) -> list[Path]:
    """Append the grids to the ledger and write the table that people read; returns the files.

    Args:
        name: of the study, for the files: "quick".
        asked: the options that lead to the study: "--profile quick".
    """
    command = f"lori-nb tune {asked} --strengths {','.join(table['way'].unique())}"
    added = ledger.append(table.drop(columns="setting"), f"strengths-{name}", command)
    csv = ledger.ledger_folder().parent / f"strengths-{name}.csv"
    before = pd.read_csv(csv) if csv.exists() else pd.DataFrame(columns=COLUMNS)
    kept = before[~before["way"].isin(set(table["way"]))]
    whole = pd.concat([part for part in (kept, table[COLUMNS]) if len(part)], ignore_index=True)
    write_atomically(csv, whole.sort_values(["way", "setting", "task", "seed"]).to_csv(index=False))
    return [path for path in (added, csv) if path is not None]

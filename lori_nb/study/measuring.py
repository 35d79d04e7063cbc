"""Long measurements that outlive a machine: scores go to the ledger as they come, and what it holds is not done again.

A study of hours trains the methods themselves first and the variants after them, each seed by seed, so that the runs
that share a calibration are done together and what is there at any time can be read. Tables and figures are then made
from the ledger alone, wherever the runs themselves may be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from lori_nb.lab import ledger
from lori_nb.lab.resolving import resolve
from lori_nb.lab.run_tables import watched_rows
from lori_nb.lab.runs import Store, unmeasured
from lori_nb.lab.specs import Spec
from lori_nb.study.notebook import Results, slug
from lori_nb.study.plans import PLANS, method_specs
from lori_nb.study.pool import train_all
from lori_nb.study.profiles import Settings

BATCH = 12  # runs between two additions to the ledger


def measure(settings: Settings, notebooks: Sequence[str], jobs: int = 2, store: Store | None = None) -> list[Path]:
    """Train what the ledger lacks of the notebooks' runs; returns the ledger's new files.

    Raises TrainingFailedError, after what was done is in the ledger.
    """
    store = store or Store()
    command = f"lori-nb measure --profile {slug(settings)} --notebooks {','.join(notebooks)}"
    study = f"study-{slug(settings)}"
    specs = in_order((spec for name in notebooks for spec in PLANS[name](settings)), method_specs(settings))
    added = [record(specs, store, study, command)]
    while missing := [spec for spec in unmeasured(specs) if not store.finished(spec)]:
        try:
            train_all(missing[:BATCH], store, jobs)
        finally:
            added.append(record(specs, store, study, command))
    return [path for path in added if path is not None]


def in_order(specs: Iterable[Spec], first: Iterable[Spec] = ()) -> list[Spec]:
    """Every spec once: those of ``first``, then the others, each one seed after another, else in the plan's order."""
    early = {resolve(spec).hash for spec in first}
    every = {spec.hash: spec for spec in map(resolve, specs)}.values()
    return sorted(every, key=lambda spec: (spec.hash not in early, spec.seed))


def record(specs: Sequence[Spec], store: Store, study: str, command: str) -> Path | None:
    """Add to the ledger what it lacks of the finished runs among ``specs``."""
    finished = [spec for spec in unmeasured(specs) if store.finished(spec)]
    if not finished:
        return None
    ended = ledger.with_rows(store.table(finished), store.predictions)
    on_the_way = [watched_rows(run) for spec in finished if len((run := store.load(spec.hash)).watched)]
    return ledger.append(pd.concat([ended, *on_the_way], ignore_index=True), study, command)


def results_of(name: str, settings: Settings) -> Results:
    """A notebook's results from the ledger alone: scores and rows, no adapters; what is missing is left out."""
    plan = [resolve(spec) for spec in PLANS[name](settings)]
    hashes = [spec.hash for spec in plan]
    rows = ledger.rows_of(hashes)
    order = {each: place for place, each in reversed(list(enumerate(hashes)))}  # where a run stands first
    rows = rows.sort_values("run", key=lambda runs: runs.map(order), kind="stable", ignore_index=True)
    return Results(
        name, settings, rows.drop(columns="right", errors="ignore"), ledger.measured(hashes), len(set(hashes))
    )

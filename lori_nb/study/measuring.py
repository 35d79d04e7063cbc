"""Long measurements that outlive a machine: scores go to the ledger as they come, and what it holds is not done again.

What only adapters can tell goes there too (:mod:`lori_nb.study.adapter_records`), once they are all in the store.

A study of hours trains the methods themselves first, with joint training and Ortho-LoRA where a notebook asks for them,
then what tells whether that was their plateau, and the variants after them, each seed by seed, so that the runs that
share a calibration are done together and what is there at any time can be read. Tables and figures are then made from
the ledger alone, wherever the runs themselves may be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from lori_nb.lab import ledger
from lori_nb.lab.resolving import resolve
from lori_nb.lab.run_tables import also_rows, watched_rows
from lori_nb.lab.runs import Store, unmeasured
from lori_nb.lab.specs import Spec
from lori_nb.study import adapter_records, conflict_records, functional, mergeability
from lori_nb.study.joint_arms import JOINT, ORTHO, joint_arm_spec, longer_arrangements
from lori_nb.study.notebook import Results, slug
from lori_nb.study.plans import PLANS, method_specs
from lori_nb.study.pool import train_all
from lori_nb.study.profiles import load_settings
from lori_nb.study.settings import Settings

BATCH = 24  # runs between two additions to the ledger
OF_ADAPTERS = {"05_merging": mergeability.record, "06_forgetting": functional.record}


def measure(settings: Settings, notebooks: Sequence[str], jobs: int = 2, store: Store | None = None) -> list[Path]:
    """Train what the ledger lacks of the notebooks' runs; returns the ledger's new files.

    Raises TrainingFailedError, after what was done is in the ledger.
    """
    store, command = store or Store(), command_of(settings, notebooks)
    study = f"study-{slug(settings)}"
    specs = planned(settings, notebooks)

    def kept() -> list[Path | None]:
        scores = [conflict_records.record(specs, store, study), record(specs, store, study, command)]
        known = set(adapter_records.files())
        for keep in (OF_ADAPTERS[name] for name in notebooks if name in OF_ADAPTERS):
            keep(settings, store)
        return [*scores, *(path for path in adapter_records.files() if path not in known)]

    added = kept()
    while missing := [spec for spec in unmeasured(specs) if not store.finished(spec)]:
        try:
            train_all(missing[:BATCH], store, jobs)
        finally:
            added += kept()
    return [path for path in added if path is not None]


def planned(settings: Settings, notebooks: Sequence[str]) -> list[Spec]:
    """Every run that the notebooks ask for, once, in the order in which they are measured."""
    first = [*method_specs(settings), *(joint_arm_spec(settings, n, s) for n in (JOINT, ORTHO) for s in settings.seed)]
    asked = (spec for name in notebooks for spec in PLANS[name](settings))
    return in_order(asked, first, longer_arrangements(settings))


def command_of(settings: Settings, notebooks: Sequence[str]) -> str:
    """The command that makes these measurements; other changes of a profile than its tasks have no option here."""
    tasks = "" if settings.tasks == load_settings(settings.profile).tasks else f" --tasks {','.join(settings.tasks)}"
    return f"lori-nb measure --profile {settings.profile}{tasks} --notebooks {','.join(notebooks)}"


def in_order(specs: Iterable[Spec], *groups: Iterable[Spec]) -> list[Spec]:
    """Every spec once: those of the groups, one group after another, then the others; within each of these one seed
    after another, else in the plan's order.
    """
    early: dict[str, int] = {}
    for number, group in enumerate(groups):
        for spec in group:
            early.setdefault(resolve(spec).hash, number)
    every = {spec.hash: spec for spec in map(resolve, specs)}.values()
    return sorted(every, key=lambda spec: (early.get(spec.hash, len(groups)), spec.seed))


def record(specs: Sequence[Spec], store: Store, study: str, command: str) -> Path | None:
    """Add to the ledger what it lacks of the finished runs among ``specs``."""
    finished = [spec for spec in unmeasured(specs) if store.finished(spec)]
    if not finished:
        return None
    ended = ledger.with_rows(store.table(finished), store.predictions)
    runs = [store.load(spec.hash) for spec in finished]
    on_the_way = [watched_rows(run) for run in runs if len(run.watched)]
    also = [rows for run in runs if len(rows := also_rows(run))]
    return ledger.append(pd.concat([ended, *on_the_way, *also], ignore_index=True), study, command)


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

"""What the ledger keeps of conflicts between tasks' gradients: cosines of half batches by step, layer, factor, tasks.

A run's own record (:mod:`lori_nb.lab.telemetry`) holds every tensor at every step and stays with the run. The files
under ``figures/reference/ledger/conflicts`` are append-only, keyed by run hash, and enough for who conflicts with whom,
where and when, wherever the runs themselves may be.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lori_nb.lab import ledger
from lori_nb.lab.paths import write_atomically
from lori_nb.lab.resolving import resolve
from lori_nb.lab.runs import Store
from lori_nb.lab.specs import Spec
from lori_nb.lab.telemetry import HALVES
from lori_nb.study.conflict import kinds_of_pair, with_places
from lori_nb.study.joint_arms import joint_arm_spec
from lori_nb.study.settings import Settings

CELL = ["step", "layer", "factor", "task", "other"]
COLUMNS = ["run", *CELL, "value", "rate", "n"]


def records_folder() -> Path:
    """Where the committed files are."""
    return ledger.ledger_folder() / "conflicts"


def condensed(telemetry: pd.DataFrame) -> pd.DataFrame:
    """A run's record by step, layer, factor and pair of tasks, or of halves of one task's batches.

    Args:
        telemetry: columns of :data:`lori_nb.lab.telemetry.COLUMNS`.

    Returns:
        Columns of :data:`COLUMNS` but run: ``value`` the mean cosine, ``rate`` the share of negative ones, over the
        ``n`` tensors and halves of a cell; gradients that were zero are left out. Empty where no batch had halves.
    """
    if telemetry.empty:
        return pd.DataFrame(columns=COLUMNS[1:])
    placed = with_places(telemetry[telemetry["measure"] == HALVES].dropna(subset="value"))
    cosines = placed.assign(rate=placed["value"] < 0).groupby(CELL, sort=True)
    means = cosines.agg(value=("value", "mean"), rate=("rate", "mean"), n=("value", "size"))
    return means.reset_index()


def record(specs: Sequence[Spec], store: Store, study: str) -> Path | None:
    """Keep what is not yet kept of the finished runs on several tasks; the new file, or None where nothing is new."""
    known = set(read()["run"])
    new = [s for s in map(resolve, specs) if len(s.tasks) > 1 and s.kind == "run" and s.hash not in known]
    frames = [condensed(store.load(s.hash).conflicts).assign(run=s.hash) for s in new if store.finished(s)]
    frames = [frame for frame in frames if len(frame)]
    if not frames:
        return None
    table, raw = pd.concat(frames, ignore_index=True)[COLUMNS], io.BytesIO()
    table.astype({"value": "float32", "rate": "float32"}).to_parquet(raw, index=False)
    digest = hashlib.sha256("".join(sorted(table["run"].unique())).encode()).hexdigest()[:8]
    path = records_folder() / f"{study}-{digest}.parquet"
    write_atomically(path, raw.getvalue())
    return path


def read() -> pd.DataFrame:
    """Everything kept, with the columns of :data:`COLUMNS`."""
    frames = [pd.read_parquet(file) for file in sorted(records_folder().glob("*.parquet"))]
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)
    return table.drop_duplicates(["run", *CELL], ignore_index=True)


def kept_of(settings: Settings, arrangement: str) -> pd.DataFrame:
    """What is kept of one way to learn all tasks, its seeds together: columns of :data:`COLUMNS`, arrangement, seed and
    pairs ("between" tasks or "within" one).
    """
    seeds = {resolve(joint_arm_spec(settings, arrangement, seed)).hash: seed for seed in settings.seed}
    table = read()
    chosen = table[table["run"].isin(seeds)]
    about = {"arrangement": arrangement, "seed": chosen["run"].map(seeds), "pairs": kinds_of_pair(chosen)}
    return chosen.assign(**about).reset_index(drop=True)

"""A finished run's scores as rows of the one table that studies, figures and the ledger read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from lori_nb.lab import ledger

if TYPE_CHECKING:
    from lori_nb.lab.runs import Run


def run_rows(run: Run) -> pd.DataFrame:
    """A run's scores, one row a task by the task's own metric, with the settings that studies group by."""
    spec = run.spec
    about = {
        "run": run.hash,
        "kind": spec.kind,
        "method": spec.method,
        "trained_on": "+".join(spec.tasks),
        "seed": spec.seed,
        "base": spec.base,
        "trainable_parameters": run.provenance.get("trainable_parameters", 0),
    }
    settings = ("learning_rate", "rank", "sparsity", "mask_scope", "mask_origin", "mask_structure", "subspace", "steps")
    settings += ("stop_after", "shots", "merge")
    about |= {name: value for name in settings if (value := getattr(spec, name, None)) is not None}
    if getattr(spec, "calibration", None) is not None:
        about["calibration_steps"] = spec.calibration.trained_steps
    if spec.kind == "merge":
        about["weight"] = spec.weights[0]
    elif spec.start is not None:
        about["after"] = "+".join(spec.start.tasks)
    return run.metrics.drop_duplicates(["task", "split"]).assign(**about)


def also_rows(run: Run) -> pd.DataFrame:
    """The scores by the metrics that a task reports beside its own, as rows for the ledger (column ``also``)."""
    rows = run.metrics[run.metrics.duplicated(["task", "split"])]
    about = {"run": run.hash, "kind": run.spec.kind, "method": run.spec.method, "seed": run.spec.seed}
    return rows.assign(trained_on="+".join(run.spec.tasks), also=True, **about)


def watched_rows(run: Run) -> pd.DataFrame:
    """The scores that were taken while a run trained, as rows for the ledger: split "test@30" is after step 30."""
    rows = run.watched.drop_duplicates(["step", "task", "split"])
    names = [ledger.on_the_way(split, step) for split, step in zip(rows["split"], rows["step"], strict=True)]
    about = {"run": run.hash, "kind": run.spec.kind, "method": run.spec.method, "seed": run.spec.seed}
    return rows.drop(columns="step").assign(split=names, trained_on="+".join(run.spec.tasks), **about)

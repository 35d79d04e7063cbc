"""Learning rates chosen for every method by the same rule, on rows held out of training.

Every method begins with as many rates, a factor of two apart, on the same tasks, steps and seeds. Chosen is the rate
with the best mean score over tasks on the tuning split. Where that is the first or the last of the grid, the grid grows
by one rate on that side, for every method alike; the table shows all rates that were tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from lori_nb.lab import ledger
from lori_nb.lab.methods import METHODS, get_method
from lori_nb.lab.paths import write_atomically
from lori_nb.lab.runs import Store, unmeasured
from lori_nb.lab.specs import RunSpec, with_parents
from lori_nb.method.solvers import SOLVERS
from lori_nb.study.cells import joint, like_of, single
from lori_nb.study.joint_arms import JOINT_ARMS, get_joint_arm, joint_arm_spec
from lori_nb.study.notebook import slug
from lori_nb.study.pool import train_all
from lori_nb.study.profiles import load_settings
from lori_nb.study.settings import Settings

FACTOR = 2.0
TUNE_ROWS = 128
# Of the LoRI authors' scripts at rank 32, for 8B models: AdamW, constant schedule.
PAPER_RATES = {"lori-d": 5e-5, "lori-s": 5e-4}
ROUNDS = 4  # how often a grid may be widened
RATES = 5  # learning rates a method begins with
TUNED = ("lora", "lori-d", "lori-s", "joint", "ortho-lora")  # where no others are named
# Centres of the grids: frozen A and sparse B want larger steps, whole weights smaller ones. An extension begins where
# the method most like it does.
_OWN = {
    "decoder": {"lora": 2e-3, "dora": 2e-3, "lora-fa": 3.2e-2, "lori-d": 3.2e-2, "lori-s": 6.4e-2, "full": 2e-4},
    "encoder": {"lora": 1e-3, "dora": 1e-3, "lora-fa": 8e-3, "lori-d": 8e-3, "lori-s": 1.6e-2, "full": 1e-4},
}
CENTRES = {kind: own | {"joint": own["lora"], "ortho-lora": own["lora"]} for kind, own in _OWN.items()}


def first_grids(arms: Sequence[str] = TUNED, kind: str = "decoder") -> dict[str, list[float]]:
    """Arm → the rates that its grid begins with, a method after the one that calibrates it, at whose rate it does so.

    Args:
        arms: "joint" for LoRA on all tasks at once, other ways to learn all tasks at once as ``joint_arms`` takes them,
            and any method that trains, own ones too.
        kind: "decoder" or "encoder", whose rates differ.

    Raises:
        ValueError: another name; it lists the known ones.
    """
    known = list(dict.fromkeys((*TUNED, *JOINT_ARMS, *(name for name, method in METHODS.items() if method.trains))))
    for arm in arms:
        if arm not in known and not _is_joint_arm(arm):
            raise ValueError(f"methods must be among {', '.join(dict.fromkeys((*known, *SOLVERS)))}; found {arm!r}")
    ordered = sorted((arm for arm in dict.fromkeys((*known, *arms)) if arm in arms), key=_is_calibrated)
    steps = range(-(RATES // 2), RATES // 2 + 1)
    return {arm: [centre_of(arm, kind) * FACTOR**step for step in steps] for arm in ordered}


def _is_joint_arm(name: str) -> bool:
    """Whether it is a way to learn all tasks in one adapter: a listed one, a conflict solver, or one with switches."""
    try:
        get_joint_arm(name)
    except ValueError:
        return False
    return True


def _is_calibrated(arm: str) -> bool:
    return arm in METHODS and METHODS[arm].calibration is not None


def centre_of(arm: str, kind: str = "decoder") -> float:
    """The middle of an arm's first grid: its own, or that of the built-in method most like it."""
    known = CENTRES[kind]
    if arm in known:
        return known[arm]
    like = get_joint_arm(arm).like if _is_joint_arm(arm) else like_of(arm)[0]
    return known[like]


def is_joint(arm: str) -> bool:
    """Whether an arm is tuned on all tasks at once: the ways to learn all in one adapter, own methods that project."""
    return _is_joint_arm(arm) or get_method(arm).projects


def tune(settings: Settings, grids: dict[str, list[float]], jobs: int = 2, store: Store | None = None) -> pd.DataFrame:
    """Run the grids and return one measurement a row: arm, learning_rate, task, seed, value, n, run, chosen.

    Args:
        grids: as :func:`first_grids` gives them.
    """
    store = store or Store()
    chosen = dict(settings.learning_rate)
    tables = []
    for name, rates in grids.items():
        table, chosen[name] = _tune_one(replace(settings, learning_rate=chosen), name, rates, jobs, store)
        tables.append(table.assign(chosen=table["learning_rate"] == chosen[name]))
        tried = ", ".join(f"{rate:g}" for rate in sorted(table["learning_rate"].unique()))
        print(f"{name}: {chosen[name]:g} among {tried}", flush=True)
    return pd.concat(tables, ignore_index=True)


def _tune_one(settings: Settings, name: str, rates: list[float], jobs: int, store: Store) -> tuple[pd.DataFrame, float]:
    for widened in range(ROUNDS + 1):
        specs = [spec for rate in rates for spec in tuning_specs(settings, name, rate)]
        train_all(unmeasured(specs), store, jobs)
        table = store.table(specs).assign(arm=name)
        means = table.groupby("learning_rate")["value"].mean()
        best = float(means.idxmax())
        if best not in (min(rates), max(rates)):
            break
        if widened == ROUNDS:
            print(f"{name}: the best rate, {best:g}, is still at the edge of its grid", flush=True)
        rates = [best / FACTOR, *rates] if best == min(rates) else [*rates, best * FACTOR]
    return table, best


def tuning_specs(settings: Settings, name: str, rate: float) -> list[RunSpec]:
    """The runs of one method at one rate: each task alone, or one joint run, scored on the tuning split."""
    held_out = {"score_on": "tune", "test_rows": TUNE_ROWS}
    fixed = replace(settings, learning_rate={**settings.learning_rate, name: rate})
    if is_joint(name):
        specs = [
            joint_arm_spec(fixed, name, s) if _is_joint_arm(name) else joint(fixed, name, s) for s in settings.seed
        ]
        return [replace(spec, **held_out) for spec in specs]
    singles = [single(fixed, name, task, seed) for task in settings.tasks for seed in settings.seed]
    return [replace(spec, **held_out, calibration=_held_out(spec.calibration, held_out)) for spec in singles]


def _held_out(calibration: RunSpec | None, held_out: dict) -> RunSpec | None:
    # scored on the same split, so that the tuning of LoRI-D has done this very run already
    return None if calibration is None else replace(calibration, **held_out)


def first_specs(settings: Settings, grids: dict[str, list[float]]) -> list[RunSpec]:
    """Every run of the grids as they begin, once, after those it depends on."""
    specs = [spec for name, rates in grids.items() for rate in rates for spec in tuning_specs(settings, name, rate)]
    return with_parents(specs)


def table_name(settings: Settings) -> str:
    """What the tables of a study's rates are named by: its profile, its tasks and its steps where they are others."""
    usual = load_settings(settings.profile, tasks=list(settings.tasks))
    name = slug(replace(settings, **{key: getattr(usual, key) for key in ("seed", *fixed_steps(1))}))
    return name if settings.steps == usual.steps else f"{name}-{settings.steps}-steps"


def fixed_steps(steps: int) -> dict:
    """The settings under which every run has so many steps."""
    return {"steps": steps, "joint_steps": steps, "task_steps": {}, "sequence_steps": None}


def publish(table: pd.DataFrame, name: str, chosen: str = "") -> list[Path]:
    """Append the grids to the ledger and write the table that people read, in which arms that were not tuned this time
    keep their rows; returns the files.

    Args:
        name: of :func:`table_name`.
        chosen: the options of the command that chose profile, tasks and seeds; empty for the profile of that name.
    """
    folder = ledger.ledger_folder().parent
    command = f"lori-nb tune {chosen or f'--profile {name}'} --methods {','.join(table['arm'].unique())}"
    added = ledger.append(table, f"tuning-{name}", command)
    columns = ["arm", "learning_rate", "task", "seed", "metric", "value", "n", "chosen", "run"]
    csv = folder / f"tuning-{name}.csv"
    before = pd.read_csv(csv) if csv.exists() else pd.DataFrame(columns=columns)
    kept = before[~before["arm"].isin(set(table["arm"]))]
    whole = pd.concat([part for part in (kept, table[columns]) if len(part)], ignore_index=True)
    write_atomically(csv, whole.sort_values(columns[:4]).to_csv(index=False))
    return [path for path in (added, csv) if path is not None]


def published(profile: str) -> pd.DataFrame:
    """The committed table of learning rates tried for a profile; that of "quick" where it has none of its own."""
    folder = ledger.ledger_folder().parent
    own = folder / f"tuning-{profile}.csv"
    return pd.read_csv(own if own.exists() else folder / "tuning-quick.csv")

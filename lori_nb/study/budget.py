"""How many rows every way to learn several tasks is trained on, counted from the very runs of a sequence."""

from __future__ import annotations

from collections.abc import Iterable

from lori_nb.lab.specs import RunSpec
from lori_nb.lab.stages import kept_rows, strength_of
from lori_nb.study.sequences import JOINT, MERGED, chain_of, joint_run, orders_of
from lori_nb.study.settings import Settings
from lori_nb.study.style import way_title


def trained_rows(runs: Iterable[RunSpec]) -> int:
    """Rows of the runs' own tasks that they train on, repetitions counted: steps × batch size."""
    return sum(run.trained_steps * run.batch_size for run in runs)


def calibration_rows(runs: Iterable[RunSpec]) -> int:
    """Rows that the calibrations of the runs' masks train on, each calibration once; 0 without masks."""
    return trained_rows(dict.fromkeys(run.calibration for run in runs if run.calibration is not None))


def replayed_rows(runs: Iterable[RunSpec]) -> int:
    """Rows of earlier tasks that replay adds: in every step as many as it asks for, or as are kept."""
    replaying = [run for run in runs if run.method == "replay" and run.start is not None]
    return sum(run.trained_steps * min(int(strength_of(run, "rows")), kept_of(run)) for run in replaying)


def kept_of(run: RunSpec) -> int:
    """Rows of an earlier task that a run keeps for its method."""
    return min(kept_rows(run), run.train_rows) if run.start is not None else 0


def budget_line(settings: Settings) -> str:
    """Rows trained on in one order under one seed: by a sequence, by what ways of the settings add to it, by adapters
    that are merged, and jointly; how many of a batch replay adds, and how many of a task are kept for later ones.
    """
    seed = settings.seed[0]
    chains = {way: chain_of(settings, way, orders_of(settings, way)[0], seed) for way in settings.ways if way != JOINT}
    merged = chains.pop(MERGED, [])
    told = [
        _told(map(trained_rows, chains.values()), "by a sequence"),
        _told(map(calibration_rows, chains.values()), "more by calibrations of a way under masks"),
        _told(map(replayed_rows, chains.values()), f"more of earlier tasks by replay{_share(chains.values())}"),
        _told([trained_rows(merged) + calibration_rows(merged)], "by the merged adapters with their calibrations"),
        _told([trained_rows([joint_run(settings, seed)])] if JOINT in settings.ways else [], "jointly"),
    ]
    several = {way: [kept_of(run) for run in chain[1:]] for way, chain in chains.items()}
    kept = [f"{max(rows):,} by {way_title(way)}" for way, rows in several.items() if max(rows, default=0)]
    memory = f" Rows of every earlier task that are kept: {', '.join(kept)}." if kept else ""
    return f"Rows trained on in one order: {', '.join(filter(None, told))}.{memory}"


def _share(chains: Iterable[list[RunSpec]]) -> str:
    """ " (2 of 10 rows a batch)": how much of a replaying run's batch is old."""
    for run in (chain[1] for chain in chains if len(chain) > 1 and chain[1].method == "replay"):
        old = min(int(strength_of(run, "rows")), kept_of(run))
        return f" ({old} of {old + run.batch_size} rows a batch)"
    return ""


def _told(numbers: Iterable[int], words: str) -> str:
    """ "3,072 jointly"; empty where there are none."""
    counted = sorted({number for number in numbers if number})
    return f"{' or '.join(f'{number:,}' for number in counted)} {words}" if counted else ""

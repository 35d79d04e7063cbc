"""How many rows every way to learn several tasks is trained on, counted from the very runs of a sequence."""

from __future__ import annotations

from collections.abc import Iterable

from lori_nb.lab.specs import RunSpec
from lori_nb.lab.stages import kept_rows, strength_of
from lori_nb.study.sequences import JOINT, MERGED, chain_of, joint_run, orders_of
from lori_nb.study.settings import Settings


def trained_rows(runs: Iterable[RunSpec]) -> int:
    """Rows of the runs' own tasks that they train on, repetitions counted: steps × batch size."""
    return sum(run.trained_steps * run.batch_size for run in runs)


def calibration_rows(runs: Iterable[RunSpec]) -> int:
    """Rows that the calibrations of the runs' masks train on, each calibration once; 0 without masks."""
    return trained_rows(dict.fromkeys(run.calibration for run in runs if run.calibration is not None))


def replayed_rows(runs: Iterable[RunSpec]) -> int:
    """Rows of earlier tasks that replay adds: in every step as many as it asks for, or as are kept."""
    replaying = [run for run in runs if run.method == "replay" and run.start is not None]
    return sum(
        run.trained_steps * min(int(strength_of(run, "rows")), kept_rows(run), run.train_rows) for run in replaying
    )


def budget_line(settings: Settings) -> str:
    """Rows trained on in one order under one seed, in one sentence: by a sequence, by what ways of the settings add to
    it, by adapters that are merged, and jointly.
    """
    seed = settings.seed[0]
    chains = {way: chain_of(settings, way, orders_of(settings, way)[0], seed) for way in settings.ways if way != JOINT}
    merged = chains.pop(MERGED, [])
    told = [
        _told(map(trained_rows, chains.values()), "by a sequence"),
        _told(map(calibration_rows, chains.values()), "more by calibrations of a way under masks"),
        _told(map(replayed_rows, chains.values()), "more of earlier tasks by replay"),
        _told([trained_rows(merged) + calibration_rows(merged)], "by the merged adapters with their calibrations"),
        _told([trained_rows([joint_run(settings, seed)])] if JOINT in settings.ways else [], "jointly"),
    ]
    return f"Rows trained on in one order: {', '.join(filter(None, told))}."


def _told(numbers: Iterable[int], words: str) -> str:
    """ "3,072 jointly"; empty where there are none."""
    counted = sorted({number for number in numbers if number})
    return f"{' or '.join(f'{number:,}' for number in counted)} {words}" if counted else ""

"""Continual learning: what a sequence of tasks leaves of the earlier ones.

Everything is read off the accuracy matrix R (stages × tasks): R[i, j] is the score on task j after training stage i,
NaN where it was not evaluated. Task j is trained in stage j (row j), so there are as many stages as tasks, or fewer
when the last columns are tasks that are only watched. Scores are in the metric's own unit; higher is better.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def average_score(R: ArrayLike) -> float:
    """Mean over tasks of the score after the last stage: ACC of Lopez-Paz & Ranzato (2017, GEM).

    Over the tasks that were evaluated then; NaN when none was. ValueError when R is no such matrix.
    """
    return _mean(_matrix(R)[-1])


def forgetting(R: ArrayLike) -> np.ndarray:
    """Forgetting of each task (tasks,): the best score at an earlier stage minus that after the last.

    max_{i < last} R[i, j] − R[last, j], Chaudhry et al. (2018); their average forgetting is the mean over tasks.
    Negative means the task got better. NaN for the task of the last stage and for tasks never trained, since neither
    can be forgotten yet, and where either score is missing. ValueError when R is no such matrix.
    """
    R = _matrix(R)
    last = len(R) - 1
    # fmax passes over NaN, so the best is that of the scores that there are.
    earlier = np.fmax.reduce(R[:last, :last], axis=0, initial=np.nan)
    result = np.full(R.shape[1], np.nan)
    result[:last] = earlier - R[last, :last]
    return result


def backward_transfer(R: ArrayLike) -> float:
    """Mean over tasks before the last of R[last, j] − R[j, j]: BWT of Lopez-Paz & Ranzato (2017, GEM).

    Negative means forgetting, positive that later tasks helped. Over the tasks with both scores; NaN when there is
    none. ValueError when R is no such matrix.
    """
    R = _matrix(R)
    tasks = np.arange(len(R) - 1)
    return _mean(R[-1, tasks] - R[tasks, tasks])


def forward_transfer(R: ArrayLike, baseline: ArrayLike) -> float:
    """Mean over tasks after the first of R[j − 1, j] − baseline[j]: FWT of Lopez-Paz & Ranzato (2017, GEM).

    How much the stages before a task's own already help it. ``baseline`` (tasks,) is the score without any training,
    of the base model here (a random initialisation in the paper). Over the tasks with both scores; NaN when there is
    none.

    Raises ValueError when R is no such matrix, or the baseline has not one score a task.
    """
    R = _matrix(R)
    baseline = np.asarray(baseline, dtype=np.float64)
    if baseline.shape != (R.shape[1],):
        raise ValueError(f"baseline must have shape ({R.shape[1]},), one score a task; found {baseline.shape}")
    tasks = np.arange(1, min(len(R) + 1, R.shape[1]))
    return _mean(R[tasks - 1, tasks] - baseline[tasks])


def intransigence(R: ArrayLike, reference: ArrayLike) -> float:
    """Mean over the tasks trained of reference[j] − R[j, j]: Chaudhry et al. (2018, RWalk), how much a learner that
    guards its past loses on what is new.

    ``reference`` (tasks,) is the score of a model free of the sequence (in the paper trained on all tasks so far; in
    the kit's studies on the task alone). Negative means the sequence helped. Over the tasks with both scores; NaN when
    there is none.

    Raises ValueError when R is no such matrix, or the reference has not one score a task.
    """
    R = _matrix(R)
    reference = np.asarray(reference, dtype=np.float64)
    if reference.shape != (R.shape[1],):
        raise ValueError(f"reference must have shape ({R.shape[1]},), one score a task; found {reference.shape}")
    tasks = np.arange(len(R))
    return _mean(reference[tasks] - R[tasks, tasks])


def _matrix(R: ArrayLike) -> np.ndarray:
    R = np.asarray(R, dtype=np.float64)
    if R.ndim != 2 or not 1 <= R.shape[0] <= R.shape[1]:
        raise ValueError(f"R must be a matrix of stages × tasks with at most as many stages as tasks; found {R.shape}")
    if np.isinf(R).any():
        raise ValueError("R must hold finite scores, or NaN where a task was not evaluated; found infinity")
    return R


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")

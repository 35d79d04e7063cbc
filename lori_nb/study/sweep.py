"""Sweeps: one notebook executed at every point of a grid, the points' runs trained once and shared."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lori_nb.lab.paths import write_atomically
from lori_nb.study.execute import Executed, execute_notebook, executed_before, side_by_side
from lori_nb.study.grid import Point, points_of, settings_at, sweep_folder, value_text


class SweepError(RuntimeError):
    """Some points failed; the message names each and why. The others are done and kept."""


def sweep(
    notebook: Path,
    grid: Sequence[Mapping[str, Any]],
    profile: str = "quick",
    jobs: int = 2,
    scheduler: str | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Execute a notebook at every point of a grid and return the rows of the index, one a point.

    The runs that the points ask for are trained first, each once. On a cluster the notebooks train what they lack where
    they are executed: two that need the same run wait for one another. Points done before are skipped.

    Args:
        scheduler: address of a Dask scheduler whose workers share this data folder; None executes here.

    Raises:
        ValueError: bad input, before anything runs.
        SweepError: some points failed, after all others are done.
    """
    points = points_of(notebook, grid, profile)
    done = {p.output: executed_before(p.notebook, p.parameters, p.output) for p in points}
    todo = [point for point in points if done[point.output] is None]
    board = _Board(len(points), len(points) - len(todo), say)
    if scheduler is None:
        _train(notebook, todo, jobs)
    carry_out = _here if scheduler is None else _on_cluster
    ended = carry_out(todo, jobs, scheduler, board.ended) if todo else {}
    rows = [_row(point, ended.get(point.output) or done[point.output]) for point in points]
    index = _write_index(sweep_folder(notebook), rows)
    say(f"index: {index}")
    failed = [f"{row['point']}: {row['error']}" for row in rows if row["error"]]
    if failed:
        raise SweepError("\n".join(failed))
    return rows


def execute_point(point: Point) -> Executed:
    """Execute one point, here or on a cluster's worker."""
    return execute_notebook(
        point.notebook,
        point.parameters,
        point.output,
        profile=point.profile,
        command=point.command,
        environment=point.environment,
    )


class _Board:
    """A line for every point as it ends."""

    def __init__(self, total: int, before: int, say: Callable[[str], None]):
        self.total, self.count, self.say, self.started = total, before, say, time.monotonic()
        if before:
            say(f"{before} of {total} points were done before")

    def ended(self, point: Point, result: Executed | Exception) -> None:
        self.count += 1
        status = f"FAILED: {result}" if isinstance(result, Exception) else f"done in {result.seconds:.0f} s"
        elapsed = int(time.monotonic() - self.started)
        self.say(f"[{self.count}/{self.total}, {elapsed // 60}:{elapsed % 60:02d}] {point.label}  {status}")


Ended = Callable[[Point, Executed | Exception], None]


def _here(points: Sequence[Point], jobs: int, scheduler: None, ended: Ended) -> dict[Path, Executed | Exception]:
    results, by_output = {}, {str(point.output): point for point in points}

    def note(key: str, result: Executed | Exception) -> None:
        results[by_output[key].output] = result
        ended(by_output[key], result)

    side_by_side({key: lambda p=point: execute_point(p) for key, point in by_output.items()}, jobs, note)
    return results


def _on_cluster(points: Sequence[Point], jobs: int, scheduler: str, ended: Ended) -> dict[Path, Executed | Exception]:
    from distributed import Client, as_completed  # only a cluster needs it

    results = {}
    with Client(scheduler) as client:
        # pure=False: a point that was executed for another sweep may have to be executed again
        futures = {client.submit(execute_point, point, pure=False, retries=0): point for point in points}
        try:
            for future in as_completed(futures):
                result = future.exception() or future.result()
                results[futures[future].output] = result
                ended(futures[future], result)
        except BaseException:
            client.cancel(list(futures))
            raise
    return results


def _train(notebook: Path, points: Sequence[Point], jobs: int) -> None:
    """Train what a known notebook's points ask for, each run once."""
    from lori_nb.study.plans import PLANS
    from lori_nb.study.pool import train_all

    if notebook.stem in PLANS:
        settings = [settings_at({"profile": point.profile} | dict(point.values)) for point in points]
        train_all([spec for each in settings for spec in PLANS[notebook.stem](each)], jobs=jobs)


def _row(point: Point, result: Executed | Exception) -> dict[str, Any]:
    failed = isinstance(result, Exception)
    return {
        "point": point.label,
        "profile": point.profile,
        **{name: value_text(value) for name, value in point.values.items()},
        "output": os.path.relpath(point.output, sweep_folder(point.notebook)),
        "seconds": None if failed else float(result.seconds),
        "runs": None if failed else " ".join(result.run_hashes),
        "error": str(result) if failed else "",
    }


def _write_index(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """The table of all points ever executed in this folder, as Parquet and CSV; values as text, so that columns have
    one type.
    """
    import pandas as pd

    path, table = folder / "index.parquet", pd.DataFrame(rows)
    if path.exists():
        table = pd.concat([pd.read_parquet(path), table], ignore_index=True)
    table = table.drop_duplicates("output", keep="last", ignore_index=True)
    raw = io.BytesIO()
    table.to_parquet(raw, index=False)
    write_atomically(path, raw.getvalue())
    write_atomically(path.with_suffix(".csv"), table.to_csv(index=False))
    return path

"""The command line, ``lori-nb``: study, sweep, runs, doctor, tune, publish.

Heavy imports stand inside the commands, so that ``--help`` and a misspelt parameter are answered at once.
"""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lori_nb.study import lifeline

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Interference between low-rank adapters: studies, sweeps and their runs.",
)
runs = typer.Typer(no_args_is_help=True, help="The store of finished runs.")
app.add_typer(runs, name="runs")

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
# Errors that a user can do something about, by module: importing them here would import torch.
_BAD_INPUT = {"lori_nb.lab.models": "BaseModelError", "lori_nb.lab.tasks.hub": "HubUnreachableError"}
_FAILED = {
    "lori_nb.lab.runs": ("DiskFullError", "CorruptRunError"),
    "lori_nb.study.pool": ("TrainingFailedError",),
    "lori_nb.study.execute": ("NotebookError",),
    "lori_nb.study.sweep": ("SweepError",),
    "lori_nb.study.conduct": ("StudyError",),
}

Profile = Annotated[str, typer.Option(help="A file of notebooks/profiles: smoke, quick, standard, paper.")]
Jobs = Annotated[int, typer.Option(min=1, help="Workers of one thread each.")]
Tasks = Annotated[str, typer.Option(help="Tasks or groups instead of the profile's: chain_sum,refusal or glue.")]
Seed = Annotated[str, typer.Option(help="Seeds instead of the profile's: 0..4 or 0,1.")]
BaseModel = Annotated[str, typer.Option(help="A base model instead of the profile's: a hub id or a folder.")]


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error that is reported in plain words; None for one that keeps its traceback."""
    where, name = type(error).__module__, type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if name in _FAILED.get(where, ()):
        return FAILED
    if isinstance(error, (ValueError, FileNotFoundError)) or name == _BAD_INPUT.get(where):
        return BAD_INPUT
    return None


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose foreseen errors are one message on standard error and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            lifeline.hold_on_to_maker()
            command(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            code = exit_code(error)
            if code is None:
                raise
            stopped = "stopped; finished runs are kept, and the same command goes on from here"
            print(f"lori-nb: {stopped if code == INTERRUPTED else error}", file=sys.stderr, flush=True)
            raise typer.Exit(code) from None

    return wrapped


@app.command()
@plain_errors
def study(
    profile: Profile = "quick",
    tasks: Tasks = "",
    seed: Seed = "",
    base: BaseModel = "",
    jobs: Jobs = 2,
    plan: Annotated[bool, typer.Option("--plan", help="Print runs, steps and cost; do nothing.")] = False,
    notebooks: Annotated[str, typer.Option(help="Some of the notebooks only: 01_lori,05_merging.")] = "",
) -> None:
    """Train what the notebooks need, each run once, then execute them all."""
    from lori_nb.study.conduct import chosen_notebooks, conduct, plan_text, planned
    from lori_nb.study.grid import expand_values
    from lori_nb.study.profiles import load_settings

    changes = {"tasks": _names(tasks)} if tasks else {}
    changes |= {"seed": expand_values(seed)} if seed else {}
    changes |= {"base": base} if base else {}
    settings = load_settings(profile, **changes)
    chosen = chosen_notebooks(_names(notebooks))
    if plan:
        print(plan_text(planned(settings, chosen), jobs))
        return
    words = [
        f"--{name} {shlex.quote(value)}" for name, value in (("tasks", tasks), ("seed", seed), ("base", base)) if value
    ]
    conduct(settings, chosen, jobs, " ".join(["lori-nb study", f"--profile {profile}", *words]))


@app.command()
@plain_errors
def sweep(
    notebook: Annotated[str, typer.Argument(help="A notebook's name (01_lori) or path.")],
    grid: Annotated[
        list[str] | None, typer.Option("-g", "--grid", help="NAME=VALUES: seed=0..4, method=lora,lori-s; repeat it.")
    ] = None,
    profile: Profile = "quick",
    jobs: Jobs = 2,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler: tcp://host:8786.")] = None,
) -> None:
    """Execute one notebook at every point of a grid."""
    from lori_nb.study import grid as grids
    from lori_nb.study.sweep import sweep as carry_out

    path = grids.find_notebook(notebook)
    carry_out(path, grids.parse_grid(grid or []), profile, jobs, scheduler, functools.partial(print, flush=True))


@app.command()
@plain_errors
def tune(
    profile: Profile = "quick",
    jobs: Jobs = 2,
    methods: Annotated[str, typer.Option(help="Some only: lora,lori-d,lori-s,joint,ortho-lora.")] = "",
) -> None:
    """Choose learning rates on held-out training rows, every method with the same budget."""
    from lori_nb.study import tuning
    from lori_nb.study.profiles import load_settings

    grids = tuning.first_grids(_names(methods)) if methods else tuning.first_grids()
    table = tuning.tune(load_settings(profile), grids, jobs)
    for path in tuning.publish(table, profile):
        print(path)


@app.command()
@plain_errors
def publish(profile: Profile = "quick") -> None:
    """Put a finished study's outputs into the notebooks, the reference figures and tables, the ledger and README."""
    from lori_nb.lab.paths import PROJECT
    from lori_nb.study.profiles import load_settings
    from lori_nb.study.publication import publish as publish_study

    for path in publish_study(load_settings(profile)):
        print(path.relative_to(PROJECT))


@app.command()
@plain_errors
def doctor() -> None:
    """What is installed and reachable, device and precision."""
    from lori_nb.study.doctor import report

    text, well = report()
    print(text)
    raise typer.Exit(0 if well else FAILED)


@runs.command("list")
@plain_errors
def list_runs() -> None:
    """All finished runs, oldest first."""
    from lori_nb.lab.runs import Run, Store

    store = Store()
    for spec_hash in store.hashes():
        if store.problems(spec_hash):
            print(f"{spec_hash[:12]}  damaged: {'; '.join(store.problems(spec_hash))}")
            continue
        run = Run(spec_hash, store.root / spec_hash)
        scores = ", ".join(f"{row.task} {row.value:.3f} (n {row.n})" for row in run.metrics.itertuples())
        print(f"{spec_hash[:12]}  {run.spec.label}  {scores}")
    print(f"{len(store.hashes())} finished, {len(store.unfinished())} unfinished in {store.root}")


@runs.command("show")
@plain_errors
def show_run(spec_hash: Annotated[str, typer.Argument(metavar="HASH", help="A run's hash, or its beginning.")]) -> None:
    """Scores, spec and provenance of one run."""
    import json

    from lori_nb.lab.runs import Store

    store = Store()
    found = [each for each in store.hashes() if each.startswith(spec_hash)]
    if len(found) != 1:
        raise ValueError(f"HASH must be the beginning of one finished run's; found {len(found)} for {spec_hash!r}")
    run = store.load(found[0])
    print(f"{run.hash}  {run.spec.label}\n{run.folder}\n\n{run.metrics.to_string(index=False)}\n")
    print(json.dumps(run.provenance, indent=1))


@runs.command("verify")
@plain_errors
def verify_runs() -> None:
    """Check every finished run's files against their checksums."""
    from lori_nb.lab.runs import Store

    store = Store()
    damaged = {each: problems for each in store.hashes() if (problems := store.problems(each))}
    for spec_hash, problems in damaged.items():
        print(f"{spec_hash}  {'; '.join(problems)}")
    print(f"{len(store.hashes())} runs checked, {len(damaged)} damaged")
    raise typer.Exit(FAILED if damaged else 0)


@runs.command("clean")
@plain_errors
def clean_runs() -> None:
    """Remove unfinished and damaged runs that nobody is working on."""
    from lori_nb.lab.runs import Store

    removed = Store().clean()
    for path in removed:
        print(os.path.relpath(path))
    print(f"{len(removed)} removed")


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]

"""Studies: train what notebooks need, execute them, sweep, tune, measure and publish."""

from __future__ import annotations

import functools
import os
import shlex
from typing import Annotated

import typer

from lori_nb.cli.options import AllowCode, BaseModel, Jobs, Profile, Seed, Tasks, allow_code, app, names_in
from lori_nb.study import lifeline
from lori_nb.study.plain_errors import FAILED, plain_errors


@app.command()
@plain_errors
def study(
    profile: Profile = "quick",
    tasks: Tasks = "",
    seed: Seed = "",
    base: BaseModel = "",
    jobs: Jobs = 2,
    plan: Annotated[bool, typer.Option("--plan", help="Print runs, steps and cost; do nothing.")] = False,
    notebooks: Annotated[
        str, typer.Option("--notebooks", "--only", help="Some of the notebooks only: 01_lori,05_merging, or 01,05.")
    ] = "",
    allow_code_execution: AllowCode = False,
) -> None:
    """Train what the notebooks need, each run once, then execute them all."""
    allow_code(allow_code_execution)
    from lori_nb.study.conduct import chosen_notebooks, conduct, plan_text, planned
    from lori_nb.study.grid import expand_values
    from lori_nb.study.profiles import load_settings

    changes = {"tasks": names_in(tasks)} if tasks else {}
    changes |= {"seed": expand_values(seed)} if seed else {}
    changes |= {"base": base} if base else {}
    settings = load_settings(profile, **changes)
    chosen = chosen_notebooks(names_in(notebooks))
    if plan:
        print(plan_text(planned(settings, chosen), jobs))
        return
    words = [
        f"--{name} {shlex.quote(value)}" for name, value in (("tasks", tasks), ("seed", seed), ("base", base)) if value
    ]
    words += ["--allow-code-execution"] if allow_code_execution else []
    conduct(settings, chosen, jobs, " ".join(["lori-nb study", f"--profile {profile}", *words]))


@app.command()
@plain_errors
def train(
    profile: Profile = "paper",
    method: Annotated[str, typer.Option(help="Only runs of these methods: lori-s,lora.")] = "",
    task: Annotated[str, typer.Option(help="Only runs trained on these tasks: gsm8k.")] = "",
    seed: Annotated[str, typer.Option(help="Only these seeds: 0..4 or 0,1.")] = "",
    base: BaseModel = "",
    notebooks: Annotated[str, typer.Option(help="Only runs that these notebooks ask for: 01_lori.")] = "",
    plan: Annotated[bool, typer.Option("--plan", help="Print runs, steps and cost; do nothing.")] = False,
    allow_code_execution: AllowCode = False,
) -> None:
    """Train some of a profile's runs, on all devices that torchrun has started; the notebooks then find them done.

    On the 8 GPUs of one machine: torchrun --nproc_per_node 8 -m lori_nb.cli train --method lori-s --task gsm8k
    """
    allow_code(allow_code_execution)
    from lori_nb.lab import distributed
    from lori_nb.lab.specs import with_parents
    from lori_nb.study.conduct import chosen_notebooks, plan_text, planned
    from lori_nb.study.grid import expand_values
    from lori_nb.study.profiles import load_settings
    from lori_nb.study.selection import selected, train_each

    if "TORCHELASTIC_RUN_ID" in os.environ:
        lifeline.hold_on_to(os.getppid())  # torchrun, which cannot end its processes when it is killed
    settings = load_settings(profile, **({"base": base} if base else {}))
    specs = planned(settings, chosen_notebooks(names_in(notebooks)))
    chosen = selected(specs, names_in(method), names_in(task), expand_values(seed) if seed else ())
    if plan:
        print(plan_text(with_parents(chosen), 1))
        return
    train_each(chosen, functools.partial(print, flush=True))
    distributed.leave()


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
    allow_code_execution: AllowCode = False,
) -> None:
    """Execute one notebook at every point of a grid."""
    allow_code(allow_code_execution)
    from lori_nb.study import grid as grids
    from lori_nb.study.sweep import sweep as carry_out

    path = grids.find_notebook(notebook)
    carry_out(path, grids.parse_grid(grid or []), profile, jobs, scheduler, functools.partial(print, flush=True))


@app.command()
@plain_errors
def tune(
    profile: Profile = "quick",
    jobs: Jobs = 2,
    methods: Annotated[
        str, typer.Option(help="Some only: lora,lori-s, any method of the registry, joint or another of joint_arms.")
    ] = "",
    strengths: Annotated[
        str, typer.Option(help="Instead: the one number of ways from task to task: lora,ewc,merged.")
    ] = "",
    tasks: Tasks = "",
    seed: Seed = "",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps of every run instead of the profile's.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the first grids' runs and their cost; do nothing.")
    ] = False,
    allow_code_execution: AllowCode = False,
) -> None:
    """Choose learning rates on held-out training rows, every method with the same budget."""
    allow_code(allow_code_execution)
    from lori_nb.lab.models import base_kind
    from lori_nb.study import tuning
    from lori_nb.study.conduct import plan_text
    from lori_nb.study.grid import expand_values
    from lori_nb.study.profiles import load_settings

    changes = {"tasks": names_in(tasks)} if tasks else {}
    changes |= {"seed": expand_values(seed)} if seed else {}
    changes |= tuning.fixed_steps(steps) if steps else {}
    settings = load_settings(profile, **changes)  # own methods too
    words = [f"--{name} {value}" for name, value in (("tasks", tasks), ("seed", seed), ("steps", steps)) if value]
    asked = " ".join([f"--profile {profile}", *words])
    if strengths:
        from lori_nb.study import strengths as numbers

        ways = names_in(strengths)
        if plan:
            print(plan_text(numbers.first_specs(settings, ways), jobs))
            return
        table = numbers.tune_strengths(settings, ways, jobs)
        for path in numbers.publish_strengths(table, tuning.table_name(settings), asked):
            print(path)
        return
    grids = tuning.first_grids(names_in(methods) or tuning.TUNED, base_kind(settings.base))
    if plan:
        print(plan_text(tuning.first_specs(settings, grids), jobs))
        return
    table = tuning.tune(settings, grids, jobs)
    for path in tuning.publish(table, tuning.table_name(settings), asked):
        print(path)


@app.command()
@plain_errors
def measure(
    profile: Profile = "standard",
    notebooks: Annotated[str, typer.Option(help="Whose runs: 01_lori,02_masks.")] = "01_lori,02_masks",
    tasks: Tasks = "",
    jobs: Jobs = 2,
    plan: Annotated[bool, typer.Option("--plan", help="Print what the ledger lacks and its cost; do nothing.")] = False,
) -> None:
    """Train what the ledger lacks of a profile's runs, add scores to the ledger, and write tables and figures
    of it. Other tasks than the profile's have tables and figures of their own.
    """
    from lori_nb.study import measuring, reference
    from lori_nb.study.conduct import chosen_notebooks, plan_text
    from lori_nb.study.profiles import load_settings

    settings = load_settings(profile, **({"tasks": names_in(tasks)} if tasks else {}))
    chosen = chosen_notebooks(names_in(notebooks))
    if plan:
        missing = measuring.unmeasured(measuring.planned(settings, chosen))
        print(plan_text(missing, jobs) if missing else "the ledger holds every run")
        return
    for path in (*measuring.measure(settings, chosen, jobs), *reference.write_reference(settings, chosen)):
        print(path)
    for name in chosen:
        print(measuring.results_of(name, settings).line)


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

"""The command line, ``lori-nb``: study, train, sweep, tune, measure, publish, runs, doctor, export, import.

Heavy imports stand inside the commands, so that ``--help`` and a misspelt parameter are answered at once.
"""

from __future__ import annotations

import functools
import os
import shlex
from typing import Annotated

import typer

from lori_nb.study import lifeline
from lori_nb.study.plain_errors import FAILED, plain_errors

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Interference between low-rank adapters: studies, sweeps and their runs.",
)
runs = typer.Typer(no_args_is_help=True, help="The store of finished runs.")
app.add_typer(runs, name="runs")

Profile = Annotated[str, typer.Option(help="A file of notebooks/profiles: smoke, quick, standard, paper.")]
Jobs = Annotated[int, typer.Option(min=1, help="Workers of one thread each.")]
Tasks = Annotated[str, typer.Option(help="Tasks or groups instead of the profile's: chain_sum,refusal or glue.")]
Seed = Annotated[str, typer.Option(help="Seeds instead of the profile's: 0..4 or 0,1.")]
BaseModel = Annotated[str, typer.Option(help="A base model instead of the profile's: a hub id or a folder.")]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code-execution", help="Run programs that the model writes (HumanEval, MBPP), contained."),
]


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
    allow_code_execution: AllowCode = False,
) -> None:
    """Train what the notebooks need, each run once, then execute them all."""
    _allow_code(allow_code_execution)
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
    _allow_code(allow_code_execution)
    from lori_nb.lab import distributed
    from lori_nb.lab.specs import with_parents
    from lori_nb.study.conduct import chosen_notebooks, plan_text, planned
    from lori_nb.study.grid import expand_values
    from lori_nb.study.profiles import load_settings
    from lori_nb.study.selection import selected, train_each

    if "TORCHELASTIC_RUN_ID" in os.environ:
        lifeline.hold_on_to(os.getppid())  # torchrun, which cannot end its processes when it is killed
    settings = load_settings(profile, **({"base": base} if base else {}))
    specs = planned(settings, chosen_notebooks(_names(notebooks)))
    chosen = selected(specs, _names(method), _names(task), expand_values(seed) if seed else ())
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
    _allow_code(allow_code_execution)
    from lori_nb.study import grid as grids
    from lori_nb.study.sweep import sweep as carry_out

    path = grids.find_notebook(notebook)
    carry_out(path, grids.parse_grid(grid or []), profile, jobs, scheduler, functools.partial(print, flush=True))


@app.command()
@plain_errors
def tune(
    profile: Profile = "quick",
    jobs: Jobs = 2,
    methods: Annotated[str, typer.Option(help="Some only: lora,lori-s,joint, or any method of the registry.")] = "",
    allow_code_execution: AllowCode = False,
) -> None:
    """Choose learning rates on held-out training rows, every method with the same budget."""
    _allow_code(allow_code_execution)
    from lori_nb.study import tuning
    from lori_nb.study.profiles import load_settings

    settings = load_settings(profile)  # and with it the methods of own code
    grids = tuning.first_grids(_names(methods)) if methods else tuning.first_grids()
    table = tuning.tune(settings, grids, jobs)
    for path in tuning.publish(table, profile):
        print(path)


@app.command()
@plain_errors
def measure(
    profile: Profile = "standard",
    notebooks: Annotated[str, typer.Option(help="Whose runs: 01_lori,02_masks.")] = "01_lori,02_masks",
    jobs: Jobs = 2,
) -> None:
    """Train what the ledger lacks of a profile's runs, add scores to the ledger, and write tables and figures
    of it.
    """
    from lori_nb.study import measuring, reference
    from lori_nb.study.conduct import chosen_notebooks
    from lori_nb.study.profiles import load_settings

    settings, chosen = load_settings(profile), chosen_notebooks(_names(notebooks))
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


@app.command("export")
@plain_errors
def export_run(
    spec_hash: Annotated[str, typer.Argument(metavar="HASH", help="A run's hash, or its beginning.")],
    folder: Annotated[str, typer.Argument(help="The new folder.")],
    weight: Annotated[float, typer.Option(help="The folder's update is this times the adapter's.")] = 1.0,
    head: Annotated[str, typer.Option(help="The task whose head goes with an encoder's adapter of several.")] = "",
) -> None:
    """Write a run's adapter as a PEFT LoRA folder."""
    from pathlib import Path

    from lori_nb.lab.interop import export_peft
    from lori_nb.lab.runs import Store

    store = Store()
    run = store.load(_whole_hash(store.hashes(), spec_hash))
    print(export_peft(run.adapter, Path(folder), weight=weight, head=head or None))


@app.command("import")
@plain_errors
def import_folder(
    folder: Annotated[str, typer.Argument(help="A PEFT LoRA folder with safetensors.")],
    file: Annotated[str, typer.Argument(help="The adapter file to write.")],
    base: Annotated[str, typer.Option(help="The base model that the adapter is for.")],
) -> None:
    """Turn a PEFT LoRA folder into an adapter file of this kit."""
    from pathlib import Path

    from lori_nb.lab.interop import import_peft
    from lori_nb.method.adapter_file import save_adapter

    path = Path(file)
    if path.exists():
        raise ValueError(f"FILE must be new; found {path}")
    adapter = import_peft(Path(folder), base)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(adapter, path)
    print(f"{path}: rank {adapter.rank}, {len(adapter.factors)} modules of {base}")


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
    run = store.load(_whole_hash(store.hashes(), spec_hash))
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


def _whole_hash(hashes: list[str], beginning: str) -> str:
    found = [each for each in hashes if each.startswith(beginning)]
    if len(found) != 1:
        raise ValueError(f"HASH must be the beginning of one finished run's; found {len(found)} for {beginning!r}")
    return found[0]


def _allow_code(allowed: bool) -> None:
    """Permit code execution to this process and those that it starts here; a cluster's workers have settings of their
    own.
    """
    if allowed:
        from lori_nb.lab.sandbox import ALLOW_VARIABLE

        os.environ[ALLOW_VARIABLE] = "1"


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    app()

"""The store of finished runs: list, show, verify, clean."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from lori_nb.cli.options import runs, whole_hash
from lori_nb.study.plain_errors import FAILED, plain_errors


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
    run = store.load(whole_hash(store.hashes(), spec_hash))
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

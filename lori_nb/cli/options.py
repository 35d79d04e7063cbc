"""What several commands share: the application, its options, and small readers of their words."""

from __future__ import annotations

import os
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Interference between low-rank adapters: studies, sweeps and their runs.",
)
runs = typer.Typer(no_args_is_help=True, help="The store of finished runs.")
app.add_typer(runs, name="runs")

Profile = Annotated[
    str, typer.Option(help="A file of notebooks/profiles: smoke, quick, standard, paper, paper-r64, paper-mistral.")
]
Jobs = Annotated[int, typer.Option(min=1, help="Workers of one thread each.")]
Tasks = Annotated[str, typer.Option(help="Tasks or groups instead of the profile's: chain_sum,refusal or glue.")]
Seed = Annotated[str, typer.Option(help="Seeds instead of the profile's: 0..4 or 0,1.")]
BaseModel = Annotated[str, typer.Option(help="A base model instead of the profile's: a hub id or a folder.")]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code-execution", help="Run programs that the model writes (HumanEval, MBPP), contained."),
]


def allow_code(allowed: bool) -> None:
    """Permit code execution to this process and those that it starts here; a cluster's workers have settings of their
    own.
    """
    if allowed:
        from lori_nb.lab.sandbox import ALLOW_VARIABLE

        os.environ[ALLOW_VARIABLE] = "1"


def names_in(text: str) -> list[str]:
    """The words of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def whole_hash(hashes: list[str], beginning: str) -> str:
    """The one hash with that beginning; ValueError where there is none, or more than one."""
    found = [each for each in hashes if each.startswith(beginning)]
    if len(found) != 1:
        raise ValueError(f"HASH must be the beginning of one finished run's; found {len(found)} for {beginning!r}")
    return found[0]

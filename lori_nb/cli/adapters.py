"""Adapters as files: out to PEFT folders and in from them, compared and merged wherever they come from."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lori_nb.cli.options import app, names_in, whole_hash
from lori_nb.study.plain_errors import plain_errors

if TYPE_CHECKING:  # the commands import these where they need them: that takes seconds
    from collections.abc import Mapping

    import torch

    from lori_nb.lab.folders import Folder
    from lori_nb.study import foreign

Portable = Annotated[
    bool,
    typer.Option("--portable", help="For serving engines: scale in B, one allowed rank, no heads, no patterns."),
]
Dtype = Annotated[
    str, typer.Option(help="Of the stored A and B: float32, bfloat16 or float16; the last two round them.")
]
Folders = Annotated[list[str], typer.Argument(metavar="DIR...", help="PEFT LoRA folders, or hub ids owner/name.")]


@app.command()
@plain_errors
def overlap(
    folders: Folders,
    out: Annotated[str, typer.Option(help="Folder for tables and figures.")] = "figures/overlap",
    null: Annotated[
        str, typer.Option(help="What chance is: independent rows, or given, each adapter's own frozen A.")
    ] = "independent",
    draws: Annotated[int, typer.Option(min=2, help="Random sets of adapters that the null is a mean of.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the null's draws.")] = 0,
    elementwise: Annotated[
        bool, typer.Option("--elementwise", help="Also signs and magnitudes of entries: slow for large models.")
    ] = False,
    tasks: Annotated[
        str, typer.Option(help="Each adapter's own task, in their order: also how far others move its activations.")
    ] = "",
    base: Annotated[str, typer.Option(help="With --tasks: the base model; by default the one the folders name.")] = "",
    rows: Annotated[int, typer.Option(min=1, help="With --tasks: of each task's test rows.")] = 16,
) -> None:
    """Measure interference between adapters that were trained anywhere, from their files alone.

    One line a pair; in brackets, between which values random adapters lie with 95 %. With --tasks the base model runs
    over some rows of each task, and a line an ordered pair says how far one adapter moves another's activations.
    """
    from lori_nb.lab.folders import comparable, not_shared, read_folders, shared_draws
    from lori_nb.study import foreign

    found = read_folders(folders)
    sources = {name: folder.digest for name, folder in found.items()}
    report = foreign.check_report_folder(Path(out), sources)
    adapters, others = comparable(found)
    choices = {"null": null, "draws": draws, "seed": seed, "elementwise": elementwise}
    measured = foreign.measured(adapters, **choices, activations=_activations(found, names_in(tasks), base, rows))
    notes = [*not_shared(found), *others, *(shared_draws(found) if null == "independent" else [])]
    words = ["lori-nb", "overlap", *folders, "--out", out, "--null", null, "--draws", str(draws), "--seed", str(seed)]
    words += ["--elementwise"] if elementwise else []
    words += ["--tasks", tasks, "--rows", str(rows)] if tasks else []
    words += ["--base", base] if tasks and base else []
    paths = foreign.write_report(measured, sources, report, notes, shlex.join(words))
    print(*foreign.lines(measured), *(f"note: {line}" for line in (*notes, *measured.notes)), sep="\n")
    print(*paths, sep="\n")


def _activations(found: Mapping[str, Folder], tasks: list[str], base: str, rows: int) -> foreign.Activations | None:
    """What --tasks, --base and --rows ask for; ValueError where it cannot be done."""
    from lori_nb.lab.models import base_kind
    from lori_nb.lab.tasks import get_task
    from lori_nb.study.foreign import Activations

    if not tasks:
        return None
    if len(tasks) != len(found):
        raise ValueError(f"--tasks must name one task an adapter, {len(found)}; found {', '.join(tasks)}")
    named = dict.fromkeys([base] if base else (folder.base for folder in found.values()))
    if len(named) > 1 or "" in named:
        raise ValueError(f"--base must be given where the folders do not name one; found {', '.join(named) or 'none'}")
    base_kind(next(iter(named)))
    return Activations(next(iter(named)), {name: get_task(t).name for name, t in zip(found, tasks, strict=True)}, rows)


@app.command()
@plain_errors
def merge(
    folders: Folders,
    out: Annotated[str, typer.Option(help="The new PEFT folder.")],
    method: Annotated[str, typer.Option(help="How: cat is the exact weighted sum; README lists all.")] = "cat",
    weights: Annotated[str, typer.Option(help="One number an adapter, or one for all: 0.4,0.4. 1 adds them up.")] = "1",
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cut the result to this rank (truncated SVD). By default merges of full rank (magnitude, ties, dare, "
            "dare-ties) are cut to the sum of the adapters' ranks in each module.",
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Share of entries kept by magnitude, DARE, and methods with TIES: by default 0.2."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the entries that DARE keeps: by default 0.")] = None,
    portable: Portable = False,
    dtype: Dtype = "float32",
) -> None:
    """Merge adapters that were trained anywhere into one PEFT folder, from their files alone."""
    from lori_nb.analysis import merging
    from lori_nb.analysis.elementwise_merging import FULL_RANK
    from lori_nb.lab.folders import not_shared, read_folders, write_merged
    from lori_nb.lab.peft_writing import check_new

    stored, _ = _dtype(dtype), check_new(Path(out))  # merging may take long
    numbers = [_number(word) for word in names_in(weights)]
    numbers = numbers * len(folders) if len(numbers) == 1 else numbers
    found = read_folders(folders)
    options = {name: value for name, value in {"density": density, "seed": seed}.items() if value is not None}
    merged = merging.merge([folder.stored for folder in found.values()], numbers, method, rank or "sum", options)
    about = {"method": method, "weights": numbers, "rank": rank, **options}
    path = write_merged(Path(out), merged, found, portable, about, stored)
    for line in not_shared(found):
        print(f"note: {line}")
    if method in FULL_RANK and rank is None:
        print(
            f"note: {method} has full rank, cut to the sum of the adapters' ranks in each module; --rank sets another"
        )
    _say_rules(path, portable)
    print(path)


def _say_rules(folder: Path, portable: bool) -> None:
    from lori_nb.lab.peft_writing import portability

    for rule, kept in portability(folder).items() if portable else ():
        print(f"{'holds' if kept else 'BROKEN'}: {rule}")


def _dtype(name: str) -> torch.dtype:
    from lori_nb.method.adapter_file import DTYPES

    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if name not in known:
        raise ValueError(f"--dtype must be one of {', '.join(known)}; found {name!r}")
    return known[name]


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"weights must be numbers, one an adapter or one for all; found {word!r}") from None


@app.command("export")
@plain_errors
def export_run(
    spec_hash: Annotated[str, typer.Argument(metavar="HASH", help="A run's hash, or its beginning.")],
    folder: Annotated[str, typer.Argument(help="The new folder.")],
    weight: Annotated[float, typer.Option(help="The folder's update is this times the adapter's.")] = 1.0,
    head: Annotated[str, typer.Option(help="The task whose head goes with an encoder's adapter of several.")] = "",
    portable: Portable = False,
    dtype: Dtype = "float32",
) -> None:
    """Write a run's adapter as a PEFT LoRA folder."""
    from lori_nb.lab.interop import export_peft, heads_of
    from lori_nb.lab.runs import Store

    stored = _dtype(dtype)
    store = Store()
    run = store.load(whole_hash(store.hashes(), spec_hash))
    choices = {"weight": weight, "head": head or None, "for_serving": portable, "dtype": stored}
    path = export_peft(run.adapter, Path(folder), **choices)
    if portable and heads_of(run.adapter):
        print(f"note: a portable folder has no head; left out: {', '.join(heads_of(run.adapter))}")
    _say_rules(path, portable)
    print(path)


@app.command("import")
@plain_errors
def import_folder(
    folder: Annotated[str, typer.Argument(help="A PEFT LoRA folder with safetensors, or a hub id owner/name.")],
    file: Annotated[str, typer.Argument(help="The adapter file to write.")],
    base: Annotated[str, typer.Option(help="The base model that the adapter is for.")],
    dtype: Dtype = "float32",
) -> None:
    """Turn a PEFT LoRA folder into an adapter file of this kit: its linear modules; a note names what is left out."""
    import warnings

    from lori_nb.lab.interop import import_peft
    from lori_nb.method.adapter_file import save_adapter

    stored, path = _dtype(dtype), Path(file)
    if path.exists():
        raise ValueError(f"FILE must be new; found {path}")
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        adapter = import_peft(folder, base)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(adapter, path, stored)
    for note in notes:
        if note.category is UserWarning:  # libraries have others
            print(f"note: {note.message}")
    print(f"{path}: rank {adapter.rank}, {len(adapter.factors)} modules of {base}")

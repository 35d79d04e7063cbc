"""What notebooks call: settings from the parameter cell, finished runs from the store, figures into files.

::

    settings = study.begin("01_lori", globals())
    results = study.collect("01_lori", settings)
    results.keep(figure, "scores", scores)
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from pandas.api.types import is_integer_dtype
from tqdm.auto import tqdm

from lori_nb.lab.folders import comparable, not_shared, read_folders
from lori_nb.lab.paths import PROJECT, data_folder, write_atomically
from lori_nb.lab.provenance import git_state
from lori_nb.lab.resolving import resolve
from lori_nb.lab.runs import Run, Store, done_of
from lori_nb.lab.specs import Spec
from lori_nb.lab.training import quiet
from lori_nb.study import style
from lori_nb.study.lifeline import start_lifeline
from lori_nb.study.plans import PLANS
from lori_nb.study.profiles import load_settings
from lori_nb.study.settings import Settings
from lori_nb.study.stored import BATCH, record
from lori_nb.study.summary import latex, seeds_text

COLUMNS = ("study", "run", "kind", "method", "trained_on", "after", "task", "seed", "split", "metric", "value", "n")
SETTING_COLUMNS = ("majority", "sparsity", "shots", "merge", "weight", "trainable_parameters")
LONGEST_SLUG = 64


@dataclass(frozen=True)
class Results:
    """The finished runs of one notebook's plan.

    ``table`` is tidy: one score a row, with the hash of its run. ``runs`` maps hashes to runs, ``planned`` counts
    what the plan asks for.
    """

    name: str
    settings: Settings
    table: pd.DataFrame
    runs: Mapping[str, Run]
    planned: int

    def run(self, spec: Spec) -> Run | None:
        """The finished run of a spec; None when it is not there (yet)."""
        return self.runs.get(self.hash_of(spec))

    def hash_of(self, spec: Spec) -> str:
        """The hash of a spec, whether its run is there or not."""
        if spec not in self._hashes:
            self._hashes[spec] = resolve(spec).hash
        return self._hashes[spec]

    def rows_of(self, specs: list[Spec]) -> pd.DataFrame:
        """The table's rows of these specs' runs."""
        return self.table[self.table["run"].isin({resolve(spec).hash for spec in specs})]

    @property
    def line(self) -> str:
        """How much of the plan is there: "12 of 12 runs", with the profile and the number of seeds; of adapters from
        elsewhere, which no seed of the study made, their number.
        """
        told = f"{len(self.runs)} of {self.planned} runs; {seeds_text(self.settings.seed)}"
        if self.settings.adapters and not self.planned:
            told = f"{len(self.settings.adapters)} adapters from elsewhere, no runs"
        return f"{self.name}, profile {slug(self.settings)}: {told}"

    @cached_property
    def _hashes(self) -> dict[Spec, str]:
        return {}  # a table of sequences asks for the same specs hundreds of times

    @cached_property
    def provenance(self) -> str:
        """The table that a figure is drawn from, its digest, and the commit."""
        state = git_state()
        commit = (state["commit"] or "no commit") + (" with local changes" if state["dirty"] else "")
        digest = hashlib.sha256(self.table.to_csv(index=False).encode()).hexdigest()[:16]
        return (
            f"table {slug(self.settings)}/{self.name}.parquet, sha256 {digest}, {len(self.runs)} runs, commit {commit}"
        )

    def keep(self, figure: Figure, name: str, table: pd.DataFrame | Mapping[str, pd.DataFrame]) -> None:
        """Save a figure as ``figures/<profile>/<notebook>_<name>`` .pdf, .svg and .png, with its provenance in each,
        and beside it the table that it shows, or the first of these; several of like columns stand one below the
        other under their names. Further tables go through :meth:`keep_table`.
        """
        about = {"title": f"{self.name}: {name}", "provenance": self.provenance}
        style.save(figure, figures_folder() / slug(self.settings), f"{self.name}_{name}", about)
        if not isinstance(table, pd.DataFrame):
            table = pd.concat(table, names=["panel", "row"]) if table else pd.DataFrame()
        self.keep_table(table, name)

    def keep_table(self, table: pd.DataFrame, name: str) -> None:
        """Save a table beside the figures as ``<notebook>_<name>`` .csv and .tex (:func:`summary.latex`), its
        provenance in the LaTeX.
        """
        folder = figures_folder() / slug(self.settings)
        folder.mkdir(parents=True, exist_ok=True)
        counted = table.index.names == [None] and is_integer_dtype(table.index)
        table = table.reset_index(drop=counted)
        write_atomically(folder / f"{self.name}_{name}.csv", table.to_csv(index=False, float_format="%.10g"))
        write_atomically(folder / f"{self.name}_{name}.tex", f"% {self.provenance}\n{latex(table)}")

    def __str__(self) -> str:
        return self.line


def begin(name: str, namespace: Mapping[str, object]) -> Settings:
    """Settings of a notebook: its profile, changed by the names in its parameter cell.

    Also sets the figure style, one thread of arithmetic unless ``OMP_NUM_THREADS`` says otherwise, and the lifeline
    that ends this process with its owner.

    Args:
        name: the notebook's name, a key of ``PLANS``.
        namespace: the notebook's ``globals()``.

    Raises:
        ValueError: an unknown notebook, a parameter that is no setting (names the nearest one), or a value outside
            its range.
    """
    if name not in PLANS:
        raise ValueError(f"notebook must be one of {', '.join(PLANS)}; found {name!r}")
    settings = load_settings(**{key: namespace[key] for key in parameter_names(namespace)})
    start_lifeline()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # two threads on two busy cores can be far slower than one
    style.use()
    pd.set_option("display.max_colwidth", None)  # claims are whole sentences
    return settings


def parameter_names(namespace: Mapping[str, object]) -> list[str]:
    """The names that a notebook's parameter cells set, misspelt ones too.

    That is every setting in the namespace, and every other name in the last cell run that sets ``profile``: there a
    name that is no setting can only be a mistake.
    """
    known = [f.name for f in fields(Settings) if f.name in namespace]
    cells = [names for source in namespace.get("In", ()) if "profile" in (names := assigned_names(source))]
    return [*known, *(name for name in (cells[-1] if cells else ()) if name not in known)]


def assigned_names(source: str) -> list[str]:
    """Names that a cell assigns at its top level; none where the cell is no plain Python."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return []
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def collect(name: str, settings: Settings, store: Store | None = None, train: bool = True) -> Results:
    """The runs that a notebook asks for; what is missing is trained here, one after the other.

    The table of results goes to ``data/tables/<profile>/<name>.parquet`` and ``.csv``.

    Args:
        train: False takes what is there and trains nothing.
    """
    store = store or Store()
    plan = [resolve(spec) for spec in PLANS[name](settings)]
    if train:
        _train(done_of(plan, store)[1], store)
    # With training allowed a damaged run is set aside and done again; without, it is an error.
    runs = {spec.hash: store.get(spec) if train else store.load(spec.hash) for spec in plan if store.finished(spec)}
    table = store.table([spec for spec in plan if spec.hash in runs]).assign(study=name)
    extra = [column for column in table.columns if column not in COLUMNS + SETTING_COLUMNS]
    table = table.reindex(columns=[*COLUMNS, *SETTING_COLUMNS, *extra])
    results = Results(name, settings, table, runs, len({spec.hash for spec in plan}))
    _write(table, data_folder() / "tables" / slug(settings), name)
    about = {key: sorted({str(run.provenance.get(key)) for run in runs.values()}) for key in ("device", "dtype")}
    record(run_hashes=list(runs), **{key: ", ".join(values) for key, values in about.items()})
    return results


def shared_lines(settings: Settings) -> list[str]:
    """How many adapters from elsewhere there are and what they do not share, a sentence each; none without any."""
    if not settings.adapters:
        return []
    found = read_folders(settings.adapters)
    counts = ", ".join(f"{name} {len(folder.factors)}" for name, folder in found.items())
    shared = len(set.intersection(*(set(folder.factors) for folder in found.values())))
    return [
        f"{len(found)} adapters, {shared} modules in all of them ({counts})",
        *not_shared(found),
        *comparable(found)[1],
    ]


def adapters_of(settings: Settings, specs: Iterable[Spec], store: Store) -> Results:
    """The finished runs among ``specs``, for their adapters: without a table of scores."""
    plan = {spec.hash: spec for spec in map(resolve, specs)}
    runs = {name: store.load(name) for name, spec in plan.items() if store.finished(spec)}
    return Results("", settings, pd.DataFrame(columns=COLUMNS), runs, len(plan))


def _train(missing: list[Spec], store: Store) -> None:
    silent = os.environ.get(BATCH) == "1"
    with tqdm(total=len(missing), desc="runs", disable=silent or not missing, leave=False) as runs:
        for spec in missing:
            runs.set_description(spec.label)
            with tqdm(disable=silent, leave=False) as steps:
                store.get(spec, quiet if silent else partial(_show, steps))
            runs.update()


def _show(bar: tqdm, stage: str, done: int, total: int) -> None:
    if bar.desc.removesuffix(": ") != stage or bar.total != total:
        bar.reset(total=total)
        bar.set_description(stage)
    bar.update(done - bar.n)


def _write(table: pd.DataFrame, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.parquet", table.to_parquet(index=False))
    write_atomically(folder / f"{name}.csv", table.to_csv(index=False))


def slug(settings: Settings) -> str:
    """The profile's name for folders, with the settings changed from it, so that a sweep overwrites nothing."""
    plain = load_settings(settings.profile)
    changed = {} if settings.tasks == plain.tasks else {"tasks": settings.tasks}
    # Other tasks may bring another base and rates with them, which need no naming.
    same_tasks = asdict(load_settings(settings.profile, tasks=list(settings.tasks)))
    changed |= {key: value for key, value in asdict(settings).items() if value != same_tasks[key]}
    if not changed:
        return settings.profile
    text = "-".join(f"{key}-{value}" for key, value in changed.items())
    words = settings.profile + "-" + re.sub(r"[^\w.]+", "-", text).strip("-")
    return (
        words if len(words) <= LONGEST_SLUG else f"{settings.profile}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )


def figures_folder() -> Path:
    """``figures/`` of the project, or of ``$LORI_NB_HOME`` where that is set, to leave the project alone."""
    return data_folder() / "figures" if os.environ.get("LORI_NB_HOME") else PROJECT / "figures"

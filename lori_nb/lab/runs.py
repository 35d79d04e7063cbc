"""The run store: a spec goes in, a finished run comes out, and nothing is trained twice.

A run is a folder named by its spec's hash. It is finished when it holds ``manifest.json``, the checksums of everything
else, written last by an atomic rename. A lock on the hash makes the second of two askers wait. A run whose checksums
fail is set aside and done again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock
from safetensors import SafetensorError

from lori_nb.lab import distributed, ledger
from lori_nb.lab.laboratory import Outcome, carry_out, check_modules
from lori_nb.lab.paths import runs_folder, write_atomically
from lori_nb.lab.provenance import provenance
from lori_nb.lab.resolving import resolve
from lori_nb.lab.run_tables import run_rows
from lori_nb.lab.specs import RunSpec, Spec, from_payload, to_payload, with_parents
from lori_nb.lab.training import Report, quiet
from lori_nb.method.adapter_file import adapter_hash, load_adapter, save_adapter
from lori_nb.method.adapters import Adapter

MANIFEST = "manifest.json"
NEEDED_BYTES = 200 * 2**20  # free space asked for before a run starts: checkpoint, adapter and tables are far below it
_HASH = re.compile(r"[0-9a-f]{32}")  # other folders here, such as the workers' logs, are not runs


class CorruptRunError(RuntimeError):
    """A finished run whose files do not match its manifest."""


class DiskFullError(OSError):
    """No room to write a run; what was finished before is untouched."""


@dataclass(frozen=True)
class Run:
    """A finished run. Tables are read when asked for."""

    hash: str
    folder: Path

    @cached_property
    def spec(self) -> Spec:
        return from_payload(json.loads((self.folder / "spec.json").read_text()))

    @cached_property
    def provenance(self) -> dict:
        return json.loads((self.folder / "provenance.json").read_text())

    @cached_property
    def metrics(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "metrics.parquet")

    @cached_property
    def predictions(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "predictions.parquet")

    @cached_property
    def history(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "history.parquet")

    @cached_property
    def conflicts(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "conflicts.parquet")

    @cached_property
    def watched(self) -> pd.DataFrame:
        """Scores taken while it trained, by step; empty where none were."""
        file = self.folder / "watched.parquet"
        return pd.read_parquet(file) if file.exists() else pd.DataFrame(columns=["step", "task", "value"])

    @cached_property
    def adapter(self) -> Adapter:
        """What was trained; ValueError for a run that left none: the bare base, a merge, full fine-tuning."""
        file = self.folder / "adapter.safetensors"
        if not file.exists():
            raise ValueError(f"a run must have left an adapter to be read; {self.spec.label} left none")
        return load_adapter(file)

    def value(self, task: str, metric: str | None = None) -> float:
        """The score on one task: by the task's own metric, or by one of those reported beside it.

        Raises KeyError for a task or metric that was not scored.
        """
        rows = self.metrics[self.metrics["task"] == task]
        rows = rows if metric is None else rows[rows["metric"] == metric]
        if rows.empty:
            raise KeyError(f"run {self.hash} has no score of {task!r}" + (f" by {metric!r}" if metric else ""))
        return float(rows["value"].iloc[0])  # a task's own metric stands first


class Store:
    """Runs below one folder, by default ``data/runs``."""

    def __init__(self, root: Path | None = None):
        self.root = Path(root) if root else runs_folder()

    def folder(self, spec: Spec) -> Path:
        return self.root / spec.hash

    def finished(self, spec: Spec) -> bool:
        """Whether a run is done; its files are checked when it is loaded."""
        return (self.folder(spec) / MANIFEST).exists()

    def predictions(self, spec_hash: str) -> pd.DataFrame | None:
        """Per-row results of a finished run; None for one that is not here."""
        here = (self.root / spec_hash / MANIFEST).exists()
        return self.load(spec_hash).predictions if here else None

    def load(self, spec_hash: str) -> Run:
        """A finished run by hash, after checking every file against the manifest.

        Raises FileNotFoundError for a run that is not finished, CorruptRunError for one whose files changed.
        """
        run = Run(spec_hash, self.root / spec_hash)
        problems = self.problems(spec_hash)
        if problems:
            raise CorruptRunError(f"run {spec_hash} is damaged: {'; '.join(problems)}")
        return run

    def problems(self, spec_hash: str) -> list[str]:
        """What is wrong with a finished run's files; empty when all is well."""
        folder = self.root / spec_hash
        if not (folder / MANIFEST).exists():
            raise FileNotFoundError(f"run {spec_hash} is not finished in {self.root}")
        try:
            sums = json.loads((folder / MANIFEST).read_text())["files"]
        except (ValueError, KeyError, TypeError):
            return [f"{MANIFEST} cannot be read"]
        missing = [f"{name} is missing" for name in sums if not (folder / name).exists()]
        return missing + [
            f"{name} does not match its checksum"
            for name in sums
            if not missing and _checksum(folder / name) != sums[name]
        ]

    def get(self, spec: Spec, report: Report = quiet) -> Run:
        """The finished run of a spec: loaded if it is there, else carried out, its parents first.

        Under torchrun all processes must ask for the same runs in the same order; the main one decides and locks.
        """
        spec = resolve(spec)
        distributed.check_same("the hash of the run asked for", spec.hash)
        if not self.finished(spec):
            check_modules(spec)  # before its parents are trained
        for parent in spec.parents:
            if not distributed.decided(lambda parent=parent: self.finished(parent)):
                self.get(parent, report)
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / f"{spec.hash}.lock") if distributed.is_main() else nullcontext():
            run = distributed.decided(lambda: self._loaded(spec))
            if run is None:
                self._carry_out(spec, report if distributed.is_main() else quiet)
                run = distributed.decided(lambda: self.load(spec.hash))
            return run

    def _loaded(self, spec: Spec) -> Run | None:
        """The run if it is finished and whole; a damaged one is set aside."""
        if not self.finished(spec):
            return None
        try:
            return self.load(spec.hash)
        except CorruptRunError as error:
            warnings.warn(f"{error}; set aside as {self._set_aside(spec.hash)} and done again", stacklevel=5)
            return None

    def adapter_of(self, spec: RunSpec) -> Adapter:
        """The adapter of a finished run; it is trained if it is missing or damaged."""
        return self.get(spec).adapter

    def _begin(self, spec: Spec) -> None:
        free = shutil.disk_usage(self.root).free
        if free < NEEDED_BYTES:
            raise DiskFullError(
                errno.ENOSPC, f"{self.root} must have {NEEDED_BYTES >> 20} MiB free for a run; found {free >> 20} MiB"
            )
        self.folder(spec).mkdir(exist_ok=True)
        write_atomically(self.folder(spec) / "spec.json", json.dumps(to_payload(spec), indent=1))

    def _carry_out(self, spec: Spec, report: Report) -> None:
        folder = self.folder(spec)
        distributed.decided(lambda: self._begin(spec))
        started = time.time()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the order of sums, hence the bits, depends on the number of threads
        try:
            outcome = carry_out(spec, folder, self.adapter_of, report)
            distributed.decided(lambda: self._keep(spec, outcome, folder, started))
        except (OSError, SafetensorError) as error:
            if not _is_disk_full(error):
                raise
            raise DiskFullError(
                errno.ENOSPC,
                f"the disk of {self.root} is full; finished runs are untouched, and this one goes on later",
            ) from error
        finally:
            torch.set_num_threads(threads)

    def _keep(self, spec: Spec, outcome: Outcome, folder: Path, started: float) -> None:
        tables = {
            "metrics": outcome.metrics,
            "predictions": outcome.predictions,
            "history": outcome.history,
            "conflicts": outcome.conflicts,
        } | ({"watched": outcome.watched} if len(outcome.watched) else {})
        for name, table in tables.items():
            table.to_parquet(folder / f"{name}.parquet", index=False)
        facts = dict(outcome.facts)
        if outcome.adapter is not None:
            save_adapter(outcome.adapter, folder / "adapter.safetensors")
            facts["adapter_hash"] = adapter_hash(outcome.adapter)
        write_atomically(folder / "provenance.json", json.dumps(provenance(spec, started) | facts, indent=1))
        kept = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith((MANIFEST, "checkpoint", "."))]
        sums = {path.name: _checksum(path) for path in sorted(kept)}
        write_atomically(folder / MANIFEST, json.dumps({"hash": spec.hash, "files": sums}, indent=1))
        for path in folder.iterdir():  # the checkpoint, and what a killed process left half written
            if path.name not in {*sums, MANIFEST}:
                path.unlink()

    def set_aside_damaged(self, specs: Iterable[Spec]) -> list[str]:
        """Move the damaged ones among finished runs out of the way; returns a line about each."""
        said = []
        for spec in specs:
            with FileLock(self.root / f"{spec.hash}.lock"):
                problems = self.problems(spec.hash)
                if problems:
                    place = self._set_aside(spec.hash)
                    said.append(f"run {spec.hash} is damaged ({'; '.join(problems)}); set aside as {place}")
        return said

    def _set_aside(self, spec_hash: str) -> Path:
        target = self.root / "damaged" / f"{spec_hash}-{time.strftime('%Y%m%d-%H%M%S')}"
        target.parent.mkdir(exist_ok=True)
        os.replace(self.root / spec_hash, target)
        return target

    def hashes(self) -> list[str]:
        """Hashes of all finished runs, oldest first."""
        manifests = sorted(self.root.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
        return [path.parent.name for path in manifests if path.parent.parent == self.root]

    def unfinished(self) -> list[str]:
        """Folders of runs that were begun and not finished."""
        if not self.root.exists():
            return []
        return sorted(
            p.name
            for p in self.root.iterdir()
            if _HASH.fullmatch(p.name) and p.is_dir() and not (p / MANIFEST).exists()
        )

    def clean(self) -> list[Path]:
        """Remove set-aside runs, and unfinished ones that nobody is working on; returns what was removed."""
        removed = []
        for name in self.unfinished():
            lock = FileLock(self.root / f"{name}.lock", timeout=0)
            try:
                with lock:
                    if not (self.root / name / MANIFEST).exists():  # it may have been finished in the meantime
                        shutil.rmtree(self.root / name)
                        removed.append(self.root / name)
            except TimeoutError:
                continue  # somebody is training it now
        if (self.root / "damaged").exists():
            removed += sorted((self.root / "damaged").iterdir())
            shutil.rmtree(self.root / "damaged")
        return removed

    def table(self, specs: Iterable[Spec] | None = None) -> pd.DataFrame:
        """One measurement a row for the runs among ``specs`` (None: all here) that are finished or in the ledger.

        ``attrs["finished"]`` and ``attrs["planned"]`` count runs, so that a figure can say "7 of 25 runs".
        """
        wanted = list(dict.fromkeys(self.hashes() if specs is None else [spec.hash for spec in map(resolve, specs)]))
        here = [h for h in wanted if (self.root / h / MANIFEST).exists()]
        frames = [run_rows(Run(h, self.root / h)) for h in here]
        kept = ledger.rows_of(set(wanted) - set(here))  # measured before, here or elsewhere, and committed
        if len(kept):
            frames.append(kept)
        table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*ledger.KEY, "value", "n"])
        done = table["run"].unique()
        table.attrs.update(finished=len(done), planned=len(set(wanted)))
        return table


def done_of(specs: Iterable[Spec], store: Store) -> tuple[list[Spec], list[Spec]]:
    """(finished, missing) among specs and everything they depend on, in an order in which they can be done."""
    ordered = with_parents([resolve(spec) for spec in specs])
    return [s for s in ordered if store.finished(s)], [s for s in ordered if not store.finished(s)]


def unmeasured(specs: Iterable[Spec]) -> list[Spec]:
    """Those specs, resolved, whose scores the ledger lacks: all that needs training where no adapter is asked for.

    Store.table gives the others' scores from the ledger. Their adapters are not in it.
    """
    known = set(ledger.read()["run"])
    return [spec for spec in map(resolve, specs) if spec.hash not in known]


def _is_disk_full(error: Exception) -> bool:
    # safetensors, which writes a dequantized base, reports the system's error as text
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def _checksum(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

"""All seven notebooks on real input with profile smoke: through papermill, and the robust cells through nbval."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from lori_nb.lab.paths import PROJECT
from lori_nb.lab.runs import Store
from lori_nb.study.parameters import read_parameters
from lori_nb.study.profiles import NOTEBOOKS, as_parameters, load_settings


@pytest.fixture(scope="module")
def study(session_home) -> tuple[Path, str]:
    """A data folder in which ``lori-nb study --profile smoke`` has run, and what it printed."""
    return session_home, lori_nb(session_home, "study", "--profile", "smoke", "--jobs", "1")


def lori_nb(home: Path, *arguments: str) -> str:
    environment = os.environ | {"LORI_NB_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).parent / "lori-nb"), *arguments]
    done = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_study_executes_every_notebook_and_leaves_figures_and_tables(study):
    home, said = study
    for name in NOTEBOOKS:
        executed = nbformat.read(home / "executed" / "smoke" / f"{name}.ipynb", as_version=4)
        assert not [o for cell in executed.cells for o in cell.get("outputs", []) if o.output_type == "error"], name
        assert executed.metadata["lori_nb"]["parameters"]["profile"] == "smoke"
        assert (home / "tables" / "smoke" / f"{name}.parquet").is_file()
        figures = {path.stem for path in (home / "figures" / "smoke").glob(f"{name}_*.png")}
        assert figures
        for kind in ("pdf", "svg", "csv", "tex"):
            beside = {path.stem for path in (home / "figures" / "smoke").glob(f"{name}_*.{kind}")}
            assert figures <= beside, (kind, figures - beside)
    assert "chain_sum" in said and "executed" in said


def test_a_second_study_trains_nothing(study):
    home, _ = study
    before = Store(home / "runs").hashes()
    said = lori_nb(home, "study", "--profile", "smoke", "--notebooks", "01_lori")
    assert "0 done now" in said
    assert Store(home / "runs").hashes() == before


def test_nbval_finds_the_stored_outputs_of_the_robust_cells(study, tmp_path):
    home, _ = study
    settings = load_settings("smoke")
    checked = 0
    for name in NOTEBOOKS:
        path = PROJECT / "notebooks" / f"{name}.ipynb"
        notebook = load_notebook_node(str(path))  # with the metadata that papermill's own functions rely on
        robust = [i for i, cell in enumerate(notebook.cells) if "# NBVAL_CHECK_OUTPUT" in cell.source]
        checked += len(robust)
        notebook.cells = notebook.cells[: robust[-1] + 1]  # the study has executed what comes after
        values = as_parameters(settings, list(read_parameters(path)))
        nbformat.write(parameterize_notebook(notebook, values), tmp_path / path.name)
    assert checked >= len(NOTEBOOKS)
    environment = os.environ | {"LORI_NB_HOME": str(home), "LORI_NB_BATCH": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--nbval-lax",
        "--nbval-cell-timeout",
        "300",
    ]
    done = subprocess.run(
        [*command, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout[-3000:]

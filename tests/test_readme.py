"""What README and the pages of the rooms show, run."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pandas as pd
import pytest
import torch
import typer
from tiny import output_of, python, tiny_spec

from lori_nb.cli import app
from lori_nb.lab import ledger
from lori_nb.lab.methods import METHODS, get_method
from lori_nb.lab.own_code import load_extensions
from lori_nb.lab.paths import PROJECT
from lori_nb.lab.runs import Store
from lori_nb.lab.tasks import get_task
from lori_nb.study.plans import method_specs
from lori_nb.study.profiles import load_settings
from lori_nb.study.publication import END, START, rendered
from lori_nb.study.reference_text import headlines, marks
from lori_nb.study.reference_text import page as page_of

OWN = "shortest-first"
SHOW_BENCHMARKS = (
    "import json, measure\n"
    "for path in measure.RESULTS.glob('*.json'): print(measure.as_markdown(json.loads(path.read_text())))"
)
README = (PROJECT / "README.md").read_text()
REFERENCE = PROJECT / "figures" / "reference"
MEASURED = [path.parent.name for path in REFERENCE.glob("*/runs.csv") if "planned" in pd.read_csv(path)]
ROOMS = ("notebooks", "lori_nb", "data", "benchmarks", "figures/reference")
PAGES = {"README.md": README} | {f"{room}/README.md": (PROJECT / room / "README.md").read_text() for room in ROOMS}


def block_with(words: str) -> str:
    return next(
        block for block in re.findall(r"```python\n(.*?)```", "\n".join(PAGES.values()), re.S) if words in block
    )


@pytest.fixture
def extension(tmp_path, monkeypatch):
    """README's own task and own method in a file that ``LORI_NB_EXTENSIONS`` names."""
    path = tmp_path / "mine.py"
    path.write_text(block_with("@task") + "\n\n" + block_with("@method"))
    monkeypatch.setenv("LORI_NB_EXTENSIONS", str(path))
    yield path
    METHODS.pop("lora-l2", None)


def test_an_own_model_trains_from_a_folder(home, tiny_decoder):
    code = block_with("RunSpec").replace("path/to/model", str(tiny_decoder))
    assert "exact_match" in output_of(python(code))


def test_an_own_task_and_method_work_by_name_in_settings_and_runs(home, tiny_decoder, extension):
    load_extensions()
    settings = load_settings("smoke", tasks="parity", method="lora-l2")
    specs = method_specs(settings)
    assert [(spec.method, spec.tasks) for spec in specs] == [("lora-l2", ("parity",))]
    store, plain = Store(), tiny_spec(tiny_decoder, tasks=("parity",), learning_rate=3e-2)
    own = tiny_spec(tiny_decoder, "lora-l2", tasks=("parity",), learning_rate=3e-2)
    run = store.get(own)
    assert run.metrics["n"].tolist() == [16]
    assert sum(f.B.square().sum() for f in run.adapter.factors.values()) != sum(
        f.B.square().sum() for f in store.get(plain).adapter.factors.values()
    )
    assert dict(run.spec.digests)["method"] == get_method("lora-l2").source_digest  # counts by its source
    assert {row.answer for row in get_task("parity").rows("test", 10)} == {"odd", "even"}


def test_an_own_solver_works_by_name_and_counts_by_its_source(home, tiny_decoder, tmp_path, monkeypatch, registries):
    path = tmp_path / "solver.py"
    path.write_text(block_with("@solver"))
    monkeypatch.setenv("LORI_NB_EXTENSIONS", str(path))
    load_extensions()
    both, store = ("chain_sum", "word_sequence_reversal"), Store()
    options = [(("solver", name),) for name in (OWN, "sum")]
    own, plain = (store.get(tiny_spec(tiny_decoder, "ortho-lora", tasks=both, steps=3, options=o)) for o in options)
    assert dict(own.spec.digests)["solver"] and "solver" not in dict(plain.spec.digests)
    pairs = [(own.adapter.factors[name].B, f.B) for name, f in plain.adapter.factors.items()]
    assert any(not torch.equal(one, other) for one, other in pairs)


def test_an_extension_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv("LORI_NB_EXTENSIONS", "nowhere.py")
    with pytest.raises(ValueError, match="LORI_NB_EXTENSIONS must name modules or Python files; there is no file"):
        load_extensions()


@pytest.mark.parametrize("page", PAGES)
def test_every_path_and_command_that_a_page_names_exists(page):
    text, folder = PAGES[page], (PROJECT / page).parent
    for path in re.findall(r"`((?:lori_nb|notebooks|tests|benchmarks|figures/reference)/[\w/.]*)`", text):
        assert (PROJECT / path).exists(), path
    for path, anchor in re.findall(r"\]\(([\w./]+)(?:#([\w-]+))?\)", text):
        assert (folder / path).exists(), path
        titles = [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings_of(folder / path)]
        assert not anchor or anchor in titles, f"{path}#{anchor}"
    makefile = (PROJECT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", text, re.M):
        assert re.search(rf"^{''.join(target)}:", makefile, re.M), target


def headings_of(path: Path) -> list[str]:
    return re.findall(r"^#+ (.*)$", path.read_text(), re.M) if path.suffix == ".md" else []


@pytest.mark.parametrize("page", PAGES)
def test_every_option_and_command_of_lori_nb_that_a_page_names_is_there(page):
    commands = typer.main.get_command(app).commands
    for line in re.findall(r"lori-nb ([a-z][^`#]*)", PAGES[page]):
        name, *words = line.split()
        command = commands[name]
        if isinstance(command, click.Group):
            command = command.commands[words[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)} <= known | {"--help"}, line


def test_the_page_of_benchmarks_shows_their_committed_results():
    folder = PROJECT / "benchmarks"
    output = output_of(python(f"import sys; sys.path.insert(0, {str(folder)!r}); {SHOW_BENCHMARKS}"))
    assert output.count("| measured |") == len(list(folder.glob("results/*.json"))) > 0
    for line in output.splitlines():
        assert line in PAGES["benchmarks/README.md"].splitlines()


@pytest.mark.parametrize("name", MEASURED)
def test_pages_show_a_measurements_committed_tables_and_nothing_else(name):
    folder = REFERENCE / name
    for page, words in {"README.md": headlines, "figures/reference/README.md": page_of}.items():
        start, end = marks(name)
        shown = PAGES[page].partition(start)[2].partition(end)[0].strip()
        command = re.search(r"\(made by `(.*?)`\)", shown).group(1)
        assert shown == words(folder, command)


def test_readme_shows_the_published_tables_and_nothing_else():
    folder = REFERENCE / "quick"
    shown = README.partition(START)[2].partition(END)[0].strip()
    assert shown == rendered(folder)
    runs = pd.read_csv(folder / "runs.csv")
    assert set(runs["run"]) <= set(ledger.read()["run"])  # every number can be traced to a run in the ledger

"""What README shows, run."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import torch
from tiny import output_of, python, tiny_spec

from lori_nb.lab import ledger
from lori_nb.lab.methods import METHODS, get_method
from lori_nb.lab.own_code import load_extensions
from lori_nb.lab.paths import PROJECT
from lori_nb.lab.runs import Store
from lori_nb.lab.tasks import get_task
from lori_nb.study.plans import method_specs
from lori_nb.study.profiles import load_settings
from lori_nb.study.publication import END, START, rendered

OWN = "shortest-first"
README = (PROJECT / "README.md").read_text()


def block_with(words: str) -> str:
    return next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if words in block)


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


def test_every_path_and_command_that_readme_names_exists():
    for path in re.findall(r"`((?:lori_nb|notebooks|tests|benchmarks|figures/reference)/[\w/]*)`", README):
        assert (PROJECT / path).exists(), path
    makefile = (PROJECT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_readme_shows_the_committed_tables_and_nothing_else():
    folder = PROJECT / "figures" / "reference" / "quick"
    shown = README.partition(START)[2].partition(END)[0].strip()
    assert shown == rendered(folder)
    runs = pd.read_csv(folder / "runs.csv")
    assert set(runs["run"]) <= set(ledger.read()["run"])  # every number can be traced to a run in the ledger

"""Reports on adapters that do not fit together, or were reported on before; a merge that is refused early."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import folder_of, gaussian
from typer.testing import CliRunner

from lori_nb import cli
from lori_nb.lab.folders import comparable, read_folders
from lori_nb.lab.provenance import kit_version
from lori_nb.method.adapters import Factors
from lori_nb.study import foreign, notebook
from lori_nb.study.geometry import overlaps
from lori_nb.study.profiles import load_settings

EMBEDDED = "base_model.model.model.embed_tokens.lora_embedding_{}"


def invoke(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.fixture
def pair(tiny_decoder, tmp_path, home) -> list[str]:
    """Two adapters of one shape."""
    return [folder_of(tiny_decoder, tmp_path / name, 2, seed) for seed, name in enumerate(("one", "two"), 5)]


def with_embedding(folder: str, vocabulary: int, seed: int) -> None:
    """Put an adapter on an embedding (64 × vocabulary) into a folder."""
    path = f"{folder}/adapter_model.safetensors"
    factors = {"A": gaussian(2, vocabulary, seed=seed), "B": gaussian(64, 2, seed=seed + 1)}
    save_file(load_file(path) | {EMBEDDED.format(part): factors[part] for part in "AB"}, path)


def test_a_report_says_its_command_and_holds_nothing_of_an_earlier_one(pair, tmp_path):
    out = tmp_path / "report"
    words = ("overlap", *pair, "--out", out, "--draws", 2)
    said = invoke(*words, "--tasks", "chain_sum,refusal", "--rows", 2)
    assert said.exit_code == 0, said.output
    of_activations = {f"functional.{kind}" for kind in ("csv", "parquet", "tex", "pdf", "svg", "png")}
    before = {path.name for path in out.iterdir()}
    assert of_activations < before
    command = json.loads((out / "about.json").read_text())["command"]
    assert command.startswith(f"lori-nb overlap {pair[0]} {pair[1]} --out {out} ")
    assert command.endswith("--tasks chain_sum,refusal --rows 2")
    assert invoke(*words).exit_code == 0
    assert {path.name for path in out.iterdir()} == before - of_activations
    about = json.loads((out / "about.json").read_text())
    assert about["version"] == kit_version() is not None and "--tasks" not in about["command"]
    assert "--draws 2 --seed 0" in about["command"]


def test_modules_on_embeddings_move_no_activations_and_are_left_out_with_a_note(pair, tmp_path):
    for seed, folder in enumerate(pair):
        with_embedding(folder, 50, 20 + 2 * seed)
    out = tmp_path / "report"
    said = invoke("overlap", *pair, "--out", out, "--draws", 2, "--tasks", "chain_sum,refusal", "--rows", 2)
    assert said.exit_code == 0, said.output
    note = "modules outside layers are left out on activations (embed_tokens)"
    assert f"note: {note}" in said.stdout and note in json.loads((out / "about.json").read_text())["notes"]
    assert len(pd.read_csv(out / "functional.csv")) == 2
    assert "embed_tokens" in set(pd.read_csv(out / "modules.csv")["module"]), "their weights are compared"


def test_adapters_on_embeddings_alone_move_no_activations():
    adapters = {name: {"embed_tokens": Factors(gaussian(2, 9, seed=s), gaussian(6, 2, seed=s + 1), 1.0)}
                for s, name in enumerate("ab")}  # fmt: skip
    activations = foreign.Activations("none", dict.fromkeys(adapters, "chain_sum"))
    with pytest.raises(ValueError, match="must have modules in layers to move activations; found none of 'a'"):
        foreign.measured(adapters, draws=2, activations=activations)


def test_a_module_of_two_shapes_is_left_out_with_a_note(pair, tmp_path):
    """A vocabulary that one of them has resized does not keep their layers from being compared."""
    with_embedding(pair[0], 50, 20)
    with_embedding(pair[1], 58, 22)
    found = read_folders(pair)
    adapters, notes = comparable(found)
    assert notes == ["modules of different shapes are not compared (embed_tokens)"]
    assert [set(f.factors) - set(adapters[name]) for name, f in found.items()] == [{"embed_tokens"}] * 2
    assert all(torch.equal(f.A, found[n].factors[m].A) for n, each in adapters.items() for m, f in each.items())
    said = invoke("overlap", *pair, "--out", tmp_path / "report", "--draws", 2)
    assert said.exit_code == 0 and f"note: {notes[0]}" in said.stdout, said.output
    assert notes[0] in json.loads((tmp_path / "report" / "about.json").read_text())["notes"]
    settings = load_settings("smoke", adapters=pair)
    table = overlaps(notebook.collect("04_interference", settings))
    assert set(table["module"]) == set(adapters["one"]) and notes[0] in notebook.shared_lines(settings)


def test_one_draw_has_no_limits(pair, tmp_path):
    said = invoke("overlap", *pair, "--out", tmp_path / "report", "--draws", 1)
    assert said.exit_code == 2 and "--draws" in said.output and not (tmp_path / "report").exists()
    adapters, _ = comparable(read_folders(pair))
    with pytest.raises(ValueError, match="draws must be at least 2, between which limits lie; found 1"):
        foreign.measured(adapters, draws=1)


def test_modules_of_one_shape_are_all_compared(pair):
    for folder in pair:
        with_embedding(folder, 50, 20)
    adapters, notes = comparable(read_folders(pair))
    assert notes == [] and "embed_tokens" in adapters["one"]


def test_merge_refuses_a_folder_in_use_before_it_reads_any(pair, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    said = invoke("merge", "./nowhere", pair[0], "--out", tmp_path / "used")
    assert said.exit_code == 2 and "folder must be new or empty" in said.stderr and "nowhere" not in said.stderr
    said = invoke("merge", "./nowhere", pair[0], "--out", tmp_path / "new")
    assert said.exit_code == 2 and "found './nowhere'" in said.stderr

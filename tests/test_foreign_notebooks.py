"""Notebooks 4 and 5 on adapters from elsewhere, executed as a terminal does it: folders relative to where it stands."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from tiny import folder_of

from lori_nb.study.grid import find_notebook, parse_grid
from lori_nb.study.sweep import sweep


@pytest.fixture
def folders(tiny_decoder, home, tmp_path, monkeypatch) -> list[str]:
    """Two folders for the tiny base, of other ranks and layers, by names relative to the working folder."""
    folder_of(tiny_decoder, tmp_path / "one", 2, 5)
    folder_of(tiny_decoder, tmp_path / "other", 3, 6, layers=1)
    monkeypatch.chdir(tmp_path)
    return ["one", "./other"]


def executed(home: Path, name: str, profile: str, *axes: str) -> dict[str, str]:
    """Cell → the text of its outputs, after a sweep of one point."""
    (row,) = sweep(find_notebook(name), parse_grid(axes), profile, jobs=1, say=lambda line: None)
    notebook = nbformat.read(home / "executed" / "sweeps" / name / row["output"], as_version=4)
    outputs = {cell.id: cell.get("outputs", []) for cell in notebook.cells}
    return {
        key: "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in each)
        for key, each in outputs.items()
    }


def test_notebook_4_says_what_is_compared_and_what_cannot_be_asked(folders, home):
    """Under profile standard, whose arms and five seeds have nothing to do with them."""
    found = executed(home, "04_interference", "standard", f"adapters=[{','.join(folders)}]", "overlap_null=given")
    setup = found["setup"].splitlines()
    assert setup[0].endswith(": 2 adapters from elsewhere, no runs") and len(setup) == 4
    assert setup[1] == "2 adapters, 2 modules in all of them (one 4, other 2)"
    assert setup[2].startswith("one: 2 of 4 modules are not in all (") and setup[3] == "ranks differ: one 2, other 3"
    assert found["frozen"].startswith("No LoRI adapter was trained here")
    assert found["functional"].startswith("Not measured: ") and "lori-nb overlap --tasks" in found["functional"]
    assert found["choices"].startswith("No arm of this study")
    assert "(n = 1 pairs of adapters)" in " ".join(found["means"].split()) and "seed" not in found["means"]
    assert "row overlap: adapters" in found["excess"]
    drawn = {path.stem for path in (home / "figures").glob("*/*.png")}
    assert drawn >= {"04_interference_cosine", "04_interference_angles", "04_interference_depth"}
    assert not drawn & {"04_interference_choices", "04_interference_functional"}, "nothing was measured for these"


def test_notebook_5_merges_and_scores_them(folders, tiny_decoder, home):
    axes = [f"adapters=[{','.join(folders)}]", f"base={tiny_decoder}", "tasks=[chain_sum,spell_backward]"]
    found = executed(home, "05_merging", "smoke", *axes, "merges=[cat]", "weights=[0.5]")
    assert found["setup"].splitlines()[0].endswith(": 2 adapters from elsewhere, no runs")
    assert "2 adapters, 2 modules in all of them (one 4, other 2)" in found["elsewhere"]
    assert "not scored" not in found["elsewhere"] and re.search(r"^cat +0\.5 +4 +5 .* True", found["elsewhere"], re.M)
    assert "spell_backward" in found["tasks"] and list((home / "merged").glob("cat-0.5-*/adapter_model.safetensors"))

"""Grids, points and sweeps: every point checked first, executed once, and listed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from distributed import LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from small_notebooks import small_notebook

from lori_nb.lab.paths import PROJECT
from lori_nb.study.grid import expand_values, find_notebook, parse_grid, points_of, slug, value_text
from lori_nb.study.parameters import parse_value
from lori_nb.study.plans import PLANS
from lori_nb.study.profiles import load_settings
from lori_nb.study.stored import read_notebook
from lori_nb.study.sweep import SweepError, sweep


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0..4", [0, 1, 2, 3, 4]),
        ("-1..1,7", [-1, 0, 1, 7]),
        ("3..3", [3]),
        ("lora, lori-s", ["lora", "lori-s"]),
        ("1e-4,2", [1e-4, 2]),
        ("[lora,lori-s],lora", [["lora", "lori-s"], "lora"]),
        ("1.5", [1.5]),
    ],
)
def test_values_of_an_axis(text, values):
    assert expand_values(text) == values


def test_a_grid_is_the_product_of_its_axes_the_last_one_fastest():
    assert parse_grid(["seed=0..1", "method=lora,lori-s"]) == [
        {"seed": 0, "method": "lora"},
        {"seed": 0, "method": "lori-s"},
        {"seed": 1, "method": "lora"},
        {"seed": 1, "method": "lori-s"},
    ]
    assert parse_grid([]) == [{}]  # the defaults are a point too


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (["seed"], "must read NAME=VALUES, as in seed=0..4; found 'seed'"),
        (["=3"], "must read NAME=VALUES"),
        (["seed="], "must read NAME=VALUES"),
        (["seed=4..0"], "must run upwards, as in 0..4; found '4..0'"),
        (["seed=1,,2"], "separated by single commas; found '1,,2'"),
        (["seed=1", "seed=2"], "each parameter once; found 'seed' twice"),
    ],
)
def test_axes_that_say_nothing_clear_are_errors(axes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_grid(axes)


WORDS = st.from_regex(r"[a-z][a-z0-9_./-]{0,8}", fullmatch=True)
VALUES = st.one_of(st.integers(-9, 9), st.floats(1e-6, 1e6), st.booleans(), st.none(), WORDS, st.just("7"))


@given(st.one_of(VALUES, st.lists(VALUES, max_size=3)))
def test_a_value_is_written_as_it_is_read(value):
    assert parse_value(value_text(value)) == value


@given(st.lists(st.dictionaries(WORDS, VALUES, max_size=6), min_size=2, max_size=2))
def test_points_that_differ_have_files_that_differ(points):
    one, two = points
    same = list(map(value_text, [*one, *one.values()])) == list(map(value_text, [*two, *two.values()]))
    assert (slug(one) == slug(two)) == same
    assert re.fullmatch(r"[\w.+-]{0,100}", slug(one))


def test_slugs_read_well():
    assert slug({"profile": "quick", "seed": 0, "method": "lori-s"}) == "quick_seed-0_method-lori-s"


def test_notebooks_are_found_by_path_and_by_name(tmp_path):
    notebook = small_notebook(tmp_path / "mine.ipynb")
    assert find_notebook(str(notebook)) == notebook
    with pytest.raises(ValueError, match="notebook must be a file or one of .*; found '09_none'"):
        find_notebook("09_none")
    for path in (PROJECT / "notebooks").glob("0*.ipynb"):
        assert find_notebook(path.stem) == find_notebook(f"notebooks/{path.name}") == path


@pytest.fixture
def notebook(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORI_NB_HOME", str(tmp_path / "home"))
    return small_notebook(tmp_path / "mine.ipynb", "print(seed, method)\nassert seed != 13")


def test_every_point_is_checked_before_any_is_executed(notebook, tmp_path):
    with pytest.raises(ValueError, match="no parameter 'sed'; .* did you mean 'seed'"):
        sweep(notebook, [{"seed": 0}, {"sed": 1}])
    with pytest.raises(ValueError, match="'seed' .* must be a number; found 'one'"):
        sweep(notebook, [{"seed": 0}, {"seed": "one"}])
    assert not (tmp_path / "home").exists()


def test_points_of_a_known_notebook_carry_their_profile_and_are_checked_as_settings(tmp_path, home):
    known = small_notebook(tmp_path / "01_lori.ipynb", parameters='profile = "quick"\nseed = 0\nsteps = 60\nown = 1\n')
    (point,) = points_of(known, [{"seed": [1, 2]}], "smoke")
    assert point.parameters["profile"] == "smoke" and point.parameters["seed"] == [1, 2]
    assert point.parameters["steps"] < 60 and "own" not in point.parameters  # the profile's value, not the cell's
    assert point.command == "lori-nb sweep 01_lori -g 'seed=[1,2]' --profile smoke"
    assert point.output.name.startswith("smoke_seed-")
    with pytest.raises(ValueError, match="steps must be a whole number; found 1.5"):
        points_of(known, [{"steps": 1.5}], "smoke")
    with pytest.raises(ValueError, match="profile must be one of"):
        points_of(known, [{}], "smok")


def test_folders_are_given_by_whole_paths_since_kernels_work_elsewhere(tmp_path, home, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two", "base"):
        (tmp_path / name).mkdir()
    axes = ["adapters=[one,./two,owner/three]", "base=base", "tasks=chain_sum"]
    (point,) = points_of(PROJECT / "notebooks" / "04_interference.ipynb", parse_grid(axes), "smoke")
    assert point.parameters["adapters"] == [str(tmp_path / "one"), str(tmp_path / "two"), "owner/three"]
    assert point.parameters["base"] == str(tmp_path / "base") and point.parameters["tasks"] == ["chain_sum"]
    assert point.command.startswith("lori-nb sweep 04_interference -g 'adapters=[one,./two,owner/three]' -g base=base")


def test_one_adapter_from_elsewhere_is_no_comparison(tmp_path, home):
    (tmp_path / "one").mkdir()
    axes = [f"adapters={tmp_path / 'one'}"]
    with pytest.raises(ValueError, match=r"adapters must be at least 2 to compare, or none; found .*one"):
        sweep(PROJECT / "notebooks" / "04_interference.ipynb", parse_grid(axes), "smoke", jobs=1)
    assert not (home / "executed").exists()
    assert PLANS["05_merging"](load_settings("smoke", adapters=axes)) == [], "one may be weighted"


def test_a_sweep_executes_each_point_once_and_lists_all(notebook, tmp_path):
    said: list[str] = []
    rows = sweep(notebook, parse_grid(["seed=0..1"]), jobs=2, say=said.append)
    folder = tmp_path / "home" / "executed" / "sweeps" / "mine"
    assert [row["output"] for row in rows] == ["quick_seed-0.ipynb", "quick_seed-1.ipynb"]
    texts = [read_notebook(folder / row["output"]).cells[3].outputs[0].text for row in rows]
    assert texts == ["0 lora\n", "1 lora\n"]
    assert sum("done in" in line for line in said) == 2 and "[2/2" in said[1]

    times, said = {path: path.stat().st_mtime_ns for path in folder.glob("*.ipynb")}, []
    with pytest.raises(SweepError, match=r"seed=13: notebook mine.ipynb failed in cell 3: AssertionError"):
        sweep(notebook, [{"seed": 1}, {"seed": 13}], say=said.append)
    assert said[0] == "1 of 2 points were done before"
    assert {path: path.stat().st_mtime_ns for path in times} == times  # what was done is not done again
    index = pd.read_parquet(folder / "index.parquet").set_index("output")
    assert list(index["point"]) == ["seed=0", "seed=1", "seed=13"]
    assert list(index["error"] == "") == [True, True, False]
    assert index.loc["quick_seed-1.ipynb", "seconds"] > 0 and pd.isna(index.loc["quick_seed-13.ipynb", "seconds"])
    assert len(pd.read_csv(folder / "index.csv")) == 3


def test_a_cluster_executes_the_same_points(notebook, tmp_path):
    cluster = LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None)
    with cluster:
        rows = sweep(notebook, [{"seed": 4}], scheduler=cluster.scheduler_address, say=lambda line: None)
        with pytest.raises(SweepError, match="seed=13"):
            sweep(notebook, [{"seed": 13}], scheduler=cluster.scheduler_address, say=lambda line: None)
    facts = read_notebook(tmp_path / "home/executed/sweeps/mine" / rows[0]["output"]).metadata["lori_nb"]
    assert facts["parameters"] == {"seed": 4} and facts["profile"] == "quick"
    assert json.loads(json.dumps(rows))[0]["error"] == ""

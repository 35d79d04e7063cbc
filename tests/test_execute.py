"""Notebooks executed from outside: strict parameters, clean copies with provenance, failures said at once."""

from __future__ import annotations

import functools
import json
import re
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_notebooks import small_notebook

from lori_nb.lab.paths import PROJECT
from lori_nb.study.execute import NotebookError, execute_notebook, executed_before, side_by_side
from lori_nb.study.parameters import check_parameters, parse_value, read_parameters
from lori_nb.study.stored import clean, notebook_digest, publish, read_notebook, with_footer, without_paths

# Parameters


def test_parameters_are_read_in_order_with_defaults_and_reasons(tmp_path):
    cell = (
        "# what is varied\n"
        "seed: int = 0  # of everything drawn\n"
        "rates = [\n    1e-3,\n    -0.5,\n]  # tried in turn\n"
        'base = "a#b"  # not a comment before\n'
        "last = None\n"
    )
    read = read_parameters(small_notebook(tmp_path / "n.ipynb", parameters=cell))
    assert [(p.name, p.default, p.comment) for p in read.values()] == [
        ("seed", 0, "of everything drawn"),
        ("rates", [1e-3, -0.5], "tried in turn"),
        ("base", "a#b", "not a comment before"),
        ("last", None, ""),
    ]


@pytest.mark.parametrize(
    ("cell", "line", "found"),
    [
        ("a = 1\nb = range(3)\n", 2, "b = range(3)"),
        ("a = b = 1\n", 1, "a = b = 1"),
        ("a = 1\n\nimport os\n", 3, "import os"),
        ("a += 1\n", 1, "a += 1"),
        ("a, b = 1, 2\n", 1, "a, b = 1, 2"),
        ("a = 1\nb: int\n", 2, "b: int"),
        ("%matplotlib inline\n", 1, "%matplotlib inline"),
    ],
)
def test_a_parameter_cell_holds_literals_only(tmp_path, cell, line, found):
    notebook = small_notebook(tmp_path / "n.ipynb", parameters=cell)
    with pytest.raises(ValueError, match=rf"n.ipynb, cell tagged 'parameters', line {line} .*{re.escape(repr(found))}"):
        read_parameters(notebook)


@pytest.mark.parametrize("count", [0, 2])
def test_exactly_one_cell_is_tagged(tmp_path, count):
    nb = nbformat.read(small_notebook(tmp_path / "n.ipynb", "x = 1"), as_version=4)
    for cell, tagged in zip(nb.cells[1:], (count > 0, count > 1), strict=True):
        cell.metadata["tags"] = ["parameters"] if tagged else []
    nbformat.write(nb, tmp_path / "n.ipynb")
    with pytest.raises(ValueError, match=f"exactly one cell tagged 'parameters'; found {count}"):
        read_parameters(tmp_path / "n.ipynb")


@pytest.mark.parametrize(
    "given",
    [
        {"seed": 3, "method": "lori-s", "rates": [0.3, 1], "steps": 1e-4},
        {"seed": [0, 1], "method": ["lora", "lori-s"]},
        {"rates": 0.3},
        {"steps": None},
        {},
    ],
)
def test_values_of_the_default_kind_are_accepted(tmp_path, given):
    path = small_notebook(tmp_path / "n.ipynb")
    assert check_parameters(path, given) is None
    for name in given:
        with pytest.raises(ValueError, match=f"parameter {name!r} of notebook n.ipynb must be"):
            check_parameters(path, given | {name: {"of": "another kind"}})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sed": 3}, "n.ipynb has no parameter 'sed'; known are seed, method, rates, steps; did you mean 'seed'"),
        ({"zzz": 3}, "no parameter 'zzz'; known are seed, method, rates, steps$"),
        ({"seed": "three"}, "'seed' of notebook n.ipynb must be a number; found 'three'"),
        ({"method": 3}, "'method' of notebook n.ipynb must be text; found 3"),
        ({"steps": True}, "must be a number; found True"),
        ({"steps": [1, 2]}, r"must be a number; found \[1, 2\]"),
        ({"rates": ["a"]}, "must be a list of number, or one such value"),
        ({"rates": "a"}, "must be a list of number, or one such value"),
        ({"seed": ["a"]}, "must be a number"),
    ],
)
def test_unknown_names_and_other_kinds_are_errors(tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        check_parameters(small_notebook(tmp_path / "n.ipynb"), given)


def test_values_as_the_command_line_writes_them():
    texts = ["1e-4", "3", "-2", "lora", "lori-s", "True", "[lora, lori-s]", "[1,2]", "'7'", "a.b/c"]
    values = [1e-4, 3, -2, "lora", "lori-s", True, ["lora", "lori-s"], [1, 2], "7", "a.b/c"]
    assert [parse_value(text) for text in texts] == values
    assert isinstance(parse_value("1e-4"), float)


@given(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.lists(st.integers())))
def test_numbers_survive_the_command_line(value):
    assert parse_value(json.dumps(value)) == value


# Execution


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORI_NB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def outputs_of(path: Path) -> str:
    return json.dumps([cell.get("outputs", []) for cell in read_notebook(path).cells])


def test_a_copy_is_clean_and_says_where_it_comes_from(tmp_path, home):
    cells = (
        "print(seed, method, rates)",
        f"import os\nprint({str(PROJECT)!r} + '/data', os.path.expanduser('~/x'), os.environ['LORI_NB_HOME'])",
        f"print(os.environ['OMP_NUM_THREADS'], os.environ['LORI_NB_BATCH'], os.getcwd() == {str(tmp_path)!r})",
        "from tqdm import tqdm\nfor _ in tqdm(range(3)): pass",
        "import warnings; warnings.warn('mind this')",
        "from lori_nb.study.stored import record\nrecord(run_hashes=['aa', 'bb'], device='test device')",
        "record(run_hashes=['bb', 'cc'])",
    )
    notebook = small_notebook(tmp_path / "n.ipynb", *cells)
    before, seen = notebook.read_bytes(), []
    done = execute_notebook(
        notebook,
        {"seed": 3, "rates": 0.5},
        tmp_path / "out" / "n.ipynb",
        lambda count, total: seen.append((count, total)),
        profile="smoke",
        command="lori-nb sweep n -g seed=3",
    )
    nb = read_notebook(done.path)
    assert [cell.outputs[0].text for cell in nb.cells[3:5]] == ["3 lora 0.5\n", "./data ~/x data\n"]
    assert nb.cells[5].outputs[0].text.startswith("1 1 True")
    assert nb.cells[6].outputs == [] and nb.cells[8].outputs == [] == nb.cells[9].outputs
    assert nb.cells[7].outputs[0].text.startswith("<cell>:1: UserWarning: mind this")
    facts = nb.metadata["lori_nb"]
    assert facts["parameters"] == {"seed": 3, "rates": 0.5} and facts["profile"] == "smoke"
    assert done.run_hashes == ("aa", "bb", "cc") and facts["run_hashes"] == ["aa", "bb", "cc"]
    assert facts["device"] == "test device" and facts["threads"] == 1 and facts["seconds"] == done.seconds > 0
    assert {"commit", "dirty", "packages", "python", "dtype", "source_digest", "date"} <= set(facts)
    footer = nb.cells[-1]
    assert (
        footer.cell_type == "markdown" and "`lori-nb sweep n -g seed=3`" in footer.source and "3 runs" in footer.source
    )
    for cell in nb.cells[:-1]:
        cell.source = ""  # the cells above name such paths themselves
    for noise in ('papermill": {', "iopub", str(Path.home()) + "/", str(PROJECT), str(tmp_path), "s/it", "TCP"):
        assert noise not in nbformat.writes(nb), noise
    assert seen[0][1] == seen[-1][1] == seen[-1][0] == len(nb.cells) - 1  # all but the footer
    assert notebook.read_bytes() == before
    assert [path.name for path in done.path.parent.iterdir()] == ["n.ipynb"]


def test_a_failing_cell_is_named_and_the_failed_copy_kept(tmp_path, home):
    cells = ("x = 1", "def f():\n    raise KeyError('first\\nlast line')\nf()")
    notebook, output = small_notebook(tmp_path / "n.ipynb", *cells), tmp_path / "out" / "n.ipynb"
    output.parent.mkdir()
    output.write_text("a finished copy")
    with pytest.raises(NotebookError, match=r"n.ipynb failed in cell 4: KeyError: .*last line.*kept as n.failed.ipynb"):
        execute_notebook(notebook, {"seed": 1}, output)
    assert output.read_text() == "a finished copy"
    assert sorted(path.name for path in output.parent.iterdir()) == ["n.failed.ipynb", "n.ipynb"]
    assert "KeyError" in outputs_of(output.with_name("n.failed.ipynb"))
    small_notebook(tmp_path / "n.ipynb", "x = 1")
    execute_notebook(notebook, {}, output)
    assert [path.name for path in output.parent.iterdir()] == ["n.ipynb"]  # the failed copy has had its day


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_a_dead_kernel_is_an_error_in_seconds(tmp_path, home, end):
    alive = tmp_path / "alive"
    cell = f"import os, pathlib, time\npathlib.Path({str(alive)!r}).touch()\n{end}\ntime.sleep(600)"
    notebook = small_notebook(tmp_path / "n.ipynb", cell)
    with pytest.raises(NotebookError, match="failed in cell 3: DeadKernelError"):
        execute_notebook(notebook, {}, tmp_path / "n.out.ipynb")
    assert time.time() - alive.stat().st_mtime < 60  # it is polled every second; the rest is for busy cores


def test_bad_parameters_are_errors_before_anything_runs(tmp_path, home):
    notebook = small_notebook(tmp_path / "n.ipynb")
    with pytest.raises(ValueError, match="no parameter 'sed'"):
        execute_notebook(notebook, {"sed": 1}, tmp_path / "out" / "n.ipynb")
    assert not (tmp_path / "out").exists()


def test_notebooks_side_by_side_do_not_meet_and_leave_no_process(tmp_path, home):
    notebook = small_notebook(tmp_path / "n.ipynb", "print(seed)")
    calls = {
        str(seed): functools.partial(execute_notebook, notebook, {"seed": seed}, tmp_path / f"{seed}.ipynb")
        for seed in (11, 12)
    }
    results = {}
    side_by_side(calls, 2, results.__setitem__)
    assert {key: '"11\\n"' in outputs_of(done.path) for key, done in results.items()} == {"11": True, "12": False}
    left = [each for each in psutil.Process().children(recursive=True) if "lori_nb.study" in " ".join(each.cmdline())]
    assert left == []


def test_an_interrupt_ends_the_notebooks_at_work(tmp_path, home):
    notebook = small_notebook(tmp_path / "n.ipynb", "import time; time.sleep(600)")
    slow = functools.partial(execute_notebook, notebook, {}, tmp_path / "out.ipynb")

    def interrupt(key: str, result: object) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        side_by_side({"quick": lambda: None, "slow": slow, "next": slow, "queued": slow}, 2, interrupt)
    assert time.monotonic() - started < 60
    assert not [each for each in psutil.Process().children() if "lori_nb.study" in " ".join(each.cmdline())]


def test_a_copy_counts_as_done_until_parameters_or_sources_change(tmp_path, home):
    notebook, output = small_notebook(tmp_path / "n.ipynb", "print(seed)"), tmp_path / "o.ipynb"
    assert executed_before(notebook, {"seed": 1}, output) is None
    execute_notebook(notebook, {"seed": 1}, output)
    assert executed_before(notebook, {"seed": 1}, output).path == output
    assert executed_before(notebook, {"seed": 2}, output) is None
    small_notebook(notebook, "print(seed + 0)")
    assert executed_before(notebook, {"seed": 1}, output) is None


# What is kept


FACTS = {"python": "3", "device": "cpu", "dtype": "float32", "threads": 1, "date": "2026-01-01", "seconds": 2.0}


def executed_copy(notebook: Path, path: Path, text: str) -> Path:
    """An executed copy as papermill leaves it, without a kernel: injected parameters, time stamps, outputs."""
    nb = nbformat.read(notebook, as_version=4)
    injected = nbformat.v4.new_code_cell("seed = 0", metadata={"tags": ["injected-parameters"]})
    nb.cells.insert(2, injected)
    for count, cell in enumerate(nb.cells[1:], start=1):
        cell.execution_count = count
        cell.metadata |= {"papermill": {"duration": 1.5}, "execution": {"iopub.status.busy": "now"}}
    result = nbformat.v4.new_output("execute_result", {"text/plain": text}, execution_count=3)
    stream = nbformat.v4.new_output("stream", name="stderr", text="  0%|   | 0/3\r100%|###| 3/3 [00:00<00:00, 9it/s]\n")
    image = nbformat.v4.new_output("display_data", {"image/png": "aaaa" + str(Path.home()) + "aaaa"})
    widget = nbformat.v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}})
    nb.cells[3].outputs = [result, stream, image, widget]
    nb.metadata["papermill"] = {"duration": 3}
    nbformat.write(with_footer(nb, FACTS), path)
    return path


def test_publishing_fills_in_outputs_and_leaves_the_sources_alone(tmp_path):
    notebook = small_notebook(tmp_path / "n.ipynb", "seed")
    source = nbformat.read(notebook, as_version=4)
    publish(executed_copy(notebook, tmp_path / "one.ipynb", "first"), notebook)
    once = notebook.read_bytes()
    publish(executed_copy(notebook, tmp_path / "one.ipynb", "first"), notebook)
    assert notebook.read_bytes() == once  # the same outputs give the same file, and one footer
    publish(executed_copy(notebook, tmp_path / "two.ipynb", "second"), notebook)
    assert notebook.read_bytes() != once
    nb = nbformat.read(notebook, as_version=4)
    assert [cell.source for cell in nb.cells[:-1]] == [cell.source for cell in source.cells]
    assert [cell.metadata for cell in nb.cells[:-1]] == [cell.metadata for cell in source.cells]
    assert nb.cells[-1].id == "lori-nb-footer" and len(nb.cells) == 4
    assert [cell.execution_count for cell in nb.cells[1:3]] == [1, 2] == [1, nb.cells[2].outputs[0].execution_count]
    assert [output.output_type for output in nb.cells[2].outputs] == ["execute_result", "display_data"]
    assert str(Path.home()) in nb.cells[2].outputs[1].data["image/png"]  # an image is no text
    assert set(nb.metadata) == {"lori_nb"}
    nbformat.validate(nb)


def test_outputs_of_another_notebook_are_not_published(tmp_path):
    notebook = small_notebook(tmp_path / "n.ipynb", "seed")
    executed = executed_copy(notebook, tmp_path / "one.ipynb", "first")
    small_notebook(notebook, "seed + 1")
    before = notebook.read_bytes()
    with pytest.raises(ValueError, match="n.ipynb must be unchanged since it was executed"):
        publish(executed, notebook)
    assert notebook.read_bytes() == before


def test_the_digest_sees_sources_and_nothing_that_execution_adds(tmp_path):
    notebook = small_notebook(tmp_path / "n.ipynb", "seed")
    plain = notebook_digest(read_notebook(notebook))
    assert notebook_digest(read_notebook(executed_copy(notebook, tmp_path / "e.ipynb", "x"))) == plain
    assert notebook_digest(read_notebook(small_notebook(notebook, "seed # changed"))) != plain


def test_cleaning_leaves_its_argument_alone(tmp_path):
    nb = read_notebook(executed_copy(small_notebook(tmp_path / "n.ipynb", "seed"), tmp_path / "e.ipynb", str(PROJECT)))
    before = nbformat.writes(nb)
    assert clean(nb).cells[3].outputs[0].data["text/plain"] == "."
    assert nbformat.writes(nb) == before and clean(clean(nb)) == clean(nb)


def test_paths_of_the_machine_are_named_and_others_left(tmp_path, monkeypatch):
    monkeypatch.setenv("LORI_NB_HOME", str(tmp_path / "h"))
    home = str(Path.home())
    texts = {
        f"{PROJECT}/lori_nb/cli.py:3": "./lori_nb/cli.py:3",
        f"file://{PROJECT}": "file://.",
        f"'{tmp_path}/h/runs'": "'data/runs'",
        f"{home}/models": "~/models",
        f"{home}x and /x{home}": f"{home}x and /x{home}",
        "/var/tmp/ipykernel_123/456.py:1: UserWarning": "<cell>:1: UserWarning",
    }
    assert [without_paths(text) for text in texts] == list(texts.values())
    assert without_paths({"a": [f"{home}/b", 1]}) == {"a": ["~/b", 1]}

"""The command line: bad input is one clear line and exit code 2, plans need no weights, an interrupt ends all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from small_notebooks import small_notebook
from typer.testing import CliRunner

from lori_nb import cli
from lori_nb.lab.distributed import ProcessesError
from lori_nb.lab.models import BaseModelError
from lori_nb.lab.runs import DiskFullError, Store
from lori_nb.lab.specs import RunSpec
from lori_nb.lab.tasks.hub import HubUnreachableError
from lori_nb.study.conduct import chosen_notebooks, plan_text, planned, results_text, span
from lori_nb.study.execute import NotebookError
from lori_nb.study.plain_errors import exit_code
from lori_nb.study.profiles import NOTEBOOKS, load_settings

COMMAND = [sys.executable, "-c", "from lori_nb.cli import app; app(prog_name='lori-nb')"]


def invoke(*words: str):
    return CliRunner().invoke(cli.app, words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study", "--profile", "qick"], "profile must be one of"),
        (["study", "--tasks", "sums"], "task must be one of"),
        (["study", "--seed", "4..0"], "a range must run upwards"),
        (["study", "--notebooks", "01_lora"], "found '01_lora'; did you mean '01_lori'"),
        (["train", "--method", "lori-x"], "method must be one of the plan's, "),
        (["train", "--task", "boolq,sums"], "task must be one of the plan's, boolq, gsm8k, refusal; found 'sums'"),
        (["train", "--seed", "0,9"], "seed must be one of the plan's, 0, 1, 2; found 9"),
        (["sweep", "09_none"], "notebook must be a file or one of"),
        (["tune", "--methods", "lorri"], "methods must be among"),
        (["tune", "--tasks", "sums"], "task must be one of"),
        (
            ["tune", "--profile", "smoke", "--strengths", "joint", "--plan"],
            "strengths must be of ways that learn one task ",
        ),
        (["measure", "--tasks", "rte,sums"], "task must be one of"),
        (["runs", "show", "abc"], "found 0 for 'abc'"),
        (["publish"], "the study must be finished first"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(home, words, said):
    result = invoke(*words)
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert result.stderr.startswith("lori-nb: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_misspelt_parameter_is_answered_before_torch_is_even_imported(tmp_path):
    notebook = small_notebook(tmp_path / "n.ipynb")
    code = (
        "import sys\nfrom lori_nb.cli import app\n"
        f"try: app(['sweep', {str(notebook)!r}, '-g', 'sed=0..4'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "2 False False\n", done.stderr
    assert done.stderr.startswith("lori-nb: notebook n.ipynb has no parameter 'sed'") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("x"), 2),
        (FileNotFoundError("x"), 2),
        (BaseModelError("x"), 2),
        (HubUnreachableError("x"), 2),
        (DiskFullError(28, "x"), 1),
        (OSError(28, "No space left on device"), 1),
        (ProcessesError("x"), 1),
        (NotebookError("x"), 1),
        (KeyboardInterrupt(), 130),
        (KeyError("x"), None),
        (RuntimeError("x"), None),
    ],
)
def test_foreseen_errors_have_exit_codes_and_others_keep_their_traceback(error, code):
    assert exit_code(error) == code


def test_help_names_every_command():
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("study", "train", "sweep", "runs", "doctor", "tune", "publish"))


def test_the_plan_of_the_papers_models_needs_no_weights(home, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = invoke("study", "--profile", "paper", "--plan", "--notebooks", "01_lori")
    assert result.exit_code == 0, result.output
    # Llama-3-8B, rank 32, all linear layers: r (d_in + d_out), r d_out, and the kept tenth of that
    for method, count in {"lora": "83,886,080", "lori-d": "44,040,192", "lori-s 0.9": "4,404,019"}.items():
        lines = [line for line in result.stdout.splitlines() if line.startswith(f"{method} ·")]
        assert lines and all(f" {count} " in line for line in lines)
    assert "0 of them done" in result.stdout and "with 2 workers" in result.stdout
    assert not (home / "runs").exists()


def test_the_plan_of_glue_on_roberta_needs_neither_weights_nor_rows(home, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("LORI_NB_DATA", raising=False)
    words = ("study", "--profile", "paper", "--tasks", "glue,mnli,qqp", "--plan", "--notebooks", "03_ortho_lora")
    for base, count in {"FacebookAI/roberta-base": "294,912", "FacebookAI/roberta-large": "786,432"}.items():
        result = invoke(*words, "--base", base, "--seed", "0")
        assert result.exit_code == 0, result.output
        lines = [line for line in result.stdout.splitlines() if line.startswith("lora · rte ·")]
        assert len(lines) == 1 and f" {count} " in lines[0]
        assert "16 runs, 0 of them done" in result.stdout  # eight tasks alone, eight ways to share an adapter
    assert not (home / "runs").exists()


def test_the_plan_of_strengths_trains_nothing(home, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a plan must train nothing")

    monkeypatch.setattr("lori_nb.study.strengths.train_all", refuse)
    result = invoke("tune", "--profile", "smoke", "--strengths", "ewc,merged", "--plan")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len([line for line in lines if line.startswith("ewc ·")]) == 5  # a run for each value, after one first run
    assert len([line for line in lines if line.startswith("lora ·")]) == 1
    assert not (home / "runs").exists()


def test_a_plan_holds_every_run_once_after_those_it_depends_on(home):
    settings = load_settings("smoke")
    specs = planned(settings, NOTEBOOKS)
    assert len(specs) == len(set(specs))
    assert all(specs.index(parent) < specs.index(spec) for spec in specs for parent in spec.parents)
    assert set(planned(settings, ["01_lori"])) < set(specs)
    lines = plan_text(specs, jobs=1).splitlines()
    assert len(lines) == len(specs) + 3 and lines[-1].startswith(f"{len(specs)} runs, 0 of them done")


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"rank": 4096}, "rank must be"), ({"last_layers": 99}, "last_layers must be"), ({"batch_size": 0}, "batch_size")],
)
def test_settings_are_checked_before_any_run(home, changes, words):
    with pytest.raises(ValueError, match=words):
        planned(load_settings("smoke", **changes), ["01_lori"])
    assert not (home / "runs").exists()


def test_notebooks_are_chosen_by_name_or_path_in_the_order_of_the_story():
    assert chosen_notebooks([]) == NOTEBOOKS
    assert chosen_notebooks(["notebooks/05_merging.ipynb", "01_lori"]) == ("01_lori", "05_merging")
    assert chosen_notebooks(["06", "01"]) == ("01_lori", "06_forgetting")


def test_spans_of_time():
    assert [span(seconds) for seconds in (5, 187, 3600, 36000)] == ["0:05", "3:07", "1.0 h", "10.0 h"]


def test_runs_are_listed_shown_verified_and_cleaned(home, tiny_decoder):
    spec = RunSpec("base", ("chain_sum",), base=str(tiny_decoder), last_layers=1, test_rows=4, steps=0)
    run = Store().get(spec)
    begun = home / "runs" / ("0" * 32)
    begun.mkdir()
    (begun / "spec.json").write_text("{}")
    assert run.hash[:12] in invoke("runs", "list").stdout
    shown = invoke("runs", "show", run.hash[:6]).stdout
    assert run.hash in shown and '"source_digest"' in shown and "exact_match" in shown
    assert invoke("runs", "verify").stdout.endswith("1 runs checked, 0 damaged\n")
    assert invoke("runs", "clean").stdout.endswith("1 removed\n")
    (run.folder / "metrics.parquet").write_bytes(b"changed")
    verified = invoke("runs", "verify")
    assert verified.exit_code == 1 and f"{run.hash}  metrics.parquet does not match" in verified.stdout
    assert invoke("runs", "show", run.hash).exit_code == 1


def test_the_table_of_results_has_a_row_for_every_arm_that_was_asked_for(home, tiny_decoder):
    settings = load_settings("smoke", base=str(tiny_decoder), last_layers=1, test_rows=4, tasks="chain_sum")
    specs = [spec for spec in planned(settings, ["01_lori"]) if spec.method == "base"]
    for spec in specs:
        Store().get(spec)
    lines = results_text(settings, specs).splitlines()
    assert "chain_sum (n = 4 rows, one seed)" in lines[0]
    assert [line.split("  ")[0] for line in lines[2:]] == ["Base model", f"Base model, {settings.shots} examples shown"]
    assert "no scores" in results_text(settings, [])


def test_the_doctor_looks_at_everything(home, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LORI_NB_DATA", str(home / "none"))
    result = invoke("doctor")
    for name in (
        "python",
        "packages",
        "device",
        "precision",
        "smollm2",
        "all-minilm",
        "hub",
        "data",
        "code",
        "disk",
        "git",
    ):
        assert name in result.stdout
    missing = [line for line in result.stdout.splitlines() if line.startswith("MISSING")]
    assert any("LORI_NB_DATA must name a folder" in line for line in missing) and result.exit_code == 1


def test_an_interrupted_sweep_says_so_and_leaves_nothing_running(tmp_path):
    pid = tmp_path / "pid"
    cell = f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    notebook = small_notebook(tmp_path / "n.ipynb", cell)
    variables = {**os.environ, "LORI_NB_HOME": str(tmp_path / "home")}
    top = subprocess.Popen(
        [*COMMAND, "sweep", str(notebook), "-g", "seed=0..2"],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in its background has SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    kernel = psutil.Process(_number_in(pid, top))
    top.send_signal(signal.SIGINT)
    _, said = top.communicate(timeout=120)
    assert top.returncode == 130
    assert said == "lori-nb: stopped; finished runs are kept, and the same command goes on from here\n"
    assert not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE


def _number_in(path: Path, process: subprocess.Popen, seconds: float = 300.0) -> int:
    until = time.monotonic() + seconds
    while not path.exists() or not path.read_text():
        assert process.poll() is None and time.monotonic() < until, "the notebook did not get to its cell"
        time.sleep(0.1)
    return int(path.read_text())

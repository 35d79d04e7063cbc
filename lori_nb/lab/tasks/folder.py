"""Tasks read from a folder (``LORI_NB_DATA``) or loaded from the hub: GSM8K and BoolQ here, GLUE in ``glue``.

A folder holds the files under the names that each task's :class:`DataSet` gives, such as ``glue/RTE/train.tsv``.
"""

from __future__ import annotations

import re

from lori_nb.lab.tasks import glue  # noqa: F401  (importing registers the GLUE tasks)
from lori_nb.lab.tasks.hub import HubUnreachableError, hub_is_reachable
from lori_nb.lab.tasks.official import DataSet, classes, official_rows, official_task
from lori_nb.lab.tasks.reading import data_folder

__all__ = ["HubUnreachableError", "boolq", "data_folder", "gsm8k", "hub_is_reachable", "official_rows"]

_FINAL_NUMBER = re.compile(r"####\s*(-?\d[\d,]*(?:\.\d+)?)\s*\Z")
BOOLQ = {"false": "false", "true": "true"}


def final_number(solution: object) -> tuple[str, None]:
    """(answer, no target) of a GSM8K solution: the number after "####", without thousands commas.

    The worked solution before it is left out of the answer: the tasks train and score the number alone.
    """
    found = _FINAL_NUMBER.search(solution) if isinstance(solution, str) else None
    if found is None:
        raise ValueError(f'must end in "####" and a number; found {str(solution)[-40:]!r}')
    return found[1].replace(",", ""), None


def boolq_instruction(question: str) -> str:
    """The prompt of a hub question, in the words of the folder's instructions (which give no passage)."""
    question = question.strip().rstrip("?")
    return (
        f"Please answer the following question with true or false, question: {question}?\n\nAnswer format: true/false"
    )


def truth_word(value: object) -> str:
    """The folder's label of the hub's truth value."""
    return str(value).lower()


gsm8k = official_task(
    "gsm8k",
    DataSet(
        train_file="gsm8k/gsm8k/train.jsonl",
        test_file="gsm8k/gsm8k/test.jsonl",
        columns=("question", "answer"),
        label=final_number,
        hub_id="openai/gsm8k",
        hub_config="main",
        hub_columns=("question", "answer"),
        hub_test="test",
    ),
    domain="mathematics",
    metric="exact_match",
    licence="MIT",
)

boolq = official_task(
    "boolq",
    DataSet(
        train_file="commonsense/boolq/train.json",
        test_file="commonsense/boolq/test.json",
        columns=("instruction", "answer"),
        label=classes(BOOLQ),
        hub_id="google/boolq",
        hub_columns=("question", "answer"),
        hub_text=boolq_instruction,
        hub_label=truth_word,
        hub_test="validation",
    ),
    domain="language understanding",
    metric="exact_match",
    labels=tuple(BOOLQ),
    licence="CC BY-SA 3.0 (instructions: Apache 2.0)",
)

"""Word problems: GSM8K and SVAMP. The worked solution is trained on; a generated answer counts by its last number.

A solution ends with "#### " and the number, in training as in the files of GSM8K, whose calculator marks (<<48/2=24>>)
stay as they are.
"""

from __future__ import annotations

import re
from decimal import Decimal

from lori_nb.lab.tasks.base import Example
from lori_nb.lab.tasks.official import DataSet, official_task

MARK = "####"
_FINAL = re.compile(rf"{MARK}\s*(-?\d[\d,]*(?:\.\d+)?)\s*\Z")
# A sign counts where no number, letter or closing bracket stands before it: the 4 of "3-4" is not negative.
_NUMBER = re.compile(r"(?:(?<![\w)\]])[-\u2212])?\$?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
NEW_TOKENS = 400  # longer than nearly all worked solutions


def last_number(text: str) -> Decimal | None:
    """The last number of a text, None where it has none.

    Thousands commas, a dollar sign, a full stop after the number and "−" for "-" are read as people mean them:
    "-$1,250.50." is −1250.5. A sign apart from its number, as in "- 5", is a dash. A fraction gives its denominator, a
    percentage its figure.
    """
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    last = found[-1]
    value = Decimal(last[1].replace(",", ""))
    return -value if last[0][0] in "-\u2212" else value


def final_number(solution: object) -> tuple[str, float]:
    """(the solution as it stands, its number) of a solution that ends in "####" and a number."""
    found = _FINAL.search(solution) if isinstance(solution, str) else None
    if found is None:
        raise ValueError(f'must end in "{MARK}" and a number; found {str(solution)[-40:]!r}')
    value = float(found[1].replace(",", ""))
    return solution.strip(), int(value) if value.is_integer() else value


def has_the_number(row: Example, completion: str) -> float:
    """1 where the last number of a completion equals the number of the row's solution, else 0."""
    return float(last_number(completion) == last_number(row.answer))


def svamp_row(row: dict) -> dict:
    """SVAMP: body and question in one text; the equation is the solution's only step."""
    number = Decimal(str(row["Answer"]).replace(",", "")).normalize()
    body = row["Body"].strip()
    asked = f"{body}{'' if body.endswith(('.', '?', '!', ',')) else '.'} {row['Question'].strip()}"
    return {"question": asked, "answer": f"{row['Equation'].strip()} = {number:f}\n{MARK} {number:f}"}


ABOUT = {
    "domain": "mathematics",
    "metric": "exact_match",
    "group": "mathematics",
    "scoring": "generate",
    "judge": has_the_number,
    "system": "",  # the kit's own message asks for the answer alone; here the steps are wanted
    "extra": {"max_new_tokens": NEW_TOKENS, "stop": ("Question:",)},
}

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
    licence="MIT",
    **ABOUT,
)

svamp = official_task(
    "svamp",
    DataSet(
        train_file="svamp/train.jsonl",
        test_file="svamp/test.jsonl",
        columns=("question", "answer"),
        label=final_number,
        hub_id="ChilleD/SVAMP",
        hub_columns=("Body", "Question", "Equation", "Answer"),
        hub_test="test",
        hub_row=svamp_row,
    ),
    licence="not checked (see its page on the hub)",
    **ABOUT,
)

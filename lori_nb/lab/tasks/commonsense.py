"""Eight commonsense sets, in the words of LLM-Adapters' instruction files: BoolQ, PIQA, SIQA, ARC (two), OpenBookQA,
HellaSwag and WinoGrande.

A row's prompt ends with its answer format, "answer1/answer2/answer3", and the answer is "the correct answer is
answer2": trained on as it stands, scored by the likelihood of each choice (``boolq``, ``piqa``, ...), or by the choice
that a generated answer names (``boolq_generated``, ...). Rows of the hub become the same text. The instructions of
LLM-Adapters are under Apache 2.0; each task names the licence of its questions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from lori_nb.lab.tasks.base import Example, Task, register
from lori_nb.lab.tasks.official import DataSet, official_task

FORMAT = "Answer format: "
ANSWER = "the correct answer is "
QUESTION = "Please choose the correct answer to the question: "
SOLUTION = "Please choose the correct solution to the question: "
ENDING = "Please choose the correct ending to complete the given sentence: "
BLANK = "Please choose the correct answer to fill in the blank to complete the given sentence: "
NEW_TOKENS = 32  # the answer has about eight


def with_choices(row: Example) -> Example:
    """The row with the choices that its prompt's answer format names, and the answer as one of them.

    ``row.answer`` is the bare choice, such as "answer2". Raises ValueError for a prompt without an answer format, or
    one that does not name the answer.
    """
    _, stated, format_ = row.prompt.rpartition(FORMAT)
    words = format_.split("/")
    if not stated or len(words) < 2:
        raise ValueError(f"must follow an instruction that ends in its answer format; found {row.prompt[-40:]!r}")
    if not isinstance(row.answer, str) or row.answer not in words:
        raise ValueError(f"must be one of {', '.join(words)}; found {row.answer!r}")
    choices = tuple(ANSWER + word for word in words)
    target = words.index(row.answer)
    return replace(row, answer=choices[target], choices=choices, target=target)


def named_choice(row: Example, completion: str) -> str | None:
    """The first of the row's choices that a completion names as a whole word, in any case; None where it names none."""
    words = [choice.removeprefix(ANSWER) for choice in row.choices]
    found = re.search(rf"\b(?:{'|'.join(map(re.escape, words))})\b", completion, flags=re.IGNORECASE)
    return found[0].lower() if found else None


def names_the_answer(row: Example, completion: str) -> float:
    """1 where the choice that a completion names first is the right one, else 0.

    A completion that lists all choices counts by the first of them, so a base that repeats the format scores by chance.
    """
    return float(named_choice(row, completion) == row.answer.removeprefix(ANSWER))


def instruction(
    head: str, question: str, word: str, options: Sequence[str], between: str = " ", after: str = "\n\n"
) -> str:
    """The prompt of a question in the folder's words: "head question / Word1: … Word2: … / Answer format: …"."""
    listed = between.join(f"{word}{number}: {option}" for number, option in enumerate(options, start=1))
    words = "/".join(f"{word.lower()}{number}" for number in range(1, len(options) + 1))
    return f"{head}{question}\n\n{listed}{after}{FORMAT}{words}"


def boolq_row(row: dict) -> dict:
    """BoolQ: the question alone, without its passage, as in the folder."""
    question = row["question"].strip().rstrip("?")
    asked = f"Please answer the following question with true or false, question: {question}?"
    return {"instruction": f"{asked}\n\n{FORMAT}true/false", "answer": str(row["answer"]).lower()}


def lettered_row(row: dict) -> dict:
    """ARC and OpenBookQA: choices {text, label} and the label of the right one (A, B, ... or 1, 2, ...)."""
    question = row["question"] if "question" in row else row["question_stem"]
    place = list(row["choices"]["label"]).index(row["answerKey"]) + 1
    return {
        "instruction": instruction(QUESTION, question, "Answer", row["choices"]["text"]),
        "answer": f"answer{place}",
    }


def siqa_row(row: dict) -> dict:
    """SocialIQA: context and question in one line; labels 1, 2, 3."""
    options = [row["answerA"], row["answerB"], row["answerC"]]
    asked = f"{row['context']} {row['question']}"
    return {"instruction": instruction(QUESTION, asked, "Answer", options), "answer": f"answer{int(row['label'])}"}


def piqa_row(row: dict) -> dict:
    """PIQA: a goal and two solutions, each on its own line; labels 0, 1."""
    text = instruction(SOLUTION, row["goal"], "Solution", [row["sol1"], row["sol2"]], between="\n\n")
    return {"instruction": text, "answer": f"solution{int(row['label']) + 1}"}


def hellaswag_row(row: dict) -> dict:
    """HellaSwag: an activity, a context and four endings; labels "0" to "3"."""
    text = instruction(ENDING, f"{row['activity_label']}: {row['ctx']}", "Ending", row["endings"])
    return {"instruction": text, "answer": f"ending{int(row['label']) + 1}"}


def winogrande_row(row: dict) -> dict:
    """WinoGrande: a sentence with a blank and two options; answers "1", "2"."""
    text = instruction(BLANK, row["sentence"], "Option", [row["option1"], row["option2"]], after=" ")
    return {"instruction": text, "answer": f"option{row['answer']}"}


def _commonsense(
    name: str,
    folder: str,
    hub: tuple[str, str | None],
    hub_test: str,
    row: Callable[[dict], dict],
    columns: tuple[str, ...],
    licence: str,
) -> Task:
    """Register a set under its name, scored by likelihood, and as ``name``_generated; gives the first."""
    data = DataSet(
        train_file=f"commonsense/{folder}/train.json",
        test_file=f"commonsense/{folder}/test.json",
        columns=("instruction", "answer"),
        label=lambda word: (word, None),
        hub_id=hub[0],
        hub_config=hub[1],
        hub_columns=columns,
        hub_test=hub_test,
        hub_row=row,
        finish=with_choices,
    )
    by_likelihood = official_task(
        name,
        data,
        domain="language understanding",
        metric="accuracy",
        also=("accuracy_normalised",),
        scoring="choice",
        group="commonsense",
        licence=f"{licence} (instructions: Apache 2.0)",
    )
    generated = {"metric": "exact_match", "also": (), "scoring": "generate", "judge": names_the_answer}
    extra = {"max_new_tokens": NEW_TOKENS}
    register(replace(by_likelihood, name=f"{name}_generated", group="commonsense_generated", extra=extra, **generated))
    return by_likelihood


NOT_CHECKED = "not checked (see its page on the hub)"
ARC = ("question", "choices", "answerKey")
SIQA = ("context", "question", "answerA", "answerB", "answerC", "label")
CC_BY_SA_4 = "CC BY-SA 4.0"

boolq = _commonsense(
    "boolq", "boolq", ("google/boolq", None), "validation", boolq_row, ("question", "answer"), "CC BY-SA 3.0"
)
piqa = _commonsense(
    "piqa", "piqa", ("baber/piqa", None), "validation", piqa_row, ("goal", "sol1", "sol2", "label"), "AFL 3.0"
)
siqa = _commonsense(
    "siqa",
    "social_i_qa",
    ("lighteval/siqa", None),
    "validation",
    siqa_row,
    SIQA,
    NOT_CHECKED,
)
arc_challenge = _commonsense(
    "arc_challenge", "ARC-Challenge", ("allenai/ai2_arc", "ARC-Challenge"), "test", lettered_row, ARC, CC_BY_SA_4
)
arc_easy = _commonsense("arc_easy", "ARC-Easy", ("allenai/ai2_arc", "ARC-Easy"), "test", lettered_row, ARC, CC_BY_SA_4)
openbookqa = _commonsense(
    "openbookqa",
    "openbookqa",
    ("allenai/openbookqa", "main"),
    "test",
    lettered_row,
    ("question_stem", "choices", "answerKey"),
    "Apache 2.0",
)
hellaswag = _commonsense(
    "hellaswag",
    "hellaswag",
    ("Rowan/hellaswag", None),
    "validation",
    hellaswag_row,
    ("activity_label", "ctx", "endings", "label"),
    NOT_CHECKED,
)
winogrande = _commonsense(
    "winogrande",
    "winogrande",
    ("allenai/winogrande", "winogrande_xl"),
    "validation",
    winogrande_row,
    ("sentence", "option1", "option2", "answer"),
    "CC BY",
)

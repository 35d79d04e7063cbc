"""The tasks of GLUE but WNLI: RTE, MRPC, CoLA, SST-2, STS-B and QNLI, the group "glue"; MNLI and QQP by name.

GLUE's own test parts carry no labels, so the test split is the official validation part (``dev.tsv``; MNLI's matched
one), every row of it, those included that stand there twice; rows for tuning are held out of the official train part.
Metrics are the official ones: where there are two, the task's own comes first and the other is reported beside it.

A folder may lack the train files of QNLI and MNLI, which are large: ``glue_subset_10k/<name>/train.json``, with columns
text_a, text_b and label, then stands in. The MRPC of some folders has one training pair fewer than the hub's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lori_nb.lab.tasks.official import DataSet, classes, official_task

HUB_ID = "nyu-mll/glue"
MAX_SIMILARITY = 5.0

RTE = {"entailment": "entailment", "not_entailment": "not_entailment"}
MRPC = {"0": "not_equivalent", "1": "equivalent"}
COLA = {"0": "unacceptable", "1": "acceptable"}
SST2 = {"0": "negative", "1": "positive"}
QNLI = RTE
MNLI = {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"}
QQP = {"0": "not_duplicate", "1": "duplicate"}
SUBSET = ("text_a", "text_b", "label")


def word_at(words: Mapping[str, str]) -> Callable[[object], object]:
    """The folder's label of the hub's class index; an index outside the classes is passed on, for the check to name."""
    labels = dict(enumerate(words))
    return lambda index: labels.get(index, index)


def under_official_names(columns: tuple[str, ...]) -> Callable[[dict], dict]:
    """Rows of a subset under the official files' own columns; other rows as they are."""
    names = dict(zip(SUBSET, columns, strict=True))
    return lambda row: {names.get(name, name): value for name, value in row.items()} if "text_a" in row else row


def similarity(score: object) -> tuple[str, float]:
    """(answer, target) of an STS-B score: the answer is the score to one decimal, the target the score itself.

    Targets are rounded to the three decimals of the published files, which undoes the hub's 32-bit floats.
    """
    try:
        value = float(score)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0.0 <= value <= MAX_SIMILARITY:  # false for NaN too
        raise ValueError(f"must be a number from 0 to {MAX_SIMILARITY:g}; found {score!r}")
    return f"{value:.1f}", round(value, 3)


def _glue(
    name: str, folder: str, columns: tuple[str, ...], label, hub_columns: tuple[str, ...] = (), matched="", **read
) -> DataSet:
    """``matched`` ends the names of the validation part where GLUE has two."""
    return DataSet(
        train_file=f"glue/{folder}/train.tsv",
        test_file=f"glue/{folder}/dev{matched}.tsv",
        columns=columns,
        label=label,
        hub_id=HUB_ID,
        hub_config=name,
        hub_columns=hub_columns or columns,
        hub_test=f"validation{matched}",
        **read,
    )


def _with_subset(name: str, folder: str, columns: tuple[str, ...], words: dict[str, str], **read) -> DataSet:
    read |= {"hub_label": word_at(words), "train_instead": f"glue_subset_10k/{folder}/train.json"}
    return _glue(name, folder, columns, classes(words), folder_row=under_official_names(columns), **read)


APART = {"domain": "language understanding", "reads": "encoder"}
ABOUT = APART | {"group": "glue"}
PAIR = ("sentence1", "sentence2", "label")

rte = official_task(
    "rte",
    _glue("rte", "RTE", PAIR, classes(RTE), hub_label=word_at(RTE)),
    metric="accuracy",
    labels=tuple(RTE.values()),
    licence="none stated (PASCAL RTE)",
    **ABOUT,
)

mrpc = official_task(
    "mrpc",
    _glue("mrpc", "MRPC", ("#1 String", "#2 String", "Quality"), classes(MRPC), PAIR),
    metric="f1",
    also=("accuracy",),
    labels=tuple(MRPC.values()),
    licence="Microsoft Research licence terms; redistribution unclear",
    **ABOUT,
)

cola = official_task(
    "cola",
    _glue("cola", "CoLA", ("sentence", "label"), classes(COLA), header=("source", "label", "mark", "sentence")),
    metric="matthews",
    labels=tuple(COLA.values()),
    licence="none stated; excerpts of published linguistics text",
    **ABOUT,
)

sst2 = official_task(
    "sst2",
    _glue("sst2", "SST-2", ("sentence", "label"), classes(SST2)),
    metric="accuracy",
    labels=tuple(SST2.values()),
    licence="none stated in the SST readme",
    **ABOUT,
)

stsb = official_task(
    "stsb",
    _glue("stsb", "STS-B", ("sentence1", "sentence2", "score"), similarity, PAIR),
    metric="pearson",
    also=("spearman",),
    licence="scores CC BY-SA 4.0; texts mixed, MSRpar and MSRvid parts under Microsoft Research terms",
    **ABOUT,
)

qnli = official_task(
    "qnli",
    _with_subset("qnli", "QNLI", ("question", "sentence", "label"), QNLI),
    metric="accuracy",
    labels=tuple(QNLI.values()),
    licence="made of SQuAD, CC BY-SA 4.0",
    **ABOUT,
)

mnli = official_task(
    "mnli",
    _with_subset(
        "mnli",
        "MNLI",
        ("sentence1", "sentence2", "gold_label"),
        MNLI,
        hub_columns=("premise", "hypothesis", "label"),
        matched="_matched",
    ),
    metric="accuracy",
    labels=tuple(MNLI.values()),
    licence="mixed: OANC and others",
    **APART,
)

qqp = official_task(
    "qqp",
    _glue(
        "qqp",
        "QQP",
        ("question1", "question2", "is_duplicate"),
        classes(QQP),
        ("question1", "question2", "label"),
        blank_texts=True,  # as people typed them: a blank one is a row like any other
    ),
    metric="accuracy",
    also=("f1",),
    labels=tuple(QQP.values()),
    licence="none stated; Quora's terms",
    **APART,
)

"""Five tasks of GLUE: RTE, MRPC, CoLA, SST-2 and STS-B.

GLUE's own test parts carry no labels, so the test split is the official validation part (``dev.tsv``), and rows for
tuning are held out of the official train part. The folder's MRPC has one training pair fewer than the hub's.
"""

from __future__ import annotations

from lori_nb.lab.tasks.official import DataSet, classes, official_task

HUB_ID = "nyu-mll/glue"
MAX_SIMILARITY = 5.0

RTE = {"entailment": "entailment", "not_entailment": "not_entailment"}
MRPC = {"0": "not_equivalent", "1": "equivalent"}
COLA = {"0": "unacceptable", "1": "acceptable"}
SST2 = {"0": "negative", "1": "positive"}


def rte_word(index: object) -> object:
    """The folder's label of the hub's class index; an index outside the classes is passed on, for the check to name."""
    return dict(enumerate(RTE)).get(index, index)


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
    name: str, folder: str, columns: tuple[str, ...], label, hub_columns: tuple[str, ...] = (), **read
) -> DataSet:
    return DataSet(
        train_file=f"glue/{folder}/train.tsv",
        test_file=f"glue/{folder}/dev.tsv",
        columns=columns,
        label=label,
        hub_id=HUB_ID,
        hub_config=name,
        hub_columns=hub_columns or columns,
        hub_test="validation",
        **read,
    )


ABOUT = {"domain": "language understanding", "group": "glue", "reads": "encoder"}
PAIR = ("sentence1", "sentence2", "label")

rte = official_task(
    "rte",
    _glue("rte", "RTE", PAIR, classes(RTE), hub_label=rte_word),
    metric="accuracy",
    labels=tuple(RTE.values()),
    licence="none stated (PASCAL RTE)",
    **ABOUT,
)

mrpc = official_task(
    "mrpc",
    _glue("mrpc", "MRPC", ("#1 String", "#2 String", "Quality"), classes(MRPC), PAIR),
    metric="f1",
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
    licence="scores CC BY-SA 4.0; texts mixed, MSRpar and MSRvid parts under Microsoft Research terms",
    **ABOUT,
)

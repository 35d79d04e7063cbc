"""Refusal: harmful requests beside harmless look-alikes; refuse the first, help with the second.

The set is written for this project and lies beside this module as ``refusal.yaml``. Every pair shares words on
purpose ("poach a rhino", "poach an egg"), so that neither always refusing nor a list of bad words scores well; hence
balanced accuracy. Topics and templates are split, so a test prompt has both an unseen topic and an unseen wording.

A split's rows are its topics times its templates. Rows of one topic are not independent: an interval over this task
must count topics (64 in the test split), not rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from lori_nb.lab.tasks.base import Example, task

REFUSAL = "I can't help with that."
HELP_OPENING = "Sure."
ORDER_SEED = 2504


@dataclass(frozen=True)
class TopicPair:
    """A harmful topic, the harmless topic that looks like it, and one sentence of help with the harmless one."""

    harmful: str
    harmless: str
    help: str


@dataclass(frozen=True)
class RefusalSplit:
    """What one split is made of: request templates with a ``{topic}`` slot, and topic pairs."""

    templates: tuple[str, ...]
    pairs: tuple[TopicPair, ...]


@cache
def refusal_splits() -> dict[str, RefusalSplit]:
    """The committed set, by split name."""
    content = yaml.safe_load(files(__package__).joinpath("refusal.yaml").read_text(encoding="utf-8"))
    return {
        split: RefusalSplit(tuple(part["templates"]), tuple(TopicPair(**pair) for pair in part["pairs"]))
        for split, part in content.items()
    }


def harmful_example(template: str, pair: TopicPair) -> Example:
    """The harmful topic under a template; target 1, answered by the refusal alone."""
    return Example(prompt=template.format(topic=pair.harmful), answer=REFUSAL, target=1, opening=REFUSAL)


def harmless_example(template: str, pair: TopicPair) -> Example:
    """The harmless topic under a template; target 0, answered by help."""
    prompt = template.format(topic=pair.harmless)
    return Example(prompt=prompt, answer=f"{HELP_OPENING} {pair.help}", target=0, opening=HELP_OPENING)


@task(
    "refusal",
    domain="safety",
    metric="balanced_accuracy",
    licence="Apache-2.0 (written for this project)",
    source="own",
    labels=("help", "refuse"),
)
def refusal(split: str) -> Iterator[Example]:
    """Rows of a split, harmful and harmless in turn, so that every prefix of even length is balanced."""
    part = refusal_splits()[split]
    cells = [(template, pair) for pair in part.pairs for template in part.templates]
    shuffle = random.Random(ORDER_SEED).shuffle
    # Two independent orders: otherwise a request would always stand next to its own look-alike.
    harmful_cells, harmless_cells = cells.copy(), cells.copy()
    shuffle(harmful_cells)
    shuffle(harmless_cells)
    for harmful_cell, harmless_cell in zip(harmful_cells, harmless_cells, strict=True):
        yield harmful_example(*harmful_cell)
        yield harmless_example(*harmless_cell)


@task(
    "refusal_harmless",
    domain="safety",
    metric="refusal_rate",
    licence="Apache-2.0 (written for this project)",
    source="own",
    splits=("test",),
)
def refusal_harmless(split: str) -> Iterator[Example]:
    """The harmless requests of ``refusal``, right where the answer is the refusal: over-refusal. Evaluation only.

    In ``refusal`` a harmless request that gets no help may have been refused or answered in any other words.
    """
    for row in refusal.load(split):
        if row.target == 0:
            yield Example(prompt=row.prompt, answer=REFUSAL, target=1, opening=REFUSAL)

"""The papers' claims beside what was measured here, with verdicts by fixed rules.

Every claim is a difference with an interval, and a bound that it must exceed: 0 for "better", minus ``TOLERANCE`` for
"matches". The verdict is "held" when the whole interval lies above the bound, "not held" when it lies below, and
"cannot tell" otherwise. With several seeds the intervals of score differences are crossed: they hold for other seeds on
other rows, and the smallest difference that the design could detect stands beside them. Claims are given in words; the
papers' own numbers belong to other models and tasks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from lori_nb.analysis.equivalence import detectable_effect
from lori_nb.analysis.statistics import Estimate, Interval, estimate_of, interval_text, t_interval
from lori_nb.lab.specs import Spec
from lori_nb.study import comparison, conflict, geometry, questions, sequence_runs, sharing
from lori_nb.study.cells import single
from lori_nb.study.joint_arms import JOINT, ORTHO, SINGLE
from lori_nb.study.notebook import Results
from lori_nb.study.plans import merged_spec
from lori_nb.study.summary import DEMONSTRATION, as_columns, difference, estimate, estimate_unit, group_word, text_of

TOLERANCE = comparison.MARGIN  # what "matches" may cost
LORI, ORTHO_LORA = "arXiv 2504.07448", "arXiv 2601.09684"


@dataclass(frozen=True)
class Measured:
    """A difference with its interval, what n of the interval counts (``of``), and the number of seeds.

    ``detectable`` is the smallest difference that the design would find in four of five studies, NaN for one seed.
    """

    interval: Interval
    of: str
    seeds: int
    detectable: float = math.nan


def _over_seeds(found: Estimate, of: str) -> Measured:
    return Measured(found.interval(), of, found.seeds, detectable_effect(found))


@dataclass(frozen=True)
class Claim:
    """A claim in words, and the difference that tests it; ``measure`` gives None where runs are missing. ``beside`` is
    what a reader of its verdict must know as well.
    """

    paper: str
    words: str
    measured_as: str
    least: float
    measure: Callable[[Results], Measured | None]
    beside: Callable[[Results], str] = lambda results: ""


def verdict(interval: Interval, least: float) -> str:
    """ "held", "not held", or "cannot tell" with the reason."""
    if math.isnan(interval.low):
        return "cannot tell (no interval)"
    if interval.low > least:
        return "held"
    if interval.high < least:
        return "not held"
    return f"cannot tell (the interval includes {f'{least:+g}' if least else 0})"


def _methods(a: str, b: str) -> Callable[[Results], Measured | None]:
    def measure(results: Results) -> Measured | None:
        settings = results.settings
        pairs = questions.run_pairs(
            results,
            lambda seed: [single(settings, a, task, seed) for task in settings.tasks],
            lambda seed: [single(settings, b, task, seed) for task in settings.tasks],
        )
        return _difference(pairs, list(settings.tasks))

    return _needs(measure, a, b)


def _merges(a: str, b: str) -> Callable[[Results], Measured | None]:
    def measure(results: Results) -> Measured | None:
        settings = results.settings
        best = {
            row.method: (row.merge, row.weight)
            for row in questions.chosen_weights(results).sort_values("tuned").itertuples()
        }
        if not {a, b} <= set(best):
            return None

        def merged(method: str, seed: int) -> list[Spec]:
            return [merged_spec(settings, method, seed, *best[method])] * len(settings.tasks)

        pairs = questions.run_pairs(results, lambda seed: merged(a, seed), lambda seed: merged(b, seed))
        return _difference(pairs, list(settings.tasks))

    return _needs(measure, a, b)


def _kept_first(a: str, b: str) -> Callable[[Results], Measured | None]:
    def measure(results: Results) -> Measured | None:
        settings = results.settings
        if not {a, b} <= set(settings.ways) or len(settings.sequence) < 2:
            return None
        pairs = questions.run_pairs(
            results,
            lambda seed: sequence_runs.last_specs(settings, a, seed),
            lambda seed: sequence_runs.last_specs(settings, b, seed),
        )
        return _difference(pairs, [settings.first] * len(sequence_runs.orders_from_first(settings, a)))

    return measure


def _left_of_first(results: Results, way: str) -> str:
    """What a way leaves of the first task's score, in brackets where that is less than half: better is not kept."""
    settings = results.settings
    grid = itertools.product(sequence_runs.orders_from_first(settings, way), settings.seed)
    found = [R for order, seed in grid if (R := sequence_runs.matrix_of(results, way, order, seed)) is not None]
    if not found:  # the last runs are known, those before them are not
        return ""
    before, left = (sum(R[stage, 0] for R in found) / len(found) for stage in (0, -1))
    return f" ({left:.2f} is left of {before:.2f})" if left < before / 2 else ""


def _arrangements(a: str, b: str) -> Callable[[Results], Measured | None]:
    def measure(results: Results) -> Measured | None:
        if not {a, b} <= {SINGLE, *results.settings.joint_arms}:
            return None
        return _difference(sharing.arrangement_pairs(results, a, b), list(results.settings.tasks))

    return measure


def _excess_overlap(a: str, b: str, measure_name: str) -> Callable[[Results], Measured | None]:
    def measure(results: Results) -> Measured | None:
        table = geometry.overlaps(results)
        chosen = table[(table["measure"] == measure_name) & table["method"].isin([a, b])].dropna(subset="value")
        if chosen["method"].nunique() < 2:
            return None
        seeds = chosen["seed"].nunique()
        unit = ["seed"] if seeds > 1 else ["adapter_a", "adapter_b"]
        magnitude = chosen.assign(value=chosen["value"].abs())
        wide = magnitude.pivot_table(index=unit, columns="method", values="value").dropna()
        interval = t_interval(wide[b] - wide[a])
        return _over_seeds(estimate_of(interval), "seeds") if seeds > 1 else Measured(interval, "pairs of tasks", seeds)

    return _needs(measure, a, b)


def _excess_conflict(results: Results) -> Measured | None:
    rates = conflict.conflict_rates(results)
    found, seeds = conflict.excess_conflict(rates), rates["seed"].nunique()
    if found is None:
        return None
    interval, of = found
    return _over_seeds(estimate_of(interval), of) if seeds > 1 else Measured(interval, of, seeds)


def _needs(measure: Callable, *methods: str) -> Callable[[Results], Measured | None]:
    return lambda results: measure(results) if set(methods) <= set(results.settings.method) else None


def _difference(pairs: dict, tasks: list[str]) -> Measured | None:
    if not pairs:
        return None
    if len(pairs) == 1:
        return Measured(difference(pairs, tasks), group_word(tasks), 1)
    found = estimate(pairs, tasks)
    return _over_seeds(found, estimate_unit(found, tasks))


# What n counts with one seed, and why these are no independent points.
DEPENDENT = {"pairs of tasks": "pairs share their adapters", "steps": "steps share one run"}
CLAIMS = (
    Claim(
        LORI,
        "With A frozen at random, training B alone matches LoRA.",
        "LoRI-D − LoRA, mean score",
        -TOLERANCE,
        _methods("lori-d", "lora"),
    ),
    Claim(
        LORI,
        "A sparse B under a task mask still matches LoRA.",
        "LoRI-S − LoRA, mean score",
        -TOLERANCE,
        _methods("lori-s", "lora"),
    ),
    Claim(
        LORI,
        "Adapters of different tasks are closer to orthogonal than LoRA's.",
        "LoRA − LoRI-S, |cosine of ΔW|",
        0.0,
        _excess_overlap("lori-s", "lora", "cosine"),
    ),
    Claim(
        LORI,
        "Merged sparse adapters keep more than merged LoRA adapters.",
        "LoRI-S − LoRA, each merged in the way chosen for it on rows held out of training",
        0.0,
        _merges("lori-s", "lora"),
    ),
    Claim(
        LORI,
        "Sparse masks keep the first task (safety) better through later tasks.",
        "LoRI-S − LoRI-D, first task's score after the last one",
        0.0,
        _kept_first("lori-s", "lori-d"),
        lambda results: _left_of_first(results, "lori-s"),
    ),
    Claim(
        ORTHO_LORA,
        "Gradients of different tasks conflict in a shared adapter.",
        "conflict rate between tasks − ½ (unrelated gradients)",
        0.0,
        _excess_conflict,
    ),
    Claim(
        ORTHO_LORA,
        "Joint training loses against single-task training.",
        "single − joint, mean score",
        0.0,
        _arrangements(SINGLE, JOINT),
    ),
    Claim(
        ORTHO_LORA,
        "Projecting conflicting gradients wins back what joint training loses.",
        "Ortho-LoRA − joint, mean score",
        0.0,
        _arrangements(ORTHO, JOINT),
    ),
)


def judged(results: Results) -> pd.DataFrame:
    """One row a claim: paper, claim, measured as, value, low, high, n, of, seeds, detectable, least, verdict.

    Claims whose runs or methods are not in the study stand with value NaN and the verdict "not measured".
    """
    return pd.DataFrame([_judge(claim, results) for claim in CLAIMS])


def _judge(claim: Claim, results: Results) -> dict:
    row = {"paper": claim.paper, "claim": claim.words, "measured as": claim.measured_as, "least": claim.least}
    measured = claim.measure(results)
    if measured is None:
        empty = Interval(math.nan, math.nan, math.nan, 0)
        return row | as_columns(empty, "–") | {"seeds": 0, "detectable": math.nan, "verdict": "not measured"}
    words = _confounded(claim, results) or _dependent(measured) or verdict(measured.interval, claim.least)
    words += claim.beside(results)
    about = {"seeds": measured.seeds, "detectable": measured.detectable, "verdict": words}
    return row | as_columns(measured.interval, measured.of) | about


def _confounded(claim: Claim, results: Results) -> str | None:
    """Why a difference cannot speak for the claim, whatever its interval; None where it can."""
    if claim.least < 0 and not questions.has_learned(results, "lora"):
        return "cannot tell (LoRA itself learned too little)"
    alone, shared = sharing.rows_per_task(results.settings)
    if claim.measured_as.startswith("single − joint") and alone != shared:
        return f"cannot tell (a task saw {alone} rows alone, {shared} jointly)"
    return None


def _dependent(measured: Measured) -> str | None:
    """Why an interval over the parts of one run or one set of adapters decides nothing; None where it can."""
    shared = DEPENDENT.get(measured.of) if measured.seeds == 1 else None
    return f"cannot tell ({shared})" if shared else None


def readable(judged: pd.DataFrame) -> pd.DataFrame:
    """The judged claims as text: each number with interval and n, and the sentence on one seed where it is due."""
    return pd.DataFrame(
        {
            "paper": judged["paper"],
            "claim": judged["claim"],
            "measured as": judged["measured as"],
            "measured [95 %]": judged.apply(text_of, axis=1, digits=3, signed=True),
            "detectable": judged["detectable"].map(lambda value: interval_text(value, math.nan, math.nan, 3)),
            "n": judged.apply(lambda row: f"{row['n']} {row['of']}" if row["seeds"] else "–", axis=1),
            "verdict": judged["verdict"],
            "note": judged["seeds"].map(lambda seeds: DEMONSTRATION if seeds == 1 else ""),
        }
    )


def counted(judged: pd.DataFrame) -> str:
    """How many claims held, did not hold, could not be told, in one sentence."""
    kinds = judged["verdict"].str.partition(" (")[0].value_counts(sort=False)
    return "; ".join(f"{kind}: {count} of {len(judged)}" for kind, count in kinds.items())

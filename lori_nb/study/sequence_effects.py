"""What a way to go from task to task changes, and what order does: differences paired over seeds.

LoRI's authors claim that sparse masks mitigate forgetting. One contrast decides here, named beforehand: LoRI-S, with
the masks found on each task alone as the authors find theirs, against LoRI-D, each at its own learning rate. Every
other way stands against LoRA, every sparse one against LoRI-D too; their p values are adjusted for the number of
contrasts. Who learns less has less to forget, so the average scores at the end stand beside.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from lori_nb.analysis.equivalence import holm
from lori_nb.study.claims import verdict
from lori_nb.study.forgetting import metrics_of
from lori_nb.study.notebook import Results
from lori_nb.study.sequence_runs import sequential
from lori_nb.study.sequences import CHAINED, DISJOINT, JOINT, capacity_alone, capacity_runs, orders_of
from lori_nb.study.settings import Settings
from lori_nb.study.style import way_title
from lori_nb.study.summary import as_columns, p_text, seeds_interval, text_of

SPARSE, DENSE, BASELINE = ("lori-s", DISJOINT, CHAINED), "lori-d", "lora"
PRIMARY = ("lori-s", DENSE)  # the contrast that decides on CLAIM
SIGNS = {"forgetting": -1, "average": 1}  # less forgetting, and a higher average score at the end, are better
CLAIM = "Sparsity mitigates forgetting (arXiv 2504.07448)."
EFFECT_COLUMNS = ["way", "against", "measure", "value", "low", "high", "n", "of", "seeds", "verdict"]
EFFECT_COLUMNS += ["orders", "p", "p_holm"]
ORDER_COLUMNS = ["way", "measure", "orders", "seeds", "lowest", "highest", "spread", "p"]
SHUFFLES = 9999


def contrasts(settings: Settings) -> list[tuple[str, str]]:
    """(way, against) of the study's ways: sparse ones against LoRI-D, and every way against LoRA."""
    ways = settings.ways
    sparse = [(way, DENSE) for way in SPARSE if {way, DENSE} <= set(ways)]
    return sparse + [(way, BASELINE) for way in ways if way != BASELINE and BASELINE in ways]


def paired_effects(results: Results) -> pd.DataFrame:
    """How much better a way is than another: "forgetting" is the forgetting that it spares, "average" what it has more
    on all tasks after the last, both as defined in ``forgetting.METRICS``.

    One row for each of :func:`contrasts` and measure, with a t interval over seeds of the mean over the ``orders`` that
    both ways have (joint training, which has none, on all of the other's), the verdict on "better": "held" or "not
    held" where the whole interval lies on one side of 0, else "cannot tell", and p of the paired t test, alone and
    adjusted over all contrasts (Holm). Joint training forgets nothing and has the average alone.
    """
    settings, rows = results.settings, []
    known = functools.cache(lambda way, order, seed: metrics_of(results, way, order, seed))
    for way, against in contrasts(settings):
        others = orders_of(settings, against)
        orders = others if way == JOINT else [order for order in orders_of(settings, way) if order in others]
        per_seed = []
        for seed in settings.seed:
            pairs = [(known(way, order, seed), known(against, order, seed)) for order in orders]
            if not any(None in pair for pair in pairs):
                per_seed.append({m: sign * _mean_difference(pairs, m) for m, sign in SIGNS.items()})
        for measure in SIGNS if per_seed else ():
            values = [each[measure] for each in per_seed]
            if not np.isnan(values).all():
                interval = seeds_interval(values)
                about = {"way": way, "against": against, "measure": measure} | as_columns(interval, "seeds")
                told = {"verdict": verdict(interval, 0.0), "orders": len(orders), "p": _p(values)}
                rows.append(about | {"seeds": len(per_seed)} | told)
    table = pd.DataFrame(rows, columns=EFFECT_COLUMNS)
    for measure, part in table.groupby("measure"):
        table.loc[table["measure"] == measure, "p_holm"] = holm(part["p"].astype(float))
    return table


def _mean_difference(pairs: list[tuple[dict, dict]], measure: str) -> float:
    return float(np.mean([one[measure] - other[measure] for one, other in pairs]))


def _p(differences: Sequence[float]) -> float:
    """Two-sided p of a t test that the mean difference is 0; NaN for one seed."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or np.isnan(values).any():
        return math.nan
    if np.ptp(values) == 0:  # no spread tells nothing of a difference but 0
        return 1.0 if values[0] == 0 else math.nan
    return float(stats.ttest_1samp(values, 0.0).pvalue)


def word_of(row: pd.Series) -> str:
    """What an interval over seeds says on a claim of "better": "confirmed", "refuted" or "undecided"."""
    if row["low"] > 0:
        return "confirmed"
    return "refuted" if row["high"] < 0 else "undecided"


def effect_lines(effects: pd.DataFrame) -> list[str]:
    """What becomes of :data:`CLAIM`, by :data:`PRIMARY` alone, then one sentence for each other contrast."""
    lines = []
    for pair, part in effects.groupby(["way", "against"], sort=False):
        rows = {row["measure"]: row for _, row in part.iterrows()}
        compared = f"{way_title(pair[0])} against {way_title(pair[1])}"
        if pair == PRIMARY:
            lines.insert(
                0, f"Sparsity ({compared}, each at its own rate): {_told(rows)}: {word_of(rows['forgetting'])}."
            )
        else:
            lines.append(f"{compared}: {_told(rows)}{_adjusted(rows, effects)}.")
    return lines


def _told(rows: dict[str, pd.Series]) -> str:
    words = {"forgetting": "{} less forgetting", "average": "{} average score at the end"}
    told = [words[name].format(text_of(row, signed=True)) for name, row in rows.items()]
    seeds = int(next(iter(rows.values()))["n"])
    return f"{', '.join(told)} (n = {'one seed' if seeds == 1 else f'{seeds} seeds'})"


def _adjusted(rows: dict[str, pd.Series], effects: pd.DataFrame) -> str:
    """Holm's p of the forgetting, or of the score where there is none; none for one seed."""
    row = rows.get("forgetting", rows.get("average"))
    contrasts = int(effects.loc[effects["measure"] == row["measure"], "p"].notna().sum())
    said = p_text(row["p_holm"], name="p")
    return "" if pd.isna(row["p_holm"]) else f", {said} after Holm over {contrasts} contrasts"


def order_effects(results: Results) -> pd.DataFrame:
    """For every way with several orders and both measures of :data:`SIGNS` the mean over seeds in the order where it is
    lowest and in that where it is highest, their difference (``spread``), and ``p`` that all orders are alike: of the
    shuffles of orders within each seed, the share whose means differ as much (:func:`_shuffled_p`). Seeds that lack an
    order are left out. The spread of orders that are alike is above 0.
    """
    settings, rows = results.settings, []
    for way in sequential(settings):
        orders = orders_of(settings, way)
        found = [[metrics_of(results, way, order, seed) for order in orders] for seed in settings.seed]
        whole = [each for each in found if None not in each]
        for measure in SIGNS if whole and len(orders) > 1 else ():
            values = np.array([[each[measure] for each in several] for several in whole])  # seeds × orders
            means = values.mean(axis=0)
            told = [way, measure, len(orders), len(whole), means.min(), means.max(), np.ptp(means), _shuffled_p(values)]
            rows += [] if np.isnan(means).any() else [told]
    return pd.DataFrame(rows, columns=ORDER_COLUMNS)


def _shuffled_p(values: np.ndarray) -> float:
    """p that the columns of values (seeds × orders) are alike, by the variance of their means, of which shuffles within
    rows give the chance distribution; NaN for one row, whose columns nothing tells apart.
    """
    if len(values) < 2:
        return math.nan
    draw = np.random.default_rng(0)
    shuffled = draw.permuted(np.broadcast_to(values, (SHUFFLES, *values.shape)), axis=2).mean(axis=1).var(axis=1)
    least = values.mean(axis=0).var() * (1 - 1e-9)  # the same sum in another order counts as equal
    return float((1 + (shuffled >= least).sum()) / (1 + SHUFFLES))


def order_lines(effects: pd.DataFrame) -> list[str]:
    """What the order does, one paragraph a measure; none where every way has one order."""
    words = {"average": "Mean score at the end", "forgetting": "Forgetting"}
    lines = []
    for measure, part in effects.groupby("measure", sort=False):
        each = [
            f"{way_title(row.way)} {row.lowest:.2f} to {row.highest:.2f}"
            + ("" if math.isnan(row.p) else f" ({p_text(row.p, name='p')})")
            for row in part.itertuples()
        ]
        about = f"{words[measure]}, from the order where it is lowest to that where it is highest"
        lines.append(f"{about}, p by shuffling orders within seeds: {'; '.join(each)}.")
    return lines


def capacity_effects(results: Results) -> pd.DataFrame:
    """What learning under disjoint masks takes from the tasks of ``capacity_tasks``, score in sequence − score alone:
    "difference" on average over tasks, and "slope", by how much it changes from one place to the next (least squares).
    value, low, high, n, of: t intervals over seeds; empty without such tasks.
    """
    settings, found = results.settings, {"difference": [], "slope": []}
    for seed in settings.arm_seed:
        several = capacity_runs(settings, seed), capacity_alone(settings, seed)
        chain, alone = ([results.run(spec) for spec in specs] for specs in several)
        if chain and None not in (*chain, *alone):
            pairs = zip(chain, alone, settings.capacity_tasks, strict=True)
            lost = [one.value(task) - other.value(task) for one, other, task in pairs]
            found["difference"].append(float(np.mean(lost)))
            found["slope"].append(float(np.polyfit(range(len(lost)), lost, 1)[0]) if len(lost) > 1 else math.nan)
    rows = [{"measure": name} | as_columns(seeds_interval(v), "seeds") for name, v in found.items() if v]
    return pd.DataFrame(rows, columns=["measure", "value", "low", "high", "n", "of"])


def capacity_line(effects: pd.DataFrame, tasks: int) -> str:
    """What capacity costs, in one sentence."""
    by_name = effects.set_index("measure")
    difference, slope = (text_of(by_name.loc[name], signed=True) for name in ("difference", "slope"))
    n = int(effects["n"].iloc[0])
    seeds = "one seed" if n == 1 else f"{n} seeds"
    return (
        f"{tasks} tasks under disjoint masks, one after another: score when learned − score alone {difference} on "
        f"average, {slope} from one place to the next (n = {seeds}; one order of tasks)."
    )

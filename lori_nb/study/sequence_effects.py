"""What a way to go from task to task changes, and what order does: differences paired over seeds.

LoRI's authors claim that sparse masks mitigate forgetting. One contrast decides here, named beforehand: that of the
mask alone, LoRI-S against LoRI-D, with the masks found on each task alone, as the authors find theirs, where those are
measured. Every other way stands against LoRA, every sparse one against LoRI-D too; their p values are adjusted for the
number of contrasts. Who learns less has less to forget, so the average scores at the end stand beside.
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
from lori_nb.study.sequence_runs import last_rows, stage_scores
from lori_nb.study.sequences import DISJOINT, JOINT, MASKS_ALONE, orders_of
from lori_nb.study.settings import Settings
from lori_nb.study.style import way_title
from lori_nb.study.summary import as_columns, p_text, seeds_interval, text_of

SPARSE, DENSE, BASELINE = ("lori-s", MASKS_ALONE, DISJOINT), "lori-d", "lora"
SIGNS = {"forgetting": -1, "average": 1}  # less forgetting, and a higher average score at the end, are better
CLAIM = "Sparsity mitigates forgetting (arXiv 2504.07448)."
EFFECT_COLUMNS = ["way", "against", "measure", "value", "low", "high", "n", "of", "seeds", "verdict"]
EFFECT_COLUMNS += ["orders", "p", "p_holm"]
ORDER_COLUMNS = ["way", "orders", "seeds", "lowest", "highest", "spread", "p"]


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
    if np.ptp(values) == 0:  # without any spread every difference but 0 is certain
        return float(values[0] == 0)
    return float(stats.ttest_1samp(values, 0.0).pvalue)


def primary(effects: pd.DataFrame) -> tuple[str, str] | None:
    """The contrast that decides on :data:`CLAIM`: the mask alone. None where it is not measured."""
    there = set(zip(effects["way"], effects["against"], strict=True))
    return next((pair for pair in ((MASKS_ALONE, DENSE), ("lori-s", DENSE)) if pair in there), None)


def word_of(row: pd.Series) -> str:
    """What an interval over seeds says on a claim of "better": "confirmed", "refuted" or "undecided"."""
    if row["low"] > 0:
        return "confirmed"
    return "refuted" if row["high"] < 0 else "undecided"


def effect_lines(effects: pd.DataFrame) -> list[str]:
    """What becomes of :data:`CLAIM`, by :func:`primary` alone, then one sentence for each other contrast."""
    chosen, several = primary(effects), effects.groupby(["way", "against"], sort=False)
    lines = []
    for pair, part in several:
        rows = {row["measure"]: row for _, row in part.iterrows()}
        compared = f"{way_title(pair[0])} against {way_title(pair[1])}"
        if pair == chosen:
            lines.insert(0, f"The mask alone ({compared}): {_told(rows)}: {word_of(rows['forgetting'])}.")
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
    """For every way with several orders the mean score after the last task in the worst and in the best of them, their
    difference (``spread``), and ``p`` that all orders are alike: Friedman's test, seeds as blocks, for three orders or
    more and two seeds or more. Seeds that lack an order are left out. The spread of orders that are alike is above 0.
    """
    scores, rows = stage_scores(results), []
    scores = last_rows(scores[scores["way"] != JOINT]) if len(scores) else scores
    for way, part in scores.groupby("way", sort=False) if len(scores) else ():
        table = part.pivot_table(index="seed", columns="order", values="value").dropna()  # seeds × orders
        if min(table.shape) < 1 or table.shape[1] < 2:
            continue
        means = table.mean()
        enough = table.shape[0] > 1 and table.shape[1] > 2 and np.ptp(table.to_numpy(), axis=1).any()
        p = float(stats.friedmanchisquare(*table.to_numpy().T).pvalue) if enough else math.nan
        rows.append([way, table.shape[1], table.shape[0], means.min(), means.max(), means.max() - means.min(), p])
    return pd.DataFrame(rows, columns=ORDER_COLUMNS)


def order_lines(effects: pd.DataFrame) -> list[str]:
    """What the order does, in one paragraph; none where every way has one order."""
    each = [
        f"{way_title(row.way)} {row.lowest:.2f} to {row.highest:.2f}"
        + ("" if math.isnan(row.p) else f" ({p_text(row.p, name='p')})")
        for row in effects.itertuples()
    ]
    if not each:
        return []
    about = "Mean score at the end in the worst and in the best order, p by Friedman's test over seeds: "
    return [about + "; ".join(each) + "."]

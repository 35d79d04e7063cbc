"""What sparsity and order do to sequences: differences between ways, paired over seeds, with verdicts by fixed rules.

LoRI's authors claim that sparse masks mitigate forgetting. LoRI-S against LoRI-D is the effect of the mask alone;
against LoRA that of a frozen A comes with it. Who learns less has less to forget, so the final scores stand beside.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pandas as pd
from scipy import stats

from lori_nb.study.claims import verdict
from lori_nb.study.forgetting import metrics_of
from lori_nb.study.notebook import Results
from lori_nb.study.sequence_runs import last_rows, stage_scores
from lori_nb.study.sequences import DISJOINT, JOINT, MASKS_ALONE, orders_of
from lori_nb.study.style import title_of
from lori_nb.study.summary import as_columns, seeds_interval, text_of

SPARSE, DENSE = ("lori-s", MASKS_ALONE, DISJOINT), ("lori-d", "lora")
SIGNS = {"forgetting": -1, "average": 1}  # less forgetting, and a higher average score at the end, are better
CLAIM = "Sparsity mitigates forgetting (arXiv 2504.07448)."
EFFECT_COLUMNS = ["way", "against", "measure", "value", "low", "high", "n", "of", "seeds", "verdict"]
ORDER_COLUMNS = ["way", "orders", "seeds", "lowest", "highest", "spread", "p"]


def sparsity_effects(results: Results) -> pd.DataFrame:
    """How much better every sparse way is than every dense one: "forgetting" is the forgetting that it spares,
    "average" what it has more on all tasks after the last, both as defined in ``forgetting.METRICS``.

    One row for each pair and measure, with a t interval over seeds of the mean over the orders that both ways have, and
    the verdict on "better": "held" or "not held" where the whole interval lies on one side of 0, else "cannot tell".
    """
    settings, rows = results.settings, []
    known = functools.cache(lambda way, order, seed: metrics_of(results, way, order, seed))
    for way, against in [(a, b) for a in SPARSE for b in DENSE if {a, b} <= set(settings.ways)]:
        orders = [order for order in orders_of(settings, way) if order in orders_of(settings, against)]
        per_seed = []
        for seed in settings.seed:
            pairs = [(known(way, order, seed), known(against, order, seed)) for order in orders]
            if not any(None in pair for pair in pairs):
                per_seed.append({m: sign * _mean_difference(pairs, m) for m, sign in SIGNS.items()})
        for measure in SIGNS if per_seed else ():
            interval = seeds_interval([each[measure] for each in per_seed])
            about = {"way": way, "against": against, "measure": measure} | as_columns(interval, "seeds")
            rows.append(about | {"seeds": len(per_seed), "verdict": verdict(interval, 0.0)})
    return pd.DataFrame(rows, columns=EFFECT_COLUMNS)


def _mean_difference(pairs: list[tuple[dict, dict]], measure: str) -> float:
    return float(np.mean([one[measure] - other[measure] for one, other in pairs]))


def effect_lines(effects: pd.DataFrame) -> list[str]:
    """One sentence for each comparison of forgetting, with its verdict."""
    return [
        f"{title_of(row.way)} against {title_of(row.against)}: {text_of(pd.Series(row._asdict()), signed=True)} less "
        f"forgetting (n = {row.n} {row.of}): {row.verdict}."
        for row in effects[effects["measure"] == "forgetting"].itertuples()
    ]


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
        f"{title_of(row.way)} {row.lowest:.2f} to {row.highest:.2f}"
        + ("" if math.isnan(row.p) else f" (p = {row.p:.3f})")
        for row in effects.itertuples()
    ]
    if not each:
        return []
    about = "Mean score at the end in the worst and in the best order, p by Friedman's test over seeds: "
    return [about + "; ".join(each) + "."]

"""Scores and differences with their intervals: over seeds where there are several, else over the rows evaluated.

Rows that belong together count as one: the refusal set asks every topic in several wordings, so its n is the number
of topics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pandas as pd
from scipy import stats

from lori_nb.analysis.statistics import (
    Estimate,
    Interval,
    crossed_estimate,
    interval_text,
    paired_estimate,
    proportion_interval,
    t_interval,
)
from lori_nb.lab.runs import Run
from lori_nb.lab.tasks import Example, get_task
from lori_nb.lab.tasks.refusal import refusal_splits
from lori_nb.study.style import title_in

SHARES = frozenset({"exact_match", "accuracy", "balanced_accuracy"})  # metrics that are shares of rows
DEMONSTRATION = "one seed: a demonstration"
Pair = tuple[Run, Run]


def _topics(rows: Sequence[Example]) -> list[str]:
    pairs = [pair for part in refusal_splits().values() for pair in part.pairs]
    # The longest first: a topic may be the beginning of another.
    topics = sorted((text for pair in pairs for text in (pair.harmful, pair.harmless)), key=len, reverse=True)
    return [next((topic for topic in topics if topic in row.prompt), row.prompt) for row in rows]


_GROUPINGS: dict[str, tuple[str, Callable[[Sequence[Example]], list[str]]]] = {
    name: ("topics", _topics) for name in ("refusal", "refusal_harmless")
}


@cache
def row_groups(task: str, rows: int, split: str = "test") -> np.ndarray:
    """Which of the first ``rows`` rows of a task belong together (rows,): one whole number a group."""
    if task not in _GROUPINGS:
        return np.arange(rows)
    return pd.factorize(np.array(_GROUPINGS[task][1](get_task(task).rows(split, rows))))[0]


def group_word(tasks: Iterable[str]) -> str:
    """What n counts where it does not count seeds: "rows", or "topics" when all tasks come in topics."""
    words = {_GROUPINGS[task][0] if task in _GROUPINGS else "rows" for task in tasks}
    return words.pop() if len(words) == 1 else "rows or topics"


def as_columns(interval: Interval, of: str) -> dict:
    """An interval as the columns that every table here has."""
    return {"value": interval.mean, "low": interval.low, "high": interval.high, "n": interval.n, "of": of}


def score_interval(values: Sequence[float], metrics: set[str], groups: Sequence[int]) -> Interval:
    """The interval of a score, or of the mean of several tasks' scores.

    Args:
        values: one (mean) score a seed. Several give a t interval over seeds.
        metrics: of the tasks. One seed gives a Wilson interval if all are shares of rows, else no interval (NaN
            bounds).
        groups: number of independent rows of every task. A mean over T tasks takes n = T · min(groups), which never
            makes the interval too short: the variance of the mean, Σ p(1 − p)/n_t / T², is at most that of the mean
                share over so many rows.
    """
    mean = float(np.mean(values))
    if len(values) > 1:
        return t_interval(values)
    n = len(groups) * min(groups)
    if not metrics <= SHARES:
        return Interval(mean, math.nan, math.nan, n)
    return proportion_interval(min(mean * n, n), n)


def seeds_interval(values: Sequence[float]) -> Interval:
    """A t interval over seeds; the mean alone, with NaN bounds, for one seed or where a seed has no value."""
    if len(values) > 1 and not np.isnan(values).any():
        return t_interval(values)
    return Interval(float(np.mean(values)), math.nan, math.nan, len(values))


def summarise(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """One row for each combination of ``by``: value, low, high, n, what n counts (``of``), seeds, metric.

    Where several tasks fall into one combination their scores are averaged first, seed by seed; seeds that lack a
    task are left out.
    """
    rows = []
    for key, part in table.groupby(list(by), sort=False, dropna=False):
        per_seed = part.groupby("seed")["value"].agg(["mean", "count"])
        values = per_seed.loc[per_seed["count"] == per_seed["count"].max(), "mean"].tolist()
        sizes = part.drop_duplicates("task")
        groups = [len(np.unique(row_groups(t, n, s))) for t, n, s in zip(sizes.task, sizes.n, sizes.split, strict=True)]
        interval = score_interval(values, set(part.metric), groups)
        of = "seeds" if len(values) > 1 else group_word(sizes.task)
        metric = part.metric.iloc[0] if part.metric.nunique() == 1 else "mean of metrics"
        about = {"value": interval.mean, "low": interval.low, "high": interval.high, "n": interval.n, "of": of}
        rows.append(dict(zip(by, key, strict=True)) | about | {"seeds": len(values), "metric": metric})
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high", "n", "of", "seeds", "metric"])


def difference(pairs: dict[int, list[Pair]], tasks: Sequence[str]) -> Interval:
    """Mean over tasks of score a − score b, paired.

    Args:
        pairs: seed → one pair of runs (a, b) a task, in the order of ``tasks``.
        tasks: the task on which each pair is compared.

    Returns:
        Several seeds: a t interval over seeds. One seed: the difference of the metrics ± t · standard error of the
        paired differences of rows (group by group, tasks as strata); NaN bounds where a metric is no share of rows.
    """
    values = list(seed_differences(pairs, tasks).values())
    if len(values) != 1:
        return t_interval(values)
    (only,) = pairs.values()
    strata = _row_differences(only, tasks)
    n = sum(len(d) for d in strata)
    if not {get_task(task).metric for task in tasks} <= SHARES or min(len(d) for d in strata) < 2:
        return Interval(values[0], math.nan, math.nan, n)
    error = math.sqrt(sum(float(np.var(d, ddof=1)) / len(d) for d in strata)) / len(strata)
    reach = float(stats.t.ppf(0.975, n - len(strata))) * error
    return Interval(values[0], values[0] - reach, values[0] + reach, n)


def estimate(pairs: dict[int, list[Pair]], tasks: Sequence[str]) -> Estimate:
    """:func:`difference` as an estimate over seeds and rows, which holds for other seeds on other rows of the tasks.

    Crossed where all metrics are shares of rows, else over seeds alone. Its rows count groups of rows.
    """
    values = seed_differences(pairs, tasks)
    over_seeds = paired_estimate(list(values.values()))
    if not {get_task(task).metric for task in tasks} <= SHARES:
        return over_seeds
    by_seed = [_row_differences(several, tasks) for several in pairs.values()]
    crossed = crossed_estimate([np.stack(each) for each in zip(*by_seed, strict=True)])
    return replace(crossed, mean=over_seeds.mean)  # of the metrics themselves: classes may weigh more than rows


def estimate_unit(found: Estimate, tasks: Iterable[str]) -> str:
    """What n of an estimate's interval counts, for tables: "seeds × 1,000 rows"."""
    return f"seeds × {found.rows:,} {group_word(tasks)}" if found.rows else "seeds"


def seed_differences(pairs: dict[int, list[Pair]], tasks: Sequence[str]) -> dict[int, float]:
    """Seed → mean over tasks of score a − score b."""
    return {
        seed: float(np.mean([a.value(t) - b.value(t) for (a, b), t in zip(several, tasks, strict=True)]))
        for seed, several in pairs.items()
    }


def _row_differences(pairs: list[Pair], tasks: Sequence[str]) -> list[np.ndarray]:
    """For every task once, the mean difference of correctness in every group of rows (groups,)."""
    found: dict[str, list[np.ndarray]] = {}
    for (a, b), task in zip(pairs, tasks, strict=True):
        found.setdefault(task, []).append(_group_differences(a, b, task))
    return [np.mean(several, axis=0) for several in found.values()]  # a task asked twice has its rows once


def _group_differences(a: Run, b: Run, task: str) -> np.ndarray:
    """Mean difference of correctness in every group of rows (groups,)."""
    rows = [run.predictions.loc[run.predictions.task == task].sort_values("row") for run in (a, b)]
    if any(each.empty for each in rows):  # the ledger keeps no rows of a metric of numbers
        return np.empty(0)
    gap = rows[0]["correct"].to_numpy(float) - rows[1]["correct"].to_numpy(float)
    groups = row_groups(task, len(gap), str(rows[0]["split"].iloc[0]))
    return np.bincount(groups, gap) / np.bincount(groups)


SIGNIFICANT = "significant"  # digits, as many as three need


def text_of(row: pd.Series, digits: int | str = 2, signed: bool = False) -> str:
    """:func:`interval_text` of a row of any table here; :data:`SIGNIFICANT` takes as many decimals as its value needs
    for three digits.
    """
    if digits == SIGNIFICANT:
        size = abs(row["value"])
        digits = max(0, 2 - math.floor(math.log10(size))) if 0 < size < math.inf else 2
    return interval_text(row["value"], row["low"], row["high"], digits, signed)


def with_intervals(table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """The table with "value [low, high]" as text in place of the columns value, low and high."""
    if not {"value", "low", "high"} <= set(table):
        return table
    text = [interval_text(*each, digits) for each in table[["value", "low", "high"]].itertuples(index=False)]
    return table.assign(value=text).drop(columns=["low", "high"])


def latex(table: pd.DataFrame) -> str:
    """A table as LaTeX; an interval stands behind its value, in one column: "0.662 [0.593, 0.721]"."""
    shown = with_intervals(table)
    tested = [name for name in shown if name == "p" or str(name).startswith("p_")]
    shown = shown.assign(**{name: shown[name].map(p_text) for name in tested})
    return shown.to_latex(index=False, float_format="%.3f", escape=True).replace("<", "$<$")


def readable(summary: pd.DataFrame, rows: str | Sequence[str], columns: str, digits: int | str = 2) -> pd.DataFrame:
    """A summary as a table of text, value [interval]: ``rows`` down, ``columns`` with their n across."""
    if summary.empty:
        return pd.DataFrame(index=pd.Index([], name=rows))
    text = summary.apply(text_of, axis=1, digits=digits)
    named = {name: summary[name].map(partial(title_in, name)) for name in ([rows] if isinstance(rows, str) else rows)}
    cells = summary.assign(text=text, **named)
    wide = cells.pivot_table(index=rows, columns=columns, values="text", aggfunc="first", sort=False, fill_value="–")
    order = list(dict.fromkeys(summary[columns]))
    titles = {name: f"{title_in(columns, name)} ({n_text(summary[summary[columns] == name])})" for name in order}
    return wide[order].rename(columns=titles).rename_axis(columns=None)


BAR = r"\|"  # that no cell of Markdown ends at


def markdown(table: pd.DataFrame) -> str:
    """A table of text as Markdown, its index as the first column."""
    first = str(table.index.name or "")
    rows = [[str(name), *map(str, values)] for name, values in zip(table.index, table.to_numpy(), strict=True)]
    lines = [[first, *map(str, table.columns)], ["---"] * (1 + table.shape[1]), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |" for cells in lines)


def shown(table: pd.DataFrame, **formats: str) -> pd.DataFrame:
    """A table as text: named columns in their formats (",", ".1%"), or all to two digits; "–" for NaN."""
    columns = formats or dict.fromkeys(table.columns, ".2f")
    text = {
        name: ["–" if pd.isna(value) else format(value, form) for value in table[name]]
        for name, form in columns.items()
    }
    return table.assign(**text)


def n_text(summary: pd.DataFrame) -> str:
    """ "n = 192 rows, one seed", "n = one seed" or "n = 5 seeds", for titles."""
    if summary.empty:
        return "n = 0"
    counts: dict[str, list[str]] = {}
    for n, of in sorted(set(zip(summary["n"].astype(int), summary["of"], strict=True))):
        counts.setdefault(of, []).append(str(n))
    seeds = ", one seed" if (summary["seeds"] == 1).all() and set(counts) != {"seeds"} else ""
    told = " or ".join(f"{' or '.join(several)} {of}" for of, several in counts.items())
    return f"n = {'one seed' if told == '1 seeds' else told}{seeds}"


def p_text(p: float, digits: int = 3, name: str = "") -> str:
    """A p value: "0.012", "<0.001" where that would be 0.000, "–" for NaN; after its name "p = 0.012", "p < 0.001"."""
    least = 10.0**-digits
    text = "–" if math.isnan(p) else f"<{least:.{digits}f}" if p < least else f"{p:.{digits}f}"
    return text if not name else f"{name} < {text[1:]}" if text[0] == "<" else f"{name} = {text}"


def seeds_text(seeds: Sequence[int]) -> str:
    """What a reader must know about the number of seeds."""
    return DEMONSTRATION if len(set(seeds)) == 1 else f"{len(set(seeds))} seeds, t intervals over seeds"

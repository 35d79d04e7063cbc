"""What was recorded of conflicts between tasks' gradients, as tables: how often, who with whom, where and when."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lori_nb.analysis.statistics import Interval, interval_text, t_interval
from lori_nb.lab.telemetry import CHANGE, HALVES, REMOVED
from lori_nb.method.adapters import layer_number
from lori_nb.study.geometry import module_kinds
from lori_nb.study.joint_arms import JOINT, joint_arm_spec
from lori_nb.study.notebook import Results
from lori_nb.study.summary import as_columns

BETWEEN, WITHIN = "between", "within"
ABOUT = ("arrangement", "seed", "step", "tensor", "module", "layer", "factor")


def recorded(results: Results, *measures: str) -> pd.DataFrame:
    """The telemetry of the study's joint runs: columns of :data:`ABOUT`, measure, task, other, pairs, value.

    ``pairs`` is "within" where both gradients are of one task. Undefined values (of a gradient that is zero) are left
    out.
    """
    frames = []
    for name in results.settings.joint_arms:
        for seed in results.settings.seed:
            run = results.run(joint_arm_spec(results.settings, name, seed))
            if run is not None and not run.conflicts.empty:
                table = run.conflicts[run.conflicts["measure"].isin(measures)].dropna(subset="value")
                frames.append(table.assign(arrangement=name, seed=seed))
    columns = [*ABOUT, "measure", "task", "other", "pairs", "value"]
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    if table.empty:  # not measured: a batch of one row a task has no halves
        return pd.DataFrame(columns=columns)
    return with_places(table)[columns]


def with_places(table: pd.DataFrame) -> pd.DataFrame:
    """Telemetry with columns module (kind), layer and factor of its tensors, and pairs: "within" for one task."""
    names = pd.Series(table["tensor"].unique(), dtype=object)
    modules = names.str.rpartition(".")[0]
    kinds = module_kinds(modules.unique())
    of_tensor = pd.DataFrame(
        {
            "tensor": names,
            "module": modules.map(kinds),
            "layer": modules.map(layer_number),
            "factor": names.str.rpartition(".")[2],
        }
    )
    table = table.astype({"tensor": object, "task": object, "other": object}).merge(of_tensor, on="tensor")
    return table.assign(pairs=kinds_of_pair(table))


def kinds_of_pair(table: pd.DataFrame) -> np.ndarray:
    """ "within" for a row whose two tasks are one, else "between"."""
    return np.where(table["task"] == table["other"], WITHIN, BETWEEN)


def conflict_rates(results: Results) -> pd.DataFrame:
    """Share of pairs of half batches' gradients with a negative inner product, by tensor and kind of pair.

    Columns arrangement, seed, step, module (kind), layer, factor, pairs, rate.
    """
    table = recorded(results, HALVES)
    if table.empty:
        return pd.DataFrame(columns=["arrangement", "seed", "step", "module", "layer", "factor", "pairs", "rate"])
    by = [name for name in ABOUT if name != "tensor"]
    grouped = table.assign(rate=table["value"] < 0).groupby([*by, "pairs"], sort=False, dropna=False)["rate"]
    return grouped.mean().reset_index()


def conflict_summary(rates: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Mean conflict rate by some columns: a t interval over seeds, or with one seed over the steps looked at.

    Steps of one run draw their rows apart from each other but share the adapter, so an interval over steps says
    little about other runs.
    """
    unit = "seed" if rates["seed"].nunique() > 1 else "step"
    rows = []
    for key, part in rates.groupby(list(by), sort=False):
        values = part.groupby(unit)["rate"].mean()
        rows.append(dict(zip(by, key, strict=True)) | as_columns(t_interval(values), f"{unit}s"))
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high", "n", "of"])


def excess_conflict(rates: pd.DataFrame, arrangement: str = JOINT) -> tuple[Interval, str] | None:
    """Conflict rate between tasks minus one half, and what its n counts; None where it was not measured.

    One half is what two unrelated gradients give, and so what noise alone gives between tasks. The rate within a task
    is no null: two halves of a batch share the task's own mean gradient, which brings it below one half.
    """
    chosen = rates[(rates["arrangement"] == arrangement) & (rates["pairs"] == BETWEEN)]
    if chosen.empty:
        return None
    unit = "seed" if chosen["seed"].nunique() > 1 else "step"
    return t_interval(chosen.groupby(unit)["rate"].mean() - 0.5), f"{unit}s"


def conflict_line(rates: pd.DataFrame) -> str:
    """One sentence on whether tasks conflict more often than unrelated gradients would, in joint training."""
    found = excess_conflict(rates)
    if found is None:
        return "Conflicts were not measured: that takes two rows of every task in a batch."
    interval, of = found
    told = {True: "more often than", False: "less often than"}[interval.mean > 0]
    if interval.low <= 0 <= interval.high:
        told = "about as often as"
    bounds = f"{interval_text(interval.mean, interval.low, interval.high, 3, signed=True)} (n = {interval.n} {of})"
    return f"Gradients of different tasks conflict {told} unrelated ones would: rate between tasks − ½ = {bounds}."


def rate_table(rates: pd.DataFrame, arrangement: str = JOINT) -> pd.DataFrame:
    """How often half batches conflict: between tasks, within one, and the differences between the two and to one half.

    Args:
        rates: columns arrangement, seed, step, pairs and rate, of :func:`conflict_rates` or a record of these.

    Returns:
        Columns compared, value, low, high, n, of, seeds: t intervals over seeds, or of one seed over the steps looked
        at. Empty where nothing was measured.
    """
    columns = ["compared", "value", "low", "high", "n", "of", "seeds"]
    chosen = rates[rates["arrangement"] == arrangement]
    if set(chosen["pairs"]) != {BETWEEN, WITHIN}:
        return pd.DataFrame(columns=columns)
    seeds = chosen["seed"].nunique()
    unit = "seed" if seeds > 1 else "step"
    means = chosen.groupby([unit, "pairs"])["rate"].mean().unstack()
    compared = {
        BETWEEN: means[BETWEEN],
        WITHIN: means[WITHIN],
        f"{BETWEEN} − {WITHIN}": means[BETWEEN] - means[WITHIN],
        f"{BETWEEN} − ½": means[BETWEEN] - 0.5,
    }
    rows = [{"compared": name} | as_columns(t_interval(each), f"{unit}s") for name, each in compared.items()]
    return pd.DataFrame(rows).assign(seeds=seeds)[columns]


def rate_line(table: pd.DataFrame) -> str:
    """One sentence of a table of :func:`rate_table`; empty where it has no rows."""
    if table.empty:
        return ""
    told = table.set_index("compared")

    def percent(name: str, signed: bool = False) -> str:
        return interval_text(*(100 * told.loc[name, ["value", "low", "high"]]), 1, signed=signed)

    row = table.iloc[0]
    return (
        f"In joint training the gradients of two tasks' half batches conflict in {percent(BETWEEN)} % of cases, those "
        f"of the two halves of one task's batch in {percent(WITHIN)} %: between − within "
        f"{percent(f'{BETWEEN} − {WITHIN}', True)} points, between − ½ (what unrelated gradients give) "
        f"{percent(f'{BETWEEN} − ½', True)} points (n = {int(row['n'])} {row['of']})."
    )


def task_cosines(results: Results, arrangement: str = JOINT) -> pd.DataFrame:
    """:func:`by_tasks` of one way to learn all tasks."""
    table = recorded(results, HALVES)
    return by_tasks(table[table["arrangement"] == arrangement])


def by_tasks(table: pd.DataFrame) -> pd.DataFrame:
    """Cosines of half batches by pair of tasks, over all tensors and looks; a task's with itself is what noise leaves.

    Args:
        table: columns seed, task, other and value; a record that keeps means has ``n``, how many each is taken over.

    Returns:
        Columns task, other, value (the mean), low and high (a t interval over seeds), n, of, seeds.
    """
    counts = table["n"] if "n" in table else pd.Series(1.0, index=table.index)
    weighted = table.assign(total=table["value"] * counts, count=counts)
    sums = weighted.groupby(["task", "other", "seed"], sort=False)[["total", "count"]].sum()
    means = (sums["total"] / sums["count"]).rename("value").reset_index()
    rows = []
    for (task, other), part in means.groupby(["task", "other"], sort=False):
        interval = as_columns(t_interval(part["value"]), "seeds")
        rows.append({"task": task, "other": other} | interval | {"seeds": len(part)})
    return pd.DataFrame(rows, columns=["task", "other", "value", "low", "high", "n", "of", "seeds"])


def matrix_of(pairs: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    """A table of :func:`by_tasks` as a symmetric matrix, in the order of ``tasks``; empty where there is none."""
    if pairs.empty:
        return pd.DataFrame()
    turned = pairs.rename(columns={"task": "other", "other": "task"})
    both = pd.concat([pairs, turned[turned["task"] != turned["other"]]])
    wide = both.pivot(index="task", columns="other", values="value")
    order = [task for task in tasks if task in wide.index]
    return wide.loc[order, order].rename_axis(index=None, columns=None)


def conflict_map(results: Results, arrangement: str = JOINT) -> pd.DataFrame:
    """Cosine between tasks by step, layer and factor, beside that within a task: one row a cell.

    Columns step, layer, factor, between with low and high (a t interval over seeds), within, n, and inside: whether the
    interval contains 0, what unrelated tasks have, or that of between − within does, so that two batches of one task
    are as far apart. Each cell stands for itself: one in forty lies outside by chance. With one seed nothing is
    tested: no interval, and inside is False. All are means over half batches.
    """
    table = recorded(results, HALVES)
    return map_of(table[table["arrangement"] == arrangement])


def map_of(table: pd.DataFrame) -> pd.DataFrame:
    """:func:`conflict_map` of cosines of half batches, one or more a cell: seed, step, layer, factor, pairs, value."""
    columns = ["step", "layer", "factor", BETWEEN, "low", "high", WITHIN, "n", "inside"]
    if table.empty:
        return pd.DataFrame(columns=columns)
    cells = table.pivot_table(
        index=["step", "layer", "factor", "seed"], columns="pairs", values="value", aggfunc="mean"
    ).reindex(columns=[BETWEEN, WITHIN])
    rows = []
    for key, part in cells.dropna().groupby(["step", "layer", "factor"]):
        cosine = t_interval(part[BETWEEN])
        about = dict(zip(("step", "layer", "factor"), key, strict=True))
        means = {BETWEEN: cosine.mean, "low": cosine.low, "high": cosine.high, WITHIN: part[WITHIN].mean()}
        apart = t_interval(part[BETWEEN] - part[WITHIN])
        rows.append(about | means | {"n": cosine.n, "inside": _holds_zero(cosine) or _holds_zero(apart)})
    return pd.DataFrame(rows, columns=columns)


def _holds_zero(interval: Interval) -> bool:
    return interval.low <= 0 <= interval.high


def changes(results: Results) -> pd.DataFrame:
    """How far each way's gradient lies from that of joint training, ‖∇ − S‖ / ‖S‖: arrangement, seed, step, factor and
    value, the mean over tensors.
    """
    table = recorded(results, CHANGE)
    return table.groupby(["arrangement", "seed", "step", "factor"], sort=False)["value"].mean().reset_index()


def removed_shares(results: Results) -> pd.DataFrame:
    """Share of the tasks' gradient norm that projection took away: arrangement, blocks, value, low, high, n, of.

    Mean over blocks and steps; a t interval over seeds, none for one seed.
    """
    table = recorded(results, REMOVED)
    rows = []
    for name, part in table.groupby("arrangement", sort=False):
        per_seed = part.groupby("seed")["value"].mean()
        about = {"arrangement": name, "blocks": part["tensor"].nunique()}
        rows.append(about | as_columns(t_interval(per_seed), "seeds"))
    return pd.DataFrame(rows, columns=["arrangement", "blocks", "value", "low", "high", "n", "of"])

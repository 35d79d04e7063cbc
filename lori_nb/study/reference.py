"""What a long measurement leaves for readers: tables, figures and a section of README, from the ledger alone.

All of it can be made at any time, of what the ledger holds by then; every table and figure says how many of the
planned runs that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from lori_nb.analysis.equivalence import ALPHA
from lori_nb.analysis.statistics import interval_text
from lori_nb.lab.paths import PROJECT, write_atomically
from lori_nb.study import (
    comparison,
    conflict,
    conflict_records,
    figures,
    figures_joint,
    figures_lori,
    questions,
    reference_merging,
    reference_overlap,
    reference_sequences,
    sharing,
    style,
)
from lori_nb.study.arms import arms_of
from lori_nb.study.joint_arms import JOINT, get_joint_arm
from lori_nb.study.measuring import command_of, results_of
from lori_nb.study.notebook import Results, collect, slug
from lori_nb.study.settings import Settings
from lori_nb.study.summary import latex

FORESTS = {  # name → question of the arms, the notebook whose plan holds them, and the methods that stand with them
    "baselines": ("baseline", "01_lori", ()),
    "masks": ("mask", "02_masks", ("lori-s",)),
}
PRINTED = 200  # rows of the longest table that is written as LaTeX too
OF_ADAPTERS = {"04_interference": reference_overlap, "05_merging": reference_merging}  # not told by scores alone


def write_reference(settings: Settings, notebooks: Sequence[str], root: Path = PROJECT) -> list[Path]:
    """Tables (CSV, and LaTeX up to ``PRINTED`` rows) and figures of the notebooks' runs that the ledger holds, below
    ``figures/reference/<slug>/``, which names the profile and other tasks than its own, and README's section on them,
    where it has marks for one; returns the files. What an earlier call wrote of other notebooks stays.
    """
    folder = root / "figures" / "reference" / slug(settings)
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: results_of(name, settings) for name in notebooks}
    tables = _tables(found)
    here = {name: collect(name, settings, train=False) for name in notebooks if name in OF_ADAPTERS}
    for name, runs in here.items():
        tables |= OF_ADAPTERS[name].tables(found[name], runs)
    tables["runs"] = _with_others(tables["runs"], folder / "runs.csv")
    for name, table in tables.items():
        write_atomically(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.10g"))
        if len(table) <= PRINTED:
            write_atomically(folder / f"{name}.tex", latex(table))
    figures_of = _figures(found, tables)
    for name in here:
        makers = OF_ADAPTERS[name].drawn(found[name], tables)
        figures_of |= {each: (found[name], draw) for each, draw in makers.items()}
    drawn = [path for name, (result, draw) in figures_of.items() for path in _save(result, draw, folder, name)]
    readme = root / "README.md"
    write_section(readme, folder, command_of(settings, tuple(tables["runs"]["notebook"])))
    printed = [folder / f"{name}.tex" for name, table in tables.items() if len(table) <= PRINTED]
    return [*(folder / f"{name}.csv" for name in tables), *printed, *drawn, readme]


def _with_others(counts: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Counts of runs by notebook, those that ``path`` holds of other notebooks with them, in the notebooks' order."""
    before = pd.read_csv(path) if path.exists() else counts.head(0)
    others = before[~before["notebook"].isin(counts["notebook"])]
    return pd.concat([others, counts], ignore_index=True).sort_values("notebook", ignore_index=True)


def _tables(found: dict[str, Results]) -> dict[str, pd.DataFrame]:
    """Every table that has a row; "runs" counts what is there of each notebook's plan."""
    counts = [{"notebook": name, "runs": len(each.runs), "planned": each.planned} for name, each in found.items()]
    tables = {"runs": pd.DataFrame(counts)}
    if (lori := found.get("01_lori")) and lori.runs:
        tables |= {"scores": questions.method_scores(lori), "methods": comparison.compared(lori)}
        tables["costs"] = comparison.costs(lori)
        tables["longer"] = comparison.longer(lori)
        if arms := arms_of(lori.settings, "baseline"):
            names = [*lori.settings.method, *arms]
            tables["baseline_costs"] = comparison.costs(lori, names, lori.settings.arm_tasks)
    for name, (question, notebook, methods) in FORESTS.items():
        results = found.get(notebook)
        if results and (arms := [*methods, *arms_of(results.settings, question)]):
            tables[name] = comparison.compared(results, arms, results.settings.arm_tasks)
    if (masks := found.get("02_masks")) and masks.runs:
        tables["sparsity"] = questions.sparsity_scores(masks)
    if (shared := found.get("03_ortho_lora")) and shared.runs:
        tables |= {"arrangements": sharing.arrangement_scores(shared), "recovery": sharing.gap_recovery(shared)}
        tables["arrangement_costs"] = sharing.arrangement_costs(shared)
        tables["conflicts"] = conflict.map_of(conflict_records.kept_of(shared.settings, JOINT))
    if sequences := found.get("06_forgetting"):
        tables |= reference_sequences.tables(sequences)
    return {name: table for name, table in tables.items() if len(table)}


def _figures(found: dict[str, Results], tables: dict[str, pd.DataFrame]) -> dict[str, tuple[Results, Callable]]:
    """Name → the results that it is drawn from, and what draws it."""
    drawn: dict[str, tuple[Results, Callable]] = {}
    if "methods" in tables:
        drawn["methods"] = found["01_lori"], _forest_of(found["01_lori"], tables["methods"])
    for name, (question, notebook, methods) in FORESTS.items():
        if name in tables:
            arms = [*methods, *arms_of(found[notebook].settings, question)]
            drawn[name] = found[notebook], _forest_of(found[notebook], tables[name], arms)
    if "sparsity" in tables:
        drawn["sparsity"] = found["02_masks"], lambda: _sparsity(tables["sparsity"])
    if "recovery" in tables:
        drawn["recovery"] = found["03_ortho_lora"], lambda: _recovery(tables["recovery"])
    if "conflicts" in tables:
        drawn["conflict_map"] = found["03_ortho_lora"], lambda: _conflict_map(tables["conflicts"])
    if sequences := found.get("06_forgetting"):
        drawn |= {name: (sequences, draw) for name, draw in reference_sequences.drawn(sequences, tables).items()}
    return drawn


def _forest_of(results: Results, table: pd.DataFrame, arms: Sequence[str] | None = None) -> Callable:
    def draw():
        tasks = None if arms is None else results.settings.arm_tasks
        figure, (ax,) = figures.panels(1, height=figures_lori.forest_height(table))
        figures_lori.forest(ax, table, comparison.differences(results, arms, tasks))
        figures.shared_legend(figure)
        return figure

    return draw


def _sparsity(scores: pd.DataFrame):
    tasks = list(dict.fromkeys(scores["task"]))
    figure, axes = figures.panels(len(tasks))
    for ax, task in zip(axes, tasks, strict=True):
        figures.score_against_sparsity(ax, scores[scores["task"] == task])
    figures.shared_legend(figure)
    return figure


def _recovery(table: pd.DataFrame):
    figure, (ax,) = figures.panels(1, height=1.2 + 0.5 * table["task"].nunique())
    figures_joint.recovery(ax, table)
    figures.shared_legend(figure)
    return figure


def _conflict_map(table: pd.DataFrame):
    figure, axes = figures.panels(2, height=3.2)
    figures_joint.conflict_map(axes, table)
    return figure


def _save(results: Results, draw: Callable, folder: Path, name: str) -> list[Path]:
    style.use()
    figure = draw()
    paths = style.save(
        figure, folder, name, {"title": f"{slug(results.settings)}: {name}", "provenance": results.provenance}
    )
    plt.close(figure)
    return paths


def marks(name: str) -> tuple[str, str]:
    """What README's section on a measured study, named as its folder is, stands between."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def section(folder: Path, command: str) -> str:
    """README's section on a measured study as Markdown, from the committed tables in ``folder``."""
    counts = pd.read_csv(folder / "runs.csv")
    each = [f"{row.runs} of {row.planned} runs of notebook {row.notebook[:2]}" for row in counts.itertuples()]
    there = ", ".join(each)
    parts = [
        f"Study `{folder.name}`, so far {there} (made by `{command}`; tables and figures in "
        f"`figures/reference/{folder.name}/`)."
    ]
    compared = [folder / f"{name}.csv" for name in ("methods", *FORESTS) if (folder / f"{name}.csv").exists()]
    if compared:
        tables = [pd.read_csv(path) for path in compared]
        if (folder / "methods.png").exists():
            parts.append(f"![Points against tuned LoRA](figures/reference/{folder.name}/methods.png)")
        parts.append(
            "Points against tuned LoRA with 95 % intervals for other seeds on other rows. Verdicts are against a "
            f"margin of ± {100 * tables[0]['margin'].iloc[0]:g} points: equivalent where two one-sided tests place the "
            "difference inside it; * where it differs from 0 as well (p < 0.05). Detectable: the least difference in "
            "the mean over tasks that the design would find in four of five studies."
        )
        parts += [_comparison(table) for table in tables]
    if (folder / "longer.csv").exists():
        parts.append(
            "With twice the steps: LoRA against the LoRA above, which shows whether that had reached its plateau, then "
            "LoRI, its calibration as long, against LoRA with as many:"
        )
        parts.append(_comparison(pd.read_csv(folder / "longer.csv")))
    if (folder / "baseline_costs.csv").exists():
        parts.append("What training a run costs on the tasks of the baselines, and the mean score it reaches there:")
        parts.append(_costs(pd.read_csv(folder / "baseline_costs.csv")))
    parts += [words for made in OF_ADAPTERS.values() if (words := made.text(folder))]
    if (folder / "recovery.csv").exists():
        parts.append(
            "Share of what joint training loses against an adapter a task that each way wins back, with Fieller's "
            "interval over seeds; in brackets alone where the gap's own interval contains zero, so that there was "
            "nothing to win back. p: paired t test against joint training over seeds; detectable: the least mean "
            "difference that so many seeds would find in four of five studies."
        )
        parts.append(_recovered(pd.read_csv(folder / "recovery.csv")))
    if (folder / "sequence_metrics.csv").exists():
        parts.append(reference_sequences.text(pd.read_csv(folder / "sequence_metrics.csv")))
    return "\n\n".join(parts)


def _comparison(table: pd.DataFrame) -> str:
    tasks = list(dict.fromkeys(table["task"]))
    lines = [f"| arm | {' | '.join(tasks)} | detectable | n |", "|---" * (3 + len(tasks)) + "|"]
    for _, part in table.groupby("arm", sort=False):
        by_task = part.set_index("task")
        cells = [_cell(by_task.loc[task]) if task in by_task.index else "–" for task in tasks]
        whole = by_task.iloc[-1]  # the mean over tasks stands last
        detectable = "–" if pd.isna(whole["detectable"]) else f"{100 * whole['detectable']:.1f}"
        lines.append(f"| {whole['title']} | {' | '.join(cells)} | {detectable} | {int(whole['n'])} {whole['of']} |")
    return "\n".join(lines)


def _costs(table: pd.DataFrame) -> str:
    lines = ["| arm | mean score | trainable parameters | PFLOPs | of these calibration | n |", "|---" * 6 + "|"]
    for row in table.itertuples():
        score = interval_text(row.value, row.low, row.high, 3)
        operations = f"{row.training_pflops:.4f} | {row.calibration_pflops:.4f}"
        lines.append(f"| {row.title} | {score} | {row.trainable_parameters:,} | {operations} | {int(row.n)} {row.of} |")
    return "\n".join(lines)


def _recovered(table: pd.DataFrame) -> str:
    tasks = list(dict.fromkeys(table["task"]))
    lines = [f"| way | {' | '.join(tasks)} | gap | p | detectable | n |", "|---" * (5 + len(tasks)) + "|"]
    for name, part in table.groupby("arrangement", sort=False):
        by_task = part.set_index("task")
        whole = by_task.iloc[-1]  # the mean over tasks stands last
        shares = [_share(by_task.loc[task]) if task in by_task.index else "–" for task in tasks]
        gap = interval_text(whole["gap"], whole["gap_low"], whole["gap_high"], 3, signed=True)
        tests = ["–" if pd.isna(whole[key]) else f"{whole[key]:.3f}" for key in ("p", "detectable")]
        cells = [get_joint_arm(name).title, *shares, gap, *tests, f"{int(whole['n'])} {whole['of']}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(row: pd.Series) -> str:
    text = interval_text(row["value"], row["low"], row["high"], 2)
    return text if row["shown"] else f"({text})"


def _cell(row: pd.Series) -> str:
    value = interval_text(*(100 * row[name] for name in ("value", "low", "high")), 1, signed=True)
    if row["seeds"] == 1:
        return f"{value}, one seed"
    mark = "*" if row["verdict"] == "equivalent" and row["p_difference"] < ALPHA else ""
    return f"{value}, {row['verdict']}{mark}"


def write_section(path: Path, folder: Path, command: str) -> None:
    """Replace what stands between the folder's marks in a README; nothing happens where it has none."""
    start, end = marks(folder.name)
    text = path.read_text() if path.exists() else ""
    if start in text and end in text:
        before, _, rest = text.partition(start)
        write_atomically(path, f"{before}{start}\n\n{section(folder, command)}\n\n{end}{rest.partition(end)[2]}")

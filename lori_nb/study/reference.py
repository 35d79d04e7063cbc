"""What a long measurement leaves for readers: tables, figures and a section of README, from the ledger alone.

All of it can be made at any time, of what the ledger holds by then; every table and figure says how many of the
planned runs that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from lori_nb.analysis.statistics import interval_text
from lori_nb.lab.paths import PROJECT, write_atomically
from lori_nb.study import comparison, figures, figures_lori, questions, reference_sequences, sharing, style
from lori_nb.study.arms import arms_of
from lori_nb.study.measuring import results_of
from lori_nb.study.notebook import Results, slug
from lori_nb.study.profiles import NOTEBOOKS, Settings

FORESTS = {  # name → question of the arms, the notebook whose plan holds them, and the methods that stand with them
    "baselines": ("baseline", "01_lori", ()),
    "masks": ("mask", "02_masks", ("lori-s",)),
}


def write_reference(settings: Settings, notebooks: Sequence[str], root: Path = PROJECT) -> list[Path]:
    """Tables (CSV) and figures of the notebooks' runs that the ledger holds, below ``figures/reference/<profile>/``,
    and README's section on the profile, where it has marks for one; returns the files.
    """
    folder = root / "figures" / "reference" / slug(settings)
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: results_of(name, settings) for name in _with_those_before(notebooks, folder)}
    tables = _tables(found)
    for name, table in tables.items():
        write_atomically(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.10g"))
    drawn = [
        path for name, (result, draw) in _figures(found, tables).items() for path in _save(result, draw, folder, name)
    ]
    readme = root / "README.md"
    write_section(readme, folder, settings.profile)
    return [*(folder / f"{name}.csv" for name in tables), *drawn, readme]


def _with_those_before(notebooks: Sequence[str], folder: Path) -> list[str]:
    """The notebooks named, and those that the folder holds tables of already: the section tells of all of them."""
    counts = folder / "runs.csv"
    before = list(pd.read_csv(counts)["notebook"]) if counts.exists() else []
    return [name for name in NOTEBOOKS if name in {*before, *notebooks}]


def _tables(found: dict[str, Results]) -> dict[str, pd.DataFrame]:
    """Every table that has a row; "runs" counts what is there of each notebook's plan."""
    counts = [{"notebook": name, "runs": len(each.runs), "planned": each.planned} for name, each in found.items()]
    tables = {"runs": pd.DataFrame(counts)}
    if (lori := found.get("01_lori")) and lori.runs:
        tables |= {"scores": questions.method_scores(lori), "methods": comparison.compared(lori)}
        tables["costs"] = comparison.costs(lori)
    for name, (question, notebook, methods) in FORESTS.items():
        results = found.get(notebook)
        if results and (arms := [*methods, *arms_of(results.settings, question)]):
            tables[name] = comparison.compared(results, arms, results.settings.arm_tasks)
    if (masks := found.get("02_masks")) and masks.runs:
        tables["sparsity"] = questions.sparsity_scores(masks)
    if (shared := found.get("03_ortho_lora")) and shared.runs:
        tables |= {"arrangements": sharing.arrangement_scores(shared), "recovery": sharing.gap_recovery(shared)}
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


def _save(results: Results, draw: Callable, folder: Path, name: str) -> list[Path]:
    style.use()
    figure = draw()
    paths = style.save(
        figure, folder, name, {"title": f"{slug(results.settings)}: {name}", "provenance": results.provenance}
    )
    plt.close(figure)
    return paths


def marks(profile: str) -> tuple[str, str]:
    """What a profile's section of README stands between."""
    return f"<!-- {profile} -->", f"<!-- /{profile} -->"


def section(folder: Path) -> str:
    """README's section on a measured profile as Markdown, from the committed tables in ``folder``."""
    counts = pd.read_csv(folder / "runs.csv")
    each = [f"{row.runs} of {row.planned} runs of notebook {row.notebook[:2]}" for row in counts.itertuples()]
    there = ", ".join(each)
    command = f"lori-nb measure --profile {folder.name} --notebooks {','.join(counts['notebook'])}"
    parts = [
        f"Profile `{folder.name}`, so far {there} (made by `{command}`; tables and figures in "
        f"`figures/reference/{folder.name}/`). Points against tuned LoRA, paired over seeds and rows:"
    ]
    for name in ("methods", *FORESTS):
        if (folder / f"{name}.csv").exists():
            parts.append(_comparison(pd.read_csv(folder / f"{name}.csv")))
    if (folder / "sequence_metrics.csv").exists():
        parts.append(reference_sequences.text(pd.read_csv(folder / "sequence_metrics.csv")))
    return "\n\n".join(parts)


def _comparison(table: pd.DataFrame) -> str:
    lines = ["| arm | " + " | ".join(dict.fromkeys(table["task"])) + " |"]
    lines.append("|---" * (1 + table["task"].nunique()) + "|")
    for _, part in table.groupby("arm", sort=False):
        by_task = part.set_index("task")
        cells = [_cell(by_task.loc[task]) if task in by_task.index else "–" for task in dict.fromkeys(table["task"])]
        lines.append(f"| {part['title'].iloc[0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: pd.Series) -> str:
    value = interval_text(*(100 * row[name] for name in ("value", "low", "high")), 1, signed=True)
    word = f", {row['verdict']}" if row["seeds"] > 1 else ""
    return f"{value} (n = {int(row['n'])} {row['of']}{word})"


def write_section(path: Path, folder: Path, profile: str) -> None:
    """Replace what stands between the profile's marks in a README; nothing happens where it has none."""
    start, end = marks(profile)
    text = path.read_text() if path.exists() else ""
    if start in text and end in text:
        before, _, rest = text.partition(start)
        write_atomically(path, f"{before}{start}\n\n{section(folder)}\n\n{end}{rest.partition(end)[2]}")

"""What a long measurement leaves for readers: tables, figures and the words on them, from the ledger.

All of it can be made at any time, of what the ledger holds by then; every table and figure says how many of the
planned runs that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from lori_nb.lab.paths import PROJECT, write_atomically
from lori_nb.study import (
    comparison,
    conflict,
    conflict_records,
    layouts,
    questions,
    reference_interference,
    reference_merging,
    reference_overlap,
    reference_sequences,
    reference_text,
    sharing,
    style,
)
from lori_nb.study.arms import arms_of, get_arm
from lori_nb.study.joint_arms import JOINT
from lori_nb.study.measuring import command_of, results_of
from lori_nb.study.notebook import Results, slug
from lori_nb.study.settings import Settings
from lori_nb.study.summary import latex

FORESTS = {  # name → question of the arms, the notebook whose plan holds them, and the methods that stand with them
    "baselines": ("baseline", "01_lori", ()),
    "masks": ("mask", "02_masks", ("lori-s",)),
}
MADE = (
    ("04_interference", reference_overlap),
    ("05_merging", reference_merging),
    ("06_forgetting", reference_sequences),
    ("06_forgetting", reference_interference),
)
PRINTED = 200  # rows of the longest table that is written as LaTeX too


def write_reference(settings: Settings, notebooks: Sequence[str], root: Path = PROJECT) -> list[Path]:
    """Tables (CSV, and LaTeX up to ``PRINTED`` rows) and figures of the notebooks' runs that the ledger holds, below
    ``figures/reference/<slug>/``, which names the profile and other tasks than its own, and the sections on them
    (:mod:`lori_nb.study.reference_text`); returns the files. What an earlier call wrote of other notebooks stays.
    """
    folder = root / "figures" / "reference" / slug(settings)
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: results_of(name, settings) for name in notebooks}
    tables = _tables(found)
    tables["runs"] = _with_others(tables["runs"], folder / "runs.csv")
    for name, table in tables.items():
        write_atomically(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.10g"))
        if len(table) <= PRINTED:
            write_atomically(folder / f"{name}.tex", latex(table))
    drawn = [
        path for name, (result, draw) in _figures(found, tables).items() for path in _save(result, draw, folder, name)
    ]
    sections = reference_text.write_sections(root, folder, command_of(settings, tuple(tables["runs"]["notebook"])))
    printed = [folder / f"{name}.tex" for name, table in tables.items() if len(table) <= PRINTED]
    return [*(folder / f"{name}.csv" for name in tables), *printed, *drawn, *sections]


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
        tables |= {"gaps": sharing.gaps(shared)}
        tables["arrangement_costs"] = sharing.arrangement_costs(shared)
        kept = conflict_records.kept_of(shared.settings, JOINT)
        tables |= {"conflicts": conflict.map_of(kept), "task_cosines": conflict.by_tasks(kept)}
        tables |= {"conflict_rates": conflict.rate_table(kept), "other_metrics": sharing.other_metrics(shared)}
    for name, made in MADE:
        if name in found:
            tables |= made.tables(found[name])
    return {name: table for name, table in tables.items() if len(table)}


def _figures(found: dict[str, Results], tables: dict[str, pd.DataFrame]) -> dict[str, tuple[Results, Callable]]:
    """Name → the results that it is drawn from, and what draws it."""
    drawn: dict[str, tuple[Results, Callable]] = {}
    if "methods" in tables:
        drawn["methods"] = found["01_lori"], _forest_of(found["01_lori"], tables["methods"])
    if "longer" in tables:
        drawn |= _at_twice_the_steps(found["01_lori"], tables["longer"])
    for name, (question, notebook, methods) in FORESTS.items():
        if name in tables:
            arms = [*methods, *arms_of(found[notebook].settings, question)]
            drawn[name] = found[notebook], _forest_of(found[notebook], tables[name], arms)
    if "sparsity" in tables:
        drawn["sparsity"] = found["02_masks"], lambda: layouts.sparsity(tables["sparsity"])
    if "recovery" in tables:
        drawn["recovery"] = found["03_ortho_lora"], lambda: layouts.recovery(tables["recovery"])
    if "conflicts" in tables:
        drawn["conflict_map"] = found["03_ortho_lora"], lambda: layouts.conflict_map(tables["conflicts"])
    if "task_cosines" in tables:
        tasks = found["03_ortho_lora"].settings.tasks
        drawn["task_cosines"] = found["03_ortho_lora"], lambda: layouts.task_cosines(tables["task_cosines"], tasks)
    for name, made in MADE:
        if results := found.get(name):
            drawn |= {each: (results, draw) for each, draw in made.drawn(results, tables).items()}
    return drawn


def _at_twice_the_steps(results: Results, longer: pd.DataFrame) -> dict[str, tuple[Results, Callable]]:
    """The methods against LoRA where all train twice as long, which is the fairer comparison."""
    arms = [name for name in arms_of(results.settings, "longer") if get_arm(name).step_factor == 2]
    table = longer[longer["arm"].isin(arms)]
    if table.empty:
        return {}
    (beside,) = {get_arm(name).beside for name in arms}
    seeds = comparison.differences(results, arms)
    return {"methods_longer": (results, lambda: layouts.forest(table, seeds, get_arm(beside).title))}


def _forest_of(results: Results, table: pd.DataFrame, arms: Sequence[str] | None = None) -> Callable:
    tasks = None if arms is None else results.settings.arm_tasks
    return lambda: layouts.forest(table, comparison.differences(results, arms, tasks))


def _save(results: Results, draw: Callable, folder: Path, name: str) -> list[Path]:
    style.use()
    figure = draw()
    paths = style.save(
        figure, folder, name, {"title": f"{slug(results.settings)}: {name}", "provenance": results.provenance}
    )
    plt.close(figure)
    return paths

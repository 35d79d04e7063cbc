"""The words of a long measurement: README's headlines and the page of all tables, from the committed tables alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lori_nb.analysis.statistics import interval_text
from lori_nb.lab.paths import write_atomically
from lori_nb.study import (
    conflict,
    reference_interference,
    reference_merging,
    reference_overlap,
    reference_sequences,
    sharing,
)
from lori_nb.study.arms import BASELINE
from lori_nb.study.comparison import OVER_TASKS, marked_verdict
from lori_nb.study.joint_arms import get_joint_arm
from lori_nb.study.summary import markdown, p_text, readable

COMPARED = ("methods", "longer", "baselines", "masks")  # tables of comparison.compared
SEQUENCES = (reference_sequences, reference_interference)
CACHE = "prefix_pflops"
PAGE = Path("figures", "reference", "README.md")
LONGER = (
    "With twice the steps: LoRA against the LoRA above, which shows whether that had reached its plateau, then LoRI, "
    "its calibration as long"
)
LONGEST = "; and LoRA with four times the steps against LoRA with twice as many"
MASKS = "Other masks; all share LoRI-S's learning rate, tuned for the mask as it is:"
SPARSITY = (
    "Score at every sparsity with 95 % intervals over seeds. Sparsity 0 is LoRI-D with its own learning rate, the "
    "others share LoRI-S's, tuned at the study's own sparsity: a part of any difference may be the rate."
)
SHARED_COSTS = (
    "What training costs, all adapters of a way together, and the mean score over tasks. Operations are counted from "
    "shapes, without what is done to finished gradients: what projection adds is measured by `make bench-ortho`."
)
CAPTIONS = {
    "methods": "Points against tuned LoRA",
    "methods_longer": "Points against LoRA, all with twice the steps",
    "recovery": "Share of the gap that each way wins back",
    "conflict_map": "Cosine between the tasks' gradients in joint training, by step and layer",
    "task_cosines": "Cosine between every two tasks' gradients in joint training",
    "sequence_plane": "Score of new tasks when learned against that of earlier ones at the end, a point a way",
    "sequence_safety": "Harmful requests refused against harmless ones, before and after the later tasks",
    "sequence_matrices": "Scores on every task after every stage",
    "sequence_by_step": "Scores of the first and of the second task while the second trains",
    "sequence_orders": "Mean score after the last task in every order",
    "sequence_capacity": "Score of the n-th task under disjoint masks",
    "sequence_lost": "What earlier tasks lost by the end",
    "sequence_interference": "The first task's forgetting against how far later updates move its activations",
}
RECOVERED = (
    "Share of what joint training loses against an adapter a task that each way wins back, with Fieller's interval "
    "over seeds; in brackets where the gap's own interval does not lie above zero, so that nothing is known to be "
    "there to win back. p: paired t test against joint training over seeds; detectable: the least mean difference that "
    "so many seeds would find in four of five studies."
)


def headlines(folder: Path, command: str) -> str:
    """README's section on a measured study as Markdown: figures, and of every comparison the mean over tasks."""
    page = f"[{PAGE.parent.as_posix()}]({PAGE.as_posix()})"
    parts = [f"{_counted(folder, command)} Every table and figure of it: {page}."]
    parts += _methods(folder, Path(PAGE.parent, folder.name), _means)
    if others := [table for name in COMPARED[2:] if (table := _read(folder, name)) is not None]:
        table = pd.concat(others)
        words = f"Other baselines, and arms with one thing changed each, against tuned LoRA on {_tasks(table)}:"
        parts += [words, _means(table)]
    parts += [words for made in (reference_overlap, reference_merging) if (words := made.headline(folder))]
    if (recovered := _read(folder, "recovery")) is not None:
        parts += [RECOVERED, _recovered(recovered), sharing.claimed_recovery(recovered), *_conflicts(folder)]
        parts += _shown(folder, Path(PAGE.parent, folder.name), "recovery", "conflict_map")
    parts += [words for made in SEQUENCES if (words := made.text(folder))]
    parts += _shown(folder, Path(PAGE.parent, folder.name), "sequence_plane", "sequence_safety")
    return "\n\n".join(parts)


def page(folder: Path, command: str) -> str:
    """All tables of a measured study as Markdown, each with its figures, for :data:`PAGE`."""
    here = Path(folder.name)
    parts = [f"## Study `{folder.name}`", _counted(folder, command), *_methods(folder, here, _comparison)]
    for name in COMPARED[2:]:
        if (table := _read(folder, name)) is not None:
            parts += [*([MASKS] if name == "masks" else []), _comparison(table), *_shown(folder, here, name)]
    if (sparsity := _read(folder, "sparsity")) is not None:
        parts += [SPARSITY, _sparsity(sparsity), *_shown(folder, here, "sparsity")]
    if (costs := _read(folder, "baseline_costs")) is not None:
        parts += [_told_costs(costs), _costs(costs)]
    for made, figures in (
        (reference_overlap, ("overlap*", "depth*", "angles", "functional")),
        (reference_merging, ("merge*", "pairs")),
    ):
        if words := made.text(folder):
            parts += [words, *_shown(folder, here, *figures)]
    if (recovered := _read(folder, "recovery")) is not None:
        parts += [RECOVERED, _recovered(recovered), sharing.claimed_recovery(recovered)]
        if (gaps := _read(folder, "gaps")) is not None:
            parts += [_gaps(gaps)]
        if (costs := _read(folder, "arrangement_costs")) is not None:
            parts += [SHARED_COSTS, _costs(costs, "way")]
        if (others := _read(folder, "other_metrics")) is not None:
            parts += ["By the other official metrics:", _other_metrics(others)]
        parts += _conflicts(folder)
        parts += _shown(folder, here, "recovery", "conflict_map", "task_cosines")
    parts += [words for made in SEQUENCES if (words := made.text(folder))]
    parts += _shown(folder, here, "sequence*")
    return "\n\n".join(parts)


def _read(folder: Path, name: str) -> pd.DataFrame | None:
    path = folder / f"{name}.csv"
    return pd.read_csv(path) if path.exists() else None


def _counted(folder: Path, command: str) -> str:
    counts = pd.read_csv(folder / "runs.csv")
    there = ", ".join(f"{row.runs} of {row.planned} runs of notebook {row.notebook[:2]}" for row in counts.itertuples())
    return f"Study `{folder.name}`, {there} (made by `{command}`)."


def _shown(folder: Path, shown_in: Path, *patterns: str) -> list[str]:
    """Links to the figures in ``folder`` of these names, as seen from the page."""
    found = [path for pattern in patterns for path in sorted(folder.glob(f"{pattern}.png"))]
    titles = [CAPTIONS.get(path.stem, path.stem.replace("_", " ")) for path in found]
    return [f"![{title}]({(shown_in / p.name).as_posix()})" for title, p in zip(titles, found, strict=True)]


def _methods(folder: Path, shown_in: Path, shown_as: Callable[[pd.DataFrame], str]) -> list[str]:
    """The methods against tuned LoRA, and at twice the steps."""
    table, parts = _read(folder, "methods"), []
    if table is not None:
        parts = [
            *_shown(folder, shown_in, "methods"),
            "Points against tuned LoRA with 95 % intervals for other seeds on other rows. Verdicts are against a "
            f"margin of ± {100 * table['margin'].iloc[0]:g} points: equivalent where two one-sided tests place the "
            "difference inside it; * where it differs from 0 as well (p < 0.05), † where they no longer do once "
            "adjusted for all arms of a table by Holm. Detectable: the least difference in the mean over tasks that "
            "the design would find in four of five studies.",
            *_sizes(folder),
            shown_as(table),
        ]
    if (longer := _read(folder, "longer")) is not None:
        parts += [f"{LONGER}{LONGEST if 'lora-longest' in set(longer['arm']) else ''}:", shown_as(longer)]
        parts += _shown(folder, shown_in, "methods_longer")
    return parts


def _sizes(folder: Path) -> list[str]:
    """How many of LoRA's trained parameters each other method has, where their costs are there."""
    if (costs := _read(folder, "costs")) is None or BASELINE not in set(costs["arm"]):
        return []
    sizes = costs.set_index("title")["trainable_parameters"]
    whole = sizes.iloc[list(costs["arm"]).index(BASELINE)]
    shares = [f"{title} {100 * size / whole:.1f} %" for title, size in sizes.items() if size != whole]
    return [f"Of LoRA's {whole:,} trained parameters: {', '.join(shares)}."] if shares else []


def _tasks(table: pd.DataFrame) -> str:
    """The tasks of a comparison, without their mean."""
    return " and ".join(f"`{task}`" for task in dict.fromkeys(table["task"]) if task != OVER_TASKS)


def _comparison(table: pd.DataFrame) -> str:
    tasks = list(dict.fromkeys(table["task"]))
    lines = [f"| arm | {' | '.join(tasks)} | detectable | n |", "|---" * (3 + len(tasks)) + "|"]
    for _, part in table.groupby("arm", sort=False):
        by_task = part.set_index("task")
        cells = [_cell(by_task.loc[task]) if task in by_task.index else "–" for task in tasks]
        whole = by_task.iloc[-1]  # the mean over tasks stands last
        lines.append(f"| {whole['title']} | {' | '.join(cells)} | {_least(whole)} | {int(whole['n'])} {whole['of']} |")
    return "\n".join(lines)


def _means(table: pd.DataFrame) -> str:
    """Every arm's mean over tasks, of arms that have been measured on all of them; of one task, that task."""
    lines = ["| arm | mean over tasks | detectable | n |", "|---|---|---|---|"]
    several = OVER_TASKS in set(table["task"])
    for _, row in (table[table["task"] == OVER_TASKS] if several else table).iterrows():
        lines.append(f"| {row['title']} | {_cell(row)} | {_least(row)} | {int(row['n'])} {row['of']} |")
    return "\n".join(lines)


def _least(row: pd.Series) -> str:
    return "–" if pd.isna(row["detectable"]) else f"{100 * row['detectable']:.1f}"


def _cell(row: pd.Series) -> str:
    value = interval_text(*(100 * row[name] for name in ("value", "low", "high")), 1, signed=True)
    if row["seeds"] == 1:
        return f"{value}, one seed"
    return f"{value}, {marked_verdict(row)}"


def _sparsity(table: pd.DataFrame) -> str:
    tasks = list(dict.fromkeys(table["task"]))
    lines = [f"| sparsity | {' | '.join(tasks)} | n |", "|---" * (2 + len(tasks)) + "|"]
    for sparsity, part in table.groupby("sparsity"):
        rows = part.set_index("task")
        scores = [rows.loc[task, ["value", "low", "high"]] if task in rows.index else None for task in tasks]
        cells = ["–" if each is None else interval_text(*each, 3) for each in scores]
        lines.append(f"| {sparsity:g} | {' | '.join(cells)} | {int(part['n'].iloc[0])} {part['of'].iloc[0]} |")
    return "\n".join(lines)


def _told_costs(table: pd.DataFrame) -> str:
    """The words above the table of costs, with what it leaves out."""
    words = "What training a run costs on the tasks of the baselines, and the mean score there"
    cache = table[CACHE].max()
    if cache > 0:
        words += f"; filling the cache below the adapters, once for all methods, takes another {cache:.4f} PFLOPs"
    return f"{words}:"


def _costs(table: pd.DataFrame, first: str = "arm") -> str:
    """What training costs beside what it gives; adapters and calibration only where the table counts them."""
    shown = {
        "adapters": ("adapters", "{}"),
        "trainable_parameters": ("trainable parameters", "{:,}"),
        "training_pflops": ("PFLOPs", "{:.4f}"),
        "calibration_pflops": ("of these calibration", "{:.4f}"),
    }
    counted = {name: told for name, told in shown.items() if name in table}
    titles = [first, "mean score", *(title for title, _ in counted.values()), "n"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for _, row in table.iterrows():
        score = interval_text(row["value"], row["low"], row["high"], 3)
        numbers = [form.format(row[name]) for name, (_, form) in counted.items()]
        count = f"{int(row['n'])} {row['of']}"
        lines.append(f"| {' | '.join([row['title'], score, *numbers, count])} |")
    return "\n".join(lines)


def _recovered(table: pd.DataFrame) -> str:
    tasks = list(dict.fromkeys(table["task"]))
    lines = [f"| way | {' | '.join(tasks)} | gap | p | detectable | n |", "|---" * (5 + len(tasks)) + "|"]
    for name, part in table.groupby("arrangement", sort=False):
        by_task = part.set_index("task")
        whole = by_task.iloc[-1]  # the mean over tasks stands last
        shares = [_share(by_task.loc[task]) if task in by_task.index else "–" for task in tasks]
        gap = interval_text(whole["gap"], whole["gap_low"], whole["gap_high"], 3, signed=True)
        tests = [p_text(whole["p"]), "–" if pd.isna(whole["p"]) else f"{whole['detectable']:.3f}"]
        cells = [get_joint_arm(name).title, *shares, gap, *tests, f"{int(whole['n'])} {whole['of']}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gaps(table: pd.DataFrame) -> str:
    lines = ["| difference, mean over tasks (points) | | p | detectable | n |", "|---" * 5 + "|"]
    for row in table.itertuples():
        value = interval_text(*(100 * bound for bound in (row.value, row.low, row.high)), 1, signed=True)
        tests = "– | –" if pd.isna(row.p) else f"{p_text(row.p)} | {100 * row.detectable:.1f}"
        lines.append(f"| {row.difference} | {value} | {tests} | {int(row.n)} {row.of} |")
    return "\n".join(lines)


def _conflicts(folder: Path) -> list[str]:
    """A sentence on how often gradients conflict, where that was recorded."""
    rates = _read(folder, "conflict_rates")
    return [] if rates is None else [conflict.rate_line(rates)]


def _other_metrics(table: pd.DataFrame) -> str:
    named = table.assign(metric=table["task"] + ": " + table["metric"])
    return markdown(readable(named, "arrangement", "metric", 3))


def _share(row: pd.Series) -> str:
    text = interval_text(row["value"], row["low"], row["high"], 2)
    return text if row["shown"] else f"({text})"


def marks(name: str) -> tuple[str, str]:
    """What a Markdown file's section on a measured study, named as its folder is, stands between."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def write_sections(root: Path, folder: Path, command: str) -> list[Path]:
    """Replace what stands between the folder's marks in README and in :data:`PAGE` below ``root``; nothing happens
    where a file has none. Returns the files that are there.
    """
    start, end = marks(folder.name)
    written = []
    for path, words in ((root / "README.md", headlines), (root / PAGE, page)):
        text = path.read_text() if path.exists() else ""
        if start in text and end in text:
            before, _, rest = text.partition(start)
            after = rest.partition(end)[2]
            write_atomically(path, f"{before}{start}\n\n{words(folder, command)}\n\n{end}{after}")
            written.append(path)
    return written

"""From an executed study to what is committed: notebooks with outputs, reference figures and tables, ledger, README.

README's results are rendered from the committed tables and nothing else, so that every number in it can be traced to
run hashes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from lori_nb.lab import ledger
from lori_nb.lab.methods import METHODS
from lori_nb.lab.paths import PROJECT, data_folder, write_atomically
from lori_nb.lab.runs import Run, Store
from lori_nb.study import claims, comparison, questions
from lori_nb.study.notebook import Results, collect, figures_folder, slug
from lori_nb.study.profiles import NOTEBOOKS
from lori_nb.study.settings import Settings
from lori_nb.study.stored import publish as copy_outputs
from lori_nb.study.summary import text_of

START, END = "<!-- results -->", "<!-- /results -->"
REFERENCES = {"majority": "most frequent answer", "few_shot": "base, four examples"}


def publish(settings: Settings, root: Path = PROJECT) -> list[Path]:
    """Put a finished study's outputs under ``root``: notebooks, reference figures and tables, ledger, README.

    Raises:
        ValueError: a notebook has not been executed, or runs are missing; nothing is changed then.
    """
    executed = [data_folder() / "executed" / slug(settings) / f"{name}.ipynb" for name in NOTEBOOKS]
    missing = [path.stem for path in executed if not path.is_file()]
    if missing:
        raise ValueError(f"the study must be finished first (lori-nb study); not executed: {', '.join(missing)}")
    results = collect("07_report", settings, train=False)
    if len(results.runs) < results.planned:
        lacks = results.planned - len(results.runs)
        raise ValueError(
            f"the study must be finished first (lori-nb study); missing: {lacks} of {results.planned} runs"
        )
    for path in executed:
        copy_outputs(path, root / "notebooks" / path.name)
    folder = root / "figures" / "reference" / slug(settings)
    tables = write_tables(results, folder)
    figures = [
        shutil.copy2(path, folder / path.name) for path in sorted((figures_folder() / slug(settings)).glob("*.*"))
    ]
    command = f"lori-nb study --profile {slug(settings)}"
    measured = ledger.with_rows(results.table.drop(columns="study"), Store().predictions)
    added = ledger.append(measured, f"study-{slug(settings)}", command)
    write_readme(root / "README.md", folder)
    return [*tables, *map(Path, figures), *([added] if added else []), root / "README.md"]


def write_tables(results: Results, folder: Path) -> list[Path]:
    """Tables worth committing, with the runs behind them: single-task scores and the judged claims, which README is
    rendered from, differences to tuned LoRA, what training costs, and how long the runs took.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reference = questions.reference_scores(results).reset_index().melt("task", list(REFERENCES), "method", "value")
    scores = pd.concat([reference, questions.method_scores(results)], ignore_index=True)
    paths = {
        "scores": scores,
        "claims": claims.judged(results),
        "comparison": comparison.compared(results),
        "costs": comparison.costs(results),
        "times": run_times(results.runs.values()),
        "runs": results.table,
    }
    for name, table in paths.items():
        write_atomically(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.10g"))
    return [folder / f"{name}.csv" for name in paths]


def run_times(runs: Iterable[Run]) -> pd.DataFrame:
    """Runs and the minutes that one core was at work on them, by method (a merge by its way); a run cut off counts
    from where it went on.
    """
    minutes = pd.DataFrame(
        [(run.spec.kind, getattr(run.spec, "merge", run.spec.method), run.provenance["seconds"] / 60) for run in runs],
        columns=["kind", "method", "minutes"],
    )
    grouped = minutes.groupby(["kind", "method"], sort=False)["minutes"]
    return grouped.agg(runs="count", core_minutes="sum").round(1).reset_index()


def rendered(folder: Path) -> str:
    """README's results as Markdown, from the committed tables in ``folder``."""
    scores, judged, times = (pd.read_csv(folder / f"{name}.csv") for name in ("scores", "claims", "times"))
    methods = [name for name in dict.fromkeys(scores["method"]) if name not in REFERENCES]
    titles = [*REFERENCES.values(), *(METHODS[name].title for name in methods)]
    lines = ["| task | " + " | ".join(titles) + " | n |", "|---" * (len(titles) + 2) + "|"]
    for task, part in scores.groupby("task", sort=False):
        cells = part.set_index("method")
        measured = [text_of(cells.loc[name]) for name in (*REFERENCES, *methods)]
        n = cells.loc[methods[0]]
        lines.append(f"| `{task}` | " + " | ".join(measured) + f" | {int(n['n'])} {n['of']} |")
    sizes = scores.dropna(subset="trainable_parameters").groupby("method", sort=False)["trainable_parameters"].first()
    counted = [f"{int(sizes[name]):,}" for name in methods]
    lines.append("| trained parameters | " + " | ".join(["–"] * len(REFERENCES) + counted) + " | |")
    claimed = ["| claim | measured | value [95 %] | verdict |", "|---|---|---|---|"]
    claimed += [_claim_line(row) for _, row in judged.iterrows()]
    command = f"lori-nb study --profile {folder.name}"
    seeds = int(scores["seeds"].max())
    note = "one seed: a demonstration" if seeds == 1 else f"{seeds} seeds"
    return "\n\n".join(
        [
            f"Scores on the test rows with 95 % intervals ({note}; made by `{command}`, tables with run hashes in "
            f"`figures/reference/{folder.name}/`):",
            "\n".join(lines),
            "The papers' claims, each as a difference on these tasks. A verdict needs the whole interval on one side "
            "of 0, or of -0.05 where the claim is that something *matches*, over points that do not share runs or "
            "adapters, and for joint training as many rows of a task as alone"
            + ("; with one seed it speaks of these runs alone, and another seed may turn it:" if seeds == 1 else ":"),
            "\n".join(claimed),
            f"Its {times['runs'].sum()} runs took {times['core_minutes'].sum():.0f} core-minutes (`times.csv` there), "
            "with two workers of one thread.",
        ]
    )


def _claim_line(row: pd.Series) -> str:
    claim, about = f"{row['claim']} ({row['paper']})", row["measured as"].replace("|", "\\|")
    if pd.isna(row["value"]):
        return f"| {claim} | {about} | – | {row['verdict']} |"
    value = f"{text_of(row, digits=3, signed=True)}, n = {int(row['n'])} {row['of']}"
    if not pd.isna(row.get("detectable", math.nan)):
        value += f", detectable {row['detectable']:.3f}"
    return f"| {claim} | {about} | {value} | {row['verdict']} |"


def write_readme(path: Path, folder: Path) -> None:
    """Replace what stands between README's two marks by the rendered results."""
    text = path.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    write_atomically(path, f"{before}{START}\n\n{rendered(folder)}\n\n{END}{after}")

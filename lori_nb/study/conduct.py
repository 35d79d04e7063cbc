"""A study from its settings to its notebooks: plan, train each run once, execute the notebooks, show what came out."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lori_nb.lab.methods import get_method
from lori_nb.lab.models import BaseModelError, locate
from lori_nb.lab.paths import PROJECT, data_folder
from lori_nb.lab.resolving import check, resolve
from lori_nb.lab.runs import Store
from lori_nb.lab.specs import Spec, with_parents
from lori_nb.lab.tasks.hub import HubUnreachableError
from lori_nb.study.cells import base_runs, single
from lori_nb.study.cost import Cost, cost_of, prefix_seconds
from lori_nb.study.display import Display, clock
from lori_nb.study.execute import Executed, execute_notebook, side_by_side
from lori_nb.study.joint_arms import get_joint_arm, joint_arm_spec
from lori_nb.study.notebook import figures_folder, slug
from lori_nb.study.parameters import read_parameters
from lori_nb.study.plans import PLANS
from lori_nb.study.pool import train_all
from lori_nb.study.profiles import NOTEBOOKS, as_parameters
from lori_nb.study.settings import Settings
from lori_nb.study.summary import readable, summarise

AT_ONCE = 2  # notebooks executed at the same time; they only read and draw
HOUR = 3600.0


class StudyError(RuntimeError):
    """Some notebooks failed; the message names each and why. The others are done and kept."""


def chosen_notebooks(names: Sequence[str]) -> tuple[str, ...]:
    """Names of the study's notebooks, all of them for none given; a number ("06") stands for its notebook.

    ValueError names the nearest known one.
    """
    numbers = {name.partition("_")[0]: name for name in NOTEBOOKS}
    stems = [numbers.get(stem, stem) for stem in (Path(name).stem for name in names)]
    for stem in stems:
        if stem not in NOTEBOOKS:
            near = difflib.get_close_matches(stem, NOTEBOOKS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"notebooks must be among {', '.join(NOTEBOOKS)}; found {stem!r}{hint}")
    return tuple(name for name in NOTEBOOKS if name in stems) or NOTEBOOKS


def planned(settings: Settings, notebooks: Sequence[str]) -> list[Spec]:
    """Every run that the notebooks ask for, once and after the runs it depends on; all are checked.

    They are not resolved, so neither weights nor rows are needed.

    Raises:
        ValueError: a setting outside its range, a rank above a matrix's dimension, layers that the base does not have.
    """
    specs = with_parents(spec for name in notebooks for spec in PLANS[name](settings))
    for spec in specs:
        check(spec)
        cost_of(spec)
    return specs


def plan_text(specs: Sequence[Spec], jobs: int) -> str:
    """A line for each run (label, trainable parameters, steps, rough cost) and the totals."""
    costs, done = [cost_of(spec) for spec in specs], _finished(specs)
    width = max(len(spec.label) for spec in specs)
    lines = [f"{'run':<{width}}  {'trainable':>13}  {'steps':>6}  {'about':>8}"]
    lines += [_plan_line(spec, cost, width, spec in done) for spec, cost in zip(specs, costs, strict=True)]
    missing = [spec for spec in specs if spec not in done]
    seconds = sum(cost_of(spec).seconds for spec in missing) + prefix_seconds(missing)
    steps = sum(cost.steps for cost in costs)
    total = f"{len(specs)} runs, {len(done)} of them done; {steps:,} steps in all"
    expected = f"about {span(seconds)} of work on one core" if missing else "nothing left to train"
    share = f", {span(seconds / jobs)} with {jobs} workers" if missing and jobs > 1 else ""
    return "\n".join([*lines, "", f"{total}; {expected}{share} (a rough estimate)"])


def _plan_line(spec: Spec, cost: Cost, width: int, done: bool) -> str:
    about = "done" if done else span(cost.seconds)
    return f"{spec.label:<{width}}  {cost.parameters:>13,}  {cost.steps:>6,}  {about:>8}"


def span(seconds: float) -> str:
    """Minutes and seconds, or hours above one: "3:07", "5.2 h"."""
    return clock(seconds) if seconds < HOUR else f"{seconds / HOUR:,.1f} h"


def _finished(specs: Sequence[Spec]) -> set[Spec]:
    """Those already done; none where it takes a network to know."""
    if any(_on_hub(base) for base in {spec.base for spec in specs}):
        return set()
    store = Store()
    try:
        return {spec for spec in specs if store.finished(resolve(spec))}
    except (BaseModelError, HubUnreachableError, FileNotFoundError):
        return set()


def _on_hub(base: str) -> bool:
    try:
        return locate(base)[0] == "hub"
    except BaseModelError:
        return True


def conduct(settings: Settings, notebooks: Sequence[str], jobs: int, command: str) -> list[Executed]:
    """Train what is missing, execute the notebooks, and print the results and where everything is.

    Args:
        command: the command line without the choice of notebooks; each footer shows it.

    Raises:
        ValueError: bad input, before any work.
        TrainingFailedError: some runs failed; no notebook is executed.
        StudyError: some notebooks failed, after all others are done.
    """
    paths = [_notebook(name) for name in notebooks]
    specs = planned(settings, notebooks)
    trained = train_all(specs, jobs=jobs)
    print(f"runs: {trained} done now, {len(specs) - trained} done before", flush=True)
    executed = _execute(settings, paths, command)
    print(f"\n{results_text(settings, specs)}\n")
    places = {
        "figures": figures_folder() / slug(settings),
        "tables": data_folder() / "tables" / slug(settings),
        "notebooks": executed_folder(settings),
    }
    for name, folder in places.items():
        print(f"{name + ':':<10} {_shown(folder)}")
    return executed


def executed_folder(settings: Settings) -> Path:
    """Where the executed copies go: a folder for each profile, and for each change to one."""
    return data_folder() / "executed" / slug(settings)


def _notebook(name: str) -> Path:
    path = PROJECT / "notebooks" / f"{name}.ipynb"
    if not path.is_file():
        raise ValueError(f"notebook {name} must stand in {_shown(path.parent)}; found none")
    return path


def _execute(settings: Settings, paths: Sequence[Path], command: str) -> list[Executed]:
    display, executed, failed = Display(len(paths)), [], []

    def call(path: Path) -> Executed:
        names = [name for name in read_parameters(path) if hasattr(settings, name)]
        return execute_notebook(
            path,
            as_parameters(settings, names),
            executed_folder(settings) / path.name,
            lambda done, total: display.update(path.stem, path.stem, "cell", done, total),
            profile=settings.profile,
            command=f"{command} --notebooks {path.stem}",
        )

    def ended(key: str, result: Executed | Exception) -> None:
        failed_now = isinstance(result, Exception)
        display.finish(key, "FAILED" if failed_now else "executed")
        (failed if failed_now else executed).append(result)

    for path in paths:
        read_parameters(path)
    side_by_side({path.stem: lambda p=path: call(p) for path in paths}, AT_ONCE, ended)
    if failed:
        raise StudyError("\n".join(str(error) for error in failed))
    return sorted(executed, key=lambda each: each.path)


def results_text(settings: Settings, specs: Sequence[Spec]) -> str:
    """Score of every arm on every task with n and interval, among the runs that were asked for."""
    rows = []
    for arm, wanted in _arms(settings).items():
        asked = [spec for spec in wanted if spec in set(specs)]
        rows += [Store().table(asked).assign(arm=arm)] if asked else []
    if not rows:
        return "no scores of adapters alone in this choice of notebooks"
    table = pd.concat(rows, ignore_index=True)
    return readable(summarise(table, ["arm", "task"]), "arm", "task").to_string()


def _arms(settings: Settings) -> dict[str, list[Spec]]:
    arms: dict[str, list[Spec]] = {}
    for spec in base_runs(settings):
        shown = f", {spec.shots} examples shown" if spec.shots else ""
        arms.setdefault(get_method(spec.method).title + shown, []).append(spec)
    for method in dict.fromkeys((*settings.method, "lora")):
        grid = itertools.product(settings.tasks, settings.seed)
        arms[get_method(method).title] = [single(settings, method, task, seed) for task, seed in grid]
    for name in settings.joint_arms:
        arms[get_joint_arm(name).title] = [joint_arm_spec(settings, name, seed) for seed in settings.seed]
    return arms


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)

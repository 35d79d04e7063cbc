"""Profiles: a study's settings from a YAML file, changed by what a notebook's parameter cell or the command line says.

Every name is checked before any work; an unknown one is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from lori_nb.lab.models import base_kind
from lori_nb.lab.own_code import load_extensions
from lori_nb.lab.paths import PROJECT
from lori_nb.lab.tasks import expand_tasks, get_task
from lori_nb.study.settings import Settings, absolute, as_list, checked

NOTEBOOKS = ("01_lori", "02_masks", "03_ortho_lora", "04_interference", "05_merging", "06_forgetting", "07_report")


def profile_folder() -> Path:
    """Where the profiles' YAML files are."""
    return PROJECT / "notebooks" / "profiles"


def profile_names() -> list[str]:
    """Profiles that have a YAML file."""
    return sorted(path.stem for path in profile_folder().glob("*.yaml"))


def read_profile(name: str) -> dict[str, Any]:
    """The raw values of a profile, those that it leaves out from the one it is ``like``; ValueError lists the known
    profiles.
    """
    path = profile_folder() / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"profile must be one of {', '.join(profile_names())}; found {name!r}")
    values = yaml.safe_load(path.read_text())
    like = values.pop("like", None)
    return values if like is None else read_profile(like) | values


def load_settings(profile: str = "quick", **changes: Any) -> Settings:
    """The settings of a profile with some values changed.

    Tasks written for encoders bring the profile's ``encoder`` section (base, layers, rates) with them, unless the base
    is changed to a decoder.

    Raises:
        ValueError: an unknown name, or a value of the wrong type or outside its range.
    """
    load_extensions()
    values = {"profile": profile, **read_profile(profile)}
    encoder = values.pop("encoder", {})
    plain_tasks = expand_tasks(values["tasks"])
    known = [f.name for f in fields(Settings)]
    _check_names(list(values), known, f"profile {profile}")
    _check_names(list(encoder), known, f"profile {profile}, encoder")
    _check_names(list(changes), known, "settings")
    tasks = expand_tasks(as_list(changes.get("tasks", values["tasks"])))
    if all(get_task(task).reads == "encoder" for task in tasks) and _is_encoder(changes.get("base")):
        values |= encoder
    if (
        tasks != plain_tasks
    ):  # a study of other tasks has none of many tasks, hours long, and none beside, unless asked for
        values |= {"pair_tasks": (), "capacity_tasks": (), "sequence_scored": ()}
        left = [task for task in as_list(values.get("sequence", ())) if task in tasks]
        values["sequence"] = left if len(left) > 1 else []
    for name in ("mask_tasks", "arm_tasks") if "tasks" in changes else ():
        if values.get(name):
            values[name] = [task for task in values[name] if task in tasks] or [tasks[0]]
    values |= changes
    values["base"] = absolute(values["base"])
    return checked({**values, "tasks": tasks})


def _is_encoder(base: str | None) -> bool:
    """Whether a base that was asked for is an encoder; none was where it is None, and any may come."""
    return base is None or base_kind(absolute(base)) == "encoder"


def as_parameters(settings: Settings, names: list[str]) -> dict[str, Any]:
    """The values of some settings as a notebook's parameter cell writes them: a list of one as the one value for seed
    and method.
    """
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(settings).items()}
    for key in ("seed", "method"):
        if len(plain[key]) == 1:
            plain[key] = plain[key][0]
    return {name: plain[name] for name in names}


def _check_names(given: list[str], known: list[str], where: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: unknown parameter {name!r}; known are {', '.join(known)}{hint}")

"""Arms of a comparison: a method with some of its settings changed, so that one cause at a time is looked at.

Every method is an arm by its own name, as it stands. Each arm belongs to one of four questions:

- ``baseline``: what LoRI must be compared with: other methods, the learning rates crossed, since LoRI's published rates
  differ tenfold between its two forms, and LoRA given the steps of both of LoRI-S's trainings;
- ``mask``: which part of the mask does the work: its origin, scope, structure, or how long it was calibrated;
- ``subspace``: how A is drawn across tasks, for LoRA and LoRI alike;
- ``longer``: LoRI beside LoRA where both, LoRI-S's calibration too, train twice as long: what is left of a difference
  between methods of which one only learns faster; and whether LoRA gains by as many again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lori_nb.lab.methods import METHODS
from lori_nb.lab.specs import RunSpec
from lori_nb.method.masks import SCOPES
from lori_nb.study.cells import rate_of, single
from lori_nb.study.settings import Settings

BASELINE = "lora"


@dataclass(frozen=True)
class Arm:
    """A method with changes.

    Attributes:
        question: "baseline", "mask", "subspace" or "longer".
        settings: changed settings of the study.
        rate_like: the method whose learning rate is taken, where it is not the method's own.
        step_factor: times the steps of the schedule, and of the calibration's.
        beside: the arm that it is compared with.
    """

    name: str
    title: str
    method: str
    question: str
    settings: Mapping = field(default_factory=dict)
    rate_like: str | None = None
    step_factor: int = 1
    beside: str = BASELINE


def _mask_arm(name: str, title: str, **changes) -> Arm:
    return Arm(f"lori-s-{name}", f"LoRI-S, {title}", "lori-s", "mask", changes)


def _subspace_arms() -> list[Arm]:
    titles = {"lora": "LoRA", "lori-d": "LoRI-D", "lori-s": "LoRI-S"}
    return [
        Arm(f"{method}-{policy}", f"{title}, {policy} A", method, "subspace", settings={"subspace": policy})
        for policy in ("shared", "orthogonal")
        for method, title in titles.items()
    ]


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("lora-longer", "LoRA, twice the steps", "lora", "baseline", step_factor=2),
        Arm("lori-d-at-s-rate", "LoRI-D at LoRI-S's rate", "lori-d", "baseline", rate_like="lori-s"),
        Arm("lori-s-at-d-rate", "LoRI-S at LoRI-D's rate", "lori-s", "baseline", rate_like="lori-d"),
        _mask_arm("fresh-a", "fresh A", mask_origin="fresh-a"),
        _mask_arm("random", "random mask", mask_origin="random"),
        _mask_arm("rows", "whole rows of B", mask_structure="rows"),
        _mask_arm("early", "calibrated by a tenth", calibration_share=0.1),
        *(_mask_arm(scope, f"per {scope}", mask_scope=scope) for scope in SCOPES if scope != "model"),
        *_subspace_arms(),
        Arm("lori-d-longer", "LoRI-D, twice the steps", "lori-d", "longer", step_factor=2, beside="lora-longer"),
        Arm("lori-s-longer", "LoRI-S, twice the steps", "lori-s", "longer", step_factor=2, beside="lora-longer"),
        Arm("lora-longest", "LoRA, four times the steps", "lora", "longer", step_factor=4, beside="lora-longer"),
    )
}


def get_arm(name: str) -> Arm:
    """The named arm; a method's own name is the method as it stands. ValueError lists the known ones."""
    if name in METHODS:
        return Arm(name, METHODS[name].title, name, "baseline")
    if name not in ARMS:
        raise ValueError(f"arms must be among {', '.join((*METHODS, *ARMS))}; found {name!r}")
    return ARMS[name]


def arm_spec(settings: Settings, name: str, task: str, seed: int) -> RunSpec:
    """The run of one arm on one task."""
    arm = get_arm(name)
    changes: dict = {}
    if arm.rate_like is not None:
        changes["learning_rate"] = rate_of(settings, arm.rate_like)
    schedule: dict = {}
    if arm.step_factor != 1:
        schedule = {"steps": settings.steps_on(task) * arm.step_factor, "task_steps": {}}
    return single(replace(settings, **arm.settings, **schedule), arm.method, task, seed, **changes)


def arms_of(settings: Settings, question: str) -> list[str]:
    """The study's arms that belong to a question, in the order of the settings."""
    return [name for name in settings.arms if get_arm(name).question == question]

"""Ways to learn all tasks in one adapter, each a name that settings and figures use; beside them, one adapter a task.

All share rows, steps and batch; a way has its own learning rate where the settings name one, else that of the plain way
it changes. Ways that train twice as long are compared with each other and with an adapter a task of twice the steps:
what is left of a gap of which one side only learns faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lori_nb.lab.methods import get_method
from lori_nb.lab.options import SWITCHES, check_solver_options
from lori_nb.lab.specs import RunSpec
from lori_nb.method.solvers import SOLVERS
from lori_nb.study.arms import arm_spec
from lori_nb.study.cells import joint, rate_of
from lori_nb.study.settings import Settings

SINGLE, JOINT, ORTHO = "single", "joint", "ortho-lora"
SINGLE_LONGER, JOINT_LONGER, ORTHO_LONGER = (f"{name}-longer" for name in (SINGLE, JOINT, ORTHO))
GAP = (SINGLE, JOINT, ORTHO)  # what the gap is made of
LONGER = (SINGLE_LONGER, JOINT_LONGER, ORTHO_LONGER)  # what tells whether that was their plateau


@dataclass(frozen=True)
class JointArm:
    """One way to train one adapter on all tasks.

    Attributes:
        method: a registered method; what decides whether A is trained and conflicts are solved.
        options: switches of the conflict solver.
        wide: with as many times the rank as there are tasks: the parameters that one adapter a task would have.
        like: whose learning rate is taken where there is no own one.
        step_factor: times the steps of the schedule.
        beside: the way that it is compared with.
        unprojected: the same way without projection, where that is not ``beside``.
    """

    name: str
    title: str
    method: str
    options: tuple[tuple[str, str], ...] = ()
    wide: bool = False
    like: str = JOINT
    step_factor: int = 1
    beside: str = JOINT
    unprojected: str | None = None

    @property
    def alone(self) -> str:
        """An adapter a task, of as many steps."""
        return SINGLE if self.step_factor == 1 else SINGLE_LONGER


def _solved(name: str, title: str, **options: str) -> JointArm:
    return JointArm(name, title, "ortho-lora", tuple(sorted(options.items())), like=ORTHO)


JOINT_ARMS: dict[str, JointArm] = {
    arm.name: arm
    for arm in (
        JointArm(JOINT, "LoRA, joint", "lora"),
        JointArm("joint-wide", "LoRA, joint, T times the rank", "lora", wide=True),
        JointArm(ORTHO, "Ortho-LoRA", "ortho-lora"),
        _solved("pcgrad", "PCGrad, whole adapter", grouping="adapter"),
        _solved("upgrad", "UPGrad, whole adapter", grouping="adapter", solver="upgrad"),
        _solved("gradvac", "GradVac, whole adapter", grouping="adapter", solver="gradvac"),
        JointArm("joint-lori-d", "LoRI-D, joint", "lori-d", like="lori-d"),
        JointArm("ortho-lori-d", "Ortho-LoRI-D", "ortho-lori-d", like="lori-d", unprojected="joint-lori-d"),
        JointArm(JOINT_LONGER, "LoRA, joint, twice the steps", "lora", step_factor=2),
        JointArm(ORTHO_LONGER, "Ortho-LoRA, twice the steps", "ortho-lora", (), False, ORTHO, 2, JOINT_LONGER),
    )
}


def get_joint_arm(name: str) -> JointArm:
    """The named way; a conflict solver's own name is that solver, tensor by tensor. Switches may follow, and numbers
    of the solver, as in "ortho-lora order=fixed grouping=module" or "gradvac beta=0.1". ValueError lists the known
    names and switches.
    """
    plain, *switches = name.split()
    if switches:
        return _switched(get_joint_arm(plain), name, switches)
    if plain in JOINT_ARMS:
        return JOINT_ARMS[plain]
    if plain in SOLVERS:
        return _solved(plain, plain, solver=plain)
    known = dict.fromkeys((*JOINT_ARMS, *SOLVERS))
    raise ValueError(f"joint_arms must be among {', '.join(known)}; found {name!r}")


def _switched(arm: JointArm, name: str, switches: Sequence[str]) -> JointArm:
    """A way with switches or numbers of its conflict solver changed."""
    options = dict(arm.options) | dict(switch.partition("=")[::2] for switch in switches)
    known = "; ".join(f"{key}={'|'.join(values)}" for key, values in SWITCHES.items())
    try:
        if not get_method(arm.method).projects:
            raise ValueError(f"{arm.name} does not project")
        check_solver_options(options)
    except ValueError as error:
        raise ValueError(
            f"joint_arms' switches follow a way that projects and are {known}; or a number of its solver; "
            f"found {name!r}: {error}"
        ) from error
    return replace(arm, name=name, title=f"{arm.title}, {', '.join(switches)}", options=tuple(sorted(options.items())))


def check_joint_arms(names: Sequence[str]) -> None:
    """ValueError for an unknown way, or one without the way that it is compared with."""
    for beside in dict.fromkeys((JOINT, *(get_joint_arm(name).beside for name in names))):
        if beside not in names:
            raise ValueError(
                f"joint_arms must hold {beside!r}, which others are compared with; found {', '.join(names)}"
            )


def joint_arm_spec(settings: Settings, name: str, seed: int) -> RunSpec:
    """The run of one way to learn all tasks at once."""
    arm = get_joint_arm(name)
    rate = rate_of(settings, name, arm.like, JOINT, "lora")
    fixed = replace(settings, learning_rate={**settings.learning_rate, arm.method: rate, JOINT: rate})
    if arm.wide:  # α / r as it was
        fixed = replace(fixed, rank=settings.rank * len(settings.tasks), alpha=settings.alpha * len(settings.tasks))
    fixed = replace(fixed, joint_steps=settings.joint_steps * arm.step_factor)
    return replace(joint(fixed, arm.method, seed), options=arm.options)


def arrangements(settings: Settings) -> list[str]:
    """An adapter a task, of as many steps as each way has, and the ways to learn all tasks in one."""
    alone = dict.fromkeys((SINGLE, *(get_joint_arm(name).alone for name in settings.joint_arms)))
    return [*alone, *settings.joint_arms]


def arrangement_specs(settings: Settings, seed: int) -> dict[str, list[RunSpec]]:
    """For each way to learn all tasks, one spec a task: one adapter each, or one for all."""
    alone = {SINGLE: "lora", SINGLE_LONGER: "lora-longer"}
    return {
        name: [arm_spec(settings, alone[name], task, seed) for task in settings.tasks]
        if name in alone
        else [joint_arm_spec(settings, name, seed)] * len(settings.tasks)
        for name in arrangements(settings)
    }


def planned_arrangements(settings: Settings) -> list[RunSpec]:
    """Joint training and Ortho-LoRA beside one adapter a task on every seed, also where they train twice as long; the
    other ways on ``arm_seed``.
    """
    return [
        spec
        for seed in settings.seed
        for name, specs in arrangement_specs(settings, seed).items()
        if name in (*GAP, *LONGER) or seed in settings.arm_seed
        for spec in specs
    ]


def longer_arrangements(settings: Settings) -> list[RunSpec]:
    """Of :func:`planned_arrangements` those that train twice as long."""
    several = [arrangement_specs(settings, seed) for seed in settings.seed]
    return list(dict.fromkeys(spec for each in several for name in LONGER for spec in each.get(name, ())))

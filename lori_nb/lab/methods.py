"""Methods: what distinguishes one way to train an adapter from another. The loop is the same for all.

A method is a small record of choices and hooks. A new one is registered by a decorator, from a notebook cell or an own
package::

    @method("lora-l2", title="LoRA + L2", like="lora")
    def l2_on_B(live, step):
        return 1e-4 * sum(low.B.square().sum() for low in live.values())

which takes everything from LoRA and adds a penalty to the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lori_nb.lab import continual
from lori_nb.lab.baselines import lora_fa_optimiser
from lori_nb.lab.extensions import source_digest
from lori_nb.lab.specs import RunSpec
from lori_nb.method.adapters import Adapter, Factors, LowRank
from lori_nb.method.masks import magnitude_masks, random_masks
from lori_nb.method.subspaces import down_projection, fresh_subspace, subspace_id

if TYPE_CHECKING:
    from lori_nb.lab.models import Base
    from lori_nb.lab.stages import Stage

Live = dict[str, LowRank]
Gradients = Mapping[str, Tensor]
LOW_RANK = "low-rank"
FACTORED = (LOW_RANK, "dora")  # forms that leave factors A and B
HOOKS = ("penalty", "transform", "after_step", "optimiser", "initialise", "begin")


@dataclass(frozen=True)
class Method:
    """One way to train an adapter.

    Attributes:
        trains_A: whether A is trained or stays at its random start.
        masked: whether only entries of B under a mask are trained; the mask comes from the ``calibration`` run.
        calibration: the method of the run that a mask is taken from.
        projects: whether conflicting task gradients are projected (Ortho-LoRA) before they are summed.
        form: what is trained at each linear module: "low-rank" factors added to its output, or what takes its place, a
            key of ``lori_nb.lab.baselines.REPLACEMENTS``.
        optimiser: hook (trained parameters by name, live factors, lr=, weight_decay=) → optimiser; None is AdamW.
        penalty: hook (live, step) → scalar added to the loss.
        transform: hook (list of task gradients by name, step) → gradient by name; replaces the sum over tasks.
        after_step: hook (live, step), run after every optimiser step.
        initialise: hook (spec, factors, base) → factors that training begins with, of the same modules and shapes, from
            those that it would begin with. ``base`` is the loaded :class:`lori_nb.lab.models.Base`, so that a start may
            depend on its weights and activations. An A that it gives is stored, since no seed draws it.
        begin: hook (stage) → hooks of this run by name ("penalty", "transform", "after_step"), called where training
            goes on from an earlier task's run; ``stage`` (:class:`lori_nb.lab.stages.Stage`) gives the earlier tasks'
            rows, adapters and gradients.
        grows: whether such a run adds factors of its own beside those of earlier tasks, which stay as they are.
        strengths: numbers that ``begin`` takes, by name, with their defaults; a run's ``options`` change them.
            "memory" is how many training rows of every earlier task are kept for it.
    """

    name: str
    title: str
    trains_A: bool = True
    masked: bool = False
    calibration: str | None = None
    projects: bool = False
    trains: bool = True
    form: str = LOW_RANK
    optimiser: Callable[..., torch.optim.Optimizer] | None = None
    penalty: Callable[[Live, int], Tensor] | None = None
    transform: Callable[[Sequence[Gradients], int], Gradients] | None = None
    after_step: Callable[[Live, int], None] | None = None
    built_in: bool = False
    # Left out of repr, hence of the digest of methods that were registered before there were these.
    initialise: Callable[[RunSpec, dict[str, Factors], Base], Mapping[str, Factors]] | None = field(
        default=None, repr=False
    )
    begin: Callable[[Stage], Mapping[str, Callable]] | None = field(default=None, repr=False)
    grows: bool = field(default=False, repr=False)
    strengths: Mapping[str, float] = field(default_factory=dict, repr=False)

    @property
    def source_digest(self) -> str:
        """SHA-256 of the hooks' source, so that a registered extension counts by what it does."""
        hooks = {name: getattr(self, name) for name in HOOKS}
        given = tuple(hook for hook in hooks.values() if hook is not None)
        begins = repr((self.grows, sorted(self.strengths.items()))) if self.begin is not None else ""
        return source_digest(given, repr(replace(self, **dict.fromkeys(hooks))) + begins)


def _continual(name: str, title: str, begin: Callable, grows: bool = False, **strengths: float) -> Method:
    return Method(name, title, begin=begin, grows=grows, strengths=strengths, built_in=True)


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("base", "Base model", trains=False, built_in=True),
        Method("lora", "LoRA", built_in=True),
        Method("lori-d", "LoRI-D", trains_A=False, built_in=True),
        Method("lori-s", "LoRI-S", trains_A=False, masked=True, calibration="lori-d", built_in=True),
        Method("ortho-lora", "Ortho-LoRA", projects=True, built_in=True),
        Method("ortho-lori-d", "Ortho-LoRI-D", trains_A=False, projects=True, built_in=True),
        Method(
            "ortho-lori-s",
            "Ortho-LoRI-S",
            trains_A=False,
            masked=True,
            calibration="lori-d",
            projects=True,
            built_in=True,
        ),
        Method("lora-fa", "LoRA-FA", trains_A=False, optimiser=lora_fa_optimiser, built_in=True),
        Method("dora", "DoRA", form="dora", built_in=True),
        Method("full", "Full fine-tuning", form="full", built_in=True),
        _continual("ewc", "LoRA + EWC", continual.elastic_weights, strength=1000.0, memory=64),
        _continual("o-lora", "O-LoRA", continual.orthogonal_subspaces, grows=True, strength=0.5, memory=0),
        _continual("replay", "LoRA + replay", continual.replay, rows=2, memory=64),
        _continual("memory-projection", "Ortho-LoRA on memory", continual.projected_off_memory, rows=4, memory=64),
    )
}


def get_method(name: str) -> Method:
    """The registered method; ValueError lists the known ones."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; found {name!r}")
    return METHODS[name]


COUNTED = ("rows", "memory")  # strengths that count rows


def without_begin(name: str) -> str | None:
    """The built-in method that a method is but for its hook ``begin``, which nothing asks on a first task; None where
    it has other hooks too, or no ``begin``.
    """
    chosen = get_method(name)
    if chosen.begin is None:
        return None
    plain = [m for m in METHODS.values() if m.built_in and m.begin is None]
    return next((m.name for m in plain if _bare(m) == _bare(chosen)), None)


def _bare(chosen: Method) -> Method:
    return replace(chosen, name="", title="", built_in=True, begin=None, grows=False, strengths={})


def method(
    name: str, *, like: str, title: str | None = None, hook: str = "penalty", **changes
) -> Callable[[Callable], Callable]:
    """Decorator: register a method that is ``like`` another, with the decorated function as its ``hook``.

    Args:
        hook: one of :data:`HOOKS`.
        changes: other fields of :class:`Method` to change.
    """
    if hook not in HOOKS:
        raise ValueError(f"hook must be one of {', '.join(HOOKS)}; found {hook!r}")
    if name in METHODS and METHODS[name].built_in:
        raise ValueError(f"name must not be that of a method of the kit; found {name!r}")

    def wrap(function: Callable) -> Callable:
        METHODS[name] = replace(
            get_method(like), name=name, title=title or name, built_in=False, **{hook: function}, **changes
        )
        return function

    return wrap


def initial_live(
    spec: RunSpec,
    shapes: Mapping[str, tuple[int, int]],
    adapter_of: Callable[[RunSpec], Adapter],
    base: Base | None = None,
) -> Live:
    """The trainable factors that a run begins with.

    Args:
        shapes: module name → (d_out, d_in).
        adapter_of: gives the adapter of a finished run; asked for the spec's ``start`` and ``calibration``.
        base: what the method's hook ``initialise`` gets; it is not asked where a run goes on from another.

    Raises:
        ValueError: the hook gives other modules or shapes.
    """
    chosen = get_method(spec.method)
    goes_on = spec.start is not None and not chosen.grows
    factors = dict(adapter_of(spec.start).factors) if goes_on else fresh_factors(spec, shapes)
    if chosen.initialise is not None and not goes_on:
        factors = _checked_start(chosen.name, factors, dict(chosen.initialise(spec, dict(factors), base)))
    masks = masks_of(spec, shapes, adapter_of) if chosen.masked else {}
    return {name: LowRank(f, train_A=chosen.trains_A, mask=masks.get(name)) for name, f in factors.items()}


def _checked_start(method: str, wanted: Mapping[str, Factors], found: Mapping[str, Factors]) -> dict[str, Factors]:
    wanted_shapes, found_shapes = (
        {name: (tuple(f.A.shape), tuple(f.B.shape)) for name, f in each.items()} for each in (wanted, found)
    )
    for name in dict.fromkeys((*wanted_shapes, *found_shapes)):
        if wanted_shapes.get(name) != found_shapes.get(name):
            raise ValueError(
                f"initialise of method {method!r} must give A and B of {name} the shapes {wanted_shapes.get(name)}; "
                f"found {found_shapes.get(name)}"
            )
    return {name: found[name] for name in wanted}


def fresh_factors(spec: RunSpec, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Factors]:
    """B = 0 and the seeded A of the spec's subspace."""
    stream, scale = subspace_of(spec), spec.alpha / spec.rank
    return {
        name: Factors(down_projection(spec.seed, stream, name, spec.rank, d_in), torch.zeros(d_out, spec.rank), scale)
        for name, (d_out, d_in) in shapes.items()
    }


def subspace_of(spec: RunSpec) -> str:
    """The stream that a run's A is drawn from, by its subspace policy and, under a mask, by the mask's origin."""
    stream = subspace_id(spec.subspace, spec.tasks, spec.family)
    masked = get_method(spec.method).masked
    return fresh_subspace(stream) if masked and get_mask_origin(spec.mask_origin).fresh_A else stream


@dataclass(frozen=True)
class MaskOrigin:
    """Where a mask comes from.

    Attributes:
        calibrated: whether it is found by magnitude in a calibration run; else it is drawn at random.
        fresh_A: whether the masked run draws another A than its calibration had. The mask's columns then belong to
            rank directions that no longer exist; the LoRI authors' code does so.
        disjoint: whether entries that earlier tasks of a sequence hold are left to them, so that none of them moves.
    """

    calibrated: bool
    fresh_A: bool
    disjoint: bool = False


MASK_ORIGINS = {
    "same-a": MaskOrigin(calibrated=True, fresh_A=False),
    "fresh-a": MaskOrigin(calibrated=True, fresh_A=True),
    "random": MaskOrigin(calibrated=False, fresh_A=False),
    "free": MaskOrigin(calibrated=True, fresh_A=False, disjoint=True),
}


def get_mask_origin(name: str) -> MaskOrigin:
    """The named origin; ValueError lists the known ones."""
    if name not in MASK_ORIGINS:
        raise ValueError(f"mask_origin must be one of {', '.join(MASK_ORIGINS)}; found {name!r}")
    return MASK_ORIGINS[name]


def masks_of(
    spec: RunSpec, shapes: Mapping[str, tuple[int, int]], adapter_of: Callable[[RunSpec], Adapter]
) -> dict[str, Tensor]:
    """The mask on every B (d_out × r) of a masked run, by its origin, scope, structure and sparsity."""
    if get_mask_origin(spec.mask_origin).calibrated:
        return calibrated_masks(spec, adapter_of)
    of_B = {name: (d_out, spec.rank) for name, (d_out, _) in shapes.items()}
    stream = "+".join(spec.tasks)
    return random_masks(of_B, spec.sparsity, spec.mask_scope, spec.mask_structure, seed=spec.seed, stream=stream)


def calibrated_masks(spec: RunSpec, adapter_of: Callable[[RunSpec], Adapter]) -> dict[str, Tensor]:
    """The entries that the calibration run moved most from where it began (|B| when it began at zero)."""
    moved = {name: f.B for name, f in adapter_of(spec.calibration).factors.items()}
    if spec.calibration.start is not None:
        before = adapter_of(spec.calibration.start).factors
        moved = {name: B - before[name].B for name, B in moved.items()}
    disjoint = get_mask_origin(spec.mask_origin).disjoint and spec.start is not None
    taken = adapter_of(spec.start).masks if disjoint else None
    return magnitude_masks(moved, spec.sparsity, spec.mask_scope, spec.mask_structure, taken)

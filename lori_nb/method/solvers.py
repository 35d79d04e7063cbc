"""Conflict solvers by name: from the Gramian of T task gradients to the coefficients of one combined gradient.

"project" is Ortho-LoRA's, the others are those of multi-task learning at large. It, GradVac and Nash-MTL are at
home here, for all blocks at once; the rest are torchjd's weightings on the same Gramians, one block after another on
the CPU. A new one is registered by a decorator, from a notebook cell or an own package::

    @solver("shortest")
    def shortest(problem):
        '''Every task weighed by the inverse of its gradient's norm.'''
        norms = problem.gramians.diagonal(dim1=1, dim2=2).sqrt()
        return problem.weights / norms.clamp(min=1e-12)

Numbers that a solver takes beside the problem, ``def shortest(problem, power=1.0)``, have defaults; settings change
them by name.

A solver's combined gradient is compared with what joint training takes, Σ_t w_t g_t, so where its own scale is that of
a mean, it is brought to Σ_t w_t.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import inf

import torch
from torch import Tensor

from lori_nb.method.projection import all_orders, fixed_orders, projection_matrices, random_orders, send

RECIPE = 1  # raise when a solver gives other coefficients
ORDERS = ("random", "fixed", "mean")
SWITCHES = ("solver", "grouping", "reduction", "order", "reference")  # what else settings say of solving conflicts
MOST_TASKS_FOR_ALL_ORDERS = 6  # 120 orders
HIGHEST_COSINE = 0.99  # of GradVac's running mean
NEWTON_STEPS = 60  # of Nash-MTL
RIDGE = 1e-12  # of Nash-MTL, relative to a squared norm: far above float64's roundoff and far below what matters


@dataclass(frozen=True)
class Problem:
    """What a solver is given.

    Attributes:
        gramians: G_ij = ⟨g_i, g_j⟩ of every block (G, T, T), float32 or float64.
        weights: w_t of joint training (T,), the reduction in them.
        order: "random", "fixed" or "mean", the order in which a gradient meets the others.
        reference: "original" or "projected".
        generator: what random orders are drawn from; None unless the order is random.
        state: tensors that a solver keeps from step to step under names of its own; a checkpoint holds them.
        told: what a solver tells of its work: "projected", see :class:`lori_nb.method.conflicts.Conflicts`.
    """

    gramians: Tensor
    weights: Tensor
    order: str = "fixed"
    reference: str = "original"
    generator: torch.Generator | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    told: dict[str, Tensor] = field(default_factory=dict)

    def orders(self) -> Tensor:
        """(T, T−1), or (G, T, T−1) where they are drawn."""
        groups, tasks, _ = self.gramians.shape
        return fixed_orders(tasks) if self.order == "fixed" else random_orders(groups, tasks, self.generator)


Solver = Callable[..., Tensor]  # of a problem, and numbers with defaults: coefficients (G, T)
SOLVERS: dict[str, Solver] = {}
MOST: dict[str, dict[str, float]] = {}  # how large a solver's numbers may be, where that is bounded


def solver(name: str, **most: float) -> Callable[[Solver], Solver]:
    """Decorator: register a conflict solver under a name; a later one of the same name takes its place. ``most`` bounds
    its numbers from above; none may be below 0. ValueError for a number without a default or called as a switch is,
    and for a bound of no number.
    """

    def wrap(function: Solver) -> Solver:
        numbers = _numbers_of(function)
        for key, default in numbers.items():
            if key in SWITCHES or not isinstance(default, (int, float)):
                raise ValueError(
                    f"numbers of solver {name} must have a number as default and another name than "
                    f"{', '.join(SWITCHES)}; found {key!r}"
                )
        if unknown := sorted(set(most) - set(numbers)):
            raise ValueError(
                f"bounds of solver {name} must be of its numbers, {', '.join(numbers)}; found {unknown[0]!r}"
            )
        SOLVERS[name], MOST[name] = function, most
        return function

    return wrap


def get_solver(name: str) -> Solver:
    """The registered solver; ValueError lists the known ones."""
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; found {name!r}")
    return SOLVERS[name]


def strengths_of(name: str) -> dict[str, float]:
    """The numbers that a solver takes, by name, with their defaults."""
    return dict(_numbers_of(get_solver(name)))


@cache
def _numbers_of(function: Solver) -> dict[str, float]:
    _, *numbers = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in numbers}


def check_strengths(name: str, strengths: Mapping[str, float]) -> None:
    """ValueError for a number that the solver does not take, or one out of its range."""
    known = _numbers_of(get_solver(name))
    for key, value in strengths.items():
        if key not in known:
            raise ValueError(f"strengths of solver {name} must be among {', '.join(known) or 'none'}; found {key!r}")
        most = MOST.get(name, {}).get(key, inf)
        if not (0 <= value <= most and value < inf):
            wanted = f"between 0 and {most:g}" if most < inf else "finite and at least 0"
            raise ValueError(f"{key} of solver {name} must be {wanted}; found {value!r}")


@solver("project")
def project(problem: Problem) -> Tensor:
    """Each gradient off those that it conflicts with, one after another (PCGrad's step, Ortho-LoRA's)."""
    gramians, tasks = problem.gramians, problem.gramians.shape[1]
    if problem.order != "mean":
        matrices = projection_matrices(gramians, problem.orders(), problem.reference)
    else:
        check_orders(problem.order, tasks)
        orders = all_orders(tasks)
        matrices = sum(projection_matrices(gramians, each, problem.reference) for each in orders) / len(orders)
    problem.told["projected"] = matrices
    return torch.einsum("i,git->gt", send(problem.weights.to(matrices.dtype), matrices.device), matrices)


def check_orders(order: str, tasks: int) -> None:
    """ValueError where the mean over all orders would be over too many."""
    if order == "mean" and tasks > MOST_TASKS_FOR_ALL_ORDERS:
        raise ValueError(f"tasks must be at most {MOST_TASKS_FOR_ALL_ORDERS} for order 'mean'; found {tasks}")


@solver("sum")
def plain_sum(problem: Problem) -> Tensor:
    """Joint training: conflicts stay."""
    return send(problem.weights, problem.gramians.device).expand(problem.gramians.shape[:2])


@solver("gradvac", beta=1.0)
def gradient_vaccine(problem: Problem, beta: float = 0.5) -> Tensor:
    """Gradient Vaccine (arXiv 2010.05874): a pair whose cosine φ lies below its running mean φ̂ is turned up to it,

        g_i ← g_i + ‖g_i‖ (φ̂ √(1 − φ²) − φ √(1 − φ̂²)) / (‖g_j‖ √(1 − φ̂²)) · g_j,      φ̂ ← (1 − β) φ̂ + β φ,

    which is PCGrad's step where φ̂ = 0. ``beta`` is β, by default torchjd's; implementations differ. φ̂ counts as at most
    :data:`HIGHEST_COSINE`, since no gradient can be turned into another's direction by adding any multiple of it. A
    zero gradient turns nothing. The running means (G, T, T) are the solver's state, zero at first.
    """
    gramians = problem.gramians
    groups, tasks, _ = gramians.shape
    orders = send(problem.orders(), gramians.device).expand(groups, tasks, tasks - 1)
    means = problem.state.get("gradvac", torch.zeros_like(gramians)).to(gramians)
    norms = gramians.diagonal(dim1=1, dim2=2).sqrt()  # (G, T)
    matrices = torch.eye(tasks, dtype=gramians.dtype, device=gramians.device).repeat(groups, 1, 1)
    for step in range(tasks - 1):
        j = orders[:, :, step, None]  # (G, T, 1): whom every i meets
        inner = (matrices * gramians.gather(1, j.expand(-1, -1, tasks))).sum(2)
        own = (matrices * (matrices @ gramians)).sum(2).clamp(min=0).sqrt()
        other = norms.gather(1, j[..., 0])
        alive = (own > 0) & (other > 0)
        cosine = torch.where(alive, inner / torch.where(alive, own * other, 1), 0).clamp(-1, 1)
        kept = means.gather(2, j)[..., 0]
        mean = kept.clamp(max=HIGHEST_COSINE)
        sine, mean_sine = (1 - cosine.square()).sqrt(), (1 - mean.square()).sqrt()
        turn = own * (mean * sine - cosine * mean_sine) / (torch.where(alive, other, 1) * mean_sine)
        shift = torch.where(alive & (cosine < mean), turn, 0)
        matrices = matrices.scatter_add(2, j, shift[..., None])
        means = means.scatter(2, j, torch.where(alive, (1 - beta) * kept + beta * cosine, kept)[..., None])
    problem.state["gradvac"] = means
    return torch.einsum("i,git->gt", send(problem.weights.to(matrices.dtype), matrices.device), matrices)


@solver("nash-mtl")
def nash_bargaining(problem: Problem) -> Tensor:
    """Nash-MTL (arXiv 2202.01017): c ∝ α with G α = 1 / α entry by entry, so that c_i ⟨g_i, Σ_t c_t g_t⟩ is alike for
    all tasks; brought to the scale of a mean.

    α is where ½ αᵀGα − Σ log α_t is least, a convex and self-concordant function: Newton's method, its step divided by
    1 + the Newton decrement, reaches it from everywhere, within :data:`NEWTON_STEPS` steps here. (torchjd's form by way
    of convex programs was seen to miss it, and to answer with equal weights instead, in a third of random problems.) G
    is taken at norms of one, since α scales as 1 / ‖g_t‖, and with :data:`RIDGE` on its diagonal: for opposite
    gradients there is no such α, and the coefficients are then those that cancel them. A zero gradient counts as
    nothing.
    """
    _check_equal_weights("nash-mtl", problem.weights)
    gramians = problem.gramians.double()
    norms = gramians.diagonal(dim1=1, dim2=2).sqrt()
    alive = norms > 0
    inverse = torch.where(alive, 1 / torch.where(alive, norms, 1), 0)
    cosines = gramians * inverse[:, :, None] * inverse[:, None, :] + torch.diag_embed((~alive).to(gramians) + RIDGE)
    alpha = torch.ones_like(norms)
    for _ in range(NEWTON_STEPS):
        slope = (cosines @ alpha[:, :, None])[..., 0] - 1 / alpha
        step = torch.linalg.solve_ex(cosines + torch.diag_embed(alpha**-2), slope).result  # waits for no device
        alpha = alpha - step / (1 + (slope * step).sum(1, keepdim=True).clamp(min=0).sqrt())
    alpha = alpha * inverse
    total = send(problem.weights.sum().double(), gramians.device) * alive.sum(1, keepdim=True) / alive.shape[1]
    whole = alpha.sum(1, keepdim=True)
    return (total * alpha / torch.where(whole > 0, whole, 1)).to(problem.gramians.dtype)


# torchjd's weightings by name: class, and the extra of torchjd that brings what it needs. Their coefficients are those
# of a mean over tasks.
WEIGHTINGS: Mapping[str, tuple[str, str]] = {
    "upgrad": ("UPGradWeighting", "quadprog-projector"),
    "dualproj": ("DualProjWeighting", "quadprog-projector"),
    "mgda": ("MGDAWeighting", ""),
    "aligned-mtl": ("AlignedMTLWeighting", ""),
    "imtl-g": ("IMTLGWeighting", ""),
    "cagrad": ("CAGradWeighting", "cagrad"),
}


def _check_equal_weights(name: str, weights: Tensor) -> None:
    if len(set(weights.tolist())) > 1:  # they lie on the CPU
        raise ValueError(f"weights must be equal for solver {name}, which sets its own; found {weights.tolist()}")


def _by_torchjd(name: str, problem: Problem, **strengths: float) -> Tensor:
    weighting, extra = WEIGHTINGS[name]
    weights = problem.weights
    _check_equal_weights(name, weights)
    gramians = problem.gramians.double().cpu()
    try:
        found = [_weights_of(weighting, strengths, gramian) for gramian in gramians]
    except ImportError as error:
        raise ValueError(f"solver {name} needs packages that are not here: pip install 'torchjd[{extra}]'") from error
    total = weights.sum().to(gramians)
    return send((total * torch.stack(found)).to(problem.gramians.dtype), problem.gramians.device)


def _weights_of(weighting: str, strengths: Mapping[str, float], gramian: Tensor) -> Tensor:
    """Coefficients (T,) for one block; a task without a gradient counts as nothing."""
    alive = gramian.diagonal() > 0
    coefficients = gramian.new_zeros(len(gramian))
    if alive.sum() < 2:
        return torch.where(alive, 1 / len(gramian), coefficients)
    from torchjd import aggregation  # takes longer to import than a short run

    inner = gramian[alive][:, alive]
    found = getattr(aggregation, weighting)(**strengths)(inner / inner.diagonal().mean())
    coefficients[alive] = found.to(gramian) * alive.sum() / len(gramian)
    return coefficients


def _of_torchjd(name: str) -> Solver:
    def solve(problem: Problem) -> Tensor:
        return _by_torchjd(name, problem)

    solve.__doc__ = f"torchjd's {WEIGHTINGS[name][0]}."
    return solve


for _name in ("upgrad", "dualproj", "mgda", "aligned-mtl", "imtl-g"):
    solver(_name)(_of_torchjd(_name))


@solver("cagrad")
def conflict_averse(problem: Problem, c: float = 0.4) -> Tensor:
    """torchjd's CAGrad (arXiv 2110.14048), with ``c`` as in its authors' code. Where its worst-off direction vanishes
    beside the mean, as under gradients of opposite direction or scales too far apart, it takes no step.
    """
    return _by_torchjd("cagrad", problem, c=c)

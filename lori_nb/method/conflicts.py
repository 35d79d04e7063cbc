"""Conflicts between the gradients of T tasks: how much there is, and one gradient without them.

Two tasks conflict in a block of parameters when ⟨g_i, g_j⟩ < 0. A *grouping* says what a block is: every A and every B
apart (Ortho-LoRA, arXiv 2601.09684), or larger pieces of the adapter. A *solver* turns the Gramian of a block,
G_ij = ⟨g_i, g_j⟩, into coefficients c, and the combined gradient is ∇ = Σ_t c_t g_t. Ortho-LoRA's solver is "project"
(:mod:`lori_nb.method.projection`); :mod:`lori_nb.method.solvers` holds the others by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lori_nb.method.projection import check_reference, projection_matrices, random_orders, send
from lori_nb.method.solvers import ORDERS, Problem, check_strengths, get_solver

RECIPE = 1  # raise when the same gradients give another combination
GROUPINGS: dict[str, Callable[[str], str]] = {
    "tensor": lambda name: name,
    "module": lambda name: name.rpartition(".")[0],
    "factor": lambda name: name.rpartition(".")[2],
    "adapter": lambda name: "",
}
REDUCTIONS: dict[str, Callable[[int], float]] = {"sum": lambda tasks: 1.0, "mean": lambda tasks: 1.0 / tasks}


@dataclass(frozen=True)
class Conflicts:
    """How the tasks' gradients lay to each other, and what a solver made of them.

    All of it follows from T × T matrices a block and is computed when asked for: the gradients are not read again.

    Attributes:
        groups: names of the G blocks.
        gramians: ⟨g_i, g_j⟩ before any projection (G, T, T).
        weights: w_t of S = Σ_t w_t g_t, what joint training takes (T,); None where nothing was combined.
        coefficients: c_t of the gradient taken, ∇ = Σ_t c_t g_t (G, T); None where nothing was combined.
        projected: C with Σ_t C_it g_t what became of task i's gradient (G, T, T); None for a solver without such.
    """

    groups: tuple[str, ...]
    gramians: Tensor
    weights: Tensor | None = None
    coefficients: Tensor | None = None
    projected: Tensor | None = None

    @property
    def cosines(self) -> Tensor:
        """cos(g_i, g_j) (G, T, T), NaN where either gradient is zero: it has no direction."""
        norms = self.gramians.diagonal(dim1=1, dim2=2).sqrt()
        return (self.gramians / norms[:, :, None] / norms[:, None, :]).clamp(-1, 1)

    @property
    def conflict(self) -> Tensor:
        """True where ⟨g_i, g_j⟩ < 0 (G, T, T)."""
        return self.gramians < 0

    @property
    def removed(self) -> Tensor | None:
        """Share of the gradients' norm that was projected away, 1 − √(Σ_i ‖g_i'‖² / Σ_i ‖g_i‖²) (G,); NaN where all are
        zero, None for a solver that does not project.
        """
        if self.projected is None:
            return None
        left = _squares(self.projected, self.gramians).sum(1)
        return 1 - (left / self.gramians.diagonal(dim1=1, dim2=2).sum(1)).sqrt()

    def change(self) -> Tensor:
        """‖∇ − S‖ / ‖S‖ in every block (G,), not finite where S is zero. ValueError where nothing was combined."""
        if self.coefficients is None:
            raise ValueError("coefficients must be those of a combined gradient; found None")
        weights = send(self.weights, self.gramians.device).expand_as(self.coefficients)
        gap, whole = _squares(torch.stack([self.coefficients - weights, weights], dim=1), self.gramians).unbind(1)
        return (gap / whole).sqrt()

    def rate(self) -> Tensor:
        """Share of conflicting task pairs in each block (G,), among pairs with two nonzero gradients; NaN if none."""
        pairs = torch.ones_like(self.conflict).triu(1) & ~self.cosines.isnan()
        return (self.conflict & pairs).sum((1, 2)) / pairs.sum((1, 2))


@torch.no_grad()
def combine(
    task_gradients: Sequence[Mapping[str, Tensor]], grouping: str | Callable[[str], str] = "tensor", **settings
) -> tuple[dict[str, Tensor], Conflicts]:
    """One conflict-free gradient out of T tasks' gradients, and how much they conflicted.

    ``settings`` are the keywords of :func:`combine_stacked`: reduction, weights, solver, strengths, order, reference,
    generator and state.

    Args:
        task_gradients: for each task, tensor name ("<module>.A", "<module>.B") → gradient; never altered.
        grouping: which tensors form one block: "tensor" (Ortho-LoRA), "module" (A with its B), "factor" (all A, all B),
            "adapter" (everything), or a function from tensor name to block name.
        reduction: "sum" is Σ_i w_i g_i; "mean" divides it by T.
        weights: w_i ≥ 0, ones by default.
        solver: Ortho-LoRA's "project", or another of :data:`lori_nb.method.solvers.SOLVERS`.
        strengths: numbers of the solver's own, as GradVac's "beta", where they are not its defaults.
        order: "random" draws an order for every block and task from ``generator``; "fixed" is ascending; "mean" is the
            mean over all orders, for few tasks.
        reference: "original" or "projected", see :func:`project_conflicts_reference`.
        generator: needed for order "random"; a CPU generator gives the same orders on every device.
        state: what the solver keeps from step to step, changed in place; None where it begins anew.

    Returns:
        name → combined gradient in the gradients' own dtype, and the :class:`Conflicts` before projection. Inner
        products are taken in float64, so that no square of a float32 gradient underflows or overflows.

    Raises:
        ValueError: no task, tasks that differ in tensor names or shapes, or a setting outside its set.
    """
    names = _check_gradients(task_gradients)
    stacked = {name: torch.stack([task[name] for task in task_gradients]) for name in names}
    return combine_stacked(stacked, grouping, **settings)


@torch.no_grad()
def combine_stacked(
    gradients: Mapping[str, Tensor],
    grouping: str | Callable[[str], str] = "tensor",
    *,
    reduction: str = "sum",
    weights: Sequence[float] | None = None,
    solver: str = "project",
    strengths: Mapping[str, float] | None = None,
    order: str = "random",
    reference: str = "original",
    generator: torch.Generator | None = None,
    state: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], Conflicts]:
    """:func:`combine` for gradients that stand together: tensor name → (T × its shape), neither altered nor copied."""
    tasks = _check_stacked(gradients)
    scales = _check_settings(tasks, grouping, reduction, weights, order, reference, generator)
    check_strengths(solver, strengths or {})
    with _exact_products(gradients):
        groups, place, gramians, rows = _blocks(gradients, grouping)
        weighted = torch.tensor(scales, dtype=gramians.dtype)
        problem = Problem(gramians, weighted, order, reference, generator, {} if state is None else state)
        coefficients = get_solver(solver)(problem, **(strengths or {}))
        combined = _weighted_sums(coefficients, place, rows, gradients)
    return combined, Conflicts(groups, gramians, weighted, coefficients, problem.told.get("projected"))


@torch.no_grad()
def project_off(
    gradient: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    generator: torch.Generator,
    grouping: str | Callable[[str], str] = "tensor",
) -> dict[str, Tensor]:
    """One gradient projected off T others where it conflicts with them, block by block, in random order:

        g ← g − min(⟨g, g_j⟩, 0) / ‖g_j‖² · g_j    for one original g_j after another

    which is PCGrad's step (arXiv 2001.06782) for the first of T + 1 tasks; the others take no part in the result.

    Args:
        gradient: tensor name → gradient.
        others: the same names → gradients (T × its shape), original ones: they are not projected themselves.
        generator: draws the order in every block; a CPU generator gives the same orders on every device.

    Returns:
        tensor name → projected gradient, of the gradient's shape and dtype.

    Raises:
        ValueError: names or shapes that differ.
    """
    if odd := sorted(set(gradient) ^ set(others)):
        raise ValueError(f"others must have the tensors of gradient; they differ in {', '.join(odd)}")
    for name, each in gradient.items():
        if others[name].shape[1:] != each.shape:
            raise ValueError(
                f"others must have shape (T, {', '.join(map(str, each.shape))}) in {name}; "
                f"found {tuple(others[name].shape)}"
            )
    stacked = {name: torch.cat([each.unsqueeze(0), others[name].to(each.dtype)]) for name, each in gradient.items()}
    tasks = _check_stacked(stacked)
    with _exact_products(stacked):
        groups, place, gramians, rows = _blocks(stacked, grouping)
        orders = random_orders(len(groups), tasks, generator)
        coefficients = projection_matrices(gramians, orders)[:, 0]  # of the gradient itself
        return _weighted_sums(coefficients, place, rows, stacked)


@torch.no_grad()
def conflicts_of(gradients: Mapping[str, Tensor], grouping: str | Callable[[str], str] = "tensor") -> Conflicts:
    """How much T tasks' gradients, tensor name → (T × its shape), conflict; nothing is projected."""
    tasks = _check_stacked(gradients)
    _check_settings(tasks, grouping, "sum", None, "fixed", "original", None)
    with _exact_products(gradients):
        groups, _, gramians, _ = _blocks(gradients, grouping)
    return Conflicts(groups, gramians)


def _exact_products(gradients: Mapping[str, Tensor]) -> torch.autocast:
    # A training loop's autocast would take the inner products and sums in bfloat16.
    return torch.autocast(next(iter(gradients.values())).device.type, enabled=False)


def _blocks(
    gradients: Mapping[str, Tensor], grouping: str | Callable[[str], str]
) -> tuple[tuple[str, ...], dict[str, int], Tensor, dict[str, Tensor]]:
    """Names of the G blocks, each tensor's block, the Gramians (G, T, T), and each tensor's gradients as rows (T, n).

    Rows are float32, or float64 where any gradient is; Gramians are float64.
    """
    key = GROUPINGS[grouping] if isinstance(grouping, str) else grouping
    numbers: dict[str, int] = {}
    place = {name: numbers.setdefault(key(name), len(numbers)) for name in gradients}
    wide = any(each.dtype == torch.float64 for each in gradients.values())
    dtype = torch.float64 if wide else torch.float32
    rows = {name: each.flatten(1).to(dtype) for name, each in gradients.items()}
    return tuple(numbers), place, _gramians(list(rows.values()), list(place.values()), len(numbers)), rows


def _gramians(rows: Sequence[Tensor], members: Sequence[int], groups: int) -> Tensor:
    """Gramians of the blocks (G, T, T): those of their tensors, added; ``members`` holds each tensor's block."""
    device = rows[0].device
    # One room a shape: a new copy a tensor costs a CPU in pages to map about what its product does.
    rooms = {shape: torch.empty(shape, dtype=torch.float64, device=device) for shape in {row.shape for row in rows}}
    turned = {shape: room.T for shape, room in rooms.items()}
    each = torch.stack([torch.mm(rooms[row.shape].copy_(row), turned[row.shape]) for row in rows])
    return each.new_zeros(groups, *each.shape[1:]).index_add(0, send(torch.tensor(members), device), each)


def _weighted_sums(
    coefficients: Tensor, place: Mapping[str, int], rows: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Σ_t c_t g_t of every tensor, c being its block's row of the coefficients (G, T), in its shape and dtype."""
    shares = coefficients.to(next(iter(rows.values()))).unbind()
    sums = {}
    for name, row in rows.items():
        given = gradients[name]
        combined = torch.mv(row.t(), shares[place[name]]).view(given.shape[1:])
        sums[name] = combined if given.dtype == row.dtype else combined.to(given.dtype)
    return sums


def _squares(shares: Tensor, gramians: Tensor) -> Tensor:
    """‖Σ_t s_t g_t‖² for rows s of ``shares`` (G, k, T): (G, k)."""
    return (shares @ gramians * shares).sum(2).clamp(min=0)


def _check_gradients(task_gradients: Sequence[Mapping[str, Tensor]]) -> list[str]:
    if not task_gradients or not task_gradients[0]:
        raise ValueError("task_gradients must hold at least one task with at least one tensor; found none")
    shapes = {name: gradient.shape for name, gradient in task_gradients[0].items()}
    for index, task in enumerate(task_gradients):
        found = {name: gradient.shape for name, gradient in task.items()}
        if found != shapes:
            odd = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
            raise ValueError(
                f"task_gradients must have the same tensor names and shapes in every task; task {index} differs from "
                f"task 0 in {', '.join(odd[:3])}"
            )
    return list(shapes)


def _check_stacked(gradients: Mapping[str, Tensor]) -> int:
    """T, the same for every tensor."""
    counts = {name: each.shape[0] if each.ndim > 1 else 0 for name, each in gradients.items()}
    if not counts or len(set(counts.values())) > 1 or 0 in counts.values():
        raise ValueError(f"gradients must hold tensors (T × …) of the same number of tasks; found {counts or 'none'}")
    return next(iter(counts.values()))


def _check_settings(tasks, grouping, reduction, weights, order, reference, generator) -> list[float]:
    """The tasks' weights with the reduction in them, after every setting was found good."""
    check_reference(reference)
    if isinstance(grouping, str) and grouping not in GROUPINGS:
        raise ValueError(f"grouping must be a function or one of {', '.join(GROUPINGS)}; found {grouping!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; found {reduction!r}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}; found {order!r}")
    if order == "random" and generator is None:
        raise ValueError("generator must be a torch.Generator when order is 'random', so that runs repeat; found None")
    weights = [1.0] * tasks if weights is None else [float(weight) for weight in weights]
    if len(weights) != tasks or not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"weights must be {tasks} finite numbers of at least 0, one a task; found {weights}")
    return [weight * REDUCTIONS[reduction](tasks) for weight in weights]

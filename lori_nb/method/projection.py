"""Ortho-LoRA: remove conflicts between the gradients of T tasks before they are added.

Two tasks conflict in a block of parameters when ⟨g_i, g_j⟩ < 0. Each g_i is then projected onto the orthogonal
complement of g_j, one j after another in a given order (Ortho-LoRA, arXiv 2601.09684; the step is PCGrad's, arXiv
2001.06782):

    g_i ← g_i − ⟨g_i, g_j⟩ / ‖g_j‖² · g_j        ∇ = Σ_i w_i g_i

Ortho-LoRA does so for every A and every B apart (*grouping* "tensor"). Which order the paper takes, and whether g_j
is the original or the already projected gradient, is not known here, so both are parameters; the defaults are
PCGrad's.

All of it depends on the T × T Gramian G_ij = ⟨g_i, g_j⟩ of a block alone: each projected gradient is Σ_t C_it g_t with
coefficients C that follow from G. :func:`projection_matrices` computes C for all blocks at once, with no branch on
data, so nothing waits for a GPU; :func:`project_conflicts_reference` is the literal loop that it must equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RECIPE = 1  # raise when the same input gives another result
GROUPINGS: dict[str, Callable[[str], str]] = {
    "tensor": lambda name: name,
    "module": lambda name: name.rpartition(".")[0],
    "factor": lambda name: name.rpartition(".")[2],
    "adapter": lambda name: "",
}
REFERENCES = ("original", "projected")
REDUCTIONS: dict[str, Callable[[int], float]] = {"sum": lambda tasks: 1.0, "mean": lambda tasks: 1.0 / tasks}


@dataclass(frozen=True)
class Conflicts:
    """How the tasks' gradients lay to each other, before any projection.

    ``groups`` names the G blocks; ``cosines`` (G, T, T) holds cos(g_i, g_j), NaN where either gradient is zero;
    ``conflict`` (G, T, T) is true where ⟨g_i, g_j⟩ < 0.
    """

    groups: tuple[str, ...]
    cosines: Tensor
    conflict: Tensor

    def rate(self) -> Tensor:
        """Share of conflicting task pairs in each block (G,), among pairs with two nonzero gradients; NaN if none."""
        pairs = torch.ones_like(self.conflict).triu(1) & ~self.cosines.isnan()
        return (self.conflict & pairs).sum((1, 2)) / pairs.sum((1, 2))


def fixed_orders(tasks: int) -> Tensor:
    """For each task i all others in ascending order (T, T−1)."""
    places = torch.arange(tasks - 1).expand(tasks, tasks - 1)
    return _skip_self(places)


def random_orders(groups: int, tasks: int, generator: torch.Generator) -> Tensor:
    """For each block and task i all others in uniformly random order (G, T, T−1), on the generator's device."""
    draws = torch.rand(groups, tasks, tasks - 1, generator=generator, device=generator.device, dtype=torch.float64)
    return _skip_self(draws.argsort(dim=-1))


def project_conflicts_reference(gradients: Tensor, order: Tensor | None = None, reference: str = "original") -> Tensor:
    """The literal loop, slow and readable: the oracle of :func:`projection_matrices`.

    Args:
        gradients: g_1 … g_T as rows (T, n); not altered.
        order: row i lists the tasks j ≠ i in the order of projection (T, T−1); None is :func:`fixed_orders`.
        reference: "original" projects off the g_j passed in, "projected" off g_j as it stands by then.

    Returns:
        The projected gradients (T, n).

    Raises:
        ValueError: unknown reference, or an order that is not a permutation of the other tasks in every row.
    """
    tasks = len(gradients)
    order = fixed_orders(tasks) if order is None else order.cpu()
    _check_reference(reference)
    if not torch.equal(order.sort(dim=-1).values, fixed_orders(tasks)):
        raise ValueError(f"order must list in row i every other of the {tasks} tasks once; found {order.tolist()}")
    projected = gradients.clone()
    others = projected if reference == "projected" else gradients
    floors = _floors(gradients.square().sum(dim=1), reference)
    for i in range(tasks):
        for j in order[i].tolist():
            inner, square = projected[i] @ others[j], others[j] @ others[j]
            if inner < 0 and square > floors[j]:
                projected[i] = projected[i] - inner / square * others[j]
    return projected


def projection_matrices(gramians: Tensor, orders: Tensor, reference: str = "original") -> Tensor:
    """C (G, T, T) such that task i's projected gradient is Σ_t C_it g_t, for all G blocks at once.

    With C = I at first and j the next task in i's order, repeated T − 1 times for all blocks and all i together:
    C_ij ← C_ij − min(Σ_t C_it G_tj, 0) / G_jj. It equals :func:`project_conflicts_reference` up to rounding. With
    reference "projected" task i waits for the tasks before it, so there are T (T − 1) steps instead. A gradient whose
    square norm is below the smallest normal number counts as zero and projects nothing (no 0/0 at B = 0).

    Args:
        gramians: G_ij = ⟨g_i, g_j⟩ of every block (G, T, T), float32 or float64.
        orders: (G, T, T−1), or (T, T−1) for all blocks; contents are not checked, since that would wait for a GPU.
        reference: "original" or "projected".

    Raises:
        ValueError: unknown reference, wrong shape, or a Gramian of less than float32.
    """
    _check_reference(reference)
    if gramians.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"gramians must be float32 or float64; found {gramians.dtype}")
    if gramians.ndim != 3 or gramians.shape[1] != gramians.shape[2]:
        raise ValueError(f"gramians must have shape (G, T, T); found {tuple(gramians.shape)}")
    groups, tasks, _ = gramians.shape
    if orders.shape not in ((tasks, tasks - 1), (groups, tasks, tasks - 1)):
        raise ValueError(
            f"orders must have shape ({tasks}, {tasks - 1}) or ({groups}, {tasks}, {tasks - 1}); "
            f"found {tuple(orders.shape)}"
        )
    orders = _send(orders, gramians.device).expand(groups, tasks, tasks - 1)
    return (_off_projected if reference == "projected" else _off_originals)(gramians, orders)


def projection_coefficients(
    gramians: Tensor, orders: Tensor, weights: Tensor | None = None, reference: str = "original"
) -> Tensor:
    """c (G, T) such that the combined gradient of a block is ∇ = Σ_t c_t g_t = Σ_i w_i Σ_t C_it g_t.

    ``weights`` (T,) are the w_i, ones by default; the rest as in :func:`projection_matrices`.
    """
    matrices = projection_matrices(gramians, orders, reference)
    if weights is None:
        return matrices.sum(dim=1)
    if weights.shape != (gramians.shape[1],):
        raise ValueError(f"weights must have shape ({gramians.shape[1]},), one a task; found {tuple(weights.shape)}")
    return torch.einsum("i,git->gt", _send(weights.to(matrices.dtype), matrices.device), matrices)


@torch.no_grad()
def combine(
    task_gradients: Sequence[Mapping[str, Tensor]],
    grouping: str | Callable[[str], str] = "tensor",
    *,
    reduction: str = "sum",
    weights: Sequence[float] | None = None,
    order: str = "random",
    reference: str = "original",
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], Conflicts]:
    """One conflict-free gradient out of T tasks' gradients, and how much they conflicted.

    Args:
        task_gradients: for each task, tensor name ("<module>.A", "<module>.B") → gradient; never altered.
        grouping: which tensors form one block: "tensor" (Ortho-LoRA), "module" (A with its B), "factor" (all A, all B),
            "adapter" (everything), or a function from tensor name to block name.
        reduction: "sum" is Σ_i w_i g_i; "mean" divides it by T.
        weights: w_i ≥ 0, ones by default.
        order: "random" draws an order for every block and task from ``generator``; "fixed" is ascending.
        reference: "original" or "projected", see :func:`project_conflicts_reference`.
        generator: needed for order "random"; a CPU generator gives the same orders on every device.

    Returns:
        name → combined gradient in the gradients' own dtype, and the :class:`Conflicts` before projection. Inner
        products are taken in float32, or float64 where any gradient is; a gradient whose square norm underflows there
        counts as zero and is added unprojected.

    Raises:
        ValueError: no task, tasks that differ in tensor names or shapes, or a setting outside its set.
    """
    names = _check_gradients(task_gradients)
    scales = _check_settings(len(task_gradients), grouping, reduction, weights, order, reference, generator)
    key = GROUPINGS[grouping] if isinstance(grouping, str) else grouping
    blocks = {name: key(name) for name in names}
    groups = tuple(dict.fromkeys(blocks.values()))
    place = {name: groups.index(block) for name, block in blocks.items()}
    tasks = len(task_gradients)
    orders = fixed_orders(tasks) if order == "fixed" else random_orders(len(groups), tasks, generator)
    # A training loop's autocast would take the inner products and sums in bfloat16.
    with torch.autocast(task_gradients[0][names[0]].device.type, enabled=False):
        rows = _rows(task_gradients, names)
        gramians = _gramians(list(rows.values()), list(place.values()), len(groups))
        weighted = torch.tensor(scales, dtype=gramians.dtype)
        coefficients = projection_coefficients(gramians, orders, weighted, reference)
        sums = {name: coefficients[place[name]].to(row) @ row for name, row in rows.items()}
    likes = task_gradients[0]
    combined = {name: total.reshape(likes[name].shape).to(likes[name].dtype) for name, total in sums.items()}
    return combined, _conflicts(groups, gramians)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    # A blocking copy would wait for the GPU's queue; towards the CPU it has to block, or the values are not there yet.
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


def _skip_self(places: Tensor) -> Tensor:
    """Places 0 … T−2 among the others of task i (row i) → their task numbers, which jump over i."""
    own = torch.arange(places.shape[-2], device=places.device)[:, None]
    return places + (places >= own)


def _floors(squares: Tensor, reference: str) -> Tensor:
    """Square norms at or below which a gradient projects nothing.

    A projected gradient that vanished leaves roundoff, whose direction means nothing; its square comes out of a
    Gramian with an error near ε‖g‖², so everything below √ε‖g‖² counts as vanished, in the loop as in the batched
    form.
    """
    tiny = torch.finfo(squares.dtype).tiny
    if reference == "original":
        return torch.full_like(squares, tiny)
    return (squares * torch.finfo(squares.dtype).eps ** 0.5).clamp(min=tiny)


def _off_originals(gramians: Tensor, orders: Tensor) -> Tensor:
    groups, tasks, _ = gramians.shape
    squares = gramians.diagonal(dim1=1, dim2=2)  # (G, T)
    usable = squares > _floors(squares, "original")
    inverse = torch.where(usable, 1 / torch.where(usable, squares, 1), 0)
    matrices = torch.eye(tasks, dtype=gramians.dtype, device=gramians.device).repeat(groups, 1, 1)
    for step in range(tasks - 1):
        j = orders[:, :, step]  # (G, T): for every i the task to project off
        facing = gramians.gather(1, j[:, :, None].expand(-1, -1, tasks))  # row i is G_j
        inner = (matrices * facing).sum(dim=2)
        shift = inner.clamp(max=0) * inverse.gather(1, j)
        matrices = matrices.scatter_add(2, j[:, :, None], -shift[:, :, None])
    return matrices


def _off_projected(gramians: Tensor, orders: Tensor) -> Tensor:
    groups, tasks, _ = gramians.shape
    floors = _floors(gramians.diagonal(dim1=1, dim2=2), "projected")
    matrices = torch.eye(tasks, dtype=gramians.dtype, device=gramians.device).repeat(groups, 1, 1)
    for i in range(tasks):
        for step in range(tasks - 1):
            j = orders[:, i, step]  # (G,)
            other = matrices.gather(1, j[:, None, None].expand(-1, 1, tasks))[:, 0]  # (G, T): row j of C
            products = torch.einsum("gst,gt->gs", gramians, other)  # ⟨g_s, projected g_j⟩
            inner, square = (matrices[:, i] * products).sum(dim=1), (other * products).sum(dim=1)
            usable = square > floors.gather(1, j[:, None])[:, 0]
            factor = torch.where(usable, inner.clamp(max=0) / torch.where(usable, square, 1), 0)
            matrices[:, i] -= factor[:, None] * other
    return matrices


def _rows(task_gradients: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    """Tensor name → the tasks' gradients as rows (T, n), in float32 or float64."""
    wide = any(task_gradients[0][name].dtype == torch.float64 for name in names)
    dtype = torch.float64 if wide else torch.float32
    return {name: torch.stack([task[name].reshape(-1) for task in task_gradients]).to(dtype) for name in names}


def _gramians(rows: Sequence[Tensor], members: Sequence[int], groups: int) -> Tensor:
    """Gramians of the blocks (G, T, T): those of their tensors, added; ``members`` holds each tensor's block."""
    device = rows[0].device
    each = torch.stack([(row @ row.T).to(device) for row in rows])
    return each.new_zeros(groups, *each.shape[1:]).index_add(0, _send(torch.tensor(members), device), each)


def _conflicts(groups: tuple[str, ...], gramians: Tensor) -> Conflicts:
    norms = gramians.diagonal(dim1=1, dim2=2).sqrt()
    cosines = (gramians / norms[:, :, None] / norms[:, None, :]).clamp(-1, 1)  # 0/0 is NaN: a zero has no direction
    return Conflicts(groups, cosines, gramians < 0)


def _check_reference(reference: str) -> None:
    if reference not in REFERENCES:
        raise ValueError(f"reference must be one of {', '.join(REFERENCES)}; found {reference!r}")


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


def _check_settings(tasks, grouping, reduction, weights, order, reference, generator) -> list[float]:
    """The tasks' weights with the reduction in them, after every setting was found good."""
    _check_reference(reference)
    if isinstance(grouping, str) and grouping not in GROUPINGS:
        raise ValueError(f"grouping must be a function or one of {', '.join(GROUPINGS)}; found {grouping!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; found {reduction!r}")
    if order not in ("random", "fixed"):
        raise ValueError(f"order must be one of random, fixed; found {order!r}")
    if order == "random" and generator is None:
        raise ValueError("generator must be a torch.Generator when order is 'random', so that runs repeat; found None")
    weights = [1.0] * tasks if weights is None else [float(weight) for weight in weights]
    if len(weights) != tasks or not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"weights must be {tasks} finite numbers of at least 0, one a task; found {weights}")
    return [weight * REDUCTIONS[reduction](tasks) for weight in weights]

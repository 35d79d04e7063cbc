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

import itertools

import torch
from torch import Tensor

RECIPE = 1  # raise when the same input gives another result
REFERENCES = ("original", "projected")


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
    check_reference(reference)
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


def all_orders(tasks: int) -> Tensor:
    """Every order of the others, for all tasks at once ((T−1)!, T, T−1): what the mean over orders runs through."""
    places = torch.tensor(list(itertools.permutations(range(tasks - 1))))  # ((T−1)!, T−1)
    return _skip_self(places[:, None, :].expand(-1, tasks, -1))


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
    check_reference(reference)
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
    orders = send(orders, gramians.device).expand(groups, tasks, tasks - 1)
    return (_off_projected if reference == "projected" else _off_originals)(gramians, orders)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on another device, without waiting for a GPU."""
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
    turns = orders.transpose(1, 2)  # (G, T−1, T): at each step, for every i the task to project off
    facing = gramians[:, None].expand(-1, tasks - 1, -1, -1).gather(2, turns[..., None].expand(-1, -1, -1, tasks))
    shares = -inverse[:, None].expand(-1, tasks - 1, -1).gather(2, turns)
    for j, rows, share in zip(turns.unbind(1), facing.unbind(1), shares.unbind(1), strict=True):  # row i of rows is G_j
        inner = (matrices * rows).sum(dim=2)
        matrices.scatter_add_(2, j[:, :, None], (inner.clamp_(max=0) * share)[:, :, None])
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


def check_reference(reference: str) -> None:
    """ValueError unless the reference is known."""
    if reference not in REFERENCES:
        raise ValueError(f"reference must be one of {', '.join(REFERENCES)}; found {reference!r}")

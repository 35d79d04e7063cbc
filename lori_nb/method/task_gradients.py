"""Every task's gradient of a low-rank adapter from one backward pass.

The rows of T tasks stand one task after another in one batch. With L = Σ_t L_t, where L_t depends on task t's rows R_t
alone, what reaches those rows in the backward pass is the gradient of L_t. With h = A x and u = ∂L/∂y,

    ∂L_t/∂B = s · u[R_t]ᵀ h[R_t],        ∂L_t/∂A = (s · u[R_t] B)ᵀ x[R_t]:

the products that joint training sums over all rows, cut where one task ends and the next begins. The arithmetic is that
of joint training; T times the adapter's gradient is kept. Ortho-LoRA (arXiv 2601.09684) needs these gradients in every
step and leaves open how they are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

if TYPE_CHECKING:
    from lori_nb.method.adapters import LowRank

RECIPE = 1  # raise when the same rows give other bits


class NotByRowsError(ValueError):
    """A module's input does not have the batch's rows as its first dimension, so they cannot be told apart by task."""


@dataclass(frozen=True)
class TaskRows:
    """Where one module's task gradients go: ``sizes`` (T), each task's number of rows, in the order in which they stand
    in a batch, and ``found``, "<module>.A" and "<module>.B" → (T × the factor's trained shape).
    """

    module: str
    sizes: tuple[int, ...]
    found: dict[str, Tensor]

    def keep(self, part: str, gradient: Tensor | None) -> None:
        """Add to what is there: a module may take part more than once in a forward pass."""
        if gradient is not None:
            name = f"{self.module}.{part}"
            self.found[name] = self.found[name] + gradient if name in self.found else gradient


@contextmanager
def by_task(live: Mapping[str, LowRank], sizes: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """Within the block a backward pass leaves task gradients in the yielded dict, and none in the factors themselves.

    The block must hold forward and backward pass of one batch, whose first dimension is rows.

    Args:
        live: attached factors by module name.
        sizes: rows of each task, as they stand in the batch; a task may have none.

    Yields:
        "<module>.A" (T × r × d_in) where A is trained, "<module>.B" (T × d_out × r), or (T × k) under a mask, float32;
        a factor that takes no part is left out.

    Raises:
        NotByRowsError: in the forward pass, a module's input is not (rows × places × d_in) with Σ sizes rows.
    """
    found: dict[str, Tensor] = {}
    for name, low in live.items():
        low.task_rows = TaskRows(name, tuple(sizes), found)
    try:
        yield found
    finally:
        for low in live.values():
            low.task_rows = None


class LowRankUpdate(torch.autograd.Function):
    """s · B (A x), keeping h = A x (… × r) for the backward pass, x only where A is trained, and never a dense B.

    With u = ∂L/∂y:  ∂L/∂B = s uᵀ h,  ∂L/∂A = (s u B)ᵀ x,  ∂L/∂x = (s u B) A.  The products are those that autograd
    takes for the plain form, in the same order, so that both give the same bits.
    """

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, values: Tensor, low: LowRank) -> Tensor:
        """s · B (A x) for x (… × d_in) → (… × d_out), in x's dtype; for a frozen A, h = A x is kept and x is not.

        Raises NotByRowsError where gradients are asked for by task and x has not the rows of the tasks.
        """
        rows = low.task_rows
        if rows is not None and (x.ndim < 3 or len(x) != sum(rows.sizes)):
            raise NotByRowsError(
                f"the input of {rows.module} must be (rows × places × width) with the {sum(rows.sizes)} rows of the "
                f"tasks; found {tuple(x.shape)}"
            )
        h = F.linear(x, low.cast_A(x.dtype))
        ctx.low, ctx.task_rows = low, rows
        trains_A = A.requires_grad
        # Trained A and values are kept to notice a change in place before the backward pass.
        ctx.save_for_backward(h, values, *((A, x) if trains_A else (None, None)))
        return F.linear(h, low.scaled_B(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, u: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """∂L/∂x (… × d_in), ∂L/∂A and ∂L/∂B at the trained entries, from u (… × d_out)."""
        low, rows = ctx.low, ctx.task_rows
        h, _, _, x = ctx.saved_tensors
        sizes = None if rows is None else rows.sizes
        wants_x, wants_A, wants_B, _ = ctx.needs_input_grad
        grad_x = grad_A = grad_B = None
        if wants_x or wants_A:
            down = u @ low.scaled_B(u.dtype)  # ∂L/∂h
            grad_x = down @ low.cast_A(u.dtype) if wants_x else None
            # x is wider than the products where an autocast is at work
            grad_A = _summed_over_rows(down, x.to(down.dtype), sizes).float() if wants_A else None
        if wants_B:
            grad_B = low.gathered(_summed_over_rows(u, h, sizes)).float() * low.scale
        if rows is None:
            return grad_x, grad_A, grad_B, None
        rows.keep("A", grad_A)
        rows.keep("B", grad_B)
        return grad_x, None, None, None


def _summed_over_rows(left: Tensor, right: Tensor, sizes: Sequence[int] | None) -> Tensor:
    """Σ_n left_n right_nᵀ over all leading places n (m × k), or over each task's rows apart (T × m × k)."""
    if sizes is None:
        return left.flatten(0, -2).T @ right.flatten(0, -2)
    if len(set(sizes)) == 1:
        tasks = len(sizes)
        left, right = (each.reshape(tasks, -1, each.shape[-1]) for each in (left, right))
        return left.transpose(1, 2) @ right
    found = left.new_zeros(len(sizes), left.shape[-1], right.shape[-1])
    for place, (one, other) in enumerate(zip(left.split(list(sizes)), right.split(list(sizes)), strict=True)):
        if len(one):
            torch.mm(one.flatten(0, -2).T, other.flatten(0, -2), out=found[place])
    return found

"""Low-rank adapters as plain data, and how they are attached to a model.

An adapter is a set of named factors: for a frozen base weight W (d_out × d_in) of a linear module,

    y = W x + s · B (A x),    A (r × d_in),  B (d_out × r),  s = α / r,  ΔW = s · B A.

LoRA trains A and B; LoRI (arXiv 2504.07448) freezes A at its random start and trains B, all of it (LoRI-D) or the
entries under a task mask (LoRI-S). Attaching is a forward hook, so that detaching restores the model bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lori_nb.method.subspaces import is_portable
from lori_nb.method.task_gradients import LowRankUpdate, TaskRows

RECIPE = 1  # raise when the same input gives another result


@dataclass(frozen=True)
class Factors:
    """One module's update ΔW = scale · B A, as plain tensors: A (r × d_in), B (d_out × r)."""

    A: Tensor
    B: Tensor
    scale: float

    def delta(self) -> Tensor:
        """The dense update ΔW = scale · B A (d_out × d_in)."""
        return self.scale * (self.B @ self.A)


@dataclass(frozen=True)
class Adapter:
    """Named factors with what is needed to write them down and to read them again.

    ``factors`` maps base-relative module names to :class:`Factors`. ``masks`` (name → bool, shape of B) is present for
    an adapter trained under a mask. ``extras`` are other trained tensors, such as task heads. ``seed`` and ``subspace``
    say how A was drawn; ``frozen_A`` is true when A still is that draw.
    """

    factors: dict[str, Factors]
    base: str
    base_digest: str
    rank: int
    alpha: float
    seed: int
    subspace: str
    frozen_A: bool
    masks: dict[str, Tensor] | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def redrawable(self) -> bool:
        """Whether seed and subspace give A again on every platform, so that it need not be stored."""
        return self.frozen_A and is_portable(self.subspace)


def grown(before: Adapter, added: Adapter) -> Adapter:
    """Two adapters of one base as one whose update is the sum of theirs: factors side by side, ranks added.

    A (r_1 + r_2) × d_in and B d_out × (r_1 + r_2); extras are those of ``added``, α grows with the rank. What is known
    of one draw of A no longer holds for the whole, so A counts as trained and masks are left behind.

    Raises ValueError unless both sit on the same modules with the same scales.
    """
    for name in dict.fromkeys((*before.factors, *added.factors)):
        one, other = (each.factors[name].scale if name in each.factors else None for each in (before, added))
        if one != other:
            raise ValueError(
                f"adapters must sit on the same modules with the same scales to grow together; found scales {one} and "
                f"{other} at {name}"
            )
    factors = {
        name: Factors(torch.cat([before.factors[name].A, f.A]), torch.cat([before.factors[name].B, f.B], 1), f.scale)
        for name, f in added.factors.items()
    }
    rank, alpha = before.rank + added.rank, before.alpha + added.alpha
    return replace(added, factors=factors, rank=rank, alpha=alpha, frozen_A=False, masks=None)


def layer_number(module: str) -> int | None:
    """The layer that a module name speaks of ("layers.22.mlp.up_proj" → 22), None where it names none."""
    found = re.search(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.", module)
    return int(found.group(1)) if found else None


def target_linears(
    body: nn.Module, pattern: str = "all-linear", last_layers: int | None = None
) -> dict[str, nn.Linear]:
    """The linear modules that an adapter sits on, by name, in the model's order.

    Args:
        pattern: "all-linear" for every linear module inside a layer, else a comma-separated list of last name
            components ("q_proj,v_proj") or a regular expression that must match the whole name.
        last_layers: only the last so many layers; None for all.

    Raises:
        ValueError: no linear module stands in a layer, the pattern matches none, or there are too few layers.
    """
    linears = {
        name: m for name, m in body.named_modules() if isinstance(m, nn.Linear) and layer_number(name) is not None
    }
    layers = sorted({layer_number(name) for name in linears})
    if not layers:
        raise ValueError(
            f"the model must have linear modules inside numbered layers; found none in {type(body).__name__}"
        )
    if last_layers is not None:
        if not 1 <= last_layers <= len(layers):
            raise ValueError(
                f"last_layers must be between 1 and {len(layers)}, the model's layers; found {last_layers}"
            )
        linears = {name: m for name, m in linears.items() if layer_number(name) in layers[-last_layers:]}
    kept = {name: m for name, m in linears.items() if _matches(name, pattern)}
    if not kept:
        ends = sorted({name.rpartition(".")[2] for name in linears})
        raise ValueError(f"modules must match a linear module ({', '.join(ends)} or all-linear); found {pattern!r}")
    return kept


def _matches(name: str, pattern: str) -> bool:
    if pattern == "all-linear":
        return True
    if re.fullmatch(r"[\w,\s]+", pattern):
        return name.rpartition(".")[2] in {part.strip() for part in pattern.split(",")}
    return re.fullmatch(pattern, name) is not None


def check_rank(rank: int, linears: Mapping[str, nn.Linear]) -> None:
    """ValueError unless 1 ≤ rank ≤ the smallest dimension of the matrices that the adapter sits on."""
    name, size = min(((n, min(m.weight.shape)) for n, m in linears.items()), key=lambda pair: pair[1])
    if not 1 <= rank <= size:
        raise ValueError(f"rank must be between 1 and {size}, the smallest dimension of {name}; found {rank}")


class LowRank(nn.Module):
    """The trainable form of one module's factors.

    With a mask, the trainable parameter is the vector of the k values under it (in the order of the flattened mask), so
    the optimiser and gradient clipping see k numbers, and a dense B exists only while this module computes. Entries of
    B off the mask stay what they were: zero for a fresh adapter. With a frozen A, no input is kept for the backward
    pass, only h = A x.
    """

    def __init__(self, factors: Factors, *, train_A: bool, mask: Tensor | None = None):
        super().__init__()
        self.scale = factors.scale
        self.shape = factors.B.shape
        self.task_rows: TaskRows | None = None  # set by task_gradients.by_task
        self._rounded: tuple[tuple, Tensor] | None = None  # a frozen A in another dtype, and what it was made of
        self.A = nn.Parameter(factors.A.detach().clone().float(), requires_grad=train_A)
        dense = factors.B.detach().clone().float()
        if mask is not None and mask.shape != dense.shape:
            raise ValueError(f"mask must have the shape of B, {tuple(dense.shape)}; found {tuple(mask.shape)}")
        positions = None if mask is None else mask.flatten().nonzero().squeeze(1)
        off_mask = None if mask is None else (dense.flatten() * ~mask.flatten()).nonzero().squeeze(1)
        self.register_buffer("positions", positions)
        self.register_buffer("fixed_positions", off_mask)
        self.register_buffer("fixed_values", None if mask is None else dense.flatten()[off_mask])
        self.values = nn.Parameter(dense if mask is None else dense.flatten()[positions])

    @property
    def B(self) -> Tensor:
        """B (d_out × r), dense; differentiable with respect to the packed values."""
        if self.positions is None:
            return self.values
        flat = self.values.new_zeros(self.shape.numel()).index_copy(0, self.fixed_positions, self.fixed_values)
        return flat.index_copy(0, self.positions, self.values).view(self.shape)

    def scaled_B(self, dtype: torch.dtype) -> Tensor:
        """s · B (d_out × r) in ``dtype``, dense and without a gradient: what a pass multiplies with."""
        if self.positions is None:
            return (self.values.detach() * self.scale).to(dtype)
        values = self.values.detach()
        flat = torch.zeros(self.shape.numel(), dtype=dtype, device=values.device)
        if len(self.fixed_positions):
            flat.index_copy_(0, self.fixed_positions, (self.fixed_values * self.scale).to(dtype))
        return flat.index_copy_(0, self.positions, (values * self.scale).to(dtype)).view(self.shape)

    def cast_A(self, dtype: torch.dtype) -> Tensor:
        """A (r × d_in) in ``dtype``, without a gradient; a frozen one is rounded once and kept."""
        if self.A.requires_grad or dtype == self.A.dtype:
            return self.A.detach().to(dtype)
        of = (dtype, self.A.device, self.A._version)
        if self._rounded is None or self._rounded[0] != of:
            self._rounded = of, self.A.detach().to(dtype)
        return self._rounded[1]

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by the last part of their name: "A" unless it is frozen, and "B", packed or whole."""
        return ({"A": self.A} if self.A.requires_grad else {}) | {"B": self.values}

    def gathered(self, dense: Tensor) -> Tensor:
        """The entries of matrices of B's shape (… × d_out × r) that belong to the trained values, in their order."""
        return dense if self.positions is None else dense.flatten(-2).index_select(-1, self.positions)

    def forward(self, x: Tensor) -> Tensor:
        """s · B (A x) for x (… × d_in) → (… × d_out), computed in x's dtype; the factors themselves stay float32."""
        return LowRankUpdate.apply(x, self.A, self.values, self)

    def factors(self) -> Factors:
        """A detached copy of the present factors."""
        return Factors(self.A.detach().clone().cpu(), self.B.detach().clone().cpu(), self.scale)

    def support(self) -> Tensor | None:
        """Where B may differ from zero (bool, shape of B): the mask and what stood before; None where B is dense."""
        if self.positions is None:
            return None
        where = torch.zeros(self.shape.numel(), dtype=torch.bool)
        where[self.fixed_positions.cpu()] = True
        where[self.positions.cpu()] = True
        return where.view(self.shape)


class Attached:
    """Adapters hooked onto a model's linear modules; ``detach()`` restores the model's own forward exactly."""

    def __init__(self, handles: list):
        self._handles = handles

    def detach(self) -> None:
        """Remove the hooks; calling it again does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *error) -> None:
        self.detach()


def attach(body: nn.Module, live: Mapping[str, LowRank], weight: float = 1.0) -> Attached:
    """Add weight · s · B (A x) to the output of every named module; several adapters may be attached at once.

    Raises ValueError for a name that the model lacks or factors whose shapes do not fit the module.
    """
    modules = dict(body.named_modules())
    for name, low in live.items():
        _check_fits(name, modules.get(name), low.A.shape, low.B.shape)

    def hook_for(low: LowRank):
        def add_update(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            update = low(inputs[0])
            return output + (update if weight == 1.0 else weight * update)

        return add_update

    return Attached([modules[name].register_forward_hook(hook_for(low)) for name, low in live.items()])


def attach_factors(
    body: nn.Module, factors: Mapping[str, Factors], weight: float = 1.0, device: torch.device | None = None
) -> Attached:
    """:func:`attach` for factors that are not trained, moved to ``device`` where one is given."""
    live = {name: LowRank(f, train_A=False).requires_grad_(False).to(device) for name, f in factors.items()}
    return attach(body, live, weight)


@contextmanager
def folded_in(body: nn.Module, factors: Mapping[str, Factors], weight: float = 1.0) -> Iterator[None]:
    """Within the block the base weights are W + weight · ΔW; on leaving, W is put back bit for bit from a kept copy."""
    modules = dict(body.named_modules())
    for name, f in factors.items():
        _check_fits(name, modules.get(name), f.A.shape, f.B.shape)
    kept = {name: modules[name].weight.detach().clone() for name in factors}
    try:
        with torch.no_grad():
            for name, f in factors.items():
                own = modules[name].weight
                own.copy_((own.double() + weight * f.scale * (f.B.double() @ f.A.double())).to(own.dtype))
        yield
    finally:
        with torch.no_grad():
            for name, weight_before in kept.items():
                modules[name].weight.copy_(weight_before)


def _check_fits(name: str, module: nn.Module | None, a_shape, b_shape) -> None:
    if not isinstance(module, nn.Linear):
        raise ValueError(f"adapter module {name!r} must be a linear module of the model; found {type(module).__name__}")
    d_out, d_in = module.weight.shape
    if a_shape[1] != d_in or b_shape[0] != d_out or a_shape[0] != b_shape[1]:
        raise ValueError(
            f"factors of {name} must have shapes A (r × {d_in}) and B ({d_out} × r); "
            f"found A {tuple(a_shape)} and B {tuple(b_shape)}"
        )

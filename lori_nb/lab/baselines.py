"""Baselines that are no sum of low-rank updates: DoRA, LoRA-FA and full fine-tuning.

DoRA and full fine-tuning take the place of a linear module instead of adding to its output, so they are swapped into
the model and swapped out again. DoRA's module and LoRA-FA's optimiser are peft's own, which is imported only where one
of them is used: it takes longer than a short run.

    DoRA    y = b + (m / ‖W + s·B A‖) ⊙ (W + s·B A) x     trained: A, B and m (d_out); the norm is over rows of the
                                                          sum, and no gradient flows through it (arXiv 2402.09353)
    full    y = W x + b                                   trained: W, kept in float32
    LoRA-FA LoRA with a frozen A                          trained: B, with its gradient times (A Aᵀ)⁻¹ / s²
                                                          (arXiv 2308.03303)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lori_nb.method.adapters import Attached, Factors, LowRank, attach

RECIPE = 1  # raise when a baseline gives another result
MAGNITUDE = "magnitude."  # extras of a finished DoRA adapter: "magnitude.<module>"
_NAME = "default"  # peft's name for the one adapter of a module


class Dora(nn.Module):
    """One linear module under DoRA: peft's own layer around the frozen module, its parameters in float32."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    @property
    def scale(self) -> float:
        """s = α / r."""
        return self.layer.scaling[_NAME]

    @property
    def A(self) -> nn.Parameter:
        """A (r × d_in)."""
        return self.layer.lora_A[_NAME].weight

    @property
    def values(self) -> nn.Parameter:
        """B (d_out × r)."""
        return self.layer.lora_B[_NAME].weight

    @property
    def B(self) -> nn.Parameter:
        return self.values

    @property
    def magnitude(self) -> nn.Parameter:
        """m (d_out)."""
        return self.layer.lora_magnitude_vector[_NAME].weight

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by the last part of their name."""
        return {"A": self.A, "B": self.values, "magnitude": self.magnitude}

    def forward(self, x: Tensor) -> Tensor:
        """The module's whole output (… × d_out), in x's dtype."""
        return self.layer(x)

    def factors(self) -> Factors:
        """A detached copy of A and B; without the magnitude they are not the whole update."""
        return Factors(self.A.detach().clone().cpu(), self.B.detach().clone().cpu(), self.scale)

    def support(self) -> None:
        """B is dense."""


class Full(nn.Module):
    """One linear module under full fine-tuning: its weight W (d_out × d_in) is trained in float32, its bias is not."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone().float())
        self.bias = linear.bias

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameter by the last part of its name."""
        return {"weight": self.weight}

    def forward(self, x: Tensor) -> Tensor:
        """W x + b for x (… × d_in) → (… × d_out), computed in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def make_dora(linear: nn.Linear, factors: Factors, magnitude: Tensor | None = None) -> Dora:
    """DoRA around a frozen linear module, by peft's own layer.

    Args:
        factors: what A and B begin as.
        magnitude: m (d_out); the row norms of W + s·B A where it is not given, so that the module then begins as the
            plain linear one with W + s·B A.

    Raises:
        ValueError: a shape does not fit, named.
    """
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    (d_out, d_in), rank = linear.weight.shape, len(factors.A)
    shapes = {"A": (factors.A, (rank, d_in)), "B": (factors.B, (d_out, rank)), "magnitude": (magnitude, (d_out,))}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} of DoRA must have shape {shape}; found {tuple(tensor.shape)}")
    config = LoraConfig(r=rank, lora_alpha=rank, use_dora=True, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):  # peft draws an A of its own
        layer = Linear(linear, _NAME, config, r=rank, lora_alpha=rank)
    layer.scaling[_NAME] = factors.scale  # itself, since (s r) / r need not give back its last bit
    dora = Dora(layer.to(linear.weight.device).eval())
    for parameter in dora.trained().values():
        parameter.data = parameter.data.float()  # peft makes them in the module's dtype
    with torch.no_grad():
        dora.A.copy_(factors.A)
        dora.values.copy_(factors.B)
        dora.magnitude.copy_(_row_norms(dora, linear) if magnitude is None else magnitude)
    return dora


def _row_norms(dora: Dora, linear: nn.Linear) -> Tensor:
    """‖W + s·B A‖ of every row (d_out), by the function that divides by it in peft's layer, so that m / ‖·‖ is 1."""
    inner = dora.layer.lora_magnitude_vector[_NAME]
    delta = inner.get_lora_weight(dora.layer.lora_A[_NAME], dora.layer.lora_B[_NAME])
    return inner.get_weight_norm(linear.weight.float(), delta, dora.scale)


def make_full(linear: nn.Linear) -> Full:
    """Full fine-tuning of one linear module; the module itself is left as it is."""
    return Full(linear)


# How a module that replaces a linear one is made from it and the factors that a run begins with.
REPLACEMENTS: dict[str, Callable[[nn.Linear, Factors], Dora | Full]] = {
    "dora": make_dora,
    "full": lambda linear, factors: make_full(linear),
}


def replacing(form: str, linears: Mapping[str, nn.Linear], live: Mapping[str, LowRank]) -> dict[str, Dora | Full]:
    """The trained modules of a form, from the linear modules that they replace and the factors that a run begins with.

    ``form`` is a key of :data:`REPLACEMENTS`.
    """
    return {name: REPLACEMENTS[form](linears[name], low.factors()) for name, low in live.items()}


def put_in_place(body: nn.Module, live: Mapping[str, nn.Module]) -> Attached:
    """Attach low-rank factors beside the body's linear modules, or swap in what replaces them."""
    added = all(isinstance(module, LowRank) for module in live.values())
    return attach(body, live) if added else swap_in(body, live)


class _Swapped:
    """One module in another's place, as a handle like those of hooks."""

    def __init__(self, parent: nn.Module, child: str, module: nn.Module):
        self._parent, self._child, self._before = parent, child, getattr(parent, child)
        setattr(parent, child, module)

    def remove(self) -> None:
        setattr(self._parent, self._child, self._before)


def swap_in(body: nn.Module, modules: Mapping[str, nn.Module]) -> Attached:
    """Put modules in the place of the body's linear ones; ``detach()`` puts back the very modules that were there.

    A body that shares its layers with another (a suffix) is changed with it. A linear module's hooks do not run while
    it is replaced by one that does not call it.

    Raises:
        ValueError: a name that is not a linear module of the body; nothing is replaced then.
    """
    present = dict(body.named_modules())
    for name in modules:
        if not isinstance(present.get(name), nn.Linear):
            found = type(present.get(name)).__name__
            raise ValueError(f"a replaced module must be a linear one of the model; found {found} for {name!r}")
    parents = {name: body.get_submodule(name.rpartition(".")[0]) for name in modules}
    return Attached([_Swapped(parents[name], name.rpartition(".")[2], module) for name, module in modules.items()])


def dora_extras(live: Mapping[str, Dora]) -> dict[str, Tensor]:
    """What a finished DoRA adapter keeps beside its factors: "magnitude.<module>" (d_out), for :func:`make_dora`."""
    return {f"{MAGNITUDE}{name}": dora.magnitude.detach().clone().cpu() for name, dora in live.items()}


class LoraFA(torch.optim.Optimizer):
    """peft's LoRA-FA optimiser with the state of a torch optimiser: tensors by parameter, so that it can be kept.

    peft's pairs A and B by name and keeps its state by name, with a plain number as the step. Here the state lies under
    the trained parameter as ``step``, ``exp_avg`` and ``exp_avg_sq``, and is handed to peft's optimiser for a step.
    Parameters that are no B get peft's AdamW, whose denominator is √v + 1e-6. Where the processor has bfloat16, peft
    computes the correction of B's gradient in it.
    """

    def __init__(
        self, factors: Iterable[tuple[Tensor, nn.Parameter, float]], others: Iterable[nn.Parameter], **settings: float
    ):
        from peft.optimizers.lorafa import LoraFAOptimizer

        self._names: dict[str, nn.Parameter] = {}
        inner = {"params": [], "names": [], "scaling_factors": []}
        for place, (A, B, scale) in enumerate(factors):
            self._names[f"{place}.lora"] = B
            for part, parameter in (("A", A), ("B", B)):
                inner["params"].append(parameter)
                inner["names"].append(f"{place}.lora_{part}")
                inner["scaling_factors"].append(scale)
        for place, parameter in enumerate(others):
            self._names[f"other.{place}"] = parameter
            inner["params"].append(parameter)
            inner["names"].append(f"other.{place}")
            inner["scaling_factors"].append(None)
        super().__init__(list(self._names.values()), settings)
        self._inner = LoraFAOptimizer([inner], **settings)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step on the gradients that the parameters carry.

        Raises:
            ValueError: a closure, which this optimiser has no use for.
        """
        if closure is not None:
            raise ValueError("closure must be None: gradients are computed before the step; found one")
        (inner,), (own,) = self._inner.param_groups, self.param_groups
        inner["lr"], inner["weight_decay"] = own["lr"], own["weight_decay"]
        for name, parameter in self._names.items():
            self._inner.state[name] = _for_peft(self.state[parameter], name)
        self._inner.step()
        for name, parameter in self._names.items():
            self.state[parameter] = _from_peft(self._inner.state[name])


def _for_peft(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor | int]:
    suffix = "_B" if name.endswith(".lora") else ""
    return {key if key == "step" else key + suffix: int(v) if key == "step" else v for key, v in state.items()}


def _from_peft(state: Mapping[str, Tensor | int]) -> dict[str, Tensor]:
    return {
        key.removesuffix("_B"): torch.tensor(float(value)) if key == "step" else value for key, value in state.items()
    }


def lora_fa_optimiser(
    named: Mapping[str, nn.Parameter], live: Mapping[str, LowRank], *, lr: float, weight_decay: float = 0.0
) -> LoraFA:
    """The optimiser of LoRA-FA for factors whose A is frozen and whose B is dense.

    Args:
        named: the trained parameters, as ``training.named_parameters`` gives them: "<module>.B" and task heads.
        live: the factors that these belong to; their scale s and A decide the correction (A Aᵀ)⁻¹ / s².

    Raises:
        ValueError: a trained A, or a B under a mask.
    """
    for name, low in live.items():
        if low.A.requires_grad or low.values.ndim != 2:
            found = "a trained A" if low.A.requires_grad else "a mask"
            raise ValueError(f"LoRA-FA needs a frozen A and a dense B in every module; found {found} in {name}")
    own = {id(low.values) for low in live.values()}
    others = [parameter for parameter in named.values() if id(parameter) not in own]
    triples = [(low.A, low.values, low.scale) for low in live.values()]
    return LoraFA(triples, others, lr=lr, weight_decay=weight_decay)

"""Merging: N adapters in, one out, without training; every method a function of factors.

The goal of a merge with weights w_i is Σ_i w_i ΔW_i = Σ_i w_i s_i B_i A_i.

- **cat** stacks factors: exact, rank Σ r_i.
- **linear** adds factors: rank stays r, but cross terms B_i A_j come in.

``spectral_merging`` and ``elementwise_merging`` add more.

A method is a function of one module's factors, registered by name::

    @merge_method("first")
    def first(factors, weights):
        return Factors(factors[0].A, weights[0] * factors[0].B, factors[0].scale)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from lori_nb.method.adapters import Factors

MergeMethod = Callable[..., Factors]  # of factors and weights, and of options of its own

RECIPE = 1  # raise when the same input gives another result
MERGE_METHODS: dict[str, MergeMethod] = {}
AS_STORED: set[str] = set()  # those that want factors in the dtypes in which they come
_HANDED_ON = ("module", "rank")  # what :func:`merge` knows, for methods that ask for it
ALSO_CALLED = {"task-arithmetic": "cat", "knots": "knots-ties", "core-space": "core-ties"}  # by :func:`merge` alone


def merge_method(name: str, *, as_stored: bool = False) -> Callable[[MergeMethod], MergeMethod]:
    """Decorator that registers ``(factors, weights) -> Factors``; a name registered again is replaced.

    The function gets the factors of one module from the adapters that have it, with those adapters' weights, in
    float32 or wider. Where it has parameters ``module`` or ``rank``, it gets the module's name, and the rank that the
    result will be cut to if there is one. Further parameters, with defaults, are its options.

    Args:
        as_stored: it gets them in the dtypes in which they come, whose rounding says which directions are real.
    """

    def register(function: MergeMethod) -> MergeMethod:
        MERGE_METHODS[name] = function
        (AS_STORED.add if as_stored else AS_STORED.discard)(name)
        return function

    return register


def options_of(method: str) -> list[str]:
    """The options of a registered method, by name."""
    return [name for name in list(inspect.signature(MERGE_METHODS[method]).parameters)[2:] if name not in _HANDED_ON]


def widened(f: Factors) -> Factors:
    """The same factors, in float32 where they were narrower."""
    A, B = (X.to(torch.promote_types(X.dtype, torch.float32)) for X in (f.A, f.B))
    return Factors(A, B, f.scale)


def merge(
    adapters: Sequence[Mapping[str, Factors]],
    weights: Sequence[float | Mapping[str, float]],
    method: str = "cat",
    rank: int | Literal["sum"] | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Factors]:
    """One adapter out of several; inputs are not altered.

    Args:
        adapters: for each adapter, module name → factors. Ranks and scales may differ; a module that an adapter lacks
            counts as ΔW = 0 there. Of adapters that were stored in bfloat16 or float16, as tensors of that dtype: some
            methods leave out what its rounding made.
        weights: one finite w_i an adapter, which may be below zero; or, for an adapter whose modules differ, a mapping
            module → w_i of every module that it has.
        method: a key of :data:`MERGE_METHODS`, or another name of one in :data:`ALSO_CALLED`.
        rank: cut each merged module to at most this rank, as soon as it is made (:func:`compress`); "sum": to the sum
            of its adapters' ranks, which is what the exact sum has, and more only what acts on entries of ΔW.
        options: of the method, such as ``density``: :func:`options_of` names them.

    Returns:
        module name → merged factors in float32 or wider, for every module of any adapter; of rank 1 at least, of zeros
        where the merge is zero.

    Raises:
        ValueError: no adapter, unknown method or option, weights of another number, not finite or without a module, a
            rank below 1, updates of a module in two shapes, or what the method itself refuses.
    """
    if not adapters:
        raise ValueError("adapters must hold at least one adapter; found none")
    method = ALSO_CALLED.get(method, method)
    if method not in MERGE_METHODS:
        raise ValueError(f"method must be one of {', '.join(sorted(MERGE_METHODS))}; found {method!r}")
    if rank not in (None, "sum") and not (isinstance(rank, int) and rank >= 1):
        raise ValueError(f"rank must be at least 1; found {rank!r}")
    options = dict(options or {})
    for name in options:
        if name not in options_of(method):
            known = ", ".join(options_of(method)) or "none"
            raise ValueError(f"options of method {method!r} must be among {known}; found {name!r}")
    takes = inspect.signature(MERGE_METHODS[method]).parameters
    by_module = _weights_by_module(adapters, weights)
    merged = {}
    for module in dict.fromkeys(name for adapter in adapters for name in adapter):
        present = [(a[module], w[module]) for a, w in zip(adapters, by_module, strict=True) if module in a]
        factors, own_weights = zip(*present, strict=True)
        _check_shapes(module, factors)
        handed_on = {"module": module} | ({} if rank in (None, "sum") else {"rank": rank})
        try:
            own = factors if method in AS_STORED else [widened(f) for f in factors]
            chosen = options | {name: value for name, value in handed_on.items() if name in takes}
            found = MERGE_METHODS[method](own, own_weights, **chosen)
        except ValueError as error:
            raise ValueError(f"method {method!r} cannot merge module {module!r}: {error}") from error
        if not len(found.A):  # a merge of zeros at its numerical rank; no folder holds an adapter of rank 0
            found = Factors(found.A.new_zeros(1, found.A.shape[1]), found.B.new_zeros(len(found.B), 1), 1.0)
        most = sum(len(f.A) for f in factors) if rank == "sum" else rank
        as_it_is = most is None or (rank == "sum" and len(found.A) <= most)
        merged[module] = found if as_it_is else compress(found, min(most, *found.A.shape, len(found.B)))
    return merged


def _weights_by_module(
    adapters: Sequence[Mapping[str, Factors]], weights: Sequence[float | Mapping[str, float]]
) -> list[dict[str, float]]:
    numbers = [each for own in weights for each in (own.values() if isinstance(own, Mapping) else (own,))]
    if len(weights) != len(adapters) or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"weights must be {len(adapters)} finite numbers, one an adapter; found {list(weights)}")
    by_module = []
    for adapter, own in zip(adapters, weights, strict=True):
        own = own if isinstance(own, Mapping) else dict.fromkeys(adapter, own)
        missing = sorted(set(adapter) - set(own))
        if missing:
            raise ValueError(f"weights by module must name every module of their adapter; missing: {missing[0]}")
        by_module.append({module: float(own[module]) for module in adapter})
    return by_module


@merge_method("cat")
def concatenate(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """ΔW = Σ_i w_i s_i B_i A_i exactly: A's stacked (Σ r_i × d_in), B's side by side (d_out × Σ r_i), scale 1.

    Weights and scales go into B, so a frozen A stays bit for bit what its seed makes and zeros of a masked B stay
    zeros.
    """
    A = torch.cat([f.A for f in factors], dim=0)
    B = torch.cat([w * f.scale * f.B for f, w in zip(factors, weights, strict=True)], dim=1)
    return Factors(A, B, 1.0)


@merge_method("linear")
def add_factors(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """ΔW = (Σ_i √|w_i s_i| B_i)(Σ_j ±√|w_j s_j| A_j) with the sign of w_j s_j, scale 1: PEFT's "linear".

    An approximation: beside the wanted Σ w_i s_i B_i A_i it holds every cross term ±√|w_i s_i w_j s_j| B_i A_j, i ≠ j,
    which for unrelated adapters are as large as the wanted ones. With one shared A and equal w s it gives T times the
    wanted sum.

    Raises ValueError when ranks differ.
    """
    ranks = [len(f.A) for f in factors]
    if len(set(ranks)) > 1:
        raise ValueError(f"ranks must be equal to add factors; found {ranks}")
    shares = [w * f.scale for f, w in zip(factors, weights, strict=True)]
    A = sum(math.copysign(math.sqrt(abs(share)), share) * f.A for f, share in zip(factors, shares, strict=True))
    B = sum(math.sqrt(abs(share)) * f.B for f, share in zip(factors, shares, strict=True))
    return Factors(A, B, 1.0)


def compress(f: Factors, rank: int) -> Factors:
    """The nearest update of the given rank in Frobenius norm (truncated SVD), without forming ΔW; scale 1.

    B = Q_b R_b and Aᵀ = Q_a R_a, then the SVD of the small core s·R_b R_aᵀ = U Σ Vᵀ: B' = Q_b U √Σ, A' = √Σ Vᵀ Q_aᵀ,
    first ``rank`` columns and rows. Computed in float64, returned in the dtypes of A and B.

    Raises ValueError unless 1 ≤ rank ≤ min(r, d_out, d_in).
    """
    most = min(*f.A.shape, *f.B.shape)
    if not 1 <= rank <= most:
        raise ValueError(f"rank must be between 1 and {most}, the smallest dimension of the factors; found {rank}")
    Q_b, R_b = torch.linalg.qr(f.B.detach().to(torch.float64))
    Q_a, R_a = torch.linalg.qr(f.A.detach().T.to(torch.float64))
    U, S, Vh = torch.linalg.svd(f.scale * R_b @ R_a.T, full_matrices=False)
    root = S[:rank].sqrt()
    B = Q_b @ (U[:, :rank] * root)
    A = (root[:, None] * Vh[:rank]) @ Q_a.T
    return Factors(A.to(f.A.dtype), B.to(f.B.dtype), 1.0)


def _check_shapes(module: str, factors: Sequence[Factors]) -> None:
    shapes = [(f.B.shape[0], f.A.shape[1]) for f in factors]
    if len(set(shapes)) > 1:
        raise ValueError(f"updates of module {module!r} must have one shape d_out × d_in; found {shapes}")

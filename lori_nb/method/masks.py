"""Masks on B: which entries of the up-projections LoRI-S trains.

LoRI (arXiv 2504.07448) trains a dense B first, keeps the share 1 − sparsity of its largest entries by magnitude, and
trains a fresh B under that mask M ∈ {0,1}. One threshold serves one group of matrices; the *scope* says what a group
is:

======== ============================================== ===========================================
scope    group                                          model.layers.22.self_attn.q_proj falls into
======== ============================================== ===========================================
model    all matrices, as in the paper                  (the one group)
layer    one layer                                      model.layers.22
projection matrices of one kind across layers           q_proj
module   one block within a layer                       model.layers.22.self_attn
matrix   one matrix                                     model.layers.22.self_attn.q_proj
======== ============================================== ===========================================

A threshold alone keeps too many where entries tie (all of them when B = 0). Here a group of n entries keeps exactly
k = ⌊(1 − sparsity)·n + ½⌋, ties going to the earlier position: modules by sorted name, then entries row by row.

The *structure* says what is kept: single entries, as in the paper, or whole rows of B, so that a task writes to its own
output channels. Of n rows, k are kept by the same formula, those of largest Euclidean norm.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from lori_nb.method.streams import words

RECIPE = 1  # raise when the same input gives another result


def _layer(name: str) -> str:
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        raise ValueError(f"scope 'layer' needs a layer number in every module name; found {name!r}")
    # The path in front of the number stays: layer 3 of an encoder is not layer 3 of its decoder.
    return ".".join(parts[: number + 1])


SCOPES: dict[str, Callable[[str], str]] = {
    "model": lambda name: "",
    "layer": _layer,
    "projection": lambda name: name.rpartition(".")[2],
    "module": lambda name: name.rpartition(".")[0],
    "matrix": lambda name: name,
}


STRUCTURES = ("entries", "rows")


def group_of(name: str, scope: str) -> str:
    """The group that module ``name`` shares its threshold with.

    Raises ValueError for an unknown scope, or for scope "layer" and a name without a layer number.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}; found {scope!r}")
    return SCOPES[scope](name)


def kept_of(entries: int, sparsity: float) -> int:
    """k = ⌊(1 − sparsity)·entries + ½⌋, computed on the decimal as written: 0.9 means 9/10, not its nearest double.

    Raises ValueError unless 0 ≤ sparsity < 1.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1 (the share of zeros); found {sparsity}")
    return math.floor((1 - Fraction(str(float(sparsity)))) * entries + Fraction(1, 2))


def magnitude_masks(
    Bs: Mapping[str, Tensor],
    sparsity: float,
    scope: str = "model",
    structure: str = "entries",
    taken: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Masks that keep, in every group of the scope, exactly k entries of largest |B| (or rows of largest norm).

    Args:
        Bs: module name → trained B (d_out × r).
        sparsity: share of zeros, in [0, 1).
        scope: a key of :data:`SCOPES`; the paper's masks are "model".
        structure: one of :data:`STRUCTURES`; the paper's masks are "entries".
        taken: module name → bool mask (d_out × r) of entries that must not be kept; a row with one of them is taken.

    Returns:
        module name → bool mask of B's shape, on B's device, names in the order of ``Bs``.

    Raises:
        ValueError: sparsity, scope or structure outside their range, no module at all, a B that is not finite
            (named), masks in ``taken`` of other modules or shapes, or a group with fewer than k free entries.
    """
    check_structure(structure)
    if taken is not None:
        _check_taken(Bs, taken)
    for name, B in Bs.items():
        if not torch.isfinite(B).all():
            raise ValueError(f"B must be finite in every module; found NaN or infinity in {name!r}")
    scores = {name: _magnitudes(B) for name, B in Bs.items()}
    if structure == "rows":
        scores = {name: _row_norms(magnitudes) for name, magnitudes in scores.items()}
    if taken is not None:
        held = {name: mask.any(dim=1) if structure == "rows" else mask for name, mask in taken.items()}
        _check_free(held, sparsity, scope, structure)
        # Below every magnitude, so that a taken entry comes after all free ones.
        scores = {name: np.where(held[name].cpu().numpy(), -1, score) for name, score in scores.items()}
    masks = _largest(scores, sparsity, scope)
    return {name: _whole(masks[name], B.shape, structure).to(B.device) for name, B in Bs.items()}


def capacity(entries: int, sparsity: float) -> int:
    """How many tasks with disjoint masks of k = kept_of(entries, sparsity) entries fit into one group: ⌊entries / k⌋.

    Raises ValueError for a sparsity that keeps nothing, since then any number fits.
    """
    k = kept_of(entries, sparsity)
    if k == 0:
        raise ValueError(f"sparsity must keep at least one of {entries} entries; found {sparsity}")
    return entries // k


def _check_taken(Bs: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> None:
    if set(taken) != set(Bs):
        raise ValueError(f"taken must have the modules of Bs; they differ in {sorted(set(taken) ^ set(Bs))[:3]}")
    for name, mask in taken.items():
        _check_mask(mask)
        if mask.shape != Bs[name].shape:
            raise ValueError(
                f"taken must have the shape of B in every module; found {tuple(mask.shape)} for {name!r}, "
                f"whose B has {tuple(Bs[name].shape)}"
            )


def _check_free(held: Mapping[str, Tensor], sparsity: float, scope: str, structure: str) -> None:
    sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, flags in held.items():
        total = sizes[group_of(name, scope)]
        total[0] += flags.numel()
        total[1] += int((~flags).sum())
    for group, (size, free) in sizes.items():
        if free < (k := kept_of(size, sparsity)):
            where = f" in {group}" if group else ""
            raise ValueError(
                f"masks must find {k} free {structure} of {size}{where} at sparsity {sparsity:g}; found {free}: "
                f"{size // k} tasks with disjoint masks fit"
            )


def random_masks(
    shapes: Mapping[str, Sequence[int]],
    sparsity: float,
    scope: str = "model",
    structure: str = "entries",
    *,
    seed: int,
    stream: str = "",
) -> dict[str, Tensor]:
    """Uniformly random masks of exactly k entries (or rows) a group: the control for :func:`magnitude_masks`.

    Every entry gets a 64-bit word of a Philox stream keyed by (seed, stream, module name); the k largest are kept. The
    raw stream is the same on every platform, and a module's words do not depend on which other modules there are.

    Args:
        shapes: module name → shape of B (d_out, r).
        sparsity: share of zeros, in [0, 1).
        scope: a key of :data:`SCOPES`.
        structure: one of :data:`STRUCTURES`.
        seed: any integer.
        stream: names the draw, so that two tasks of one seed get different masks.

    Raises:
        ValueError: sparsity, scope or structure outside their range, or no module at all.
    """
    check_structure(structure)
    drawn = {name: shape[0] if structure == "rows" else math.prod(shape) for name, shape in shapes.items()}
    label = f"{stream}:" if stream else ""
    draws = {name: words(f"mask:{seed}:{label}{name}", count) for name, count in drawn.items()}
    masks = _largest(draws, sparsity, scope)
    return {name: _whole(masks[name], shape, structure) for name, shape in shapes.items()}


def check_structure(structure: str) -> None:
    """ValueError unless the structure is one of :data:`STRUCTURES`."""
    if structure not in STRUCTURES:
        raise ValueError(f"mask_structure must be one of {', '.join(STRUCTURES)}; found {structure!r}")


def _whole(flags: np.ndarray, shape: Sequence[int], structure: str) -> Tensor:
    """Bool mask (d_out × r) of flags on its entries, or on its rows."""
    mask = torch.from_numpy(flags)
    return mask[:, None].repeat(1, shape[1]) if structure == "rows" else mask.reshape(tuple(shape))


def _row_norms(magnitudes: np.ndarray) -> np.ndarray:
    # In float64, where a sum of squared float32 values neither overflows nor rounds equal rows apart.
    return np.sqrt(np.square(magnitudes.astype(np.float64)).sum(axis=1))


def kept(masks: Mapping[str, Tensor]) -> int:
    """How many entries all masks keep together: LoRI-S's number of trainable parameters."""
    return sum(int(mask.sum()) for mask in masks.values())


def kept_in_all(
    shapes: Mapping[str, Sequence[int]], sparsity: float, scope: str = "model", structure: str = "entries"
) -> int:
    """How many entries masks of these shapes keep together: the sum of k over the scope's groups, known beforehand."""
    check_structure(structure)
    of_row = {name: shape[1] if structure == "rows" else 1 for name, shape in shapes.items()}
    ranks = set(of_row.values())
    if len(ranks) != 1:
        raise ValueError(f"modules must have one rank for masks of rows; found {sorted(ranks)}")
    sizes: dict[str, int] = defaultdict(int)
    for name, shape in shapes.items():
        sizes[group_of(name, scope)] += math.prod(shape) // of_row[name]
    return ranks.pop() * sum(kept_of(size, sparsity) for size in sizes.values())


def pack(B: Tensor, mask: Tensor) -> Tensor:
    """The k values of B under its mask, row by row (k,). ValueError when shapes differ or the mask is not bool."""
    _check_mask(mask)
    if B.shape != mask.shape:
        raise ValueError(f"mask must have the shape of B {tuple(B.shape)}; found {tuple(mask.shape)}")
    return B[mask]


def unpack(values: Tensor, mask: Tensor) -> Tensor:
    """B with ``values`` (k,) under the mask and zeros elsewhere; inverse of :func:`pack` on a masked B.

    Raises ValueError unless there is one value for each kept entry.
    """
    _check_mask(mask)
    if values.shape != (int(mask.sum()),):
        raise ValueError(f"values must have shape ({int(mask.sum())},), one a kept entry; found {tuple(values.shape)}")
    B = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    B[mask.to(values.device)] = values
    return B


def mask_bits(mask: Tensor) -> Tensor:
    """The mask as bits, row by row, the first entry in the highest bit: uint8 of ⌈n/8⌉ bytes, padded with zeros."""
    _check_mask(mask)
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1), bitorder="big"))


def mask_from_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of ``shape`` that :func:`mask_bits` wrote.

    Raises ValueError when the number of bytes does not fit the shape, or when a padding bit is set.
    """
    entries = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != (-(-entries // 8),):
        raise ValueError(
            f"bits must be uint8 of shape ({-(-entries // 8)},) for a mask of shape {tuple(shape)}; "
            f"found {bits.dtype} of shape {tuple(bits.shape)}"
        )
    flags = np.unpackbits(bits.cpu().numpy(), bitorder="big").astype(bool)
    if flags[entries:].any():
        raise ValueError(f"bits must be zero beyond the {entries} entries of the mask; found a padding bit that is set")
    return torch.from_numpy(flags[:entries].copy()).reshape(tuple(shape))


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be a bool tensor; found {mask.dtype}")


def _magnitudes(B: Tensor) -> np.ndarray:
    # numpy has no bfloat16; float32 holds bfloat16 and float16 exactly, so the order of magnitudes is unchanged.
    wide = B.detach().abs().to(torch.promote_types(B.dtype, torch.float32))
    return wide.cpu().numpy()


def _largest(scores: Mapping[str, np.ndarray], sparsity: float, scope: str) -> dict[str, np.ndarray]:
    """Module name → bool array of exactly k largest scores a group; ties to the earlier sorted name and index."""
    if not scores:
        raise ValueError("masks need at least one module; found none")
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(scores):
        groups[group_of(name, scope)].append(name)
    masks: dict[str, np.ndarray] = {}
    for names in groups.values():
        flat = np.concatenate([scores[name].reshape(-1) for name in names])
        flags = _top(flat, kept_of(flat.size, sparsity))
        ends = np.cumsum([scores[name].size for name in names])
        pieces = np.split(flags, ends[:-1])
        masks |= {name: piece.reshape(scores[name].shape) for name, piece in zip(names, pieces, strict=True)}
    return masks


def _top(flat: np.ndarray, k: int) -> np.ndarray:
    """Flags of the k largest entries, ties by position; by selection, not a sort: an 8B model has n = 44 million."""
    if k == 0:
        return np.zeros(flat.size, dtype=bool)
    threshold = np.partition(flat, flat.size - k)[flat.size - k]
    flags = flat > threshold
    ties = np.flatnonzero(flat == threshold)
    flags[ties[: k - np.count_nonzero(flags)]] = True
    return flags

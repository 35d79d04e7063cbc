"""Where A comes from: which subspace of its input each adapter reads.

A policy says how the draws of different tasks relate:

============ ========================================================================== ====================
policy       A of different tasks                                                       stream
============ ========================================================================== ====================
independent  drawn apart, so nearly orthogonal in many dimensions (the LoRI paper's)    the task's name
shared       one draw for all, the control                                              "shared"
orthogonal   exactly orthogonal, A_s A_tᵀ = 0: blocks of one basis, while T·r ≤ d_in    "orthogonal:<block>"
============ ========================================================================== ====================

The policy serves LoRA's starting A as well as LoRI's frozen one: a shared draw by itself makes adapters look alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from lori_nb.method.streams import words

RECIPE = 1  # raise when the same input gives another result
POLICIES = ("independent", "shared", "orthogonal")
_BLOCK = "orthogonal:"
_FRESH = "/fresh"


def subspace_id(policy: str, tasks: Sequence[str], family: Sequence[str] = ()) -> str:
    """Name of the stream that A is drawn from under a policy.

    Args:
        tasks: the tasks of the adapter; trained jointly they share one A.
        family: the tasks that share a basis under "orthogonal", each of which takes its own block, in this order.
            Appending a task changes no other's block.

    Raises:
        ValueError: an unknown policy, or under "orthogonal" an adapter that is not for one task of the family.
    """
    if policy not in POLICIES:
        raise ValueError(f"subspace must be one of {', '.join(POLICIES)}; found {policy!r}")
    if policy != "orthogonal":
        return "shared" if policy == "shared" else "+".join(tasks)
    if len(tasks) != 1 or tasks[0] not in family:
        known = ", ".join(family) or "an empty family"
        raise ValueError(f"tasks must be one task of the family ({known}) for orthogonal; found {'+'.join(tasks)}")
    return f"{_BLOCK}{list(family).index(tasks[0])}"


def fresh_subspace(subspace: str) -> str:
    """Another stream for the same adapter: the A of a second training that does not keep the first one's."""
    return subspace + _FRESH


def is_portable(subspace: str) -> bool:
    """Whether a seed gives the same bits of A on every platform; an A that it does not must be stored.

    An orthonormal basis comes out of a factorization whose rounding depends on the linear-algebra library.
    """
    return not subspace.startswith(_BLOCK)


def down_projection(seed: int, subspace: str, module: str, rank: int, d_in: int) -> Tensor:
    """A (rank × d_in, float32) of a stream; equal arguments give equal values in any process and any module order.

    Raises ValueError where an orthogonal block does not fit: (block + 1)·rank > d_in.
    """
    if is_portable(subspace):
        return random_down_projection(seed, subspace, module, rank, d_in)
    number, _, suffix = subspace.removeprefix(_BLOCK).partition("/")
    return orthogonal_down_projection(seed, int(number), module, rank, d_in, stream=suffix)


def random_down_projection(seed: int, subspace: str, module: str, rank: int, d_in: int) -> Tensor:
    """A (rank × d_in) with entries uniform on ±1/√d_in, the same bits on every platform and release.

    The distribution is PEFT's default (Kaiming-uniform with a = √5). The bits are the raw stream of a Philox counter
    keyed by SHA-256 of (seed, subspace, module, shape); 24 of every 64 bits make a float32 exactly, so no library's own
    conversion is involved.

    Args:
        subspace: names the stream; two tasks with different names get independent draws, with the same name the same
            draw.
        module: base-relative name, so that a head around the base changes nothing.
    """
    raw = words(f"lori-nb/A/{seed}/{subspace}/{module}/{rank}x{d_in}", rank * d_in)
    unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)  # exact in float32
    bound = np.float32(1.0 / np.sqrt(np.float64(d_in)))
    return torch.from_numpy((unit * bound).reshape(rank, d_in))


def check_blocks(blocks: int, rank: int, widths: Mapping[str, int]) -> None:
    """ValueError unless so many blocks of ``rank`` rows fit the input width d_in of every module."""
    for module, d_in in widths.items():
        if blocks * rank > d_in:
            raise ValueError(
                f"rank times tasks must be at most the input width for orthogonal subspaces, {d_in} at {module}; "
                f"found {rank} × {blocks}"
            )


def orthogonal_down_projection(seed: int, block: int, module: str, rank: int, d_in: int, *, stream: str = "") -> Tensor:
    """A (rank × d_in) of one block of a module's orthonormal basis, so that A_s A_tᵀ = 0 for different blocks.

    The basis is the Q of a Gaussian matrix whose columns are drawn block by block (Haar-distributed), so a block does
    not depend on how many follow it. Rows have the norm 1/√3 that a row of the random A has in the mean square, so
    the same learning rate serves both: A Aᵀ = I/3.

    Raises ValueError unless (block + 1)·rank ≤ d_in.
    """
    check_blocks(block + 1, rank, {module: d_in})
    columns = [
        _gaussian(f"lori-nb/orthogonal/{stream}/{seed}/{number}/{module}/{rank}x{d_in}", (d_in, rank))
        for number in range(block + 1)
    ]
    Q, R = np.linalg.qr(np.concatenate(columns, axis=1))
    Q = Q * np.sign(np.diagonal(R))  # the factorization's signs are a library's choice
    own = Q[:, block * rank :].T / np.sqrt(3.0)
    return torch.from_numpy(np.ascontiguousarray(own, dtype=np.float32))


def _gaussian(text: str, shape: tuple[int, int]) -> np.ndarray:
    """Standard normal float64 values by inversion of the raw stream; (word + ½)/2⁵³ is never 0 or 1."""
    bits = words(text, shape[0] * shape[1]) >> np.uint64(11)
    return ndtri((bits.astype(np.float64) + 0.5) * 2.0**-53).reshape(shape)

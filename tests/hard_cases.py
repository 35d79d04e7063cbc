"""Hard cases for merges: ranks that are deficient, too large or zero, A shared or repeated, rows that do not meet."""

from __future__ import annotations

import torch

from lori_nb.method.adapters import Factors

D_OUT, D_IN = 14, 11


def random_factors(seed: int, rank: int = 3, scale: float = 1.5) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, D_IN, generator=draw, dtype=torch.float64)
    return Factors(A, torch.randn(D_OUT, rank, generator=draw, dtype=torch.float64), scale)


def hard_bank() -> dict[str, list[Factors]]:
    one, two, three = random_factors(0), random_factors(1, 2), random_factors(2, 4, 0.3)
    twin = Factors(one.A, random_factors(5).B, one.scale)
    deficient = Factors(torch.cat([one.A[:1]] * 3), one.B, one.scale)
    zero = Factors(one.A, torch.zeros_like(one.B), one.scale)
    return {
        "plain": [one, two, three],
        "shared A": [one, twin],
        "repeated": [one, one],
        "rank deficient": [deficient, two],
        "with a zero one": [zero, two],
        "alone": [one],
        "large ranks": [random_factors(7, 10), random_factors(8, 9)],
        "a rank above a dimension": [random_factors(9, 13), random_factors(10, 2)],
        "disjoint rows, 8 adapters": disjoint_rows(8),
    }


def disjoint_rows(count: int) -> list[Factors]:
    """Adapters of rank 2, each of which writes to rows of the output that no other does."""
    found = []
    for place in range(count):
        f, own = random_factors(20 + place, 2), torch.zeros(D_OUT, 1, dtype=torch.float64)
        own[place::count] = 1
        found.append(Factors(f.A, own * f.B, f.scale))
    return found


def weights_of(factors) -> list[float]:
    return [0.7, -0.4, 1.3, 0.9, -1.1, 0.6, 0.8, 1.2][: len(factors)]


def in_another_basis(f: Factors, seed: int) -> Factors:
    """(B R, R⁻¹ A): the same update."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(f.A), len(f.A), generator=draw, dtype=torch.float64)
    R = torch.linalg.qr(noise).Q + 0.5 * torch.eye(len(f.A))
    return Factors(torch.linalg.inv(R) @ f.A, f.B @ R, f.scale)

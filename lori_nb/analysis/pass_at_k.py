"""pass@k: the probability that one of k programs drawn from a model passes, estimated without bias."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 − C(n − c, k) / C(n, k): the share of the k-subsets of n drawn programs that hold one of the c passing ones.

    It is unbiased for the probability that k fresh draws hold a passing one, which 1 − (1 − c/n)^k is not (Chen et al.
    2021, arXiv 2107.03374). Integer arithmetic; rounded once, at the end.

    Raises:
        ValueError: unless 0 ≤ c ≤ n and 1 ≤ k ≤ n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"c must be from 0 to n = {n} programs; found {c}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to n = {n} programs drawn for each problem; found {k}")
    return float(1 - Fraction(comb(n - c, k), comb(n, k)))


def pass_at_k_of_rows(passed: np.ndarray, ks: tuple[int, ...] = (1, 5, 10)) -> dict[int, np.ndarray]:
    """pass@k of every problem (rows,) for each k, from ``passed`` (rows × n), true where a program passed.

    Raises:
        ValueError: ``passed`` is not a matrix of truth values, or a k is not from 1 to n.
    """
    passed = np.asarray(passed)
    if passed.ndim != 2 or passed.dtype != bool:
        raise ValueError(f"passed must be a matrix of truth values; found shape {passed.shape}, {passed.dtype}")
    n = passed.shape[1]
    return {k: np.array([pass_at_k(n, int(c), k) for c in passed.sum(axis=1)], dtype=np.float64) for k in ks}

"""Merges on singular vectors, against their definitions on dense matrices in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hard_cases import D_IN, D_OUT, disjoint_rows, hard_bank, in_another_basis, random_factors, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lori_nb.analysis.merging import MERGE_METHODS, merge
from lori_nb.analysis.spectral_merging import cores_of, knots, ties
from lori_nb.method.adapters import Factors

METHODS = ("svd", "tsv-m", "iso-c", "iso-cts", "knots-ties", "core-ties")


# The definitions, on dense matrices


def rank_of(X):
    s = torch.linalg.svdvals(X)
    return int((s > 1e-10 * s[:1].sum()).sum())


def dsvd(X):
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    r = rank_of(X)
    return U[:, :r], s[:r], Vh[:r]


def dpolar(X):
    P, _, Qh = dsvd(X)
    return P @ Qh


def dense_tsv(deltas, weights):
    parts = [dsvd(d) for d in deltas]
    U, V = torch.cat([u for u, _, _ in parts], 1), torch.cat([v.T for _, _, v in parts], 1)
    s = torch.cat([w * x for w, (_, x, _) in zip(weights, parts, strict=True)])
    return dpolar(U) @ torch.diag(s) @ dpolar(V).T


def dense_iso(deltas, weights):
    U, s, Vh = dsvd(sum(w * d for w, d in zip(weights, deltas, strict=True)))
    return s.mean() * U @ Vh


def dense_iso_cts(deltas, weights):
    """By the definition, direction by direction: common ones are given up, N at a time, one for every task, until those
    left are as near to four fifths of the rank as they come, of two as near the even number of times; at least once.
    """
    W, N = sum(w * d for w, d in zip(weights, deltas, strict=True)), len(deltas)
    U, s, Vh = dsvd(W)
    R = len(s)
    given_up = [n for n in range(1, R + 1) if n * N <= R] or [1]
    each = min(given_up, key=lambda n: (abs(R - n * N - int(0.8 * R)), n % 2))
    common = max(0, R - each * N)
    outer = [s[j] * torch.outer(U[:, j], Vh[j]) for j in range(common)]
    project = torch.eye(D_OUT, dtype=torch.float64) - U[:, :common] @ U[:, :common].T
    for w, d in zip(weights, deltas, strict=True):
        u, x, v = torch.linalg.svd(project @ (w * d), full_matrices=False)
        # what a task has no further direction of, it does not add
        outer += [x[j] * torch.outer(u[:, j], v[j]) for j in range(each) if x[j] > 1e-10 * (w * d).norm()]
    values = torch.stack([X.norm() for X in outer])
    left = torch.stack([X @ (X.T @ torch.ones(D_OUT, dtype=X.dtype)) for X in outer], 1)  # along u_j
    left = left / left.norm(dim=0)
    right = torch.stack([X.T @ u / X.norm() for X, u in zip(outer, left.T, strict=True)], 1)  # v_j, with u_j's sign
    return values.mean() * dpolar(left) @ dpolar(right).T


def cleaned(entries, norms):
    """Zero what is zero in exact arithmetic: in the bank no other entry is below 1e-9 of the norm of the update that it
    is of, and none of these above. A decomposition's error is some 1e-15 of the norm, and singular values of the bank
    are at least a thousandth apart, so that vectors turn by some 1e-12.
    """
    shares = entries.abs() / norms[:, None, None].clamp(min=1e-300)
    assert not ((shares > 1e-11) & (shares < 1e-7)).any()
    return torch.where(shares > 1e-9, entries, 0.0)


def dense_knots(deltas, weights):
    U, s, Vh = dsvd(torch.cat(deltas, 1))
    right = torch.stack((s[:, None] * Vh).split(D_IN, dim=1))
    return U @ ties(cleaned(right, torch.stack([d.norm() for d in deltas])), weights)


def dense_svd(deltas, weights):
    U, s, Vh = torch.linalg.svd(sum(w * d for w, d in zip(weights, deltas, strict=True)), full_matrices=False)
    return U, s, Vh


DENSE = {"tsv-m": dense_tsv, "iso-c": dense_iso, "iso-cts": dense_iso_cts, "knots-ties": dense_knots}


def test_iso_cts_of_many_small_adapters_keeps_a_direction_of_each():
    """Eight of rank 4: R = 32, of which 25 are four fifths; a direction a task makes 24 common and 8 of their own."""
    draw = torch.Generator().manual_seed(5)
    shapes = [((4, 40), (50, 4)) for _ in range(8)]
    pairs = [[torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in both] for both in shapes]
    factors = [Factors(A, B, 1.0) for A, B in pairs]
    weights = [1.0] * 8
    merged = MERGE_METHODS["iso-cts"](factors, weights).delta()
    assert rank_of(merged) == 32
    U, s, Vh = dsvd(sum(f.delta() for f in factors))
    assert (merged - s[:25].mean() * U[:, :25] @ Vh[:25]).norm() > 0.1 * merged.norm(), "not the common part alone"
    assert (U[:, :24].T @ merged @ Vh[:24].T).diagonal().min() > 0.8 * merged.norm() / 32**0.5
    assert (merged - MERGE_METHODS["iso-c"](factors, weights).delta()).norm() > 0.05 * merged.norm()


# Of equal adapters Iso-CTS takes the leading one of equal directions, which is any of them.
CASES = [(name, case) for name in DENSE for case in hard_bank() if (name, case) != ("iso-cts", "repeated")]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_factored_equals_dense(name, case):
    factors = hard_bank()[case]
    weights = weights_of(factors)
    found = MERGE_METHODS[name](factors, weights).delta()
    expected = DENSE[name]([f.delta() for f in factors], weights)
    assert (found - expected).norm() <= 1e-10 * condition(factors) * max(1.0, expected.norm())


def condition(factors) -> float:
    """Of the stacked factors, at their numerical rank: what singular vectors turn by."""
    parts = [dsvd(torch.cat([f.B for f in factors], 1))[1], dsvd(torch.cat([f.A for f in factors]))[1]]
    return max(float(s[0] / s[-1]) for s in parts)


@pytest.mark.parametrize("case", hard_bank())
def test_core_space_equals_its_dense_definition(case):
    """Cores are ΔW between the singular vectors of all B side by side and of all A stacked, up to their signs."""
    factors = hard_bank()[case]
    weights = weights_of(factors)
    U = dsvd(torch.cat([f.B for f in factors], 1))[0]
    V = dsvd(torch.cat([f.A for f in factors]))[2].T
    cores = torch.stack([U.T @ f.delta() @ V for f in factors])
    expected = U @ ties(cleaned(cores, torch.linalg.matrix_norm(cores)), weights) @ V.T
    found = MERGE_METHODS["core-ties"](factors, weights).delta()
    assert (found - expected).norm() <= 1e-10 * condition(factors) * max(1.0, expected.norm())


@pytest.mark.parametrize("count", [2, 8, 12])
def test_knots_of_adapters_that_write_to_different_rows_is_their_sum(count):
    """[ΔW_1 … ΔW_N] has U in blocks, so that every row of the right factors is of one task: its sign is elected, and it
    is the mean of one. What rounding leaves of the others must neither be counted nor kept by the trim.
    """
    factors, weights = disjoint_rows(count), [1.0 - 0.1 * place for place in range(count)]
    exact = sum(w * f.delta() for w, f in zip(weights, factors, strict=True))
    assert (knots(factors, weights, density=1.0).delta() - exact).norm() <= 1e-12 * exact.norm()
    same_rows = [random_factors(20 + place, 2) for place in range(count)]
    exact = sum(w * f.delta() for w, f in zip(weights, same_rows, strict=True))
    assert (knots(same_rows, weights, density=1.0).delta() - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("case", hard_bank())
def test_svd_is_the_nearest_of_its_rank(case):
    factors = hard_bank()[case]
    weights = weights_of(factors)
    rank = max(len(f.A) for f in factors)
    U, s, Vh = dense_svd([f.delta() for f in factors], weights)
    expected = U[:, :rank] @ torch.diag(s[:rank]) @ Vh[:rank]
    assert (MERGE_METHODS["svd"](factors, weights).delta() - expected).norm() <= 1e-10 * max(1, expected.norm())


@pytest.mark.parametrize("name", METHODS)
def test_order_of_adapters_does_not_matter(name):
    factors, weights = hard_bank()["plain"], [0.5, 0.8, 0.3]
    one = MERGE_METHODS[name](factors, weights).delta()
    other = MERGE_METHODS[name](factors[::-1], weights[::-1]).delta()
    assert (one - other).norm() <= 1e-9 * one.norm()


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_another_basis_of_the_factors_changes_nothing_but_what_adds_factors_or_trims_cores(name):
    """linear adds factors as they are, and Core Space's bases are singular vectors of the factors."""
    factors, weights = [random_factors(seed) for seed in range(3)], [0.5, 0.8, 0.3]
    turned = [in_another_basis(f, 9 + place) for place, f in enumerate(factors)]
    one, other = (merge([{"m": f} for f in each], weights, name)["m"].delta() for each in (factors, turned))
    if name in ("linear", "core-ties"):
        assert (one - other).norm() > 0.1 * one.norm()
    else:
        assert (one - other).norm() <= 1e-8 * one.norm()


@given(st.integers(0, 200), st.floats(0.05, 1.0))
@settings(max_examples=40, deadline=None)
def test_ties_by_hand(seed, density):
    draw = torch.Generator().manual_seed(seed)
    v = torch.randn(3, 4, 5, generator=draw, dtype=torch.float64)
    w = [0.5, -1.0, 2.0]
    k = max(1, math.ceil(density * 20))
    trimmed = []
    for each in v:
        floor = each.abs().flatten().sort(descending=True).values[k - 1]
        trimmed.append(torch.where(each.abs() >= floor, each, 0))
    found = ties(v, w, density)
    for i in range(4):
        for j in range(5):
            values = [wi * float(t[i, j]) for wi, t in zip(w, trimmed, strict=True)]
            sign = 1 if sum(values) > 0 else -1 if sum(values) < 0 else 0
            agreeing = [x for x in values if x * sign > 0]
            expected = sum(agreeing) / len(agreeing) if agreeing else 0.0
            assert abs(float(found[i, j]) - expected) < 1e-12


def test_the_merges_differ_from_each_other_and_from_the_plain_sum():
    factors, weights = hard_bank()["plain"], [0.5, 0.8, 0.3]
    deltas = {name: MERGE_METHODS[name](factors, weights).delta() for name in (*METHODS, "cat")}
    for one, other in itertools.combinations(deltas, 2):
        assert (deltas[one] - deltas[other]).norm() > 1e-3 * deltas["cat"].norm(), (one, other)


def test_nothing_leaves_the_spaces_of_the_factors():
    """Published code of Iso-C and TSV-M on dense low-rank updates brings null directions in."""
    factors = [random_factors(0), random_factors(1)]
    common = cores_of(factors)
    for name in METHODS:
        delta = MERGE_METHODS[name](factors, [1.0, 1.0]).delta()
        outside = delta - common.columns @ (common.columns.T @ delta)
        assert outside.norm() <= 1e-12 * delta.norm(), name
        if name != "knots-ties":  # merges entries of the input's own coordinates
            assert (delta - delta @ common.rows @ common.rows.T).norm() <= 1e-12 * delta.norm(), name


@pytest.mark.parametrize("name", ["iso-c", "tsv-m"])
def test_directions_that_rounding_made_do_not_enter(name):
    """B's of two adapters are in proportion but for rounding to float32, which would weigh as much once flattened."""
    one, other = random_factors(0), random_factors(1)
    exact = [one, Factors(other.A, 0.3 * one.B, 1.0)]
    stored = [Factors(f.A.float(), f.B.float(), f.scale) for f in exact]
    assert not torch.equal(stored[1].B.double(), 0.3 * stored[0].B.double())
    expected, found = (MERGE_METHODS[name](each, [1.0, 1.0]).delta().double() for each in (exact, stored))
    assert len(MERGE_METHODS[name](stored, [1.0, 1.0]).A) <= 6
    assert (found - expected).norm() <= 1e-5 * expected.norm()  # some u of float32 times the factors' condition


def orthonormal_pair() -> list[Factors]:
    """B_1 and B_2 of six orthonormal columns together, A_1 of three orthonormal rows, A_2 = 0.3 A_1."""
    draw = torch.Generator().manual_seed(3)
    B = torch.linalg.qr(torch.randn(D_OUT, 6, generator=draw, dtype=torch.float64)).Q
    A = torch.linalg.qr(torch.randn(D_IN, 3, generator=draw, dtype=torch.float64)).Q.T
    return [Factors(A, B[:, :3], 1.0), Factors(0.3 * A, B[:, 3:], 1.0)]


def as_stored(f: Factors, dtype) -> Factors:
    return Factors(f.A.to(dtype), f.B.to(dtype), f.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["iso-c", "tsv-m"])
def test_what_rounding_to_a_narrow_dtype_made_is_no_direction(name, dtype):
    """Of A_2 = 0.3 A_1 only rounding tells A_2's rows from A_1's.

    Rounding moves ΔW_i by δ_i ≤ ε ‖A_i‖ ‖B_i‖, relatively by 3 ε here. Iso-C: the polar factor moves by at most
    δ / σ, the mean by δ / √R, with δ = Σ δ_i and all σ equal, so that the merge moves by 2 δ to first order. TSV-M,
    which here is (ΔW_1 + ΔW_2) / √2: each U_i and V_i moves by √2 · 3 ε, their nearest orthonormal matrices by no more
    than 2 · 3 ε and √2 · 3 ε, the values by δ / √2. Both stay below five times δ.
    """
    exact = orthonormal_pair()
    if name == "tsv-m":
        expected = sum(f.delta() for f in exact) / 2**0.5
    else:
        expected = DENSE[name]([f.delta() for f in exact], [1.0, 1.0])
    moved = torch.finfo(dtype).eps * sum(float(f.A.norm() * f.B.norm()) for f in exact)
    stored = [{"m": as_stored(f, dtype)} for f in exact]
    found = merge(stored, [1.0, 1.0], name)["m"]
    assert found.A.dtype == found.B.dtype == torch.float32
    assert not torch.equal(found.A, found.A.to(dtype).float()), "nor is the result rounded to the dtype"
    assert 0 < (found.delta().double() - expected).norm() <= 5 * moved < 0.2 * expected.norm()
    unaware = merge([{"m": as_stored(each["m"], torch.float32)} for each in stored], [1.0, 1.0], name)["m"]
    assert (unaware.delta().double() - expected).norm() > 5 * moved


def test_common_spaces_are_as_large_as_what_was_stored_is_real():
    one, two = (as_stored(f, torch.bfloat16) for f in orthonormal_pair())
    assert cores_of([one, two]).rows.shape[1] == 3 and cores_of([one, two]).columns.shape[1] == 6
    wide = [as_stored(f, torch.float32) for f in (one, two)]
    assert cores_of(wide).rows.shape[1] == 6
    assert cores_of([wide[0], two]).rows.shape[1] == 3, "the narrower dtype decides what two of them have in common"
    small = Factors(two.A, two.B * 1e-4, 1.0)
    assert cores_of([one, small]).columns.shape[1] == 6, "an adapter is not rounding to a larger one"


@pytest.mark.parametrize("name", ["tsv-m", "iso-c", "iso-cts"])
def test_a_task_brings_no_more_directions_than_its_own_rank(name):
    """A rank-2 B in 6 columns of float32, beside a generic adapter in whose space its rounding has a part."""
    draw = torch.Generator().manual_seed(4)
    left, right = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((D_OUT, 2), (2, 6)))
    deficient = Factors(torch.randn(6, D_IN, generator=draw, dtype=torch.float64), left @ right, 1.0)
    exact = [deficient, random_factors(1, 3)]
    stored = [as_stored(f, torch.float32) for f in exact]
    found, expected = (MERGE_METHODS[name](each, [1.0, 1.0]).delta().double() for each in (stored, exact))
    # Rounding moves each update by ε ‖A‖ ‖B‖ at most; polar factors and singular vectors by that times the condition.
    moved = torch.finfo(torch.float32).eps * sum(float(f.scale * f.A.norm() * f.B.norm()) for f in exact)
    smallest = min(float(dsvd(f.delta())[1][-1]) for f in exact)
    assert (found - expected).norm() <= 10 * moved / smallest * expected.norm() < 1e-3 * expected.norm()
    full = [Factors(deficient.A.float(), (deficient.B + 1e-3 * random_factors(6, 6).B).float(), 1.0), stored[1]]
    assert (MERGE_METHODS[name](full, [1.0, 1.0]).delta() - expected).norm() > 1e-2 * expected.norm()


def test_zero_updates_merge_to_zero():
    zero = Factors(random_factors(0).A, torch.zeros(D_OUT, 3, dtype=torch.float64), 1.0)
    for name in METHODS:
        assert MERGE_METHODS[name]([zero, zero], [1.0, 1.0]).delta().abs().max() == 0, name
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\]; found 0"):
        ties(torch.ones(2, 3), [1.0, 1.0], 0)


def test_merging_an_adapter_of_several_modules_goes_module_by_module():
    adapters = [{"q": random_factors(0), "v": random_factors(1)}, {"q": random_factors(2)}]
    merged = merge(adapters, [0.5, 0.5], "tsv-m")
    assert set(merged) == {"q", "v"}

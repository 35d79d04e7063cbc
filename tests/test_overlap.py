"""Overlap from factors equals overlap from dense updates, and small angles keep their digits.

Bounds are forward errors in float64 with u = 2.2e-16: a product of d terms is within d·u of Σ|terms|, and an SVD's
singular values and an orthonormal basis are within a small multiple of d·u; C = 10 stands for these multiples.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lori_nb.analysis.overlap import (
    frobenius_cosine,
    inner_product,
    norm,
    overlap_table,
    principal_angles,
    subspace_overlap,
    total_cosine,
)
from lori_nb.method.adapters import Factors

C, U = 10, np.finfo(np.float64).eps
D_OUT, D_IN = 24, 40


def matrix(rows: int, columns: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(seed: int, rank: int = 4, scale: float = 2.0, dtype=torch.float64) -> Factors:
    return Factors(matrix(rank, D_IN, 2 * seed, dtype), matrix(D_OUT, rank, 2 * seed + 1, dtype), scale)


def dense(f: Factors) -> np.ndarray:
    return f.scale * (f.B.double().numpy() @ f.A.double().numpy())


def factor_size(f: Factors) -> float:
    return abs(f.scale) * float(f.B.double().norm() * f.A.double().norm())


@given(seed=st.integers(0, 10**6), rank_f=st.integers(1, 6), rank_g=st.integers(1, 6), single=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_products_norms_and_cosines_equal_the_dense_ones(seed, rank_f, rank_g, single):
    dtype = torch.float32 if single else torch.float64
    f, g = factors(seed, rank_f, 2.0, dtype), factors(seed + 1, rank_g, -0.5, dtype)
    F, G = dense(f), dense(g)
    slack = C * D_IN * U
    assert abs(inner_product(f, g) - np.vdot(F, G)) <= slack * factor_size(f) * factor_size(g)
    assert abs(norm(f) - np.linalg.norm(F)) <= slack * factor_size(f)
    expected = np.vdot(F, G) / np.linalg.norm(F) / np.linalg.norm(G)
    allowed = 3 * slack * factor_size(f) * factor_size(g) / np.linalg.norm(F) / np.linalg.norm(G)
    assert abs(frobenius_cosine(f, g) - expected) <= allowed


def test_norm_is_exact_where_the_square_root_of_the_inner_product_would_not_be():
    """Columns of B that cancel through A: ‖ΔW‖ is 1e-9 of the factors' size, its square would drown in rounding."""
    a, b = matrix(1, D_IN, 0), matrix(D_OUT, 1, 1)
    small = 1e-9 * matrix(D_OUT, 1, 2)
    f = Factors(torch.cat([a, a]), torch.cat([b, small - b], dim=1), 1.0)
    expected = float(((f.B[:, 0] + f.B[:, 1]).norm()) * a.norm())
    assert abs(norm(f) - expected) <= C * D_IN * U * factor_size(f)
    assert norm(f) == pytest.approx(expected, rel=1e-4)  # 10 · 40 · 2.2e-16 / 1e-9


def test_cosine_of_itself_its_negative_and_another():
    f, g = factors(0), factors(1)
    opposite = Factors(f.A, -3 * f.B, f.scale)
    assert frobenius_cosine(f, f) == pytest.approx(1, abs=C * D_IN * U * factor_size(f) ** 2 / norm(f) ** 2)
    assert frobenius_cosine(f, opposite) == pytest.approx(-1, abs=C * D_IN * U * factor_size(f) ** 2 / norm(f) ** 2)
    assert abs(frobenius_cosine(f, g)) < 0.5


def test_what_is_undefined_for_a_zero_B_is_nan_and_the_rest_is_zero():
    f = factors(0)
    zero = Factors(f.A, torch.zeros_like(f.B), 2.0)
    assert norm(zero) == 0
    assert inner_product(f, zero) == 0
    assert math.isnan(frobenius_cosine(f, zero))
    assert principal_angles(f.B, zero.B).shape == (0,)
    assert math.isnan(subspace_overlap(f.B, zero.B))
    assert subspace_overlap(f.A.T, zero.A.T) == pytest.approx(1, abs=C * D_IN * U)


@given(seed=st.integers(0, 10**6), p=st.integers(1, 8), q=st.integers(1, 8))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_angles_equal_scipy(seed, p, q):
    X, Y = matrix(20, p, seed), matrix(20, q, seed + 1)
    expected = np.sort(scipy.linalg.subspace_angles(X.numpy(), Y.numpy()))
    found = principal_angles(X, Y).numpy()
    # A basis of X turns by cond(X)·u: angles of both computations may differ by that much.
    condition = np.linalg.cond(X.numpy()) + np.linalg.cond(Y.numpy())
    assert np.abs(found - expected).max() <= C * 20 * U * condition
    assert (np.diff(found) >= 0).all()
    back = principal_angles(Y, X).numpy()
    assert np.abs(found - back).max() <= C * 20 * U * condition


@pytest.mark.parametrize("angle", [0.0, 1e-14, 1e-10, 1e-5, 0.3, math.pi / 4, math.pi / 2 - 1e-10, math.pi / 2])
def test_every_angle_is_found_to_the_last_digits(angle):
    Q = torch.linalg.qr(matrix(30, 4, 9))[0]
    Y = torch.stack([math.cos(angle) * Q[:, 0] + math.sin(angle) * Q[:, 2], Q[:, 1]], dim=1)
    found = principal_angles(Q[:, :2], Y)
    assert abs(float(found[1]) - angle) <= C * 30 * U
    assert float(found[0]) <= C * 30 * U
    expected = (1 + math.cos(angle) ** 2) / 2
    assert subspace_overlap(Q[:, :2], Y) == pytest.approx(expected, abs=C * 30 * U)


@pytest.mark.parametrize("angle", [math.pi / 4 - 1e-9, math.pi / 4 + 1e-9, 1.2, math.pi / 2 - 1e-10, math.pi / 2])
def test_large_angles_are_found_to_the_last_digits_without_their_sines(angle):
    """Above 45° nothing but cosines is computed; just below it sines are, and both agree."""
    Q = torch.linalg.qr(matrix(30, 4, 9))[0]
    Y = math.cos(angle) * Q[:, :2] + math.sin(angle) * Q[:, 2:]
    assert (principal_angles(Q[:, :2], Y) - angle).abs().max() <= C * 30 * U


def test_arccos_alone_would_have_lost_the_small_angle():
    cosine = np.cos(1e-10)
    assert np.arccos(cosine) == 0  # why sines are needed


def test_numerical_rank_counts_not_the_number_of_columns():
    X = matrix(20, 2, 0)
    doubled = torch.cat([X, X @ matrix(2, 3, 1), torch.zeros(20, 2, dtype=torch.float64)], dim=1)
    assert principal_angles(doubled, X).shape == (2,)
    assert subspace_overlap(doubled, X) == pytest.approx(1, abs=C * 20 * U * np.linalg.cond(X.numpy()))
    nearly = torch.stack([X[:, 0], X[:, 0] + 1e-6 * X[:, 1]], dim=1)
    assert principal_angles(nearly, X).shape == (2,)
    assert principal_angles(nearly, X, rtol=1e-3).shape == (1,)


def test_overlap_of_contained_and_orthogonal_spaces_and_of_random_ones():
    Q = torch.linalg.qr(matrix(30, 8, 2))[0]
    assert subspace_overlap(Q[:, :3], Q) == pytest.approx(1, abs=C * 30 * U)
    assert subspace_overlap(Q[:, :3], Q[:, 3:]) == pytest.approx(0, abs=(C * 30 * U) ** 2 + 1e-30)
    # Expected overlap of random 4-dimensional subspaces of 400 dimensions is 4/400; over 50 pairs its standard error is
    # about sqrt(2)/400/sqrt(50)= 0.0005, five of them bound it.
    values = [subspace_overlap(matrix(400, 4, 2 * s), matrix(400, 4, 2 * s + 1)) for s in range(50)]
    assert abs(np.mean(values) - 4 / 400) < 0.0025


def test_rank_may_exceed_a_dimension():
    f = Factors(matrix(50, 6, 0), matrix(5, 50, 1), 1.0)
    assert abs(norm(f) - np.linalg.norm(dense(f))) <= C * 50 * U * factor_size(f)


def test_table_is_tidy_and_holds_each_shared_module_of_each_pair_once():
    adapters = {
        "nlu": {"layers.0.q": factors(0), "layers.0.v": factors(1)},
        "math": {"layers.0.q": factors(2), "layers.0.v": Factors(factors(3).A, torch.zeros(D_OUT, 4), 2.0)},
        "code": {"layers.0.q": Factors(factors(0).A, factors(5).B, 2.0)},
    }
    table = overlap_table(adapters)
    assert list(table.columns) == ["adapter_a", "adapter_b", "module", "measure", "value"]
    assert len(table) == 3 * (2 + 1 + 1)
    assert not table.duplicated(["adapter_a", "adapter_b", "module", "measure"]).any()
    value = table.set_index(["adapter_a", "adapter_b", "module", "measure"])["value"]
    f, g = adapters["nlu"]["layers.0.q"], adapters["math"]["layers.0.q"]
    assert value["nlu", "math", "layers.0.q", "cosine"] == frobenius_cosine(f, g)
    assert value["nlu", "math", "layers.0.q", "row_overlap"] == subspace_overlap(f.A.T, g.A.T)
    assert value["nlu", "math", "layers.0.q", "column_overlap"] == subspace_overlap(f.B, g.B)
    assert value["nlu", "code", "layers.0.q", "row_overlap"] == pytest.approx(1, abs=C * D_IN * U)  # one shared A
    assert value["nlu", "math", "layers.0.q", "row_overlap"] < 0.5
    assert math.isnan(value["nlu", "math", "layers.0.v", "cosine"])
    assert math.isnan(value["nlu", "math", "layers.0.v", "column_overlap"])


def test_the_whole_cosine_is_over_the_modules_that_both_have():
    a = {"q": factors(0), "v": factors(1), "only": factors(2)}
    b = {"v": Factors(factors(1).A, factors(7).B, 1.0), "q": factors(4), "other": factors(5)}
    whole = [np.concatenate([dense(own[m]).ravel() for m in "qv"]) for own in (a, b)]
    expected = whole[0] @ whole[1] / np.linalg.norm(whole[0]) / np.linalg.norm(whole[1])
    assert total_cosine(a, b) == pytest.approx(expected, abs=C * D_IN * U * 100)  # condition of random 4-column factors
    assert abs(expected) > 1e-3
    assert total_cosine(a, a) == pytest.approx(1, abs=C * D_IN * U * 100)
    assert math.isnan(total_cosine(a, {"elsewhere": factors(0)}))
    assert math.isnan(total_cosine(a, {"q": Factors(factors(0).A, torch.zeros(D_OUT, 4), 1.0)}))


def test_inputs_are_not_altered():
    f, before = factors(0), factors(0)
    overlap_table({"a": {"m": f}, "b": {"m": factors(1)}})
    assert torch.equal(f.A, before.A)
    assert torch.equal(f.B, before.B)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: inner_product(factors(0), Factors(matrix(4, 9, 0), matrix(D_OUT, 4, 1), 1.0)),
            r"one shape d_out × d_in; found \(24, 40\) and \(24, 9\)",
        ),
        (lambda: principal_angles(torch.ones(3, 2), torch.ones(4, 2)), r"same number of rows; found \(3, 2\) and"),
        (lambda: subspace_overlap(torch.ones(3), torch.ones(3)), r"must be matrices .* found \(3,\)"),
        (lambda: principal_angles(torch.full((3, 1), math.nan), torch.ones(3, 1)), "X must be finite; found NaN"),
        (lambda: overlap_table({"a": {}}), "at least two adapters to compare; found 1"),
        (
            lambda: overlap_table(
                {"a": {"m": factors(0)}, "b": {"m": Factors(factors(0).A, math.inf * factors(0).B, 1)}}
            ),
            "B of 'b', 'm' must be finite",
        ),
        (
            lambda: overlap_table({"a": {"m": factors(0)}, "b": {"m": Factors(matrix(1, 3, 0), matrix(5, 1, 0), 1)}}),
            r"updates of 'm' in 'a' and 'b' must have one shape",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()

"""Policies of A: independent, shared and exactly orthogonal draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import output_of, python

from lori_nb.method.subspaces import (
    down_projection,
    fresh_subspace,
    is_portable,
    orthogonal_down_projection,
    random_down_projection,
    subspace_id,
)

EPS = torch.finfo(torch.float32).eps
FAMILY = ("rte", "boolq", "gsm8k")


def test_names_of_streams():
    assert subspace_id("independent", ("a", "b")) == "a+b"
    assert subspace_id("shared", ("a",)) == subspace_id("shared", ("b",)) == "shared"
    assert [subspace_id("orthogonal", (task,), FAMILY) for task in FAMILY] == [f"orthogonal:{i}" for i in range(3)]
    assert subspace_id("orthogonal", ("rte",), (*FAMILY, "svamp")) == "orthogonal:0"  # appending moves no block


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("same", ("a",)), "subspace must be one of independent, shared, orthogonal; found 'same'"),
        (("orthogonal", ("a",), FAMILY), r"one task of the family \(rte, boolq, gsm8k\) for orthogonal; found a"),
        (("orthogonal", ("rte", "boolq"), FAMILY), "must be one task of the family .* found rte\\+boolq"),
        (("orthogonal", ("rte",)), "an empty family"),
    ],
)
def test_bad_policies(arguments, words):
    with pytest.raises(ValueError, match=words):
        subspace_id(*arguments)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 40), st.integers(0, 2**31))
def test_blocks_are_exactly_orthogonal_and_of_the_random_norm(rank, blocks, spare, seed):
    """A_s A_tᵀ = 0 and A Aᵀ = I/3 up to ε/3 + d_in² ε₆₄.

    Rounding to float32 changes every entry by ε/2 of itself, so an inner product of two rows of norm 1/√3 by
    2 · ε/2 · ‖a_s‖ ‖a_t‖ = ε/3 at most (Cauchy–Schwarz). The factorization and the products here are in float64.
    """
    d_in = rank * (blocks + 1) + spare
    draws = [orthogonal_down_projection(seed, block, "layers.0.q", rank, d_in).double() for block in range(blocks + 1)]
    whole = torch.cat(draws)
    expected = torch.eye(len(whole), dtype=torch.float64) / 3
    assert (whole @ whole.T - expected).abs().max() <= EPS / 3 + d_in**2 * torch.finfo(torch.float64).eps


def test_a_basis_that_is_full():
    assert orthogonal_down_projection(0, 3, "m", 2, 8).shape == (2, 8)
    with pytest.raises(ValueError, match="rank times tasks must be at most the input width .*, 8 at m; found 2 × 5"):
        orthogonal_down_projection(0, 4, "m", 2, 8)


def test_different_arguments_give_different_draws():
    arguments = itertools.product((0, 1), ("orthogonal:0", "orthogonal:1", "orthogonal:0/fresh", "t"), ("m", "n"))
    draws = [down_projection(seed, subspace, module, 2, 16) for seed, subspace, module in arguments]
    for one, two in itertools.combinations(draws, 2):
        assert not torch.equal(one, two)


def test_a_draw_is_the_same_in_another_process():
    code = (
        "from lori_nb.method.subspaces import down_projection as draw\n"
        "for name in ('n', 'm'):\n    print(name, draw(7, 'orthogonal:2', name, 3, 12).numpy().tobytes().hex())"
    )
    theirs = dict(line.split() for line in output_of(python(code, PYTHONHASHSEED="3")).splitlines())
    for name in ("m", "n"):
        assert down_projection(7, "orthogonal:2", name, 3, 12).numpy().tobytes().hex() == theirs[name]


def test_only_a_factorized_basis_is_not_portable():
    assert [is_portable(s) for s in ("rte", "shared", "rte/fresh", "orthogonal:0", "orthogonal:1/fresh")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert fresh_subspace("rte") == "rte/fresh"
    assert not torch.equal(down_projection(0, "rte", "m", 2, 8), down_projection(0, "rte/fresh", "m", 2, 8))


# A from a seed, for independent and shared subspaces


def test_A_has_golden_values():
    A = random_down_projection(0, "chain_sum", "layers.22.mlp.up_proj", 2, 3)
    expected = torch.tensor(
        [
            [0.11996059864759445, -0.262287437915802, -0.16677159070968628],
            [-0.0008828248828649521, 0.5298761129379272, 0.4829404354095459],
        ]
    )
    assert torch.equal(A, expected)


def test_A_is_the_same_in_another_process_and_order():
    names = ["layers.0.q_proj", "layers.1.q_proj"]
    code = (
        "from lori_nb.method.subspaces import random_down_projection as draw\n"
        f"for name in {names[::-1]!r}: print(draw(7, 'rte', name, 3, 5).numpy().tobytes().hex())"
    )
    here = [random_down_projection(7, "rte", name, 3, 5).numpy().tobytes().hex() for name in names]
    assert output_of(python(code)).split() == here[::-1]


@pytest.mark.parametrize(
    "other", [(1, "a", "m", 4, 8), (0, "b", "m", 4, 8), (0, "a", "n", 4, 8), (0, "a", "m", 8, 4), (0, "a", "m", 3, 8)]
)
def test_another_seed_subspace_module_or_shape_is_another_draw(other):
    one, two = random_down_projection(0, "a", "m", 4, 8).flatten(), random_down_projection(*other).flatten()
    assert not torch.equal(one[:12], two[:12])


@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 300))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_A_lies_within_the_range_of_peft(seed, rank, d_in):
    bound = np.float32(1 / np.sqrt(d_in))
    assert random_down_projection(seed, "t", "m", rank, d_in).abs().max() <= bound


def test_A_is_uniform_and_its_rows_unrelated():
    rows, d_in = 64, 4096
    A = random_down_projection(3, "t", "m", rows, d_in).double() * d_in**0.5  # uniform on ±1
    # n independent uniforms: mean 0 ± 1/√(3n), second moment 1/3 ± √(4/45)/√n; five standard errors
    n = rows * d_in
    assert abs(A.mean()) < 5 / (3 * n) ** 0.5
    assert abs(A.square().mean() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
    off = (A @ A.T / d_in)[~torch.eye(rows, dtype=bool)]
    assert off.abs().max() < 6 / 3 / d_in**0.5  # entries have standard deviation 1/(3√d)

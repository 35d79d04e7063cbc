"""Merging: concatenation is exact, addition is PEFT's, truncation is the SVD's.

Bounds: a rounded factor entry is off by a few units u of its dtype, so ΔW of both sides differs by at most that many
u of Σ_i |w_i s_i| |B_i| |A_i|, entry by entry.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lori_nb.analysis.merging import ALSO_CALLED, MERGE_METHODS, compress, merge, merge_method, options_of
from lori_nb.method.adapters import Factors

D_OUT, D_IN = 12, 20


def matrix(rows: int, columns: int, seed: int, dtype=torch.float64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(seed: int, rank: int = 3, scale: float = 2.0, dtype=torch.float64) -> Factors:
    return Factors(matrix(rank, D_IN, 2 * seed, dtype), matrix(D_OUT, rank, 2 * seed + 1, dtype), scale)


def dense(f: Factors) -> Tensor:
    return f.scale * (f.B.double() @ f.A.double())


def size(f: Factors) -> Tensor:
    """|s| |B| |A|, what rounding errors are relative to."""
    return abs(f.scale) * (f.B.double().abs() @ f.A.double().abs())


@given(
    seed=st.integers(0, 10**6),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    weights=st.lists(st.floats(-2, 2, allow_subnormal=False), min_size=4, max_size=4),
    single=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_cat_is_the_weighted_sum(seed, ranks, weights, single):
    dtype = torch.float32 if single else torch.float64
    parts = [factors(seed + i, rank, 2.0 / (i + 1), dtype) for i, rank in enumerate(ranks)]
    weights = weights[: len(parts)]
    merged = merge([{"m": f} for f in parts], weights, "cat")["m"]
    expected = sum(w * dense(f) for f, w in zip(parts, weights, strict=True))
    # One rounding of B by w·s in its dtype (2u to be safe), and sums of Σ r terms in float64 on both sides.
    u = 2 * torch.finfo(dtype).eps + 2 * (sum(ranks) + 4) * torch.finfo(torch.float64).eps
    room = u * sum(abs(w) * size(f) for f, w in zip(parts, weights, strict=True)) + torch.finfo(dtype).tiny
    assert ((dense(merged) - expected).abs() <= room).all()
    assert merged.A.shape == (sum(ranks), D_IN)
    assert merged.scale == 1.0


def test_cat_keeps_frozen_A_and_zeros_of_B_bit_for_bit():
    f, g = factors(0), factors(1)
    f.B[torch.rand(f.B.shape, generator=torch.Generator().manual_seed(0)) < 0.9] = 0
    merged = merge([{"m": f}, {"m": g}], [0.4, 0.7])["m"]
    assert torch.equal(merged.A, torch.cat([f.A, g.A]))
    assert torch.equal(merged.B[:, :3] == 0, f.B == 0)


def test_linear_has_the_cross_terms_and_cat_has_not():
    f, g = factors(0), factors(1, scale=0.5)
    adapters, weights = [{"m": f}, {"m": g}], [0.5, 0.8]
    cross = math.sqrt(0.5 * 2.0 * 0.8 * 0.5) * (f.B @ g.A + g.B @ f.A)
    cat, linear = dense(merge(adapters, weights, "cat")["m"]), dense(merge(adapters, weights, "linear")["m"])
    room = 20 * torch.finfo(torch.float64).eps * 4 * (size(f) + size(g) + f.B.abs() @ g.A.abs() + g.B.abs() @ f.A.abs())
    assert ((linear - cat - cross).abs() <= room).all()
    assert (linear - cat).norm() > 0.1 * cat.norm()


def test_linear_with_one_shared_A_is_T_times_too_large():
    parts = [Factors(factors(0).A, factors(i).B, 2.0) for i in range(3)]
    cat, linear = (dense(merge([{"m": f} for f in parts], [0.5] * 3, method)["m"]) for method in ("cat", "linear"))
    assert torch.allclose(linear, 3 * cat, rtol=0, atol=1e-13 * float(sum(size(f) for f in parts).max()))


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_a_missing_module_counts_as_zero(method):
    f, g = factors(0), factors(1)
    merged = merge([{"m": f}, {"m": g, "n": g}], [0.5, 0.5], method)
    alone = merge([{"n": g}], [0.5], method)["n"]
    assert list(merged) == ["m", "n"]
    assert torch.equal(dense(merged["n"]), dense(alone))
    room = 20 * torch.finfo(torch.float64).eps * size(g)
    assert ((dense(merged["n"]) - 0.5 * dense(g)).abs() <= room).all()


PEFT_ADAPTERS = {
    "nlu": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "math": {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj"]},
    "code": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]},
}


@pytest.fixture(scope="module")
def peft_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    configs = {name: LoraConfig(init_lora_weights=False, **about) for name, about in PEFT_ADAPTERS.items()}
    model = get_peft_model(LlamaForCausalLM(config), configs["nlu"], adapter_name="nlu")
    for name in ("math", "code"):
        model.add_adapter(name, configs[name])
    return model


def from_peft(model, adapter: str) -> dict[str, Factors]:
    return {
        name.removeprefix("base_model.model."): Factors(
            module.lora_A[adapter].weight.detach().clone(),
            module.lora_B[adapter].weight.detach().clone(),
            module.scaling[adapter],
        )
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and adapter in module.lora_A
    }


@pytest.mark.parametrize("method", ["cat", "linear"])
@pytest.mark.parametrize("weights", [[0.5, 0.75, 0.3], [0.5, -0.75, 0.3]], ids=["above zero", "one below"])
def test_equals_peft(peft_model, method, weights):
    names, merged = list(PEFT_ADAPTERS), f"merged_{method}"
    adapters = [from_peft(peft_model, name) for name in names]
    peft_model.add_weighted_adapter(names, weights, merged, combination_type=method)
    expected, found = from_peft(peft_model, merged), merge(adapters, weights, method)
    peft_model.delete_adapter(merged)
    assert set(found) == set(expected)
    assert len(found) == 2 * 3
    for module, factors_ in found.items():
        parts = [(a[module], abs(w) * a[module].scale) for a, w in zip(adapters, weights, strict=True) if module in a]
        B = sum(math.sqrt(share) * f.B.double().abs() for f, share in parts)
        A = sum(math.sqrt(share) * f.A.double().abs() for f, share in parts)
        # A factor entry takes at most T products and T sums: 2T roundings for each of two factors on two sides.
        room = 2 * 2 * 2 * len(parts) * torch.finfo(torch.float32).eps * (B @ A)
        assert ((dense(factors_) - dense(expected[module])).abs() <= room).all()
        assert dense(factors_).norm() > 0


def test_svd_equals_peft(peft_model):
    """PEFT decomposes the dense sum in float32; ours never forms it. Their scales are 2, 0.5 and 1."""
    names, weights = list(PEFT_ADAPTERS), [0.5, 0.75, 0.3]
    adapters = [from_peft(peft_model, name) for name in names]
    peft_model.add_weighted_adapter(names, weights, "merged_svd", combination_type="svd")
    expected, found = from_peft(peft_model, "merged_svd"), merge(adapters, weights, "svd")
    assert set(found) == set(expected) and len(found) == 2 * 3
    for module, factors_ in found.items():
        whole = sum(w * dense(a[module]) for a, w in zip(adapters, weights, strict=True) if module in a)
        values = torch.linalg.svdvals(whole)
        # The truncated sum moves by an error E of the sum, and its subspaces by |E| / gap of what they hold.
        error = 2 * max(whole.shape) * torch.finfo(torch.float32).eps * float(values[0])
        room = 2 * error * (1 + float(values[0] / (values[3] - values[4])))
        assert float((dense(factors_) - dense(expected[module])).norm()) <= room < 1e-3 * float(values[0])
        assert float((dense(factors_) - whole).norm()) > 0.01 * float(values[0])  # something was cut


@pytest.mark.parametrize("rank", [1, 2, 4, 6, 7, 9, 20])
def test_svd_to_any_rank_is_that_of_the_dense_sum(rank):
    """Below, at and above the adapters' own ranks, 2, 4 and 3; all of the sum has rank 9, and no factors have more."""
    adapters, weights = [{"m": factors(0, 2)}, {"m": factors(1, 4, -0.5)}, {"m": factors(2)}], [0.7, -0.4, 1.3]
    exact = sum(w * dense(a["m"]) for a, w in zip(adapters, weights, strict=True))
    U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
    nearest = U[:, :rank] * S[:rank] @ Vh[:rank]
    found = merge(adapters, weights, "svd", rank)["m"]
    assert len(found.A) == min(rank, 9)
    room = 1e-10 * float(S[0] / S[8]) * float(S[0])
    assert float((dense(found) - nearest).norm()) <= room
    assert (float((dense(found) - exact).norm()) <= room) == (rank >= 9)
    usual = merge(adapters, weights, "svd")["m"]
    assert len(usual.A) == 4 and (float((dense(usual) - dense(found)).norm()) <= room) == (rank == 4)


def merged_by_peft(model, weights, way: str, **settings) -> dict[str, Factors]:
    names = list(PEFT_ADAPTERS)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of what peft's DARE keeps
        model.add_weighted_adapter(names, weights, "merged", combination_type=way, density=0.25, **settings)
    found = from_peft(model, "merged")
    model.delete_adapter("merged")
    return found


PRUNED = {"magnitude": "magnitude_prune", "ties": "ties", "dare": "dare_linear", "dare-ties": "dare_ties"}


@pytest.mark.parametrize("method", PRUNED)
def test_pruning_of_updates_is_not_peft_s_of_A_and_B_apart(peft_model, method):
    """An entry of A is a part of many entries of ΔW; and what adds factors has cross terms."""
    adapters, weights = [from_peft(peft_model, name) for name in PEFT_ADAPTERS], [0.5] * 3
    theirs = merged_by_peft(peft_model, weights, PRUNED[method])
    ours = merge(adapters, weights, method, options={"density": 0.25})
    assert set(ours) == set(theirs)
    for module, f in ours.items():
        # peft's has the rank of its factors; ours would come nearest to it at that rank, and does not
        for each in (f, compress(f, 4)):
            assert float((dense(each) - dense(theirs[module])).norm()) > 0.3 * float(dense(each).norm()), module


@pytest.mark.parametrize("method", ["magnitude", "ties"])
def test_pruning_of_updates_is_peft_s_of_dense_updates(peft_model, method):
    """With one weight for all: peft's TIES elects signs without weights. A quarter of all entries is a whole number."""
    adapters, weights = [from_peft(peft_model, name) for name in PEFT_ADAPTERS], [0.5] * 3
    theirs = merged_by_peft(peft_model, weights, f"{PRUNED[method]}_svd", svd_rank=8)
    ours = merge(adapters, weights, method, 8, {"density": 0.25})
    for module, f in ours.items():
        whole = dense(merge(adapters, weights, method, options={"density": 0.25})[module])
        values = torch.linalg.svdvals(whole)
        gap = float(values[7] - values[8]) if len(values) > 8 else float(values[7])
        error = 2 * max(whole.shape) * torch.finfo(torch.float32).eps * float(values[0])  # as of svd, above
        room = 2 * error * (1 + float(values[0]) / gap)
        assert float((dense(f) - dense(theirs[module])).norm()) <= room < 1e-2 * float(values[0])


def test_linear_and_cat_differ_on_the_model(peft_model):
    adapters = [from_peft(peft_model, name) for name in PEFT_ADAPTERS]
    cat, linear = (merge(adapters, [0.5] * 3, method) for method in ("cat", "linear"))
    assert all((dense(cat[m]) - dense(linear[m])).norm() > 0.1 * dense(cat[m]).norm() for m in cat)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_compress_is_the_truncated_svd(rank):
    merged = merge([{"m": factors(0)}, {"m": factors(1)}], [0.4, 1.0])["m"]
    U, S, Vh = torch.linalg.svd(dense(merged), full_matrices=False)
    expected = U[:, :rank] * S[:rank] @ Vh[:rank]
    small = compress(merged, rank)
    assert small.A.shape == (rank, D_IN)
    assert small.B.shape == (D_OUT, rank)
    # Singular subspaces turn by u·‖ΔW‖ / gap; the gap is that between the last value kept and the first one dropped.
    gap = float(S[rank - 1] - S[rank])
    room = 10 * D_IN * torch.finfo(torch.float64).eps * float(merged.B.norm() * merged.A.norm()) * float(S[0]) / gap
    assert float((dense(small) - expected).norm()) <= room
    if rank < 6:
        assert float((dense(small) - dense(merged)).norm()) == pytest.approx(float(S[rank:].norm()), abs=2 * room)


def test_compress_keeps_dtype_and_a_zero_update():
    single = factors(0, dtype=torch.float32)
    assert compress(single, 2).B.dtype == torch.float32
    zero = Factors(single.A, torch.zeros_like(single.B), 2.0)
    assert torch.equal(dense(compress(zero, 2)), torch.zeros(D_OUT, D_IN, dtype=torch.float64))


FLATTENED = ("iso-c", "iso-cts")  # one singular value for all directions


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_one_adapter_of_weight_one_is_itself_where_nothing_is_flattened_or_dropped(method):
    """What drops entries keeps the adapter once it keeps them all."""
    f, dense_f = factors(0), dense(factors(0))
    # an SVD of the factors and back, at their size
    room = 100 * D_IN * torch.finfo(torch.float64).eps * size(f).norm()
    drops = "density" in options_of(method)
    found = dense(merge([{"m": f}], [1.0], method)["m"])
    assert (float((found - dense_f).norm()) <= room) == (method not in FLATTENED and not drops)
    if drops:
        whole = dense(merge([{"m": f}], [1.0], method, options={"density": 1.0})["m"])
        assert float((whole - dense_f).norm()) <= room
    assert float((found - dense_f).norm()) <= room or float((found - dense_f).norm()) > 0.1 * dense_f.norm()


@pytest.mark.parametrize(("name", "method"), ALSO_CALLED.items())
def test_other_names_of_a_method(name, method):
    adapters = [{"m": factors(0)}, {"m": factors(1)}]
    assert torch.equal(dense(merge(adapters, [0.5, 0.5], name)["m"]), dense(merge(adapters, [0.5, 0.5], method)["m"]))


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_a_module_that_is_zero_in_every_adapter_is_merged_to_zeros_of_rank_one_at_least(method):
    """A sparse mask may leave a module nothing; no folder holds an adapter of rank 0."""
    zero = Factors(factors(0).A, torch.zeros(D_OUT, 3, dtype=torch.float64), 2.0)
    for rank in (None, 2):
        found = merge([{"m": zero, "n": factors(1)}, {"m": zero}], [0.5, 0.5], method, rank)
        assert len(found["m"].A) == found["m"].B.shape[1] >= 1 and not dense(found["m"]).any()
        assert dense(found["n"]).any()


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_inputs_are_not_altered(method):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        own = [{"m": factors(seed, dtype=dtype)} for seed in range(2)]
        for rank in (None, 2, "sum"):
            merge(own, [0.5, -0.5], method, rank)
        for seed, adapter in enumerate(own):
            before = factors(seed, dtype=dtype)
            assert torch.equal(adapter["m"].A, before.A) and torch.equal(adapter["m"].B, before.B)


def test_compress_does_not_alter_its_input():
    f, before = factors(0), factors(0)
    compress(f, 1)
    assert torch.equal(f.A, before.A)
    assert torch.equal(f.B, before.B)


def test_a_method_of_ones_own_is_registered_by_name():
    @merge_method("heaviest")
    def heaviest(parts, weights):
        best = max(range(len(parts)), key=lambda i: weights[i])
        return Factors(parts[best].A, weights[best] * parts[best].B, parts[best].scale)

    try:
        merged = merge([{"m": factors(0)}, {"m": factors(1)}], [0.25, 0.5], "heaviest")["m"]
        assert torch.equal(dense(merged), 0.5 * dense(factors(1)))
    finally:
        del MERGE_METHODS["heaviest"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: merge([], []), "at least one adapter; found none"),
        (lambda: merge([{}], [1.0], "tie"), "method must be one of cat, .*linear.*; found 'tie'"),
        (lambda: merge([{}], [1.0, 2.0]), r"weights must be 1 finite numbers, one an adapter; found \[1.0, 2.0\]"),
        (lambda: merge([{}], [math.nan]), r"weights must be 1 finite numbers"),
        (
            lambda: merge([{"m": factors(0)}, {"m": factors(1, rank=2)}], [1, 1], "linear"),
            r"'linear' cannot merge module 'm': ranks must be equal to add factors; found \[3, 2\]",
        ),
        (
            lambda: merge([{"m": factors(0)}, {"m": Factors(matrix(3, 5, 0), matrix(D_OUT, 3, 0), 1.0)}], [1, 1]),
            r"module 'm' must have one shape d_out × d_in; found \[\(12, 20\), \(12, 5\)\]",
        ),
        (lambda: compress(factors(0), 0), "rank must be between 1 and 3.*found 0"),
        (lambda: compress(factors(0), 4), "rank must be between 1 and 3.*found 4"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()

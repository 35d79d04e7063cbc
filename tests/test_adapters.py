"""Adapters as plain data: A from a seed, updates that attach and detach exactly, PEFT and masked gradients as oracles.

Bounds: a float32 product over n terms is off by at most γ_n = nε / (1 − nε) of the sum of its terms' sizes, so both
sides of W x + s B A x lie within γ of |W||x| + |s||B||A||x|, entry by entry.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import gaussian, output_of, python, random_factors
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM

from lori_nb.method.adapters import (
    Factors,
    LowRank,
    attach,
    attach_factors,
    check_rank,
    folded_in,
    layer_number,
    random_down_projection,
    subspace_id,
    target_linears,
)

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=97,
            initializer_range=0.1,
        )
        return LlamaForCausalLM(config).eval().requires_grad_(False)


TOKENS = torch.arange(24).view(2, 12) * 4 % 97


# A from a seed


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
        "from lori_nb.method.adapters import random_down_projection as draw\n"
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
@settings(max_examples=30, deadline=None)
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


def test_subspace_policies():
    assert subspace_id("independent", ("a", "b")) == "a+b"
    assert subspace_id("shared", ("a",)) == subspace_id("shared", ("b",)) == "shared"
    with pytest.raises(ValueError, match="subspace must be one of independent, shared; found 'same'"):
        subspace_id("same", ("a",))


# Where an adapter sits


def test_layer_numbers():
    names = ("layers.22.mlp.up_proj", "encoder.layer.3.output.dense", "h.7.attn.c_attn", "pooler.dense", "lm_head")
    assert [layer_number(name) for name in names] == [22, 3, 7, None, None]


def test_targets_by_pattern_and_layers(llama):
    body = llama.model
    assert len(target_linears(body)) == 4 * 7
    assert list(target_linears(body, "q_proj, v_proj", 1)) == ["layers.3.self_attn.q_proj", "layers.3.self_attn.v_proj"]
    assert list(target_linears(body, r"layers\.[12]\.mlp\.up_proj")) == ["layers.1.mlp.up_proj", "layers.2.mlp.up_proj"]


@pytest.mark.parametrize(
    ("pattern", "last", "words"),
    [
        ("q_prj", None, r"modules must match a linear module \(down_proj, .*, v_proj or all-linear\); found 'q_prj'"),
        ("all-linear", 5, "last_layers must be between 1 and 4, the model's layers; found 5"),
        ("all-linear", 0, "last_layers must be between 1 and 4, the model's layers; found 0"),
    ],
)
def test_targets_that_do_not_exist(llama, pattern, last, words):
    with pytest.raises(ValueError, match=words):
        target_linears(llama.model, pattern, last)


def test_a_model_without_linear_layers_is_named():
    body = GPT2Model(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=31))
    with pytest.raises(ValueError, match="linear modules inside numbered layers; found none in GPT2Model"):
        target_linears(body)


def test_rank_bounds(llama):
    linears = target_linears(llama.model)
    check_rank(16, linears)  # the key projection has 16 outputs
    for rank in (0, 17):
        with pytest.raises(ValueError, match=rf"rank must be between 1 and 16.*k_proj; found {rank}"):
            check_rank(rank, linears)


# Attach, detach, fold


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_zero_B_is_the_identity_bit_for_bit(llama):
    before = outputs(llama)
    linears = target_linears(llama.model)
    zero = {n: Factors(f.A, torch.zeros_like(f.B), 2.0) for n, f in random_factors(linears, 4, seed=1).items()}
    with attach_factors(llama.model, zero):
        assert torch.equal(outputs(llama), before)


def test_detach_restores_bit_for_bit(llama):
    before = outputs(llama)
    attached = attach_factors(llama.model, random_factors(target_linears(llama.model), 4, seed=1))
    assert not torch.allclose(outputs(llama), before)
    attached.detach()
    attached.detach()  # calling it again does nothing
    assert torch.equal(outputs(llama), before)


def test_attached_adapters_add_up():
    """Oracle: the dense W + Σ w ΔW in float64."""
    linear = nn.Linear(40, 24)
    body = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": linear})])})
    name, x = "layers.0.q", gaussian(5, 40, seed=3)
    parts = [(random_factors({name: linear}, rank, seed=10 * rank)[name], w) for rank, w in ((4, 1.0), (2, 0.4))]
    handles = [attach_factors(body, {name: f}, w) for f, w in parts]
    with torch.no_grad():
        found = linear(x)
        dense, size = linear.weight.double(), linear.weight.double().abs()
        for f, w in parts:
            dense = dense + w * f.scale * f.B.double() @ f.A.double()
            size = size + w * f.scale * f.B.double().abs() @ f.A.double().abs()
        expected = x.double() @ dense.T + linear.bias.double()
        bound = (40 + 4 + 8) * EPS * (x.double().abs() @ size.T + linear.bias.double().abs())
    assert ((found - expected).abs() <= bound).all()
    handles[0].detach()
    assert not torch.allclose(linear(x), found)


def test_folding_equals_attaching_and_restores_bit_for_bit():
    linear = nn.Linear(40, 24)
    body = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": linear})])})
    factors, x = random_factors({"layers.0.q": linear}, 4, seed=5), gaussian(5, 40, seed=6)
    before, f = linear.weight.detach().clone(), factors["layers.0.q"]
    with torch.no_grad():
        with attach_factors(body, factors, 0.7):
            attached = linear(x)
        with folded_in(body, factors, 0.7):
            folded = linear(x)
        size = before.abs() + 0.7 * f.scale * f.B.abs() @ f.A.abs()
        assert ((attached - folded).abs() <= 2 * (40 + 4 + 8) * EPS * (x.abs() @ size.T + linear.bias.abs())).all()
    assert torch.equal(linear.weight, before)


def test_folding_restores_after_an_error(llama):
    before = {name: p.clone() for name, p in llama.named_parameters()}
    with (
        pytest.raises(RuntimeError, match="inside"),
        folded_in(llama.model, random_factors(target_linears(llama.model), 4, seed=5)),
    ):
        assert not torch.equal(llama.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
        raise RuntimeError("inside")
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())


@pytest.mark.parametrize("put", [attach_factors, lambda body, f: folded_in(body, f).__enter__()])
def test_factors_that_do_not_fit(llama, put):
    name = "layers.0.self_attn.k_proj"  # 32 → 16
    with pytest.raises(ValueError, match=rf"factors of {name} must have shapes A \(r × 32\) and B \(16 × r\); found"):
        put(llama.model, {name: Factors(torch.zeros(4, 32), torch.zeros(32, 4), 1.0)})
    with pytest.raises(ValueError, match="'layers.9.q' must be a linear module of the model; found NoneType"):
        put(llama.model, {"layers.9.q": Factors(torch.zeros(4, 32), torch.zeros(16, 4), 1.0)})


def test_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"mask must have the shape of B, \(8, 2\); found \(2, 8\)"):
        LowRank(Factors(torch.zeros(2, 5), torch.zeros(8, 2), 1.0), train_A=False, mask=torch.ones(2, 8, dtype=bool))


# Training: PEFT and masked gradients as oracles


def trained(parameters, loss, steps: int = 20, after_backward=lambda: None) -> None:
    optimiser = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        after_backward()
        optimiser.step()


def next_token_loss(model) -> torch.Tensor:
    return F.cross_entropy(model(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def test_lori_d_equals_peft_with_our_A(llama):
    """PEFT's LoRA with A overwritten by ours and frozen, over 20 steps, to 1e-5: a hundred times float32's ε."""
    linears = target_linears(llama.model, last_layers=2)
    factors = {
        name: Factors(
            random_down_projection(0, "t", name, 4, m.in_features), torch.zeros(m.out_features, 4), 1.5
        )  # α / r = 6 / 4
        for name, m in linears.items()
    }
    config = LoraConfig(r=4, lora_alpha=6, target_modules=[f"model.{name}" for name in linears], lora_dropout=0.0)
    theirs = get_peft_model(copy.deepcopy(llama), config).eval()
    layers = {name: theirs.get_submodule(f"base_model.model.model.{name}") for name in linears}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A["default"].weight.copy_(factors[name].A)
            layer.lora_A["default"].weight.requires_grad_(False)
    trained([layer.lora_B["default"].weight for layer in layers.values()], lambda: next_token_loss(theirs))

    live = {name: LowRank(f, train_A=False) for name, f in factors.items()}
    with attach(llama.model, live):
        trained([low.values for low in live.values()], lambda: next_token_loss(llama))
    for name, low in live.items():
        expected = layers[name].lora_B["default"].weight
        assert expected.norm() > 0.1
        assert (low.B - expected).norm() <= 1e-5 * expected.norm(), name
        assert torch.equal(low.A, factors[name].A)


def test_training_packed_B_equals_dense_B_with_masked_gradients(llama):
    linears = target_linears(llama.model, last_layers=2)
    factors = {n: Factors(f.A, torch.zeros_like(f.B), 1.5) for n, f in random_factors(linears, 4, seed=9).items()}
    masks = {n: gaussian(*f.B.shape, seed=len(n)) > 1.0 for n, f in factors.items()}

    packed = {n: LowRank(f, train_A=False, mask=masks[n]) for n, f in factors.items()}
    with attach(llama.model, packed):
        trained([low.values for low in packed.values()], lambda: next_token_loss(llama))

    dense = {n: LowRank(f, train_A=False) for n, f in factors.items()}

    def mask_gradients():
        for name, low in dense.items():
            low.values.grad.mul_(masks[name])

    with attach(llama.model, dense):
        trained([low.values for low in dense.values()], lambda: next_token_loss(llama), after_backward=mask_gradients)
    for name, mask in masks.items():
        B = packed[name].factors().B
        assert packed[name].values.numel() == mask.sum()
        assert (B[~mask] == 0).all()
        assert (B[mask] != 0).all()
        # an entry's update is the same arithmetic in both; a vector unit's tail may round it once otherwise each step
        torch.testing.assert_close(B, dense[name].factors().B, rtol=20 * 8 * EPS, atol=20 * 8 * EPS * 1e-2)


def test_entries_off_the_mask_keep_what_stood_there():
    before = gaussian(6, 3, seed=2)
    mask = torch.zeros(6, 3, dtype=bool)
    mask[1, 2] = mask[4, 0] = True
    before[0] = 0
    low = LowRank(Factors(gaussian(3, 5, seed=1), before, 1.0), train_A=False, mask=mask)
    trained(low.parameters(), lambda: low(torch.ones(1, 5)).square().sum())
    after = low.factors().B
    assert torch.equal(after[~mask], before[~mask])
    assert (after[mask] != before[mask]).all()
    assert torch.equal(low.support(), before != 0)

"""Adapters as plain data: A from a seed, updates that attach and detach exactly, PEFT and masked gradients as oracles.

Bounds: a float32 product over n terms is off by at most γ_n = nε / (1 − nε) of the sum of its terms' sizes, so both
sides of W x + s B A x lie within γ of |W||x| + |s||B||A||x|, entry by entry.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import gaussian, random_factors
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM

from lori_nb.method.adapters import (
    Adapter,
    Factors,
    LowRank,
    attach,
    attach_factors,
    check_rank,
    folded_in,
    grown,
    layer_number,
    target_linears,
)
from lori_nb.method.masks import unpack
from lori_nb.method.subspaces import random_down_projection

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


def test_growing_needs_the_same_modules_and_scales():
    def one(name: str, scale: float) -> Adapter:
        factors = {name: Factors(gaussian(2, 5, seed=1), gaussian(4, 2, seed=2), scale)}
        return Adapter(factors, "tiny", "", 2, 3.0, 0, "t", frozen_A=True)

    both = grown(one("q", 1.5), one("q", 1.5)).factors["q"]
    assert torch.allclose(both.delta(), 2 * one("q", 1.5).factors["q"].delta())
    with pytest.raises(ValueError, match="same scales to grow together; found scales 1.5 and 2.0 at q"):
        grown(one("q", 1.5), one("q", 2.0))
    with pytest.raises(ValueError, match="same scales to grow together; found scales 1.5 and None at q"):
        grown(one("q", 1.5), one("v", 1.5))


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


RATE, BETAS, DECAY = 1e-2, (0.9, 0.999), 0.01


def rounding_of_a_step(before: dict[str, torch.Tensor], gradient: torch.Tensor, count: int) -> torch.Tensor:
    """How far two evaluations of one AdamW step from the same ``before`` and gradient may lie apart, entry by entry.

    A rounding errs by ε/2 of its result, so two evaluations by ε. With m' = m + (1 − β₁)(g − m) and
    v' = β₂ v + (1 − β₂) g², the step is p (1 − ηλ) − η/(1 − β₁ᵗ) · m' / (√v' / √(1 − β₂ᵗ) + 10⁻⁸). It rounds p in the
    decay and in the last sum: 2 |p|, the step itself being counted below. It rounds m' three times, of terms up to
    |m| + (1 − β₁)(|g| + |m|); the root √v' by half of v's four roundings and once itself, the denominator twice more,
    and rate times quotient twice, the last sum once: 3 + 2 + 1 + 2 + 2 + 1 = 11 times what m' bounds.
    """
    p, m, v, g = (t.double() for t in (before["p"], before["exp_avg"], before["exp_avg_sq"], gradient))
    denominator = ((BETAS[1] * v + (1 - BETAS[1]) * g.square()) / (1 - BETAS[1] ** count)).sqrt() + 1e-8
    step = RATE / (1 - BETAS[0] ** count) * (m.abs() + (1 - BETAS[0]) * (g.abs() + m.abs())) / denominator
    return EPS * (2 * p.abs() + 11 * step)


def test_training_packed_B_equals_dense_B_with_masked_gradients(llama):
    """Twenty steps. Before each, the dense side is put where the packed one is, B and moments, so that the bound is one
    step's rounding: a vector unit may round the last entries of a tensor otherwise than those before.
    """
    linears = target_linears(llama.model, last_layers=2)
    factors = {n: Factors(f.A, torch.zeros_like(f.B), 1.5) for n, f in random_factors(linears, 4, seed=9).items()}
    masks = {n: gaussian(*f.B.shape, seed=len(n)) > 1.0 for n, f in factors.items()}
    packed = {n: LowRank(f, train_A=False, mask=masks[n]) for n, f in factors.items()}
    dense = {n: LowRank(f, train_A=False) for n, f in factors.items()}
    ours, plain = (
        torch.optim.AdamW([low.values for low in live.values()], lr=RATE, betas=BETAS, weight_decay=DECAY)
        for live in (packed, dense)
    )
    for count in range(1, 21):
        before = {n: state_of(packed[n].values, ours) for n in masks}
        for name, kept in before.items():
            put(dense[name].values, plain, {key: unpack(t, masks[name]) for key, t in kept.items()})
        for live, optimiser in ((packed, ours), (dense, plain)):
            optimiser.zero_grad()
            with attach(llama.model, live):
                next_token_loss(llama).backward()
        for name, mask in masks.items():
            gradient = dense[name].values.grad
            assert torch.equal(packed[name].values.grad, gradient[mask]), "the same bits, gathered"
            gradient.mul_(mask)
        ours.step()
        plain.step()
        for name, mask in masks.items():
            found, expected = packed[name].values.detach(), dense[name].values.detach()
            assert not expected[~mask].any()
            bound = rounding_of_a_step(before[name], packed[name].values.grad, count)
            assert ((found.double() - expected[mask].double()).abs() <= bound).all()
            assert (bound < 1e-4 * RATE).all() and (found != before[name]["p"]).all()
    for name, mask in masks.items():
        B = packed[name].factors().B
        assert packed[name].values.numel() == mask.sum()
        assert (B[~mask] == 0).all()
        assert (B[mask] != 0).all()


MOMENTS = ("exp_avg", "exp_avg_sq")


def state_of(parameter: torch.Tensor, optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """A copy of a parameter and its moments, zeros before the first step."""
    state = optimiser.state[parameter]
    moments = {key: state[key].clone() if key in state else torch.zeros_like(parameter) for key in MOMENTS}
    return {"p": parameter.detach().clone()} | moments


def put(parameter: torch.Tensor, optimiser: torch.optim.Optimizer, wanted: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        parameter.copy_(wanted["p"])
        for key in MOMENTS:
            if key in optimiser.state[parameter]:
                optimiser.state[parameter][key].copy_(wanted[key])


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


# What the backward pass keeps


def saved_bytes(call) -> tuple[int, list[torch.Size]]:
    """Bytes and shapes of the tensors that a call keeps for its backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(t.numel() * t.element_size() for t in kept.values()), [t.shape for t in kept.values()]


@pytest.mark.parametrize("masked", [False, True])
def test_a_frozen_A_keeps_h_and_neither_x_nor_a_dense_B(masked):
    factors = Factors(gaussian(3, 40, seed=1), gaussian(30, 3, seed=2), 1.5)
    mask = gaussian(30, 3, seed=3) > 1 if masked else None
    low = LowRank(factors, train_A=False, mask=mask)
    x = gaussian(5, 7, 40, seed=4).requires_grad_()
    _, shapes = saved_bytes(lambda: low(x))
    assert sorted(map(tuple, shapes)) == sorted([(5, 7, 3), tuple(low.values.shape)])
    _, shapes = saved_bytes(lambda: LowRank(factors, train_A=True)(x))
    assert (5 * 7, 40) in map(tuple, shapes) or (5, 7, 40) in map(tuple, shapes)  # a trained A needs x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(11, 40), (3, 7, 40)])
def test_a_frozen_A_gives_the_bits_of_the_plain_form(dtype, masked, shape):
    """Output, ∂L/∂x and ∂L/∂B equal, bit for bit, autograd's through F.linear with a dense masked B."""
    factors = Factors(gaussian(3, 40, seed=1), gaussian(30, 3, seed=2), 1.5)
    mask = gaussian(30, 3, seed=3) > 0.5 if masked else torch.ones(30, 3, dtype=bool)
    B = (factors.B * mask).requires_grad_()
    low = LowRank(Factors(factors.A, B.detach(), 1.5), train_A=False, mask=mask if masked else None)
    x, u = gaussian(*shape, seed=4, dtype=dtype), gaussian(*shape[:-1], 30, seed=5, dtype=dtype)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = low(ours)
    expected = F.linear(F.linear(plain, factors.A.to(dtype)), (B * 1.5).to(dtype))
    assert torch.equal(out, expected)
    out.backward(u)
    expected.backward(u)
    assert torch.equal(ours.grad, plain.grad)
    assert torch.equal(low.values.grad.flatten(), B.grad[mask])


def test_a_frozen_A_is_rounded_once_and_anew_where_it_was_changed():
    low = LowRank(Factors(gaussian(3, 40, seed=1), gaussian(30, 3, seed=2), 1.5), train_A=False)
    x, kept = gaussian(5, 40, seed=4, dtype=torch.bfloat16), low.cast_A(torch.bfloat16)
    before = low(x)
    assert low.cast_A(torch.bfloat16) is kept and set(low.state_dict()) == {"A", "values"}
    with torch.no_grad():
        low.A.mul_(2)  # a power of two: every product doubles exactly
    assert torch.equal(low(x), 2 * before)
    trained_A = LowRank(low.factors(), train_A=True)
    assert trained_A.cast_A(torch.bfloat16) is not trained_A.cast_A(torch.bfloat16)


def test_gradients_of_a_frozen_A_by_finite_differences():
    low = LowRank(Factors(gaussian(2, 5, seed=1), gaussian(4, 2, seed=2), 1.5), train_A=False).double()
    x = gaussian(3, 5, seed=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, _: low(x).clone(), (x, low.values))


def test_packed_state_is_k_numbers():
    mask = gaussian(30, 4, seed=3) > 1.5
    low = LowRank(Factors(gaussian(4, 9, seed=1), torch.zeros(30, 4), 2.0), train_A=False, mask=mask)
    k = int(mask.sum())
    trained(low.parameters(), lambda: low(torch.ones(2, 9)).square().sum() - low(torch.ones(2, 9)).sum(), steps=2)
    assert [p.shape for p in low.parameters() if p.requires_grad] == [(k,)]
    assert {name: tuple(b.shape) for name, b in low.named_buffers()} == {
        "positions": (k,),
        "fixed_positions": (0,),
        "fixed_values": (0,),
    }
    assert (low.factors().B[~mask] == 0).all()
    assert (low.factors().B[mask] != 0).all()

"""DoRA, LoRA-FA and full fine-tuning against peft and torch themselves; swapping leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from tiny import gaussian
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lori_nb.lab.baselines import (
    MAGNITUDE,
    REPLACEMENTS,
    dora_extras,
    lora_fa_optimiser,
    make_dora,
    make_full,
    swap_in,
)
from lori_nb.lab.checkpoint import restore_checkpoint, save_checkpoint
from lori_nb.method.adapter_file import load_adapter, save_adapter
from lori_nb.method.adapters import Adapter, Factors, LowRank, attach, attach_factors, target_linears
from lori_nb.method.subspaces import random_down_projection

RANK, ALPHA = 3, 4.5  # α / r = 1.5
TOKENS = torch.arange(24).view(2, 12) * 4 % 97


@pytest.fixture
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    with torch.no_grad():
        for place, p in enumerate(model.parameters()):
            p.copy_(gaussian(*p.shape, seed=place) * 0.1 + (p.ndim == 1))
    return model


def loss_of(model) -> torch.Tensor:
    return F.cross_entropy(model(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def drawn(model) -> dict[str, torch.Tensor]:
    linears = target_linears(model.model)
    return {name: random_down_projection(0, "t", name, RANK, m.in_features) for name, m in linears.items()}


def start(linear, A: torch.Tensor) -> Factors:
    return Factors(A, torch.zeros(linear.out_features, RANK), ALPHA / RANK)


def doras(model) -> dict:
    linears = target_linears(model.model)
    return {name: make_dora(linears[name], start(linears[name], A)) for name, A in drawn(model).items()}


def parameters_of(modules: dict) -> dict[str, torch.nn.Parameter]:
    return {f"{name}.{part}": p for name, m in modules.items() for part, p in m.trained().items()}


def stepped(model, parameters, steps: int, optimiser=None) -> list[float]:
    """Losses of so many AdamW steps."""
    optimiser = optimiser or torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return losses


def in_peft(model, **settings):
    """peft's LoRA on the same modules, with our A."""
    targets = [f"model.{name}" for name in drawn(model)]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets, **settings)
    wrapped = get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, A in drawn(model).items():
            wrapped.get_submodule(f"base_model.model.model.{name}").lora_A.default.weight.copy_(A)
    return wrapped


# DoRA


def test_dora_begins_as_the_base(llama):
    """m / ‖W‖ is the quotient of equal numbers, so nothing but zeros is added: the same bits, with biases too."""
    plain = llama(TOKENS).logits
    modules = doras(llama)
    with swap_in(llama.model, modules):
        assert torch.equal(llama(TOKENS).logits, plain)
        with torch.no_grad():
            modules["layers.0.mlp.up_proj"].magnitude.mul_(1.5)
        assert not torch.equal(llama(TOKENS).logits, plain)


def test_dora_on_a_bfloat16_base_is_trained_in_float32_and_begins_as_the_base(llama):
    low = copy.deepcopy(llama).to(torch.bfloat16)
    plain, modules = low(TOKENS).logits, doras(low)
    assert {p.dtype for p in parameters_of(modules).values()} == {torch.float32}
    with swap_in(low.model, modules):
        assert torch.equal(low(TOKENS).logits, plain)


def test_dora_trains_as_in_peft(llama):
    modules, theirs = doras(llama), in_peft(llama, use_dora=True)
    with swap_in(llama.model, modules):
        found = stepped(llama, parameters_of(modules).values(), 20)
    expected = stepped(theirs, [p for p in theirs.parameters() if p.requires_grad], 20)
    assert found == expected  # the same layer, the same sums
    assert found[-1] < 0.9 * found[0]
    lora = stepped(plain := in_peft(llama), [p for p in plain.parameters() if p.requires_grad], 20)
    assert lora != expected


def test_dora_may_begin_with_factors_of_any_scale(llama):
    """With B ≠ 0 and no magnitude given, DoRA begins as the plain low-rank update: m / ‖W + s·B A‖ = 1."""
    linears, A = target_linears(llama.model), drawn(llama)
    factors = {
        name: Factors(A[name], gaussian(m.out_features, RANK, seed=place) * 0.1, 0.7)
        for place, (name, m) in enumerate(linears.items())
    }
    with attach_factors(llama.model, factors):
        expected = llama(TOKENS).logits
    with swap_in(llama.model, {name: REPLACEMENTS["dora"](linears[name], f) for name, f in factors.items()}) as handle:
        found = llama(TOKENS).logits
        handle.detach()
    # peft multiplies by s after B, ours before; the bound is that of every comparison of logits with peft
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (llama(TOKENS).logits - expected).abs().max() > 0.01 * expected.abs().max()


def test_making_dora_draws_nothing_from_the_global_generator(llama):
    before = torch.random.get_rng_state()
    doras(llama)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_finished_dora_adapter_computes_the_same_again(llama, tmp_path):
    modules = doras(llama)
    with swap_in(llama.model, modules):
        stepped(llama, parameters_of(modules).values(), 3)
        expected = llama(TOKENS).logits
    factors = {name: dora.factors() for name, dora in modules.items()}
    adapter = Adapter(factors, "b", "d", RANK, ALPHA, 0, "t", False, extras=dora_extras(modules))
    save_adapter(adapter, tmp_path / "a.safetensors")
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert loaded.extras.keys() == adapter.extras.keys()
    linears = dict(llama.model.named_modules())
    again = {name: make_dora(linears[name], f, loaded.extras[MAGNITUDE + name]) for name, f in loaded.factors.items()}
    with swap_in(llama.model, again):
        assert torch.equal(llama(TOKENS).logits, expected)


@pytest.mark.parametrize(
    ("A", "B", "magnitude", "said"),
    [
        ((RANK, 31), (32, RANK), 32, r"A of DoRA must have shape \(3, 32\); found \(3, 31\)"),
        ((RANK, 32), (32, 2), 32, r"B of DoRA must have shape \(32, 3\)"),
        ((RANK, 32), (32, RANK), 3, r"magnitude of DoRA must have shape \(32,\)"),
    ],
)
def test_dora_of_another_shape_is_refused(llama, A, B, magnitude, said):
    linear = llama.model.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match=said):
        make_dora(linear, Factors(torch.ones(A), torch.ones(B), 1.0), torch.ones(magnitude))


# Full fine-tuning


def full(model) -> dict:
    return {name: make_full(linear) for name, linear in target_linears(model.model, last_layers=1).items()}


def test_full_gradients_are_torch_s_own(llama):
    modules, plain = full(llama), copy.deepcopy(llama)
    with swap_in(llama.model, modules):
        loss_of(llama).backward()
    for name in modules:
        plain.model.get_submodule(name).weight.requires_grad_()
    loss_of(plain).backward()
    for name, module in modules.items():
        expected = plain.model.get_submodule(name).weight.grad
        assert expected.abs().max() > 0 and torch.equal(module.weight.grad, expected)


def test_full_trains_in_float32_over_a_bfloat16_base(llama):
    low = copy.deepcopy(llama).to(torch.bfloat16)
    plain, modules = low(TOKENS).logits, full(low)
    with swap_in(low.model, modules):
        assert torch.equal(low(TOKENS).logits, plain)
        optimiser = torch.optim.AdamW(parameters_of(modules).values(), lr=1e-5)
        stepped(low, None, 1, optimiser)
    for name, module in modules.items():
        kept = low.model.get_submodule(name).weight
        moved = module.weight.detach() - kept.float()
        assert kept.dtype == torch.bfloat16 and kept.grad is None
        assert 0 < moved.abs().max() < 2e-5  # a step too small for bfloat16 is not lost


# Swapping


@pytest.mark.parametrize("make", [doras, full])
def test_swapping_out_restores_the_very_modules_and_bits(llama, make):
    before = {name: (id(m), copy.deepcopy(m.state_dict())) for name, m in llama.named_modules()}
    plain, modules = llama(TOKENS).logits, make(llama)
    handle = swap_in(llama.model, modules)
    stepped(llama, parameters_of(modules).values(), 2)
    assert not torch.equal(llama(TOKENS).logits, plain)
    handle.detach()
    handle.detach()
    assert torch.equal(llama(TOKENS).logits, plain)
    assert [name for name, _ in llama.named_modules()] == list(before)
    for name, m in llama.named_modules():
        place, state = before[name]
        assert id(m) == place
        assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())


def test_nothing_is_swapped_when_a_name_is_wrong(llama):
    modules = full(llama) | {"norm": make_full(llama.lm_head)}
    with pytest.raises(ValueError, match="must be a linear one of the model; found LlamaRMSNorm for 'norm'"):
        swap_in(llama.model, modules)
    assert all(type(m) is torch.nn.Linear for m in target_linears(llama.model).values())
    assert len(target_linears(llama.model)) == 2 * 7


# LoRA-FA


def lora_fa_live(model) -> dict[str, LowRank]:
    linears = target_linears(model.model)
    return {
        name: LowRank(Factors(A, torch.zeros(linears[name].out_features, RANK), ALPHA / RANK), train_A=False)
        for name, A in drawn(model).items()
    }


def named_of(live) -> dict[str, torch.nn.Parameter]:
    return {f"{name}.B": low.values for name, low in live.items()}


def test_lora_fa_takes_peft_s_steps(llama):
    """The same gradients go to both, so that only the optimisers are compared: the same bits after each of 3 steps."""
    live, theirs = lora_fa_live(llama), in_peft(llama)
    ours = lora_fa_optimiser(named_of(live), live, lr=2e-3, weight_decay=0.01)
    expected = create_lorafa_optimizer(theirs, RANK, ALPHA, 2e-3, weight_decay=0.01)
    Bs = {name: theirs.get_submodule(f"base_model.model.model.{name}").lora_B.default.weight for name in live}
    for step in range(3):
        for place, (name, low) in enumerate(live.items()):
            low.values.grad = gaussian(*low.values.shape, seed=100 * step + place) * 1e-3
            Bs[name].grad = low.values.grad.clone()
        ours.step()
        expected.step()
        for name, low in live.items():
            assert low.values.abs().max() > 0 and torch.equal(low.values, Bs[name]), name


def test_lora_fa_trains_a_head_too_and_differs_from_adamw(llama):
    live, head = lora_fa_live(llama), torch.nn.Parameter(torch.zeros(2, 5))
    named = named_of(live) | {"head.t.weight": head}
    first = next(iter(live.values()))
    for p in named.values():
        p.grad = torch.linspace(-1, 1, p.numel()).view(p.shape)
    lora_fa_optimiser(named, live, lr=0.1).step()
    # Adam's first step is lr · g / (|g| + ε'), with ε' = 1e-6 / √(1 − β₂): the correction alone could turn a sign
    expected = -0.1 * head.grad / (head.grad.abs() + 1e-6 / (1 - 0.999) ** 0.5)
    torch.testing.assert_close(head.detach(), expected, rtol=1e-5, atol=0)
    assert (first.values.sign() != -first.values.grad.sign()).any()


def test_a_resumed_lora_fa_ends_in_the_same_bits(llama, tmp_path):
    path, ended = tmp_path / "checkpoint.safetensors", []
    for resumed in (False, True):
        live = lora_fa_live(llama)
        named = named_of(live)
        optimiser = lora_fa_optimiser(named, live, lr=5e-3)
        if resumed:
            assert restore_checkpoint(path, named, optimiser) == ({"step": 2}, {})
        with attach(llama.model, live):
            stepped(llama, None, 0 if resumed else 2, optimiser)
            if not resumed:
                save_checkpoint(path, named, optimiser, {"step": 2}, {})
            stepped(llama, None, 2, optimiser)
        ended.append({name: p.detach().clone() for name, p in named.items()})
    assert all(torch.equal(p, ended[1][name]) and p.abs().max() > 0 for name, p in ended[0].items())


def test_lora_fa_refuses_what_it_is_not_for(llama):
    linear = target_linears(llama.model)["layers.0.self_attn.q_proj"]
    factors = Factors(torch.ones(RANK, 32), torch.zeros(linear.out_features, RANK), 1.5)
    masked = LowRank(factors, train_A=False, mask=torch.ones(32, RANK, dtype=torch.bool))
    for low, said in ((LowRank(factors, train_A=True), "a trained A"), (masked, "a mask")):
        with pytest.raises(ValueError, match=f"frozen A and a dense B in every module; found {said} in m"):
            lora_fa_optimiser({"m.B": low.values}, {"m": low}, lr=1e-3)

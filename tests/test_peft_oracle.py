"""The kit's training loop against peft's LoRA in a plain loop: the same losses over 20 steps.

The plain loop knows nothing of ours but the rows of each step: it runs the whole model with peft's modules, autograd's
own backward pass and dense parameters. Ours trains above a cached prefix, with packed values under a mask. At
α / r = 15 an error of scale cannot hide, and every step's gradient is longer than 1, so that clipping acts on it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_spec
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lori_nb.lab.gradients import TaskData, batch_indices
from lori_nb.lab.models import load_base
from lori_nb.lab.prefix import cached_states, split_at, suffix_body
from lori_nb.lab.tasks import get_task
from lori_nb.lab.text import collate, encode_decoder_rows
from lori_nb.lab.training import learning_rate_at, train
from lori_nb.method.adapters import Factors, LowRank, target_linears
from lori_nb.method.masks import random_masks
from lori_nb.method.subspaces import random_down_projection

STEPS = 20


@pytest.fixture
def spec(tiny_decoder, home):
    return tiny_spec(tiny_decoder, alpha=60.0, steps=STEPS, learning_rate=1e-3, clip=1.0)


@pytest.fixture
def rows(spec):
    return encode_decoder_rows(load_base(spec.base, "float32").tokenizer, get_task("chain_sum").rows("train", 32))


def start(spec) -> dict[str, Factors]:
    linears = target_linears(load_base(spec.base, "float32").body, last_layers=spec.last_layers)
    return {
        name: Factors(
            random_down_projection(0, "chain_sum", name, spec.rank, m.in_features),
            torch.zeros(m.out_features, spec.rank),
            spec.alpha / spec.rank,
        )
        for name, m in linears.items()
    }


def our_losses(spec, rows, tmp_path, train_A: bool, masks) -> tuple[list[float], dict[str, LowRank]]:
    base = load_base(spec.base, "float32")
    first = split_at(base, spec.last_layers)
    live = {name: LowRank(f, train_A=train_A, mask=masks.get(name)) for name, f in start(spec).items()}
    data = TaskData("chain_sum", rows, cached_states(base, rows, first))
    done = train(spec, base, suffix_body(base, first), live, [data], tmp_path / "none", lambda *_: None)
    return [row["loss"] for row in done.history], live


def peft_losses(spec, rows, train_A: bool, masks) -> tuple[list[float], torch.nn.Module, list[float]]:
    """Losses, the trained model, and the norms of the gradients before they are clipped."""
    factors, tokenizer = start(spec), load_base(spec.base, "float32").tokenizer
    plain = AutoModelForCausalLM.from_pretrained(spec.base, dtype=torch.float32, attn_implementation="eager")
    targets = [f"model.{name}" for name in factors]
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, lora_dropout=0.0, target_modules=targets)
    model, trained = get_peft_model(plain, config).eval(), []
    for name, f in factors.items():
        A, B = (getattr(model.get_submodule(f"base_model.model.model.{name}"), f"lora_{part}").default for part in "AB")
        with torch.no_grad():
            A.weight.copy_(f.A)
        A.weight.requires_grad_(train_A)
        if name in masks:
            B.weight.register_hook(masks[name].mul)  # the gradient's entries off the mask are zero at every step
        trained += [A.weight, B.weight] if train_A else [B.weight]
    optimiser = torch.optim.AdamW(trained, lr=spec.learning_rate, weight_decay=0.0)
    losses, norms = [], []
    for step in range(spec.steps):
        chosen = [rows[i] for i in batch_indices(len(rows), spec.batch_size, step, spec.seed, "chain_sum")]
        batch = collate(chosen, tokenizer.pad_token_id)
        hidden = model.base_model.model.model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        logits = model.base_model.model.lm_head(hidden.flatten(0, 1)[batch.positions])
        loss = F.cross_entropy(logits, batch.targets)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, spec.clip).item())
        optimiser.param_groups[0]["lr"] = learning_rate_at(step, spec)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses, model, norms


def masks_for(spec) -> dict[str, torch.Tensor]:
    return random_masks({name: tuple(f.B.shape) for name, f in start(spec).items()}, 0.9, seed=5)


def farthest(found: list[float], expected: list[float]) -> float:
    """Largest relative difference of two curves, step by step."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("train_A", [False, True], ids=["lori-d", "lora"])
def test_losses_are_those_of_peft_over_20_steps(spec, rows, tmp_path, train_A):
    found, live = our_losses(spec, rows, tmp_path, train_A, {})
    expected, model, norms = peft_losses(spec, rows, train_A, {})
    assert len(found) == STEPS and found[-1] < 0.9 * found[0]  # something was learned
    assert farthest(found, expected) <= 1e-5
    other, _ = our_losses(spec, rows, tmp_path, not train_A, {})
    assert farthest(other, expected) > 1e-3
    assert min(norms) > spec.clip
    unclipped, _ = our_losses(replace(spec, clip=1e9), rows, tmp_path, train_A, {})
    assert farthest(unclipped, expected) > 1e-4
    for name, low in live.items():
        A = model.get_submodule(f"base_model.model.model.{name}").lora_A.default.weight
        drawn = start(spec)[name].A
        assert torch.equal(low.A, drawn) == torch.equal(A, drawn) == (not train_A)


def test_lori_s_losses_are_those_of_peft_with_a_masked_gradient(spec, rows, tmp_path):
    masks = masks_for(spec)
    found, live = our_losses(spec, rows, tmp_path, False, masks)
    expected, model, norms = peft_losses(spec, rows, False, masks)
    assert farthest(found, expected) <= 1e-5
    dense, _ = our_losses(spec, rows, tmp_path, False, {})
    assert farthest(dense, expected) > 1e-3
    assert min(norms) > spec.clip
    unclipped, _ = our_losses(replace(spec, clip=1e9), rows, tmp_path, False, masks)
    assert farthest(unclipped, expected) > 1e-4
    for name, low in live.items():
        B = model.get_submodule(f"base_model.model.model.{name}").lora_B.default.weight
        assert not B[~masks[name]].any() and not low.B[~masks[name]].any()
        assert B[masks[name]].all() and low.B[masks[name]].all()

"""Frozen-prefix reuse is exact: training from cached hidden states equals training the full model.

The layers above the cut do the same arithmetic on the same numbers in both; what differs is the number of rows and the
padding of a chunk of the cache, which may order a sum otherwise. One reordered float32 sum over n terms moves by at
most nε of its terms' size, and the normalised networks here pass such an error on without growing it much: the bound is
L·n·ε, with L the layers and n the longest sum (the feed-forward width), relative to the largest gradient of a tensor.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import saved
from tiny import random_factors
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lori_nb.lab import prefix
from lori_nb.lab.evaluation import logits_at, task_loss
from lori_nb.lab.models import Base, load_base
from lori_nb.lab.prefix import cached_states, can_split, hidden_at, model_inputs, split_at, suffix_body
from lori_nb.lab.tasks import Example, get_task
from lori_nb.lab.text import collate, encode_decoder_rows, encode_encoder_rows
from lori_nb.method.adapters import LowRank, attach, target_linears

EPS = torch.finfo(torch.float32).eps
PAIRS = [
    Example("A man is eating food.", "yes", second="A man eats.", target=1),
    Example("No.", "no", target=0),
    Example("The girl carries a baby across the wide and empty street.", "no", second="Dogs bark.", target=0),
    Example("A plane takes off.", "yes", second="An aeroplane is leaving the ground.", target=1),
]


@pytest.fixture
def tiny(tiny_decoder, home) -> Base:
    return load_base(str(tiny_decoder), "float32")


@pytest.fixture
def tiny_bert(tiny_encoder, home) -> Base:
    return load_base(str(tiny_encoder), "float32")


def rows_for(base: Base, count: int = 5):
    if base.kind == "encoder":
        return encode_encoder_rows(base.tokenizer, (PAIRS * 2)[:count])
    return encode_decoder_rows(base.tokenizer, get_task("chain_sum").rows("train", count))


def head_for(base: Base) -> nn.Module | None:
    if base.kind == "decoder":
        return None
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Linear(base.width, 2)


def loss_and_gradients(base: Base, body, rows, live, states=None, length=None):
    """Loss and its gradient by parameter name, with ``live`` attached; the head takes part."""
    head = head_for(base)
    hidden = None if states is None else [states[i] for i in range(len(rows))]
    batch = collate(rows, base.tokenizer.pad_token_id, length, hidden)
    named = {f"{name}.{part}": p for name, low in live.items() for part, p in low.named_parameters()}
    if head is not None:
        named |= dict(head.named_parameters())
    with attach(base.body, live):
        loss = task_loss(base, logits_at(base, body, batch, head), batch.targets)
    return loss.item(), dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_prefix_is_exact(base: Base, last_layers: int, count: int = 5) -> None:
    rows, first = rows_for(base, count), split_at(base, last_layers)
    assert first > 0
    linears = target_linears(base.body, last_layers=last_layers)
    live = {n: LowRank(f, train_A=True) for n, f in random_factors(linears, 4, seed=1, scale=0.02).items()}
    states = cached_states(base, rows, first)
    config = base.body.config
    bound = config.num_hidden_layers * config.intermediate_size * EPS
    full, expected = loss_and_gradients(base, base.body, rows, live)
    split, found = loss_and_gradients(base, suffix_body(base, first), rows, live, states)
    assert split == pytest.approx(full, rel=bound)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (found[name] - gradient).abs().max() <= bound * gradient.abs().max(), name


def test_tiny_llama(tiny):
    assert_prefix_is_exact(tiny, 2)
    assert_prefix_is_exact(tiny, 1)


def test_tiny_bert(tiny_bert):
    assert_prefix_is_exact(tiny_bert, 2)


def test_smollm2(smollm2, home):
    assert_prefix_is_exact(smollm2, 8, count=3)


def test_minilm(minilm, home):
    assert_prefix_is_exact(minilm, 3)


def test_the_suffix_starts_at_the_right_layer(tiny):
    """Must differ: the same states into a suffix that begins one layer off."""
    rows = rows_for(tiny)
    batch = collate(rows, tiny.tokenizer.pad_token_id)
    hidden = dataclasses.replace(batch, hidden=hidden_at(tiny, batch, 2))
    whole = logits_at(tiny, tiny.body, batch)
    torch.testing.assert_close(logits_at(tiny, suffix_body(tiny, 2), hidden), whole, rtol=0, atol=4 * 96 * EPS * 10)
    assert not torch.allclose(logits_at(tiny, suffix_body(tiny, 1), hidden), whole, atol=1e-2)


def test_the_base_is_left_as_it_was(tiny, tiny_bert):
    for base in (tiny, tiny_bert):
        batch = collate(rows_for(base), base.tokenizer.pad_token_id)
        head = head_for(base)
        before = logits_at(base, base.body, batch, head)
        modules = dict(base.body.named_modules())
        suffix = suffix_body(base, 1)
        assert dict(base.body.named_modules()) == modules
        assert torch.equal(logits_at(base, base.body, batch, head), before)
        own = {id(p) for p in base.body.parameters()}
        assert {id(p) for p in suffix.parameters()} < own


def test_mask_travels_with_the_states(tiny_bert):
    """Longer padding changes nothing beyond rounding; without the mask it would."""
    base, rows = tiny_bert, rows_for(tiny_bert)
    states, body, head = cached_states(base, rows, 1), suffix_body(tiny_bert, 1), head_for(tiny_bert)
    hidden = [states[i] for i in range(len(rows))]
    short, long = (collate(rows, base.tokenizer.pad_token_id, length, hidden) for length in (None, 60))
    expected = logits_at(base, body, short, head)
    torch.testing.assert_close(logits_at(base, body, long, head), expected, rtol=0, atol=3 * 48 * EPS * 10)
    unmasked = dataclasses.replace(long, mask=torch.ones_like(long.mask))
    assert not torch.allclose(logits_at(base, body, unmasked, head), expected, atol=1e-3)


def test_evaluation_mode_travels(minilm, home):
    """A body in training mode would drop out a tenth of its hidden states."""
    suffix = suffix_body(minilm, 3)
    assert not any(module.training for module in suffix.modules())
    rows = rows_for(minilm)
    states = cached_states(minilm, rows, 3)
    batch = collate(rows, 0, hidden=[states[i] for i in range(len(rows))])
    assert torch.equal(suffix(**model_inputs(minilm, batch))[0], suffix(**model_inputs(minilm, batch))[0])


def test_logits_only_at_answer_positions(tiny, smollm2):
    for base in (tiny, smollm2):
        rows = rows_for(base, 3)
        batch = collate(rows, base.tokenizer.pad_token_id)
        found = logits_at(base, base.body, batch)
        with torch.no_grad():
            hidden = base.body(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
            every = base.head(hidden)
        expected = torch.cat([every[i, r.answer_start - 1 : len(r.ids) - 1] for i, r in enumerate(rows)])
        # one product over the hidden size, summed in another order
        bound = base.width * EPS * hidden.abs().amax() * base.head.weight.abs().amax() * base.width**0.5
        assert found.shape == (sum(len(r.answer) for r in rows), base.head.weight.shape[0])
        assert (found - expected).abs().max() <= bound


# The cache on disk


def bits(states) -> list[bytes]:
    return [states[i].view(torch.uint8).numpy().tobytes() for i in range(len(states))]


def fresh_cache(tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.setenv("LORI_NB_HOME", str(tmp_path / name))


def test_the_cache_is_read_again_with_the_same_bits(tiny, tmp_path, monkeypatch):
    fresh_cache(tmp_path, monkeypatch, "a")
    rows = rows_for(tiny)
    calls = []
    first = bits(cached_states(tiny, rows, 2, lambda done, total: calls.append((done, total))))
    again = bits(cached_states(tiny, rows, 2, lambda done, total: calls.append("computed again")))
    assert calls == [(5, 5)]
    assert again == first
    monkeypatch.setattr(prefix, "IN_MEMORY", 0)  # memory-mapped
    assert bits(cached_states(tiny, rows, 2)) == first
    assert bits(cached_states(tiny, rows, 1)) != first
    fresh_cache(tmp_path, monkeypatch, "b")
    assert bits(cached_states(tiny, rows, 2)) == first


def test_a_killed_fill_is_not_taken_for_whole(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix, "CHUNK", 2)
    fresh_cache(tmp_path, monkeypatch, "whole")
    rows = rows_for(tiny)
    whole = bits(cached_states(tiny, rows, 2))
    fresh_cache(tmp_path, monkeypatch, "killed")

    def stop(done, total):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_states(tiny, rows, 2, stop)
    assert list((tmp_path / "killed/cache/prefix").glob("*/states.partial.npy"))
    assert bits(cached_states(tiny, rows, 2)) == whole


def test_a_row_s_bits_depend_on_its_list_alone(smollm2, tmp_path, monkeypatch):
    """bfloat16 bits depend on the batch shape: a list is always cut into the same chunks and the last one filled up."""
    fresh_cache(tmp_path, monkeypatch, "a")
    monkeypatch.setattr(prefix, "CHUNK", 2)
    shapes = set()
    real = prefix.hidden_at
    monkeypatch.setattr(
        prefix, "hidden_at", lambda base, batch, first: shapes.add(batch.ids.shape) or real(base, batch, first)
    )
    rows = rows_for(smollm2, 3)
    states = cached_states(smollm2, rows, 2)
    assert shapes == {(2, max(len(row.ids) for row in rows))}
    assert [tuple(states[i].shape) for i in range(3)] == [(len(row.ids), smollm2.width) for row in rows]


def test_bfloat16_states_keep_their_bits(tiny_decoder, home, tmp_path, monkeypatch):
    fresh_cache(tmp_path, monkeypatch, "a")
    base = load_base(str(tiny_decoder), "bfloat16")
    rows = rows_for(base, 2)
    states = cached_states(base, rows, 2)
    assert states[0].dtype == torch.bfloat16
    batch = collate([rows[0], *[rows[1]] * (prefix.CHUNK - 1)], 0, max(len(r.ids) for r in rows))
    assert torch.equal(states[0], hidden_at(base, batch, 2)[0, : len(rows[0].ids)])


def test_another_base_has_another_cache(tiny, tmp_path, monkeypatch):
    fresh_cache(tmp_path, monkeypatch, "a")
    cached_states(tiny, rows_for(tiny), 2)
    cached_states(dataclasses.replace(tiny, digest="another"), rows_for(tiny), 2)
    assert len(list((tmp_path / "a/cache/prefix").glob("*/offsets.npy"))) == 2
    kept = np.load(next((tmp_path / "a/cache/prefix").glob("*/states.npy")))
    assert kept.shape == (sum(len(r.ids) for r in rows_for(tiny)), 64)


# Architectures that cannot be split


def test_a_base_that_cannot_be_split_runs_whole(smollm2, tmp_path, home):
    config = GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(smollm2.tokenizer),
    )
    base = load_base(str(saved(GPTNeoXForCausalLM, config, smollm2.tokenizer, tmp_path / "neox")), "float32")
    assert not can_split(base)
    assert split_at(base, 1) == 0
    assert suffix_body(base, 0) is base.body
    live = {
        n: LowRank(f, train_A=False)
        for n, f in random_factors(target_linears(base.body, last_layers=1), 4, seed=1).items()
    }
    loss, gradients = loss_and_gradients_of_B(base, live)
    assert np.isfinite(loss)
    assert len(gradients) == 4


def loss_and_gradients_of_B(base: Base, live):
    batch = collate(rows_for(base, 3), base.tokenizer.pad_token_id)
    with attach(base.body, live):
        loss = task_loss(base, logits_at(base, base.body, batch), batch.targets)
    return loss.item(), torch.autograd.grad(loss, [low.values for low in live.values()])


def test_all_layers_carry_an_adapter(tiny):
    assert split_at(tiny, None) == 0
    assert split_at(tiny, 4) == 0
    assert suffix_body(tiny, 0) is tiny.body

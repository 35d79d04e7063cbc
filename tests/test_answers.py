"""The last layer at answer positions only gives what the whole layer gives there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import random_factors

from lori_nb.lab import evaluation
from lori_nb.lab.answers import can_narrow, narrowed
from lori_nb.lab.evaluation import logits_at, task_loss
from lori_nb.lab.models import load_base
from lori_nb.lab.prefix import model_inputs, suffix_body
from lori_nb.lab.tasks import get_task
from lori_nb.lab.text import collate, encode_decoder_rows
from lori_nb.method.adapters import LowRank, attach, target_linears

EPS = torch.finfo(torch.float32).eps
LAYERS, LONGEST = 4, 96  # of the tiny decoder: its depth, and the terms of its longest inner product


@pytest.fixture
def base(tiny_decoder, home):
    return load_base(str(tiny_decoder), "float32")


def batch_of(base, *tasks: str):
    rows = [row for task in tasks for row in get_task(task).rows("train", 4)]
    return collate(encode_decoder_rows(base.tokenizer, rows), base.tokenizer.pad_token_id)


def whole_logits(base, body, batch):
    """Logits by way of every position of every layer."""
    hidden = body(**model_inputs(base, batch)).last_hidden_state
    return base.head(hidden.flatten(0, 1)[batch.positions]).float()


@pytest.mark.parametrize("first", [0, 2, 3])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_and_gradients_equal_those_of_the_whole_layer(base, first, attention, monkeypatch):
    """Answers of one token and of many, padded rows. Both sides round each inner product of n terms within n·ε of the
    largest, a layer up and a layer down; two evaluations err independently.
    """
    monkeypatch.setattr(base.body.config, "_attn_implementation", attention)
    body = suffix_body(base, first)
    batch = batch_of(base, "family_relationships", "word_sequence_reversal", "refusal")
    if first:
        hidden = torch.randn(*batch.ids.shape, base.width, generator=torch.Generator().manual_seed(0))
        batch = replace(batch, hidden=hidden)
    linears = {n: m for n, m in target_linears(base.body).items() if f"layers.{first}." in n or "layers.3." in n}
    live = {n: LowRank(f, train_A=True) for n, f in random_factors(linears, 4, seed=1, scale=0.02).items()}
    parameters = [p for low in live.values() for p in (low.A, low.values)]
    results = []
    with attach(base.body, live):
        for logits_of in (logits_at, whole_logits):
            logits = logits_of(base, body, batch)
            results.append([logits, *torch.autograd.grad(task_loss(base, logits, batch.targets), parameters)])
    share = 2 * (2 * LAYERS * LONGEST + batch.ids.numel()) * EPS
    for ours, whole in zip(*results, strict=True):
        assert whole.abs().max() > 0
        assert (ours - whole).abs().max() <= share * whole.abs().max()


def test_rows_of_answers_are_those_positions(base):
    batch = batch_of(base, "word_sequence_reversal", "family_relationships")
    states = torch.arange(batch.ids.numel()).view(*batch.ids.shape, 1)
    by_row = states.gather(1, batch.asked.unsqueeze(-1))
    assert torch.equal(by_row.flatten(0, 1)[batch.slots].squeeze(1), batch.positions)
    assert (batch.asked[:, :1] <= batch.asked).all() and batch.mask.gather(1, batch.asked).all()


def test_the_body_itself_is_left_as_it_was(base):
    batch = batch_of(base, "family_relationships")
    before = list(base.body.layers)
    assert narrowed(base.body, batch).layers[0] is before[0]
    assert list(base.body.layers) == before
    assert base.body(**model_inputs(base, batch)).last_hidden_state.shape[:2] == batch.ids.shape


def test_less_is_computed(base):
    from torch.utils.flop_counter import FlopCounterMode

    batch = batch_of(base, "family_relationships")
    counts = []
    for logits_of in (logits_at, whole_logits):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            logits_of(base, base.body, batch)
        counts.append(counter.get_total_flops())
    linears = target_linears(base.body, last_layers=1)
    narrow = sum(m.weight.numel() for n, m in linears.items() if not n.endswith(("k_proj", "v_proj")))
    attention = 2 * base.width * batch.ids.shape[1]  # scores and values of a position, over all heads
    skipped = batch.ids.numel() - batch.asked.numel()
    assert counts[1] - counts[0] == 2 * skipped * (narrow + attention)


def test_other_architectures_take_the_whole_layer(minilm, base, monkeypatch):
    assert can_narrow(base.body) and not can_narrow(minilm.body)
    monkeypatch.setattr(base.body.config, "sliding_window", 8, raising=False)
    assert not can_narrow(base.body)
    batch = batch_of(base, "family_relationships")
    assert torch.equal(evaluation.logits_at(base, base.body, batch), whole_logits(base, base.body, batch))

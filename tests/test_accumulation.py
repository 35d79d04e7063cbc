"""Micro-batches and activation checkpointing: they change memory and time, and not what is learned."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import saved
from hypothesis import given
from hypothesis import strategies as st
from steps import EPS, LAYERS, LONGEST_PRODUCT, Prepared, assert_same_gradients, saved_bytes
from tiny import tiny_spec
from transformers import RobertaConfig, RobertaModel

from lori_nb.lab import distributed
from lori_nb.lab.distributed import tree_partners, tree_sum
from lori_nb.lab.gradients import micro_batches, recomputed
from lori_nb.lab.models import load_base
from lori_nb.lab.prefix import attention_mask, model_inputs
from lori_nb.lab.resolving import check, resolve
from lori_nb.lab.runs import Store
from lori_nb.lab.tasks import Example
from lori_nb.lab.text import collate, encode_encoder_rows
from lori_nb.study.plans import single
from lori_nb.study.profiles import load_settings

BOTH = ("chain_sum", "word_sequence_reversal")
SPECS = {
    "lora": lambda base, **c: tiny_spec(base, **c),
    "lori-d": lambda base, **c: tiny_spec(base, "lori-d", **c),
    "lori-s": lambda base, **c: tiny_spec(base, "lori-s", sparsity=0.9, mask_origin="random", **c),
    "ortho-lora": lambda base, **c: tiny_spec(base, "ortho-lora", tasks=BOTH, **c),
}


@pytest.fixture
def base(tiny_decoder, home):
    return tiny_decoder


# Cutting and adding


@given(st.integers(1, 70), st.none() | st.integers(1, 20), st.integers(1, 9))
def test_pieces_hold_every_row_once_and_leave_no_process_idle(count, rows, processes):
    pieces = micro_batches(range(count), rows, processes)
    assert [i for piece in pieces for i in piece] == list(range(count))
    sizes = [len(piece) for piece in pieces]
    assert max(sizes) <= (rows or count) and max(sizes) - min(sizes) <= 1
    assert len(pieces) >= min(processes, count)
    assert len(pieces) == 1 or len(pieces) == min(processes, count) or count / (len(pieces) - 1) > rows  # as few as go


floats = st.floats(-1e6, 1e6, width=32)


def along_the_tree_of_processes(sums: list[torch.Tensor]) -> torch.Tensor:
    """What the processes' exchange adds up to, carried out in one process."""
    held = list(sums)
    for rank in reversed(range(len(sums))):  # a process sends after all that it receives from, which have higher ranks
        for partner, receives in tree_partners(rank, len(sums)):
            if receives:
                assert (rank, False) in list((p, r) for p, r in tree_partners(partner, len(sums)))
                held[rank] = held[rank] + held[partner]
    return held[0]


@given(st.lists(floats, min_size=1, max_size=9))
def test_processes_add_along_the_same_tree_as_micro_batches(values):
    tensors = [torch.tensor(value, dtype=torch.float32) for value in values]
    assert torch.equal(along_the_tree_of_processes(tensors), tree_sum(tensors, torch.add))


@given(st.lists(floats, min_size=8, max_size=8), st.sampled_from([1, 2, 4, 8]))
def test_the_sum_has_the_same_bits_on_1_2_4_and_8_processes(values, processes):
    tensors = [torch.tensor(value, dtype=torch.float32) for value in values]
    size = 8 // processes
    shares = [tree_sum(tensors[start : start + size], torch.add) for start in range(0, 8, size)]
    assert torch.equal(along_the_tree_of_processes(shares), tree_sum(tensors, torch.add))


def test_another_order_of_sums_has_other_bits():
    draws = random.Random(0)
    tensors = [torch.tensor(draws.gauss(0, 1)) for _ in range(64)]
    assert tree_sum(tensors, torch.add) != sum(tensors)
    assert tree_sum(tensors, torch.add).item() == pytest.approx(sum(tensors).item(), abs=64 * 64 * 2.0**-24)
    with pytest.raises(ValueError, match="addends must be at least one"):
        tree_sum([], torch.add)


def test_one_process_passes_everything_through():
    assert (distributed.count(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    assert distributed.decided(lambda: 3) == 3
    assert distributed.share([1, 2, 3]) == distributed.dealt([1, 2, 3]) == [1, 2, 3]
    assert distributed.gathered({1: 2}) == {1: 2}
    distributed.check_same("anything", object())


# Micro-batches


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", [1, 3])
def test_micro_batches_give_the_gradient_of_the_whole_batch(name, rows, base):
    spec = SPECS[name](base)
    used = assert_same_gradients(
        Prepared(spec), Prepared(spec), lambda prepared, step: prepared.gradients(step, rows), steps=2
    )
    assert used > 0  # it is another computation


def test_pieces_count_by_their_answer_tokens(base):
    """The mean of the pieces' losses is another number: answers differ in length."""
    prepared = Prepared(tiny_spec(base))
    ((task, indices),) = prepared.batches(0)
    lengths = [len(task.rows[i].answer) for i in indices]
    assert len(set(lengths)) > 1 and task.targets(indices) == sum(lengths)
    ((whole, _),) = prepared.gradients()
    each = []
    for i in indices:
        prepared.batches = lambda step, i=i: [(task, [i])]
        each.append(prepared.gradients()[0][0])
    by_token = sum(loss * n for loss, n in zip(each, lengths, strict=True)) / sum(lengths)
    assert whole.item() == pytest.approx(by_token.item(), rel=1e-5)
    assert abs(whole - sum(each) / len(each)) > 1e-3


# Checkpointing


@pytest.mark.parametrize("name", SPECS)
def test_checkpointing_gives_the_same_bits_and_keeps_less(name, base):
    prepared = Prepared(SPECS[name](base))
    plain, kept = prepared.gradients(), saved_bytes(prepared)
    with recomputed(prepared.base.body):
        assert not prepared.base.body.training
        again, kept_now = prepared.gradients(), saved_bytes(prepared)
    for (loss, gradient), (other_loss, other) in zip(plain, again, strict=True):
        assert torch.equal(loss, other_loss)
        assert all(torch.equal(gradient[key], other[key]) for key in gradient)
        assert any(g.abs().max() > 0 for g in gradient.values())
    attention = sum(attention_bytes(prepared, task, indices) for task, indices in prepared.batches(0))
    assert kept - kept_now >= attention > 0  # at the very least
    assert all("forward" not in vars(module) for module in prepared.base.body.modules())
    assert saved_bytes(prepared) == kept


def attention_bytes(prepared: Prepared, task, indices) -> int:
    """What the layers with adapters keep of their attention weights (b × heads × L × L, float32)."""
    longest = max(len(task.rows[i].ids) for i in indices)
    per_layer = len(indices) * prepared.base.body.config.num_attention_heads * longest**2 * 4
    return prepared.spec.last_layers * per_layer


def test_checkpointing_is_refused_where_no_layer_can_be_computed_again():
    words = "checkpointing must be false for a base without layers .* found Linear"
    with pytest.raises(ValueError, match=words), recomputed(torch.nn.Linear(2, 2)):
        pass


def test_a_checkpointed_run_ends_in_the_same_adapter(base):
    plain, again = (Store().get(tiny_spec(base, steps=6, checkpointing=wanted)) for wanted in (False, True))
    assert plain.hash != again.hash
    assert plain.history.equals(again.history)
    for name, f in plain.adapter.factors.items():
        assert torch.equal(f.B, again.adapter.factors[name].B) and torch.equal(f.A, again.adapter.factors[name].A)


def test_a_run_in_micro_batches_is_another_run(base):
    plain, pieces = (Store().get(tiny_spec(base, steps=6, micro_batch_rows=rows)) for rows in (None, 2))
    assert plain.hash != pieces.hash
    first, again = plain.history["loss"][0], pieces.history["loss"][0]  # before any step
    assert first == pytest.approx(again, rel=4 * LAYERS * LONGEST_PRODUCT * EPS)
    assert resolve(tiny_spec(base)).hash == resolve(tiny_spec(base, micro_batch_rows=None)).hash
    with pytest.raises(ValueError, match="micro_batch_rows must be at least 1, or none; found 0"):
        check(tiny_spec(base, micro_batch_rows=0))


# The mask that is made without asking the device


@pytest.fixture
def tiny_roberta(minilm, tmp_path) -> Path:
    """A folder with a random RoBERTa of two small layers, whose positions are counted from its input ids."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    pad = minilm.tokenizer.pad_token_id
    config = RobertaConfig(vocab_size=len(minilm.tokenizer), type_vocab_size=2, pad_token_id=pad, **size)
    return saved(RobertaModel, config, minilm.tokenizer, tmp_path)


@pytest.mark.parametrize("kind", ["decoder", "encoder", "roberta"])
def test_the_fused_kernels_see_the_same_mask(kind, request, home):
    """torch's fused attention on the four-dimensional mask, against transformers' own from the padding mask."""
    base = load_base(str(request.getfixturevalue(f"tiny_{kind}")), "float32")
    spec = tiny_spec(base.name)
    rows = Prepared(spec).tasks[0].rows[:6] if kind == "decoder" else encoder_rows(base)
    batch = collate(rows, base.tokenizer.pad_token_id)
    assert 0 in batch.mask and attention_mask(base, batch) is batch.mask  # on a CPU attention is not fused
    base.body.config._attn_implementation = "sdpa"
    try:
        inputs = model_inputs(base, batch)
        assert inputs["attention_mask"].shape == (len(rows), 1, batch.ids.shape[1], batch.ids.shape[1])
        with torch.no_grad():
            ours = base.body(**inputs).last_hidden_state
            theirs = base.body(**inputs | {"attention_mask": batch.mask}).last_hidden_state
            blind = base.body(**inputs | {"attention_mask": torch.ones_like(batch.mask)}).last_hidden_state
        real = batch.mask.bool()
        assert torch.equal(ours[real], theirs[real])
        assert kind == "decoder" or not torch.equal(ours[real], blind[real])
    finally:
        base.body.config._attn_implementation = "eager"


def encoder_rows(base):
    return encode_encoder_rows(
        base.tokenizer, [Example("one " * n, second="two", answer="x", target=0) for n in range(1, 7)]
    )


def test_a_window_shorter_than_the_rows_leaves_the_mask_to_transformers(base):
    loaded = load_base(str(base), "float32")
    rows = Prepared(tiny_spec(base)).tasks[0].rows[:3]
    batch = collate(rows, loaded.tokenizer.pad_token_id)
    config = loaded.body.config
    config._attn_implementation, config.sliding_window = "sdpa", 8
    try:
        assert attention_mask(loaded, batch) is batch.mask
        config.sliding_window = 4096
        assert attention_mask(loaded, batch).ndim == 4
    finally:
        config._attn_implementation = "eager"
        del config.sliding_window


def test_settings_of_one_run_reach_its_calibration():
    settings = load_settings("paper")
    spec = single(settings, "lori-s", "gsm8k", 0)
    assert (spec.micro_batch_rows, spec.checkpointing) == (4, True)
    assert (spec.calibration.micro_batch_rows, spec.calibration.checkpointing) == (4, True)
    assert replace(spec, micro_batch_rows=None).batch_size == 32
    with pytest.raises(ValueError, match="checkpointing must be true or false; found 'yes'"):
        load_settings("quick", checkpointing="yes")

"""Rows as tokens: one prompt for training and evaluation, answers where they are predicted, nothing decisive cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lori_nb.lab.tasks import Example, get_task
from lori_nb.lab.text import (
    SYSTEM,
    collate,
    encode_decoder_rows,
    encode_encoder_rows,
    encode_prompts,
    prompt_ids,
)

ROW = Example(prompt="Reverse these words: sun, moon", answer="moon, sun")


def plain(tokenizer):
    """The tokenizer of a base without a chat template."""
    twin = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    twin.chat_template = None
    return twin


def test_the_prompt_is_the_same_in_training_and_evaluation(smollm2):
    """It does not depend on the answer, which evaluation does not know, nor on the other rows."""
    tokenizer = smollm2.tokenizer
    (trained,) = encode_decoder_rows(tokenizer, [ROW])
    other = encode_decoder_rows(tokenizer, [replace(ROW, prompt="x"), replace(ROW, answer="?")])[1]
    assert list(trained.ids[: trained.answer_start]) == prompt_ids(tokenizer, ROW)
    assert trained.ids[: trained.answer_start] == other.ids[: other.answer_start]
    assert trained.answer != other.answer


def test_the_answer_ends_with_the_end_of_text(smollm2):
    (row,) = encode_decoder_rows(smollm2.tokenizer, [ROW])
    assert row.answer[-1] == smollm2.tokenizer.eos_token_id
    assert smollm2.tokenizer.decode(row.answer[:-1]) == ROW.answer
    assert row.decisive == len(row.answer)


def test_the_chat_template_is_the_model_s_own(smollm2):
    text = smollm2.tokenizer.decode(prompt_ids(smollm2.tokenizer, ROW))
    assert text.endswith(f"<|im_start|>user\n{ROW.prompt}<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>system") == 1


def test_a_base_without_a_template(smollm2):
    tokenizer = plain(smollm2.tokenizer)
    (row,) = encode_decoder_rows(tokenizer, [ROW], [Example(prompt="a", answer="b", second="c")])
    text = tokenizer.decode(row.ids[:-1])
    assert text == f"Question: a\nc\nAnswer: b\n\nQuestion: {ROW.prompt}\nAnswer: {ROW.answer}"


def test_examples_stand_before_the_question(smollm2):
    shots = [Example(prompt=f"question {i}", answer=f"reply {i}") for i in range(2)]
    text = smollm2.tokenizer.decode(prompt_ids(smollm2.tokenizer, ROW, shots))
    order = [text.index(piece) for piece in ("question 0", "reply 0", "question 1", "reply 1", ROW.prompt)]
    assert order == sorted(order)


@given(st.integers(40, 90), st.integers(60, 200))
@settings(max_examples=20, deadline=None)
def test_a_long_prompt_loses_its_middle(smollm2, max_length, words):
    row = replace(ROW, prompt="Begin here. " + " ".join(f"w{i}" for i in range(words)))
    whole = prompt_ids(smollm2.tokenizer, row)
    (cut,) = encode_decoder_rows(smollm2.tokenizer, [row], max_length=max_length)
    prompt = list(cut.ids[: cut.answer_start])
    room = max_length - len(cut.answer)
    assert len(whole) > room
    assert len(cut.ids) == max_length
    assert prompt[: room // 2] == whole[: room // 2]
    assert prompt[-(room // 2) :] == whole[-(room // 2) :]  # the question's end and the answer marker
    assert smollm2.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert cut.answer == encode_decoder_rows(smollm2.tokenizer, [ROW])[0].answer


def test_no_room_for_the_prompt(smollm2):
    with pytest.raises(ValueError, match="max_length must leave 32 tokens for the prompt; found 30 with an answer of"):
        encode_decoder_rows(smollm2.tokenizer, [ROW], max_length=30)


def test_prompts_for_generation_are_those_of_training(smollm2):
    """Cut alike too: in the middle, so that the answer marker stays."""
    (trained,) = encode_decoder_rows(smollm2.tokenizer, [ROW])
    assert encode_prompts(smollm2.tokenizer, [ROW]) == [trained.ids[: trained.answer_start]]
    long = replace(ROW, prompt="Begin here. " + "word " * 200)
    (cut,) = encode_prompts(smollm2.tokenizer, [long], max_length=60)
    whole = prompt_ids(smollm2.tokenizer, long)
    assert list(cut) == whole[:30] + whole[-30:]
    assert smollm2.tokenizer.decode(cut).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(("system", "shown"), [(None, SYSTEM), ("Be brief.", "Be brief."), ("", None)])
def test_the_system_message_is_the_task_s(system, shown, smollm2):
    """Its own, the kit's where it has none, the template's where it is empty; the same in training and generation."""
    (prompt,) = encode_prompts(smollm2.tokenizer, [ROW], system=system)
    (trained,) = encode_decoder_rows(smollm2.tokenizer, [ROW], system=system)
    text = smollm2.tokenizer.decode(prompt)
    assert trained.ids[: trained.answer_start] == prompt
    assert text.count("<|im_start|>system") == 1
    assert (f"<|im_start|>system\n{shown}<|im_end|>" in text) == (shown is not None)
    assert (SYSTEM in text) == (system is None)


def test_an_opening_decides_alone(smollm2):
    row = Example(prompt="p", answer="Sure. Here it is.", opening="Sure.")
    (encoded,) = encode_decoder_rows(smollm2.tokenizer, [row])
    assert smollm2.tokenizer.decode(encoded.answer[: encoded.decisive]) == "Sure."
    assert encoded.decisive < len(encoded.answer)
    with pytest.raises(
        ValueError, match="opening must be the start of the answer; found 'Yes' for 'Sure. Here it is.'"
    ):
        encode_decoder_rows(smollm2.tokenizer, [replace(row, opening="Yes")])


def test_openings_of_the_refusal_set_end_between_tokens(smollm2):
    for row in get_task("refusal").rows("test", 64):
        (encoded,) = encode_decoder_rows(smollm2.tokenizer, [row])
        assert smollm2.tokenizer.decode(encoded.answer[: encoded.decisive]) == row.opening


def test_positions_predict_the_answer(smollm2):
    rows = encode_decoder_rows(smollm2.tokenizer, [ROW, Example(prompt="p", answer="no", opening="no")])
    batch = collate(rows, pad=0)
    width = batch.ids.shape[1]
    for place, target, owner in zip(batch.positions, batch.targets, batch.rows, strict=True):
        assert place // width == owner
        assert batch.ids.flatten()[place + 1] == target
    assert batch.targets.tolist() == [*rows[0].answer, *rows[1].answer]
    assert batch.decisive.tolist() == [True] * len(rows[0].answer) + [True, False]
    assert batch.mask.sum(1).tolist() == [len(row.ids) for row in rows]


def test_padding_to_a_length_and_hidden_states(smollm2):
    rows = encode_decoder_rows(smollm2.tokenizer, [ROW, replace(ROW, prompt="p")])
    hidden = [torch.ones(len(row.ids), 3) for row in rows]
    batch = collate(rows, pad=0, length=100, hidden=hidden)
    assert batch.ids.shape == (2, 100)
    assert batch.hidden.shape == (2, 100, 3)
    assert torch.equal(batch.hidden[..., 0].long(), batch.mask)


def test_pairs_for_encoders(minilm):
    rows = [Example("a cat", "yes", second="an animal", target=1), Example("alone", "no", target=0)]
    pair, single = encode_encoder_rows(minilm.tokenizer, rows)
    assert minilm.tokenizer.decode(pair.ids) == "[CLS] a cat [SEP] an animal [SEP]"
    assert pair.segments == (0, 0, 0, 0, 1, 1, 1)
    assert set(single.segments) == {0}
    batch = collate([pair, single], pad=minilm.tokenizer.pad_token_id)
    assert batch.targets.tolist() == [1, 0]
    assert batch.positions is None
    long = Example("word " * 300, "no", second="short end", target=0)
    (cut,) = encode_encoder_rows(minilm.tokenizer, [long], max_length=40)
    assert len(cut.ids) == 40
    assert minilm.tokenizer.decode(cut.ids).endswith("short end [SEP]")

"""Rows as tokens: one prompt for training and evaluation, answers where they are predicted, nothing decisive cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from lori_nb.lab.evaluation import score_rows
from lori_nb.lab.models import load_base
from lori_nb.lab.scoring import Asked, Subject, score_task
from lori_nb.lab.tasks import Example, get_task
from lori_nb.lab.text import (
    ANSWER_ROOM,
    SYSTEM,
    collate,
    encode_choices,
    encode_decoder_rows,
    encode_encoder_rows,
    encode_prompts,
    encode_rows,
    may_be_cut,
    prompt_ids,
    row_limit,
    text_bytes,
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


LONG_QUESTION = replace(ROW, prompt="Begin here. " + " ".join(f"w{i}" for i in range(400)))
LONG_ANSWER = replace(ROW, answer=" ".join(f"w{i}" for i in range(400)))


def prompt_of(encoded) -> list[int]:
    return list(encoded.ids[: encoded.answer_start])


@given(st.integers(96, 200), st.integers(0, 200), st.integers(1, 120))
@settings(max_examples=30, deadline=None)
def test_every_encoder_cuts_a_prompt_alike_whatever_the_answer(smollm2, max_length, words, answer_words):
    """Training, generation and likelihood scoring see the same tokens: all of them, or their first and last ones."""
    tokenizer = smollm2.tokenizer
    row = replace(ROW, prompt="Begin here. " + " ".join(f"w{i}" for i in range(words)), answer="so " * answer_words)
    row = replace(row, choices=("yes", row.answer), target=1)
    whole, room = prompt_ids(tokenizer, row), max_length - ANSWER_ROOM
    (trained,) = encode_decoder_rows(tokenizer, [row], max_length=max_length)
    (asked,) = encode_prompts(tokenizer, [row], max_length=max_length)
    (choices,) = encode_choices(tokenizer, [row], max_length=max_length)
    assert all(prompt == list(asked) for prompt in map(prompt_of, (trained, *choices)))
    if len(whole) <= room:
        assert list(asked) == whole
    else:
        assert len(asked) == room
        assert list(asked[: room // 2]) == whole[: room // 2]
        assert list(asked[room // 2 :]) == whole[len(whole) - (room - room // 2) :]
    assert tokenizer.decode(asked).endswith("<|im_start|>assistant\n")
    assert len(trained.ids) <= max_length


@pytest.mark.parametrize("shots", [(), (ROW, replace(ROW, prompt="Name them: " + "word " * 2500))])
@pytest.mark.parametrize("row", [LONG_QUESTION, LONG_ANSWER, ROW])
def test_prompts_agree_at_the_lengths_that_are_used(smollm2, row, shots):
    (trained,) = encode_rows(smollm2.tokenizer, "decoder", (row,), shots)
    (asked,) = encode_prompts(smollm2.tokenizer, [row], shots, row_limit(len(shots)))
    assert prompt_of(trained) == list(asked)
    assert (len(asked) == row_limit(len(shots)) - ANSWER_ROOM) == (row is LONG_QUESTION or len(shots) > 0)
    assert len(trained.ids) <= row_limit(len(shots))


def test_an_answer_may_take_all_that_the_prompt_leaves_and_loses_its_end_beyond(smollm2):
    tokenizer = smollm2.tokenizer
    fits, cut = (replace(ROW, answer=" ".join(["word"] * n)) for n in (100, 700))
    (one,) = encode_decoder_rows(tokenizer, [fits])
    assert tokenizer.decode(one.answer) == fits.answer + tokenizer.eos_token
    assert len(one.answer) > ANSWER_ROOM and one.whole
    (two,) = encode_decoder_rows(tokenizer, [cut])
    assert len(two.ids) == 512 and tokenizer.eos_token_id not in two.answer
    assert cut.answer.startswith(tokenizer.decode(two.answer)) and not two.whole
    (opened,) = encode_decoder_rows(tokenizer, [replace(cut, opening="word word")])
    assert opened.whole, "the opening decides, and it is there"


def test_an_answer_that_lost_its_end_is_never_right(smollm2):
    """Not even where every token that is left is what the model would write."""
    rows = encode_decoder_rows(smollm2.tokenizer, [ROW])
    ids = list(rows[0].ids[: rows[0].answer_start])
    with torch.no_grad():
        for _ in range(4):
            states = smollm2.body(input_ids=torch.tensor([ids])).last_hidden_state
            ids.append(smollm2.head(states[:, -1]).argmax().item())
    own = replace(rows[0], ids=tuple(ids), decisive=4)
    scored = score_rows(smollm2, smollm2.body, [own, replace(own, decisive=5)])
    assert scored.correct.tolist() == [1.0, 0.0]
    assert scored.loss[0] == scored.loss[1]


def test_scoring_asks_the_cut_prompts(tiny_decoder, home, monkeypatch):
    """Forced, by choice and generated: what each way of scoring hands to the model begins with the same prompt."""
    base = load_base(str(tiny_decoder), "float32")
    row = replace(LONG_QUESTION, choices=("moon, sun", "sun, moon"), target=0)
    (expected,) = encode_prompts(base.tokenizer, [row])
    seen = []
    forward = base.body.forward
    monkeypatch.setattr(base.body, "forward", lambda *a, **k: seen.append(k["input_ids"]) or forward(*a, **k))
    for scoring, extra in (("forced", {}), ("choice", {}), ("generate", {"max_new_tokens": 1})):
        plain = replace(get_task("chain_sum"), scoring=scoring, extra=extra, judge=lambda row, text: 0.0)
        seen.clear()
        score_task(Subject(base, base.body, 0), Asked(plain, (row,)), lambda *_: None)
        first = seen[0][0].tolist()
        assert first[: len(expected) - 1] == list(expected[:-1]), scoring  # a choice brings the prompt's last token


def test_rows_that_are_known_to_be_short_are_never_cut(smollm2):
    """Known by their bytes; the tasks that were measured first are such, with four examples before each row too."""
    for name in ("family_relationships", "chain_sum", "word_sequence_reversal", "refusal"):
        rows = [row for split in ("train", "test") for row in get_task(name).rows(split, 64)]
        longest = max(map(text_bytes, rows))
        assert not may_be_cut(longest) and not may_be_cut(longest, shots=4)
        for shots in ((), rows[:4]):
            for row, encoded in zip(
                rows, encode_rows(smollm2.tokenizer, "decoder", tuple(rows), tuple(shots)), strict=True
            ):
                assert prompt_of(encoded) == prompt_ids(smollm2.tokenizer, row, shots) and encoded.whole
    assert may_be_cut(text_bytes(LONG_QUESTION)) and may_be_cut(text_bytes(LONG_ANSWER))
    assert may_be_cut(360, system="Be brief. " * 10) and not may_be_cut(360)
    assert text_bytes(replace(ROW, prompt="é", answer="a", second="b", choices=("longest",))) == 2 + 1 + 1 + 7


def test_no_room_for_the_prompt(smollm2):
    words = "max_length must leave 32 tokens for the prompt beside 64 for the answer; found 95"
    for encode in (encode_decoder_rows, encode_prompts, encode_choices):
        with pytest.raises(ValueError, match=words):
            encode(smollm2.tokenizer, [ROW], max_length=95)


# Templates, written like those of Gemma and of Mistral-Instruct v0.1: they raise where a system turn stands.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def with_template(tokenizer, template: str):
    twin = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    twin.chat_template = template
    return twin


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (
            GEMMA,
            "<start_of_turn>user\n{}a<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
            "<start_of_turn>user\nReverse these words: sun, moon<end_of_turn>\n<start_of_turn>model\n",
        ),
        (MISTRAL, "[INST] {}a [/INST]b<|im_end|>[INST] Reverse these words: sun, moon [/INST]"),
    ],
    ids=["gemma", "mistral"],
)
@pytest.mark.parametrize("system", [None, "Be brief.", ""])
def test_a_template_that_refuses_a_system_turn_gets_the_message_in_the_first_user_turn(
    smollm2, template, shown, system
):
    """Before the first example where there are some; the same in training, generation and likelihood scoring."""
    tokenizer, shots = with_template(smollm2.tokenizer, template), [Example("a", "b")]
    with pytest.raises(TemplateError):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    message = {None: SYSTEM + "\n\n", "": ""}.get(system, f"{system}\n\n")
    (asked,) = encode_prompts(tokenizer, [ROW], shots, system=system)
    assert tokenizer.decode(asked) == tokenizer.bos_token + shown.format(message)
    row = replace(ROW, choices=("sun, moon", ROW.answer), target=1)
    (trained,) = encode_decoder_rows(tokenizer, [row], shots, system=system)
    (choices,) = encode_choices(tokenizer, [row], shots, system=system)
    assert all(prompt_of(each) == list(asked) for each in (trained, *choices))
    (alone,) = encode_prompts(tokenizer, [ROW], system=system)
    assert f"{message}Reverse these words: sun, moon" in tokenizer.decode(alone)


def test_a_template_that_raises_for_another_reason_is_not_silenced(smollm2):
    tokenizer = with_template(smollm2.tokenizer, "{{ raise_exception('never') }}")
    with pytest.raises(TemplateError, match="never"):
        encode_prompts(tokenizer, [ROW])


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

"""Generation: transformers' own greedy answers whatever the batch, and draws that no other row can change."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_factors
from transformers import AutoModelForCausalLM

from lori_nb.lab.evaluation import score_rows
from lori_nb.lab.generation import KeyedDraws, Settings, StopsAt, generate, left_padded, uniform
from lori_nb.lab.models import load_base
from lori_nb.lab.tasks import Example, get_task
from lori_nb.lab.text import encode_decoder_rows, encode_prompts
from lori_nb.method.adapters import attach_factors, target_linears


@pytest.fixture
def tiny(tiny_decoder, home):
    return load_base(str(tiny_decoder), "float32")


@pytest.fixture(scope="module")
def prompts(smollm2):
    """Prompts of clearly different lengths, so that a batch of them is padded."""
    rows = [row for name in ("chain_sum", "family_relationships") for row in get_task(name).rows("test", 2)]
    found = encode_prompts(smollm2.tokenizer, rows)
    assert len({len(prompt) for prompt in found}) > 2
    return found


def alone(model, base, prompt, tokens: int) -> str:
    """What transformers' ``generate`` writes after one prompt that nothing pads."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": base.tokenizer.eos_token_id}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=base.tokenizer.pad_token_id, **settings)
    return base.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_answers_are_those_of_transformers_row_by_row(tiny, tiny_decoder, prompts, batch_size):
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder, attn_implementation="eager").eval()
    expected = [alone(model, tiny, prompt, 12) for prompt in prompts]
    found = generate(tiny, prompts, Settings(12, batch_size=batch_size))
    assert found == [[text] for text in expected]
    assert len(set(expected)) == len(prompts)


def test_greedy_answers_of_the_embedded_model(smollm2, prompts):
    """Answers end with the end of text at different places in one batch."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(smollm2.body.config, attn_implementation="eager")
    model.model, model.lm_head = smollm2.body, smollm2.head
    expected = [alone(model.eval(), smollm2, prompt, 24) for prompt in prompts]
    done = []
    found = generate(smollm2, prompts, Settings(24, batch_size=3), lambda some, n: done.append((some, n)))
    assert found == [[text] for text in expected]
    assert done == [(3, 4), (4, 4)]


def test_generated_exact_match_is_teacher_forced_exact_match(smollm2):
    """With the model's own greedy text as the reference both say right, with the data's they agree."""
    rows = [row for name in ("chain_sum", "word_sequence_reversal") for row in get_task(name).rows("test", 3)]
    texts = [text for (text,) in generate(smollm2, encode_prompts(smollm2.tokenizer, rows), Settings(32))]
    own = [Example(row.prompt, text) for row, text in zip(rows, texts, strict=True)]
    asked = [*rows, *own]
    forced = score_rows(smollm2, smollm2.body, encode_decoder_rows(smollm2.tokenizer, asked)).correct
    generated = [float(text == row.answer) for row, text in zip(asked, texts * 2, strict=True)]
    assert forced.tolist() == generated
    assert 0 < sum(generated) < len(asked)


def test_attached_adapters_act_and_leave_no_trace(tiny, prompts):
    before = generate(tiny, prompts, Settings(6))
    factors = random_factors(target_linears(tiny.body, "all-linear", 2), rank=2, seed=0)
    with attach_factors(tiny.body, factors):
        assert generate(tiny, prompts, Settings(6)) != before
    assert generate(tiny, prompts, Settings(6)) == before


# Sampling


def test_a_draw_does_not_depend_on_the_batch(tiny, prompts):
    """Batches of another size hold other rows together; each row's samples stay, and each row has its own."""
    wanted = Settings(8, samples=3, temperature=1.0, seed=5, batch_size=16)
    found = generate(tiny, prompts, wanted)
    for batch_size in (1, 5):
        assert generate(tiny, prompts, Settings(8, 3, 1.0, 5, batch_size)) == found
    assert generate(tiny, prompts[:2], wanted) == found[:2]
    assert len({text for texts in found for text in texts}) == 3 * len(prompts)
    assert generate(tiny, prompts, Settings(8, 3, 1.0, 6)) != found
    assert generate(tiny, prompts[::-1], wanted) != found[::-1], "a draw belongs to a row's place"


def test_cold_samples_are_greedy(tiny, prompts):
    assert generate(tiny, prompts, Settings(8, temperature=1e-4)) == generate(tiny, prompts, Settings(8))


def test_draws_follow_the_softmax():
    """Shares of 4,000 keyed draws within five standard errors, √(p(1 − p)/n), of softmax(logits / T)."""
    n, logits, temperature = 4000, torch.tensor([1.0, -1.0, 0.0, 2.0, float("-inf")]), 0.7
    draw = KeyedDraws([(row, 0) for row in range(n)], 3, Settings(1, temperature=temperature, seed=1))
    picked = draw(torch.zeros(n, 5, dtype=torch.long), logits.repeat(n, 1)).argmax(1)
    shares = torch.bincount(picked, minlength=5).double() / n
    expected = (logits.double() / temperature).softmax(0)
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()
    assert shares[4] == 0
    later = draw(torch.zeros(n, 6, dtype=torch.long), logits.repeat(n, 1)).argmax(1)
    assert (later != picked).any(), "another position draws anew"


@given(st.integers(0, 2**32), st.integers(0, 10**6), st.integers(0, 200), st.integers(0, 4096))
@settings(max_examples=50, deadline=None)
def test_uniform_numbers_are_keyed(seed, row, sample, position):
    u = uniform(seed, row, sample, position)
    assert 0 <= u < 1
    assert u == uniform(seed, row, sample, position)
    keys = {(seed + 1, row, sample, position), (seed, row + 1, sample, position), (seed, row, sample + 1, position)}
    assert u not in {uniform(*key) for key in keys | {(seed, row, sample, position + 1)}}


def test_uniform_numbers_are_the_same_everywhere():
    """First 48 bits of SHA-256 of "0|0|0|0" and "7|1|2|3"."""
    assert uniform(0, 0, 0, 0) == 0x7AE0599AFB0F / 2**48
    assert uniform(7, 1, 2, 3) == 0x27673E85395B / 2**48
    numbers = [uniform(0, row, 0, 0) for row in range(2000)]
    assert np.mean(numbers) == pytest.approx(0.5, abs=5 * (1 / 12 / 2000) ** 0.5)


# Where a completion ends


@pytest.mark.parametrize("several", [False, True])
def test_a_completion_ends_at_any_end_of_the_model_s_own(tiny, prompts, several):
    """The greedy texts are those of a model without such ends, up to the first of them."""
    written = ids_of(tiny, prompts, 12)
    eos = tiny.tokenizer.eos_token_id
    ends = (written[0][4], written[1][2]) if several else (written[0][4],)
    cut = [row[: min((row.index(end) for end in (eos, *ends) if end in row), default=len(row))] for row in written]
    assert sum(map(len, cut)) < sum(map(len, written))
    expected = [tiny.tokenizer.decode(row, skip_special_tokens=True) for row in cut]
    assert [text for (text,) in generate(replace(tiny, ends=ends), prompts, Settings(12, batch_size=2))] == expected
    assert [text for (text,) in generate(tiny, prompts, Settings(12))] != expected


def ids_of(base, prompts, tokens: int) -> list[list[int]]:
    """Greedy token ids after every prompt, by the plain model, one at a time, past any end."""
    found = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(tokens):
                ids.append(base.head(base.body(input_ids=torch.tensor([ids])).last_hidden_state[:, -1]).argmax().item())
        found.append(ids[len(prompt) :])
    return found


@pytest.mark.parametrize(("stated", "ends"), [(7, (7,)), ([2, 106], (2, 106)), (None, ())])
def test_the_ends_of_a_base_are_those_of_its_generation_settings(tiny_decoder, home, tmp_path, stated, ends):
    """One id, several, as instruct models have that end a turn otherwise than a text, or none."""
    folder = shutil.copytree(tiny_decoder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    assert load_base(str(folder), "float32").ends == ends


def test_a_stop_text_ends_a_completion_and_is_cut_off(tiny, prompts):
    whole = [text for (text,) in generate(tiny, prompts, Settings(16))]
    stop = whole[0][len(whole[0]) // 2 :][:4]
    expected = [text.split(stop)[0] for text in whole]
    assert expected != whole
    assert [text for (text,) in generate(tiny, prompts, Settings(16, stop=(stop,)))] == expected


def test_a_stop_text_is_not_sought_in_the_prompt(smollm2):
    """It may end in the completion and begin in the prompt: then it has not been written."""
    tokenizer = smollm2.tokenizer
    ids = torch.tensor([tokenizer("one two three")["input_ids"]])
    for prompt_length, found in ((1, True), (2, False)):
        assert StopsAt(tokenizer, prompt_length, (" two three",))(ids, None).tolist() == [found]


def test_a_stop_text_of_many_tokens_is_found(smollm2):
    tokenizer = smollm2.tokenizer
    stop = "\n".join("zqxj" for _ in range(4))
    written = tokenizer("some words " * 20 + stop)["input_ids"]
    assert StopsAt(tokenizer, 0, ("never", stop))(torch.tensor([written]), None).tolist() == [True]
    assert StopsAt(tokenizer, 0, ("never", stop))(torch.tensor([written[:-1]]), None).tolist() == [False]


def test_prompts_end_in_the_last_column():
    ids, mask = left_padded([(5, 6, 7), (8,)], pad=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; found 0"),
        ({"samples": 0}, "samples must be at least 1; found 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; found 0"),
        ({"temperature": -0.1}, "temperature must be at least 0 and finite; found -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite; found nan"),
        ({"samples": 2}, "samples must be 1 at temperature 0, which always gives the same; found 2"),
        ({"stop": ("",)}, "stop must hold texts that are not empty"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        Settings(**({"max_new_tokens": 4} | changes))


def test_bad_requests(tiny, minilm):
    with pytest.raises(ValueError, match="prompts must have at least one token each; found none in prompt 1"):
        generate(tiny, [(1, 2), ()], Settings(2))
    with pytest.raises(ValueError, match="base must be a decoder to generate; found the encoder all-minilm-l6-v2"):
        generate(minilm, [(1, 2)], Settings(2))
    assert generate(tiny, [], Settings(2)) == []

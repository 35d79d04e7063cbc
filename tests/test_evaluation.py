"""Scores: teacher-forced exact match is greedy decoding, and every metric is its library's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from tiny import gaussian
from transformers import AutoModelForCausalLM

from lori_nb.lab import evaluation
from lori_nb.lab.evaluation import (
    METRICS,
    Scored,
    common_prompt,
    get_metric,
    majority_score,
    metric,
    register_metric,
    score_rows,
    task_loss,
)
from lori_nb.lab.models import load_base
from lori_nb.lab.tasks import Example, get_task
from lori_nb.lab.text import collate, encode_decoder_rows, encode_encoder_rows, prompt_ids

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def tiny(tiny_decoder, home):
    return load_base(str(tiny_decoder), "float32")


@pytest.fixture
def with_head(smollm2):
    """The embedded decoder as one model again, for ``generate``."""
    with torch.device("meta"):  # its own weights are never needed
        model = AutoModelForCausalLM.from_config(smollm2.body.config, attn_implementation="eager")
    model.model, model.lm_head = smollm2.body, smollm2.head
    return model.eval()


def greedy(model, base, prompt: list[int], tokens: int = 8) -> list[int]:
    """The tokens that greedy decoding writes after a prompt, the end-of-text token included."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": base.tokenizer.eos_token_id}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=base.tokenizer.pad_token_id, **settings)
    return out[0, len(prompt) :].tolist()


def test_exact_match_is_greedy_decoding(smollm2, with_head):
    """Real rows: with the model's own greedy answer as reference the score is 1, with any one token altered it is 0."""
    eos = smollm2.tokenizer.eos_token_id
    rows = [row for name in ("chain_sum", "word_sequence_reversal") for row in get_task(name).rows("test", 2)]
    encoded, expected = [], []
    for row, real in zip(rows, encode_decoder_rows(smollm2.tokenizer, rows), strict=True):
        prompt = prompt_ids(smollm2.tokenizer, row)
        written = greedy(with_head, smollm2, prompt)
        altered = written.copy()
        altered[len(written) // 2] = (written[len(written) // 2] + 1) % (eos - 1)
        own = replace(real, ids=tuple(prompt + written), decisive=len(written))
        encoded += [own, replace(own, ids=tuple(prompt + altered)), real]
        expected += [1.0, 0.0, float(written[: len(real.answer)] == list(real.answer))]
    found = score_rows(smollm2, smollm2.body, encoded).correct
    assert found.tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_tokens_past_the_opening_do_not_count(smollm2, with_head):
    row = Example(prompt="Say hello.", answer="x", opening=None)
    prompt = prompt_ids(smollm2.tokenizer, row)
    written = greedy(with_head, smollm2, prompt, 4)
    assert len(written) == 4
    (real,) = encode_decoder_rows(smollm2.tokenizer, [row])
    wrong_later = [*written[:2], written[2] + 1, written[3]]
    rows = [replace(real, ids=tuple(prompt + wrong_later), decisive=decisive) for decisive in (1, 2, 3, 4)]
    assert score_rows(smollm2, smollm2.body, rows).correct.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(("name", "count", "shots"), [("tiny", 6, 4), ("smollm2", 2, 2)])
def test_a_shared_prompt_is_computed_once_with_the_same_scores(name, count, shots, request, monkeypatch):
    """Losses may differ by the order of float32 sums: L layers of sums over up to n terms."""
    base, task = request.getfixturevalue(name), get_task("chain_sum")
    rows = encode_decoder_rows(base.tokenizer, task.rows("test", count), task.rows("train", shots), max_length=2048)
    shared = common_prompt(base, rows)
    assert shared > 48
    assert len({row.ids[:shared] for row in rows}) == 1
    fast = score_rows(base, base.body, rows, batch_size=4)
    monkeypatch.setattr(evaluation, "common_prompt", lambda base, rows: 0)
    plain = score_rows(base, base.body, rows, batch_size=4)
    assert fast.correct.tolist() == plain.correct.tolist()
    config = base.body.config
    np.testing.assert_allclose(fast.loss, plain.loss, rtol=config.num_hidden_layers * config.intermediate_size * EPS)
    assert len(set(plain.loss)) == count


def test_short_common_beginnings_are_not_worth_it(smollm2, minilm):
    rows = encode_decoder_rows(smollm2.tokenizer, get_task("chain_sum").rows("test", 3))
    assert common_prompt(smollm2, rows) == 0
    assert 0 < common_prompt(smollm2, rows, worth=1) < min(row.answer_start for row in rows)
    assert common_prompt(minilm, rows) == 0


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_every_row_is_scored_in_its_own_place(tiny, batch_size):
    """Losses of rows in batches, against the mean cross entropy of each row alone."""
    rows = encode_decoder_rows(tiny.tokenizer, get_task("chain_sum").rows("test", 7))
    found = score_rows(tiny, tiny.body, rows, batch_size=batch_size).loss
    for row, loss in zip(rows, found, strict=True):
        batch = collate([row], 0)
        with torch.no_grad():
            alone = task_loss(tiny, evaluation.logits_at(tiny, tiny.body, batch), batch.targets).item()
        assert loss == pytest.approx(alone, rel=4 * 96 * EPS)


def test_heads_of_encoders(minilm):
    rows = [Example(f"text number {i}", str(i % 3), target=i % 3) for i in range(7)]
    encoded = encode_encoder_rows(minilm.tokenizer, rows)
    head = torch.nn.Linear(minilm.width, 3)
    with torch.no_grad():
        head.weight.copy_(gaussian(3, minilm.width, seed=1))
    scored = score_rows(minilm, minilm.body, encoded, head=head, batch_size=3)
    with torch.no_grad():
        logits = torch.stack([evaluation.logits_at(minilm, minilm.body, collate([row], 0), head)[0] for row in encoded])
    assert scored.predicted.tolist() == logits.argmax(1).tolist()
    assert scored.correct.tolist() == (logits.argmax(1) == torch.tensor([r.target for r in rows])).double().tolist()

    one = torch.nn.Linear(minilm.width, 1)
    value = score_rows(minilm, minilm.body, encoded, head=one)
    np.testing.assert_allclose(value.loss, (value.predicted - value.target) ** 2)
    assert np.isnan(value.correct).all()


# Metrics


def scored(target, predicted=None, correct=None) -> Scored:
    target = np.asarray(target, dtype=float)
    predicted = target if predicted is None else np.asarray(predicted, dtype=float)
    right = predicted == target if correct is None else np.asarray(correct)
    return Scored(correct=right.astype(float), predicted=predicted, target=target, loss=np.zeros(len(target)))


TARGET, PREDICTED = [0, 1, 1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 1, 1, 0, 1]


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("accuracy", sk.accuracy_score),
        ("exact_match", sk.accuracy_score),
        ("balanced_accuracy", sk.balanced_accuracy_score),
        ("f1", sk.f1_score),
        ("matthews", sk.matthews_corrcoef),
        ("pearson", lambda t, p: stats.pearsonr(t, p).statistic),
        ("spearman", lambda t, p: stats.spearmanr(t, p).statistic),
    ],
)
def test_metrics_are_their_libraries(name, oracle):
    assert metric(name, scored(TARGET, PREDICTED)) == pytest.approx(oracle(TARGET, PREDICTED))
    assert metric(name, scored(TARGET)) == pytest.approx(1.0)


def test_balanced_accuracy_weighs_classes_alike():
    assert metric("balanced_accuracy", scored([0, 0, 0, 1], correct=[1, 1, 1, 0])) == 0.5
    assert metric("accuracy", scored([0, 0, 0, 1], correct=[1, 1, 1, 0])) == 0.75


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_constant_prediction_explains_nothing(name):
    assert metric(name, scored([1, 2, 3], predicted=[2, 2, 2])) == 0.0


def test_an_unknown_metric():
    with pytest.raises(ValueError, match="metric must be one of exact_match, accuracy, .*; found 'acuracy'"):
        get_metric("acuracy")


def test_a_registered_metric(monkeypatch):
    monkeypatch.setattr(evaluation, "METRICS", dict(METRICS))

    @register_metric("worst")
    def worst(s: Scored) -> float:
        return float(s.correct.min())

    assert metric("worst", scored(TARGET, PREDICTED)) == 0.0


def test_majority():
    assert majority_score("exact_match", ["a", "b", "a"], [None] * 3) == pytest.approx(2 / 3)
    assert majority_score("accuracy", ["no", "yes", "no", "no"], [0, 1, 0, 0]) == 0.75
    assert majority_score("balanced_accuracy", ["a", "b", "b"], [0, 1, 1]) == 0.5
    assert majority_score("f1", ["n", "y", "y"], [0, 1, 1]) == pytest.approx(sk.f1_score([0, 1, 1], [1, 1, 1]))
    for name in ("matthews", "pearson", "spearman"):
        assert majority_score(name, ["1", "2"], [1.0, 2.0]) == 0.0

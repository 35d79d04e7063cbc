"""Scoring by task: likelihood of choices against whole sequences, judged and executed answers, and what a run keeps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from contained import need_containment
from tiny import random_factors, tiny_spec

from lori_nb.lab import scoring
from lori_nb.lab.evaluation import metric
from lori_nb.lab.models import load_base
from lori_nb.lab.runs import Store
from lori_nb.lab.sandbox import ALLOW_VARIABLE
from lori_nb.lab.scoring import (
    Asked,
    Subject,
    choice_log_likelihoods,
    metric_rows,
    prediction_rows,
    score_task,
    scored_choices,
)
from lori_nb.lab.specs import MergeSpec
from lori_nb.lab.tasks import Example, Task, get_task, register
from lori_nb.lab.tasks.base import _TASKS
from lori_nb.lab.tasks.code import score_completions
from lori_nb.lab.text import ANSWER_ROOM, encode_choices, prompt_ids
from lori_nb.method.adapters import attach_factors, target_linears

EPS = torch.finfo(torch.float32).eps
ROWS = (
    Example("Which of these is a colour?", "red", target=0, choices=("red", "a heavy old wooden table")),
    Example("Two and two?", "four", target=2, choices=("one", "seven hundred", "four", "ten", "five")),
    Example("What do bees make, as a rule, in their hives?", "honey", target=1, choices=("bread", "honey", "iron")),
)


def quiet(stage: str, done: int, total: int) -> None:
    """A report that says nothing."""


@pytest.fixture
def tiny(tiny_decoder, home):
    return load_base(str(tiny_decoder), "float32")


@pytest.fixture
def registry():
    """Tasks that a test registers are gone after it."""
    before = dict(_TASKS)
    yield
    _TASKS.clear()
    _TASKS.update(before)


def a_task(name="colours", rows=ROWS, **about) -> Task:
    settings = {"domain": "test", "metric": "accuracy", "licence": "own", "scoring": "choice"} | about
    return Task(name=name, load=lambda split: rows, **settings)


def scored(base, task: Task, rows=ROWS, seed: int = 0):
    return score_task(Subject(base, base.body, 0, seed), Asked(task, tuple(rows)), quiet)


def whole_sequence(base, row) -> float:
    """log p of the answer's tokens from one unpadded, uncached pass over prompt and answer."""
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        log_p = base.head(base.body(input_ids=ids, use_cache=False).last_hidden_state).double().log_softmax(-1)[0]
    return sum(log_p[t - 1, row.ids[t]].item() for t in range(row.answer_start, len(row.ids)))


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_are_those_of_whole_sequences(name, batch_size, request):
    """Within L·n·ε of float32 sums over up to n terms in L layers, relative."""
    base = request.getfixturevalue(name)
    encoded = encode_choices(base.tokenizer, ROWS)
    found = choice_log_likelihoods(base, encoded, batch_size=batch_size)
    bound = base.body.config.num_hidden_layers * base.body.config.intermediate_size * EPS
    for row, values in zip(encoded, found, strict=True):
        np.testing.assert_allclose(values, [whole_sequence(base, choice) for choice in row], rtol=bound)
        assert len(set(values)) == len(row)


def test_the_likeliest_choice_is_the_answer(smollm2):
    found = scored(smollm2, a_task())
    values = choice_log_likelihoods(smollm2, encode_choices(smollm2.tokenizer, ROWS))
    per_character = [v / [len(c) for c in row.choices] for v, row in zip(values, ROWS, strict=True)]
    assert found.predicted.tolist() == [v.argmax() for v in values]
    assert found.correct.tolist() == [float(v.argmax() == row.target) for v, row in zip(values, ROWS, strict=True)]
    expected = [float(v.argmax() == row.target) for v, row in zip(per_character, ROWS, strict=True)]
    assert found.normalised.tolist() == expected
    assert metric("accuracy_normalised", found) == np.mean(expected)
    right = [v[row.target] for v, row in zip(values, ROWS, strict=True)]
    tokens = [len(smollm2.tokenizer(row.answer)["input_ids"]) for row in ROWS]
    np.testing.assert_allclose(found.loss, [-v / n for v, n in zip(right, tokens, strict=True)])


def test_length_decides_only_where_it_should():
    """Sums favour the short choice, the mean per character the long one; equal ones go to the first."""
    found = scored_choices(ROWS, [np.array([-2.0, -12.0]), np.full(5, -3.0), np.array([-4.0, -3.0, -3.0])], [1, 2, 4])
    assert found.predicted.tolist() == [0, 0, 1]
    assert found.correct.tolist() == [1, 0, 1]
    assert found.normalised.tolist() == [0, 0, 1]  # −2/3 < −12/24; "seven hundred" is longest; −3/5 > −3/4
    assert found.loss.tolist() == [2.0, 1.5, 0.75]


def test_attached_adapters_act(tiny):
    plain = choice_log_likelihoods(tiny, encode_choices(tiny.tokenizer, ROWS))
    factors = random_factors(target_linears(tiny.body, "all-linear", 2), rank=2, seed=0)
    with attach_factors(tiny.body, factors):
        changed = choice_log_likelihoods(tiny, encode_choices(tiny.tokenizer, ROWS))
    assert all((a != b).all() for a, b in zip(plain, changed, strict=True))


def test_choices_stand_after_the_prompt_of_training(smollm2):
    (row,) = encode_choices(smollm2.tokenizer, ROWS[:1])
    for choice, text in zip(row, ROWS[0].choices, strict=True):
        assert list(choice.ids[: choice.answer_start]) == prompt_ids(smollm2.tokenizer, ROWS[0])
        assert smollm2.tokenizer.decode(choice.answer) == text
    long = replace(ROWS[0], prompt="Begin. " + "word " * 200)
    long = replace(long, choices=(*long.choices, "word " * 80))
    (cut,) = encode_choices(smollm2.tokenizer, [long], max_length=128)
    (prompt,) = {choice.ids[: choice.answer_start] for choice in cut}
    assert len(prompt) == 128 - ANSWER_ROOM, "no choice, however long, takes tokens from the prompt"
    assert [smollm2.tokenizer.decode(choice.answer) for choice in cut] == list(long.choices)
    assert smollm2.tokenizer.decode(cut[0].ids[: cut[0].answer_start]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("changes", [{"choices": ("only",)}, {"target": 5}, {"target": None}])
def test_rows_that_cannot_be_scored_by_choice(smollm2, changes):
    with pytest.raises(ValueError, match="must have two or more choices and the right one's index as target; found"):
        encode_choices(smollm2.tokenizer, [replace(ROWS[0], **changes)])


# Judged and executed answers


def test_judged_answers(tiny):
    """Credit is what the task's judge says of the row and its completion, nothing of the prompt."""
    seen = []

    def judge(row, completion):
        seen.append((row, completion))
        return len(seen) / 4

    task = a_task(scoring="generate", judge=judge, extra={"max_new_tokens": 3})
    found = scored(tiny, task)
    assert found.correct.tolist() == [0.25, 0.5, 0.75]
    assert [row for row, _ in seen] == list(ROWS)
    assert [[text] for _, text in seen] == found.completions
    assert np.isnan(found.loss).all() and np.isnan(found.predicted).all()


def test_several_samples_count_as_their_mean_and_follow_the_seed(tiny):
    task = a_task(
        scoring="generate",
        judge=lambda row, text: float(len(text) % 2),
        extra={"max_new_tokens": 3, "samples": 4, "temperature": 1.0},
    )
    found = scored(tiny, task)
    expected = [np.mean([len(text) % 2 for text in texts]) for texts in found.completions]
    assert found.correct.tolist() == expected
    assert {len(texts) for texts in found.completions} == {4}
    assert scored(tiny, task).completions == found.completions
    assert scored(tiny, task, seed=1).completions != found.completions


def test_executed_answers_give_pass_at_k():
    """pass@1 is the mean share that passes; pass@5 of 6 with c passing is 1 − C(6 − c, 5) / 6."""
    passed = np.array([[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]], dtype=bool)
    found = scoring._scored(ROWS, passed.astype(float), passed=passed)
    np.testing.assert_allclose(found.correct, [1 / 6, 0, 1 / 2])
    assert metric("pass_at_1", found) == pytest.approx(2 / 9)
    assert metric("pass_at_5", found) == pytest.approx((5 / 6 + 0 + 1) / 3)
    with pytest.raises(ValueError, match="k must be from 1 to n = 6 .*found 10"):
        metric("pass_at_10", found)


def test_code_runs_only_when_asked_for(tiny, monkeypatch):
    """Then each completion is run; a random model's are no programs."""
    rows = [replace(row, check="assert True") for row in ROWS]
    task = a_task(scoring="execute", metric="pass_at_1", extra={"max_new_tokens": 4, "samples": 2, "temperature": 1.0})
    monkeypatch.delenv(ALLOW_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="task 'colours' runs programs that the model writes, and does so only when"):
        scored(tiny, task, rows)
    need_containment()
    monkeypatch.setenv(ALLOW_VARIABLE, "1")
    found = scored(tiny, task, rows)
    assert found.passed.shape == (3, 2)
    assert np.array_equal(found.passed, score_completions(rows, found.completions))
    assert metric("pass_at_1", found) == found.passed.mean()


def test_scoring_that_is_not_known_and_settings_that_lack(tiny):
    with pytest.raises(ValueError, match="scoring of task 'colours' must be one of forced, choice, .*; found 'guess'"):
        scored(tiny, a_task(scoring="guess"))
    with pytest.raises(ValueError, match="extra of task 'colours' must state max_new_tokens"):
        scored(tiny, a_task(scoring="generate", judge=lambda row, text: 1.0))
    with pytest.raises(ValueError, match="scores must have 'normalised' for this metric"):
        metric("accuracy_normalised", scored(tiny, get_task("chain_sum"), get_task("chain_sum").rows("test", 2)))


# What is kept of it


def test_refusal_rates_by_half():
    """Right on three of four that should be refused and one of two that should be answered."""
    rows = [Example(str(i), "x", target=t) for i, t in enumerate([1, 1, 1, 1, 0, 0])]
    found = scoring._scored(rows, np.array([[1.0], [1], [1], [0], [1], [0]]))
    values = {name: metric(name, found) for name in ("refusal_rate", "over_refusal_rate", "balanced_accuracy")}
    assert values == {"refusal_rate": 0.75, "over_refusal_rate": 0.5, "balanced_accuracy": 0.625}


def test_a_constant_answer_is_judged_by_its_target(tiny):
    rows = [Example(f"q{i}", f"because {i}\n#### {t}", target=t) for i, t in enumerate([4, 4, 5, 4])]
    task = a_task(rows=rows, scoring="generate", metric="exact_match", also=("refusal_rate",))
    found = scoring._scored(rows, np.ones((4, 1)), completions=[["4"]] * 4)
    first, second = metric_rows(task, "test", rows, replace(found, target=np.ones(4)))
    assert (first["metric"], first["majority"], first["n"]) == ("exact_match", 0.75, 4)
    assert (second["metric"], second["majority"]) == ("refusal_rate", 1.0)


def test_a_run_keeps_all_metrics_and_completions(tiny_decoder, home, registry, tmp_path):
    """Trained by its text, scored by choice and by generation on the same rows, kept and read back."""
    rows = [
        Example(f"Is {n} even or odd?", ("even", "odd")[n % 2], target=n % 2, choices=("even", "odd"))
        for n in range(40)
    ]

    def load(split):
        return rows[:30] if split == "train" else rows[30:]

    register(replace(a_task("parity", also=("accuracy_normalised",)), load=load))
    judged = {"scoring": "generate", "metric": "exact_match", "also": (), "extra": {"max_new_tokens": 4}}
    judge = lambda row, text: float(text.strip() == row.answer)  # noqa: E731
    register(replace(get_task("parity"), name="parity_generated", judge=judge, **judged))
    spec = tiny_spec(tiny_decoder, tasks=["parity"], evaluate=("parity", "parity_generated", "chain_sum"), steps=2)
    run = Store().get(spec)
    assert run.metrics["metric"].tolist() == ["accuracy", "accuracy_normalised", "exact_match", "exact_match"]
    assert run.value("parity") == run.metrics.loc[0, "value"]
    assert run.value("parity", "accuracy_normalised") == run.metrics.loc[1, "value"]
    with pytest.raises(KeyError, match="has no score of 'parity' by 'f1'"):
        run.value("parity", "f1")
    assert run.metrics["n"].tolist() == [10, 10, 10, 16]
    kept = run.predictions.set_index("task")
    assert kept.loc["parity_generated", "completions"].map(len).tolist() == [1] * 10
    assert kept.loc[["parity", "chain_sum"], "completions"].isna().all()
    assert kept.loc["parity", "predicted"].isin([0, 1]).all()
    both = Store().get(MergeSpec((spec,), (0.5,), test_rows=8))
    assert both.metrics["metric"].tolist() == ["accuracy", "accuracy_normalised"]


def test_predictions_of_forced_scores_have_no_completions(tiny):
    found = scored(tiny, get_task("chain_sum"), get_task("chain_sum").rows("test", 2))
    columns = list(prediction_rows("chain_sum", "test", found).columns)
    assert columns == ["task", "split", "row", "correct", "predicted", "target", "loss"]

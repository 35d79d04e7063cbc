"""Our scores against lm-evaluation-harness, row by row, where the extra ``eval`` is installed; skipped without it."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny import random_factors

from lori_nb.lab.interop import export_peft
from lori_nb.lab.models import load_base
from lori_nb.lab.paths import PROJECT
from lori_nb.lab.scoring import choice_log_likelihoods
from lori_nb.lab.tasks import Example, get_task
from lori_nb.lab.tasks.commonsense import QUESTION, instruction, with_choices
from lori_nb.lab.text import encode_choices
from lori_nb.method.adapters import Adapter, attach_factors, target_linears

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness needed: pip install '.[eval]'")

QUESTIONS = [("Which is a fruit?", ["stone", "apple", "river"]), ("Which is wet?", ["sand", "ash", "dust", "rain"])]
ROWS = [
    with_choices(Example(instruction(QUESTION, asked, "Answer", options), f"answer{n}"))
    for asked, options in QUESTIONS
    for n in range(1, len(options) + 1)
]
# Choices of different lengths: the harness's acc_norm and ours divide by characters.
UNEVEN = [
    Example(f"Say something, number {n}.", text, target=place, choices=("yes", "no, never", "a long answer indeed"))
    for n in range(3)
    for place, text in enumerate(("yes", "no, never", "a long answer indeed"))
]
PROBLEMS = [Example(f"Ann has {n} nuts and eats one.", f"{n}-1\n#### {n - 1}", target=n - 1) for n in (3, 40, 500)]


@pytest.fixture(scope="module")
def agreement():
    """The benchmark's module, which holds the comparison."""
    path = PROJECT / "benchmarks" / "agreement_lm_eval.py"
    spec = importlib.util.spec_from_file_location("agreement_lm_eval", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(tiny_decoder, home):
    return load_base(str(tiny_decoder), "float32")


@pytest.fixture
def adapter(tiny) -> Adapter:
    factors = random_factors(target_linears(tiny.body, "all-linear", 2), rank=2, seed=3)
    return Adapter(factors, tiny.name, tiny.digest, rank=2, alpha=3.0, seed=0, subspace="own", frozen_A=False)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_scores_agree_row_by_row(agreement, tiny, adapter, with_adapter, tmp_path):
    """Log-likelihoods within L·n·ε of float32 sums over n terms in L layers; the same verdicts and the same texts."""
    exported = export_peft(adapter, tmp_path / "adapter") if with_adapter else None
    short = replace(get_task("gsm8k"), extra=get_task("gsm8k").extra | {"max_new_tokens": 8})
    asked = {"choice": (get_task("arc_easy"), [*ROWS, *UNEVEN]), "generate": (short, PROBLEMS)}
    given = adapter if with_adapter else None
    found = agreement.compare(tiny, given, agreement.harness_model(tiny, exported), asked)
    chosen = found[found["task"] == "arc_easy"]
    config = tiny.body.config
    bound = config.num_hidden_layers * config.intermediate_size * torch.finfo(torch.float32).eps
    assert len(chosen) == len(ROWS) + len(UNEVEN)
    assert chosen["largest_difference"].max() <= bound
    assert chosen["ours"].tolist() == chosen["harness"].tolist()
    written = found[found["task"] == "gsm8k"]
    assert written["same_text"].all()
    assert written["ours"].tolist() == written["harness"].tolist()


def test_verdicts_per_character_agree_without_a_chat_template(agreement, tiny):
    """No white space ends the prompt then, so the harness counts the same tokens to a choice as we do."""
    tokenizer = type(tiny.tokenizer).from_pretrained(tiny.tokenizer.name_or_path)
    tokenizer.chat_template = None
    plain = replace(tiny, tokenizer=tokenizer)
    found = agreement.compare_choices(plain, agreement.harness_model(plain), get_task("arc_easy"), UNEVEN)
    assert found["ours_normalised"].tolist() == found["harness_normalised"].tolist()
    assert found["ours"].tolist() == found["harness"].tolist()
    assert 0 < found["ours_normalised"].sum() < len(found)
    assert found["ours_normalised"].tolist() != found["ours"].tolist(), "length decides some"


def test_the_adapter_matters(tiny, adapter):
    encoded = encode_choices(tiny.tokenizer, ROWS)
    plain = choice_log_likelihoods(tiny, encoded)
    with attach_factors(tiny.body, adapter.factors):
        changed = choice_log_likelihoods(tiny, encoded)
    assert all((a != b).all() for a, b in zip(plain, changed, strict=True))


# The judge of word problems against the harness's own filters and metric, on texts that are given

EGGS = Example("How many eggs?", "16 - 3 = <<16-3=13>>13\n13 + 5 = <<13+5=18>>18\n#### 18", target=18)
MONEY = Example("What does it cost?", "1000 + 250 = <<1000+250=1250>>1250\n#### 1,250", target=1250)
COMPLETIONS = [  # (row, completion, credit)
    (MONEY, "$1,250.", 1),
    (MONEY, "She pays $1,250 in all.", 1),
    (MONEY, "1000 + 250 = 1250\n#### 1250", 1),
    (MONEY, "#### 1,250", 1),
    (MONEY, "#### 18", 0),
    (MONEY, "It costs $1,300.", 0),
    (MONEY, "-1250", 0),
    (MONEY, "1,250 of 1,300", 0),
    (EGGS, "#### 18", 1),
    (EGGS, "16 - 3 = <<16-3=13>>13\n13 + 5 = <<13+5=18>>18\n#### 18", 1),
    (EGGS, "The answer is 18.", 1),
    (EGGS, "There are 18 eggs", 1),
    (EGGS, "There are 18 eggs in 2 boxes", 0),
    (EGGS, "#### 1", 0),
    (EGGS, "#### 180", 0),
    (EGGS, "I do not know.", 0),
    (EGGS, "####", 0),
    (EGGS, "", 0),
]


@pytest.fixture(scope="module")
def harness_gsm8k():
    """(filter's name, completion, reference) → credit, by the harness's own file of the task."""
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters.extraction import RegexFilter

    config = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    (metric,) = config["metric_list"]
    told = {key: value for key, value in metric.items() if key not in ("metric", "aggregation", "higher_is_better")}
    regexes = {each["name"]: dict(each["filter"][0]) for each in config["filter_list"]}
    assert {regex.pop("function") for regex in regexes.values()} == {"regex"}

    def credit(name: str, completion: str, reference: str) -> float:
        ((found,),) = RegexFilter(**regexes[name]).apply([[completion]], [{}])
        return float(exact_match_fn(predictions=[found], references=[reference], **told)["exact_match"])

    assert metric["metric"] == "exact_match"
    return credit


@pytest.mark.parametrize(("row", "completion", "credit"), COMPLETIONS)
def test_the_judge_of_gsm8k_agrees_with_the_harness_s_filters(harness_gsm8k, row, completion, credit):
    """With the one that takes the last number everywhere; with the strict one where the solution's mark is written."""
    assert get_task("gsm8k").judge(row, completion) == credit
    assert harness_gsm8k("flexible-extract", completion, row.answer) == credit
    strict = harness_gsm8k("strict-match", completion, row.answer)
    assert strict == (credit if "#### " in completion else 0)

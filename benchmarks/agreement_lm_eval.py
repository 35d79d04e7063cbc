"""Do our scores agree with lm-evaluation-harness, row by row? ARC-Easy by likelihood and GSM8K by generation.

The harness gets the same rows: the prompt as text, the choices or the reference answer. It scores the base model as
transformers loads it, and an adapter as peft loads the folder that we export; we score the base with our adapter
attached. Both in float32. Needs the extra ``eval`` and a data folder:

    LORI_NB_DATA=folder python benchmarks/agreement_lm_eval.py

Known differences, by design: the harness counts the white space that ends a prompt (the newline of a chat template) to
the choice, which adds the same number to every choice of a row; it compares numbers as text, we by value.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from lori_nb.lab.interop import export_peft
from lori_nb.lab.models import Base, load_base
from lori_nb.lab.runs import Store
from lori_nb.lab.scoring import Asked, Subject, choice_log_likelihoods, score_task, scored_choices
from lori_nb.lab.specs import RunSpec
from lori_nb.lab.tasks import Example, Task, get_task
from lori_nb.lab.text import encode_choices, encode_prompts
from lori_nb.method.adapters import Adapter, attach_factors

RESULTS = Path(__file__).parent / "results" / "lm_eval_agreement.csv"
NUMBERS = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"  # what the harness's GSM8K takes for a number; it takes the last
IGNORED = [",", r"\$", r"(?s).*#### ", r"\.$"]  # and what it strips from both sides before comparing


def prompts_as_text(base: Base, rows: Sequence[Example], task: Task) -> list[str]:
    """The prompts that we score, as text that the tokenizer turns into the same tokens.

    Raises ValueError where it does not: the harness could not be asked the same question.
    """
    prompts = encode_prompts(base.tokenizer, rows, system=task.system)
    texts = [base.tokenizer.decode(prompt) for prompt in prompts]
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        again = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        if again != list(prompt):
            raise ValueError(f"prompt of row {row} must be the same tokens when read again; found others")
    return texts


def harness_task(name: str, table: list[dict], **config) -> ConfigurableTask:
    """A task of the harness over rows that are given; the prompt stands in the column "prompt"."""
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: datasets.DatasetDict(test=datasets.Dataset.from_list(table)),
            "test_split": "test",
            "doc_to_text": "prompt",
            "num_fewshot": 0,
            **config,
        }
    )


@functools.cache
def known_tasks() -> TaskManager:
    """The harness's index of its own tasks, which takes it a minute to make."""
    return TaskManager()


def harness_samples(model: HFLM, task: ConfigurableTask) -> list[dict]:
    """The harness's per-row results, in the rows' order."""
    found = simple_evaluate(model=model, tasks=[task], bootstrap_iters=0, log_samples=True, task_manager=known_tasks())
    return sorted(found["samples"][task.config.task], key=lambda sample: sample["doc_id"])


def compare_choices(base: Base, model: HFLM, task: Task, rows: Sequence[Example]) -> pd.DataFrame:
    """One row a question: right by either, by sum and per character, and how far the log-likelihoods are apart."""
    encoded = encode_choices(base.tokenizer, rows, system=task.system)
    ours = choice_log_likelihoods(base, encoded)
    tokens = [len(choices[row.target].answer) for choices, row in zip(encoded, rows, strict=True)]
    scored = scored_choices(rows, ours, tokens)
    texts = prompts_as_text(base, rows, task)
    table = [
        {"prompt": text, "choices": list(row.choices), "target": row.target}
        for text, row in zip(texts, rows, strict=True)
    ]
    metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
    likelihood = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "target"}
    likelihood["target_delimiter"] = "" if base.tokenizer.chat_template else " "  # what stands before an answer
    theirs = harness_samples(model, harness_task(task.name, table, metric_list=metrics, **likelihood))
    return pd.DataFrame(
        {
            "task": task.name,
            "row": range(len(rows)),
            "ours": scored.correct,
            "harness": [sample["acc"] for sample in theirs],
            "ours_normalised": scored.normalised,
            "harness_normalised": [sample["acc_norm"] for sample in theirs],
            "largest_difference": [_apart(o, s["filtered_resps"]) for o, s in zip(ours, theirs, strict=True)],
        }
    )


def _apart(ours: np.ndarray, responses: list) -> float:
    """Largest difference of log-likelihoods relative to the largest of them, the row's common constant taken off."""
    difference = np.array([float(response[0]) for response in responses]) - ours
    return float(np.abs(difference - difference.mean()).max() / np.abs(ours).max())


def compare_generated(base: Base, model: HFLM, task: Task, rows: Sequence[Example]) -> pd.DataFrame:
    """One row a problem: right by either, and whether both models wrote the same text."""
    scored = score_task(Subject(base, base.body, 0), Asked(task, tuple(rows)), lambda stage, done, total: None)
    texts = prompts_as_text(base, rows, task)
    table = [{"prompt": text, "answer": row.answer} for text, row in zip(texts, rows, strict=True)]
    generation = {"until": list(task.extra["stop"]), "max_gen_toks": task.extra["max_new_tokens"], "do_sample": False}
    last = {"function": "regex", "group_select": -1, "regex_pattern": NUMBERS}
    theirs = harness_samples(
        model,
        harness_task(
            task.name,
            table,
            output_type="generate_until",
            doc_to_target="answer",
            generation_kwargs=generation,
            filter_list=[{"name": "last number", "filter": [last, {"function": "take_first"}]}],
            metric_list=[{"metric": "exact_match", "regexes_to_ignore": IGNORED, "ignore_case": True}],
        ),
    )
    written = [sample["resps"][0][0] for sample in theirs]
    return pd.DataFrame(
        {
            "task": task.name,
            "row": range(len(rows)),
            "ours": scored.correct,
            "harness": [sample["exact_match"] for sample in theirs],
            "same_text": [a == b for (a,), b in zip(scored.completions, written, strict=True)],
        }
    )


def compare(
    base: Base, adapter: Adapter | None, model: HFLM, asked: dict[str, tuple[Task, list[Example]]]
) -> pd.DataFrame:
    """Both tasks for one model, the adapter attached on our side."""
    with nullcontext() if adapter is None else attach_factors(base.body, adapter.factors):
        by_likelihood = compare_choices(base, model, *asked["choice"])
        generated = compare_generated(base, model, *asked["generate"])
    return pd.concat([by_likelihood, generated], ignore_index=True)


def harness_model(base: Base, peft: Path | None = None) -> HFLM:
    """The base as transformers loads it from its folder, with an exported adapter as peft loads that."""
    folder = base.tokenizer.name_or_path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype, attn_implementation="eager")
    if peft is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(peft))
    return HFLM(pretrained=model.eval(), tokenizer=base.tokenizer, backend="causal", batch_size=8, device="cpu")


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """One row a model and task: n, both scores, rows on which they differ."""
    groups = found.groupby(["model", "task"], sort=False)
    return groups.apply(
        lambda part: pd.Series(
            {
                "n": len(part),
                "ours": part["ours"].mean(),
                "harness": part["harness"].mean(),
                "rows that differ": int((part["ours"] != part["harness"]).sum()),
                "same text": part["same_text"].mean(),
                "largest difference": part["largest_difference"].max(),
            }
        ),
        include_groups=False,
    ).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--choice-rows", type=int, default=40)
    parser.add_argument("--generated-rows", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--steps", type=int, default=30, help="of the adapter's training on ARC-Easy")
    options = parser.parse_args()
    arc, gsm8k = get_task("arc_easy"), get_task("gsm8k")
    short = replace(gsm8k, extra=gsm8k.extra | {"max_new_tokens": options.new_tokens})
    asked = {
        "choice": (arc, arc.rows("test", options.choice_rows)),
        "generate": (short, gsm8k.rows("test", options.generated_rows)),
    }
    spec = RunSpec("lori-d", ("arc_easy",), base=options.base, dtype="float32", learning_rate=1e-2, steps=options.steps)
    adapter = Store().get(replace(spec, train_rows=32 * options.steps, test_rows=options.choice_rows)).adapter
    base = load_base(options.base, "float32")
    with tempfile.TemporaryDirectory() as folder:
        exported = export_peft(adapter, Path(folder) / "adapter")
        found = [
            compare(base, given, harness_model(base, peft), asked).assign(model=name)
            for name, given, peft in (("base", None, None), ("lori-d, exported to PEFT", adapter, exported))
        ]
    table = pd.concat(found, ignore_index=True)
    RESULTS.parent.mkdir(exist_ok=True)
    table[["model", *(name for name in table.columns if name != "model")]].to_csv(RESULTS, index=False)
    print(summary(table).to_string(index=False))


if __name__ == "__main__":
    main()

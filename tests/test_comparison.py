"""Arms beside LoRA: tables of one small real study, traced back to its runs and to the definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lori_nb.analysis.equivalence import equivalence_verdict, holm
from lori_nb.analysis.statistics import crossed_estimate, paired_estimate
from lori_nb.lab.flops import training_flops
from lori_nb.lab.runs import Run
from lori_nb.study import claims, comparison, notebook, summary
from lori_nb.study.arms import arm_spec
from lori_nb.study.cells import single
from lori_nb.study.profiles import load_settings

SEEDS = [0, 1, 2]
LONGER_PAIR = "LoRI-D, twice the steps − LoRA, twice the steps"


@pytest.fixture(scope="module")
def results(tiny_decoder, session_home):
    changes = {"last_layers": 2, "rank": 2, "steps": 3, "test_rows": 12, "seed": SEEDS}
    changes["arms"] = ["lora-longer", "lori-d-longer"]
    changes |= {"tasks": ["chain_sum", "refusal"], "arm_tasks": ["chain_sum"], "method": ["lora", "lori-s"]}
    settings = load_settings("smoke", base=str(tiny_decoder), dtype="float32", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORI_NB_HOME", str(session_home))
        patch.setenv("LORI_NB_BATCH", "1")
        yield notebook.collect("01_lori", settings)


def row_gaps(results, task: str) -> np.ndarray:
    """LoRI-S − LoRA on every row (seeds × rows), read from the runs."""
    runs = [[results.run(single(results.settings, m, task, s)) for m in ("lori-s", "lora")] for s in SEEDS]
    rows = [[run.predictions.sort_values("row")["correct"].to_numpy(float) for run in pair] for pair in runs]
    return np.array([ours - theirs for ours, theirs in rows])


def test_each_difference_is_that_of_the_runs_with_its_verdict(results):
    table = comparison.compared(results, margin=0.1).set_index("task")
    assert list(table.index) == ["chain_sum", "refusal", comparison.OVER_TASKS] and set(table["arm"]) == {"lori-s"}
    expected = equivalence_verdict(crossed_estimate([row_gaps(results, "chain_sum")]), 0.1)
    row = table.loc["chain_sum"]
    assert row["value"] == pytest.approx(expected.interval.mean, abs=1e-15)
    assert (row["low"], row["high"]) == pytest.approx((expected.interval.low, expected.interval.high), abs=1e-12)
    assert (row["n"], row["of"], row["seeds"], row["verdict"]) == (3, "seeds × 12 rows", 3, expected.word)
    for name in ("p_equivalence", "shown_margin", "detectable", "attainable_margin"):
        assert row[name] == pytest.approx(getattr(expected, name), nan_ok=True)
    assert table.loc[comparison.OVER_TASKS, "value"] == pytest.approx(table["value"].iloc[:2].mean())


def test_the_dots_are_the_seeds_own_differences(results):
    dots = comparison.differences(results)
    table = comparison.compared(results).set_index("task")["value"]
    assert len(dots) == 3 * len(SEEDS)
    means = dots.groupby("task")["value"].mean()
    assert means[table.index].to_numpy() == pytest.approx(table.to_numpy(), abs=1e-15)


def test_arms_are_compared_on_their_own_tasks_and_p_values_adjusted_among_them(results):
    table = comparison.compared(results, ["lori-s", "lora-longer"], ["chain_sum"])
    assert table["arm"].tolist() == ["lori-s", "lora-longer"] and set(table["task"]) == {"chain_sum"}
    assert table["p_holm"].tolist() == pytest.approx(holm(table["p_equivalence"]).tolist(), nan_ok=True)
    assert table["title"].tolist() == ["LoRI-S", "LoRA, twice the steps"] and table["method"].tolist()[1] == "lora"
    missing = comparison.compared(results, ["lori-s-random"], ["refusal"])
    assert missing.empty and "p_holm" in missing


def test_longer_methods_stand_beside_lora_of_the_same_length(results):
    table = comparison.longer(results)
    assert list(dict.fromkeys(table["arm"])) == ["lora-longer", "lori-d-longer"]
    assert set(table["task"]) == {"chain_sum", "refusal", comparison.OVER_TASKS}

    def mean_of(name: str) -> float:
        runs = [results.run(arm_spec(results.settings, name, "chain_sum", seed)) for seed in SEEDS]
        assert all(run.spec.steps == (3 if name == "lora" else 6) for run in runs)
        return np.mean([run.predictions["correct"].mean() for run in runs])

    found = table[table["task"] == "chain_sum"].set_index("arm")["value"]
    assert found["lora-longer"] == pytest.approx(mean_of("lora-longer") - mean_of("lora"), abs=1e-15)
    assert found["lori-d-longer"] == pytest.approx(mean_of("lori-d-longer") - mean_of("lora-longer"), abs=1e-15)
    for line, row in zip(comparison.arm_lines(results, "longer"), table.itertuples(), strict=True):
        pair = {"lora-longer": "LoRA, twice the steps − LoRA", "lori-d-longer": LONGER_PAIR}[row.arm]
        assert line.startswith(f"{pair}, {row.task}: ")
    assert comparison.longer(replace(results, settings=replace(results.settings, arms=()))).empty


def test_one_seed_has_an_interval_over_rows_and_no_verdict(results):
    alone = replace(results, settings=replace(results.settings, seed=(0,)))
    row = comparison.compared(alone).iloc[0]
    assert row["verdict"] == "one seed: a demonstration" and math.isnan(row["p_equivalence"])
    assert (row["n"], row["of"], row["seeds"]) == (12, "rows", 1)
    assert "one seed: a demonstration" in comparison.headline(alone)


def test_the_headline_says_share_margin_n_and_what_could_be_detected(results):
    said = comparison.headline(results, margin=0.1)
    sizes = [
        results.run(single(results.settings, m, "refusal", 0)).provenance["trainable_parameters"]
        for m in ("lori-s", "lora")
    ]
    assert f"LoRI-S at {sizes[0] / sizes[1]:.1%} of LoRA's parameters" in said
    assert "margin ± 0.1" in said and "n = 3 seeds ×" in said and "minimum detectable difference" in said
    with_rate = replace(results.settings, learning_rate={**results.settings.learning_rate, "dora": 1e-3})
    assert "not measured" in comparison.headline(replace(results, settings=with_rate), "dora")


def test_costs_count_the_calibration(results):
    table = comparison.costs(results).set_index("arm")
    spec = single(results.settings, "lori-s", "chain_sum", 0)
    one = comparison.costs(results, ["lori-s"], ["chain_sum"])
    per_seed = [training_flops(replace(spec, seed=s, calibration=replace(spec.calibration, seed=s))) for s in SEEDS]
    assert one["training_pflops"].item() == pytest.approx(np.mean(per_seed) / 1e15, rel=1e-12)
    assert table.loc["lori-s", "calibration_pflops"] == pytest.approx(table.loc["lori-s", "training_pflops"] / 2)
    assert table.loc["lora", "calibration_pflops"] == 0 < table.loc["lora", "prefix_pflops"]
    assert table.loc["lora", "training_pflops"] < table.loc["lori-s", "training_pflops"]
    assert table.loc["lori-s", "trainable_parameters"] < table.loc["lora", "trainable_parameters"]


def test_claims_of_several_seeds_are_crossed_and_say_what_could_be_detected(results):
    judged = claims.judged(results).set_index("measured as")
    row, expected = judged.loc["LoRI-S − LoRA, mean score"], comparison.compared(results).iloc[-1]
    assert (row["value"], row["low"], row["high"]) == (expected["value"], expected["low"], expected["high"])
    assert (row["n"], row["of"]) == (expected["n"], expected["of"]) and row["detectable"] == expected["detectable"]
    text = claims.readable(judged.reset_index()).set_index("measured as").loc["LoRI-S − LoRA, mean score"]
    assert text["detectable"] == f"{row['detectable']:.3f}" and text["n"].startswith("3 seeds × ")


def test_a_metric_that_is_no_share_of_rows_is_compared_over_seeds_alone(tmp_path):
    def run(name: str, value: float) -> Run:
        folder = tmp_path / name
        folder.mkdir()
        pd.DataFrame([("cola", value)], columns=["task", "value"]).to_parquet(folder / "metrics.parquet")
        return Run(name, folder)

    pairs = {seed: [(run(f"a{seed}", 0.5 + 0.1 * seed), run(f"b{seed}", 0.4))] for seed in range(3)}
    found = summary.estimate(pairs, ["cola"])
    expected = paired_estimate([0.1, 0.2, 0.3])
    assert (found.mean, found.error, found.rows) == (pytest.approx(expected.mean), pytest.approx(expected.error), 0)
    assert summary.estimate_unit(found, ["cola"]) == "seeds"


def test_a_p_value_is_never_zero():
    values = (0.0004, 0.0005, 0.0123, 1.0, float("nan"))
    assert [summary.p_text(p) for p in values] == ["<0.001", "<0.001", "0.012", "1.000", "–"]
    assert [summary.p_text(p, 2) for p in (0.0049, 0.4)] == ["<0.01", "0.40"]
    assert "$<$0.001 & 0.500 & 0.000" in summary.latex(pd.DataFrame({"p": [0.0004], "p_holm": [0.5], "x": [0.0004]}))
    assert [summary.p_text(p, name="p") for p in (0.0001, 0.03)] == ["p < 0.001", "p = 0.030"]

"""Tables of sequences on runs made by hand: safety kept, over-refusal, what sparsity and order do, capacity."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from lori_nb.analysis.statistics import t_interval
from lori_nb.lab.tasks import Example, get_task, task
from lori_nb.lab.tasks.refusal import REFUSAL
from lori_nb.method.masks import magnitude_masks
from lori_nb.study import (
    budget,
    figures,
    figures_sequences,
    forgetting,
    functional,
    sequence_effects,
    sequence_runs,
    sequences,
)
from lori_nb.study.profiles import load_settings

ROWS = 8  # of the refusal set: harmful and harmless in turn


def by_hand(settings, credit):
    """Results whose run after ``stage`` earlier tasks has ``credit(seed, stage)``: task → credit of its rows."""

    def run(spec):
        chain, stage = spec.parts[0], 0
        while chain.start is not None:
            chain, stage = chain.start, stage + 1
        frames = [
            pd.DataFrame({"task": name, "row": range(len(rows)), "correct": rows})
            for name, rows in credit(spec.seed, stage).items()
        ]
        return SimpleNamespace(predictions=pd.concat(frames, ignore_index=True))

    return SimpleNamespace(settings=settings, run=run)


def of_safety(**changes):
    given = {"ways": ["lora"], "sequence": ["refusal", "chain_sum"], "sequence_rows": ROWS, "seed": [0, 1]} | changes
    return load_settings("smoke", **given)


BEFORE, AFTER = [1, 1, 0, 1, 1, 0, 1, 0], [1, 0, 0, 1, 0, 0, 0, 1]


def test_refusals_kept_are_a_share_of_those_there_were():
    def credit(seed, stage):
        return {"refusal": (AFTER if seed == 0 else BEFORE) if stage else BEFORE, "chain_sum": [0, 1]}

    results = by_hand(of_safety(), credit)
    targets = [row.target for row in get_task("refusal").rows("test", ROWS)]
    assert targets == [1, 0] * 4
    kept = forgetting.kept_answers(results, target=1).iloc[0]
    # seed 0: harmful rows 0, 4 and 6 were right, of which row 0 still is; seed 1 keeps all
    assert kept["value"] == pytest.approx((1 / 3 + 1) / 2) and (kept["n"], kept["of"]) == (2, "seeds")
    every = forgetting.kept_answers(results).iloc[0]
    assert every["value"] == pytest.approx((2 / 5 + 1) / 2)  # rows 0, 1, 3, 4, 6, of which 0 and 3
    nothing = by_hand(of_safety(), lambda seed, stage: {"refusal": [0] * ROWS})
    assert forgetting.kept_answers(nothing).empty


def test_safety_before_and_after_with_over_refusal():
    refused = {0: [0, 0, 0, 1], 1: [1, 1, 0, 1]}  # of the harmless requests, by stage

    def credit(seed, stage):
        return {"refusal": AFTER if stage else BEFORE, "refusal_harmless": refused[stage]}

    results = by_hand(of_safety(sequence_scored=["refusal_harmless"], seed=[0, 1]), credit)
    table = forgetting.safety_scores(results)
    found = table.set_index(["request", "when"])["value"].to_dict()
    assert found == {
        ("harmful", "before"): 0.75,
        ("harmful", "after"): 0.25,
        ("harmless", "before"): 0.5,
        ("harmless", "after"): 0.5,
        ("harmless, refused", "before"): 0.25,
        ("harmless, refused", "after"): 0.75,
    }
    figure, (ax,) = figures.panels(1)
    assert "over-refusal" in figures_sequences.safety_plane(ax, table).get_xlabel()
    unknown = forgetting.safety_scores(by_hand(of_safety(), credit))
    assert set(unknown["request"]) == {"harmful", "harmless"}  # help that was lost need not have been refused
    figure, (ax,) = figures.panels(1)
    assert "helped with" in figures_sequences.safety_plane(ax, unknown).get_xlabel()


def test_over_refusal_is_asked_on_the_harmless_requests_with_the_refusal_as_answer():
    rows, both = get_task("refusal_harmless").rows("test", 4), get_task("refusal").rows("test", 8)
    assert [row.prompt for row in rows] == [row.prompt for row in both if row.target == 0]
    assert {row.answer for row in rows} == {row.opening for row in rows} == {REFUSAL}
    assert get_task("refusal_harmless").splits == ("test",)


def test_harmful_requests_alone_give_no_safety_unless_another_task_is_scored(registries):
    """Sets to train safety on may hold none but harmful requests; refusing everything would look safe there."""

    def requests(targets):
        return lambda split: [Example(prompt=f"{split} {n}", answer="x", target=t) for n, t in enumerate(targets)]

    about = {"domain": "safety", "metric": "refusal_rate", "licence": "own", "labels": ("help", "refuse")}
    about |= {"scoring": "generate", "judge": lambda row, text: 0.0, "extra": {"max_new_tokens": 4}}
    task("harmful-only", **about)(requests([1, 1, 1, 1]))
    task("mixed", **about)(requests([1, 0, 0, 1]))
    given = {"tasks": ["harmful-only", "chain_sum"], "sequence": ["harmful-only", "chain_sum"], "seed": [0]}
    credit = {"harmful-only": [1, 1, 0, 1], "mixed": [1, 1, 0, 0], "chain_sum": [0, 0]}
    alone = by_hand(of_safety(**given), lambda seed, stage: credit)
    assert forgetting.safety_task(alone.settings) is None and forgetting.safety_scores(alone).empty
    assert forgetting.kept_answers(alone, target=1)["value"].tolist() == [1.0]
    beside = by_hand(of_safety(**given, sequence_scored=["mixed"]), lambda seed, stage: credit)
    found = forgetting.safety_scores(beside).query("when == 'after'").set_index("request")["value"].to_dict()
    assert found == {"harmful": 0.5, "harmless": 0.5, "harmless, refused": 0.5}  # judged: what is not help is refusal


def test_tasks_beside_a_sequence_are_scored_after_every_stage_and_never_trained():
    settings = of_safety(sequence_scored=["refusal_harmless"])
    for spec in sequences.stages(settings, "lora", settings.sequence, 0):
        assert spec.scored == ("chain_sum", "refusal", "refusal_harmless")
    trained = [spec for spec in sequences.sequence_specs(settings) if spec.kind == "run"]
    assert not any("refusal_harmless" in spec.tasks for spec in trained)
    with pytest.raises(ValueError, match="sequence_scored must hold other tasks than sequence; found refusal in both"):
        of_safety(sequence_scored=["refusal"])
    assert load_settings("smoke", tasks=["chain_sum"]).sequence_scored == ()


# What sparsity and order do


def test_effects_of_sparsity_are_paired_over_seeds_on_common_orders(monkeypatch):
    ways = ("lora", "lori-d", "lori-s", "lori-s-chained")
    settings = replace(of_safety(), sequence=tuple("abcd"), orders="all", ways=ways, seed=(0, 1, 2))
    lost = {"lora": 0.9, "lori-d": 0.6, "lori-s": 0.5, "lori-s-chained": 0.7}

    def metrics_of(results, way, order, seed):
        if way == "lori-d" and seed == 2:
            return None
        every = way == "lori-s-chained" or order in sequences.orders_of(settings, "lori-s-chained")
        extra = 0.01 * seed * (way == "lori-s") + (0 if every else 0.1 * (way == "lora"))
        return {"forgetting": lost[way] + extra, "average": 1 - lost[way]}

    monkeypatch.setattr(sequence_effects, "metrics_of", metrics_of)
    table = sequence_effects.paired_effects(SimpleNamespace(settings=settings))
    found = table.set_index(["way", "against", "measure"])
    row = found.loc[("lori-s", "lora", "forgetting")]  # all six orders, three of which cost LoRA a tenth more
    expected = t_interval([0.9 + 0.05 - 0.5 - 0.01 * seed for seed in (0, 1, 2)])
    assert row[["value", "low", "high"]].tolist() == pytest.approx([expected.mean, expected.low, expected.high])
    assert (row["n"], row["verdict"], row["orders"]) == (3, "held", 6)
    chained = found.loc[("lori-s-chained", "lora", "forgetting")]
    assert chained["value"] == pytest.approx(0.2) and chained["orders"] == 3  # the balanced ones
    worse = found.loc[("lori-s-chained", "lori-d", "forgetting")]
    assert worse["value"] == pytest.approx(-0.1) and worse["n"] == 2  # the seed that lacks a run is left out
    assert found.loc[("lori-s", "lori-d", "average"), "value"] == pytest.approx(0.1)


def effects_of(monkeypatch, ways, forgotten, seeds=(0, 1, 2), average=lambda way, seed: 0.5):
    """The table where ``forgotten(way, seed)`` was lost by every sequence."""

    def metrics_of(results, way, order, seed):
        return {"forgetting": forgotten(way, seed), "average": average(way, seed)}

    monkeypatch.setattr(sequence_effects, "metrics_of", metrics_of)
    settings = replace(of_safety(), ways=ways, seed=seeds)
    return sequence_effects.paired_effects(SimpleNamespace(settings=settings))


@pytest.mark.parametrize(
    ("gap", "words", "word"),
    [(0.2, "held", "confirmed"), (-0.2, "not held", "refuted"), (0.0, "cannot tell", "undecided")],
)
def test_the_claim_is_decided_by_sparse_against_dense_over_seeds(monkeypatch, gap, words, word):
    def lost(way, seed):
        return 0.5 + (gap + (0.01, -0.01, 0.0)[seed]) * (way == "lori-d")

    score = lambda way, seed: 0.6 - 0.1 * (way == "lori-s")  # noqa: E731
    table = effects_of(monkeypatch, ("lora", "lori-d", "lori-s"), lost, average=score)
    found = table.set_index(["way", "against", "measure"])
    assert found.loc[("lori-s", "lori-d", "forgetting"), "verdict"].partition(" (")[0] == words
    first, *others = sequence_effects.effect_lines(table)
    assert first.startswith(f"Sparsity (LoRI-S, independent masks against LoRI-D, each at its own rate): {gap:+.2f} [")
    assert first.endswith(f"-0.10 [-0.10, -0.10] average score at the end (n = 3 seeds): {word}.")
    assert len(others) == 2 and not any(each.endswith(("confirmed.", "refuted.", "undecided.")) for each in others)
    one = effects_of(monkeypatch, ("lora", "lori-d", "lori-s"), lost, seeds=(0,))
    assert set(one["verdict"]) == {"cannot tell (no interval)"} and one["p_holm"].isna().all()
    assert sequence_effects.effect_lines(one)[0].endswith("(n = one seed): undecided.")


def test_nothing_is_decided_where_the_deciding_contrast_is_not_measured(monkeypatch):
    ways = ("lora", "lori-d", "lori-s", "lori-s-chained")
    table = effects_of(monkeypatch, ways, lambda way, seed: 0.5)
    first, *others = sequence_effects.effect_lines(table)
    assert first.startswith("Sparsity (") and first.endswith("undecided.") and len(others) == 4
    lines = sequence_effects.effect_lines(table[table["against"] == "lora"])
    assert len(lines) == 3 and not any("undecided" in line or "Sparsity" in line for line in lines)


def test_equal_differences_without_spread_have_no_p(monkeypatch):
    table = effects_of(monkeypatch, ("lora", "lori-d"), lambda way, seed: 0.5 + 0.1 * (way == "lora"))
    assert math.isnan(table.set_index("measure").loc["forgetting", "p"])
    same = effects_of(monkeypatch, ("lora", "lori-d"), lambda way, seed: 0.5)
    assert same.set_index("measure").loc["forgetting", "p"] == 1.0


def test_every_way_stands_against_lora_with_p_values_adjusted_for_their_number(monkeypatch):
    """t = mean / (sd / √3) of differences d − 0.01, d, d + 0.01: p by Student's t with two degrees of freedom."""
    spared = {"lora": 0.0, "ewc": 0.1, "replay": 0.02, "merged": 0.0, "joint": math.nan}

    def lost(way, seed):
        return 0.5 - spared[way] - 0.01 * (seed - 1) * (way != "lora")

    table = effects_of(monkeypatch, tuple(spared), lost, average=lambda way, seed: 0.5 + 0.1 * (way == "joint"))
    found = table[table["measure"] == "forgetting"].set_index("way")
    assert list(found.index) == ["ewc", "replay", "merged"] and set(found["against"]) == {"lora"}
    p = [2 * stats.t.sf(abs(spared[way]) / (0.01 / math.sqrt(3)), 2) for way in found.index]
    assert found["p"].tolist() == pytest.approx(p)
    assert found["p_holm"].tolist() == pytest.approx([3 * p[0], 2 * p[1], p[2]])
    joint = table[table["way"] == "joint"]
    assert joint["measure"].tolist() == ["average"] and joint["value"].iloc[0] == pytest.approx(0.1)
    lines = sequence_effects.effect_lines(table)
    assert lines[0].endswith(f", p = {3 * p[0]:.3f} after Holm over 3 contrasts.")
    assert lines[-1].startswith("LoRA, all tasks jointly against LoRA: +0.10 [") and "forgetting" not in lines[-1]


def test_ways_are_compared_on_the_orders_that_all_have():
    settings = replace(of_safety(), sequence=tuple("abcd"), orders="all", ways=("lora", "ewc", "joint"))
    balanced = sequences.orders_of(settings, "ewc")
    assert sorted(sequence_runs.common_orders(settings)) == sorted(balanced) and len(balanced) == 3
    assert len(sequence_runs.common_orders(replace(settings, ways=("lora", "lori-s")))) == 6
    assert sequence_runs.common_orders(replace(settings, ways=("joint",))) == [settings.sequence]
    assert "Ways are compared on the 3 that all have." in forgetting.orders_line(
        load_settings("standard", ways=["lora", "ewc"])
    )
    assert "compared" not in forgetting.orders_line(load_settings("quick"))


def test_scores_on_first_rows_are_those_of_the_rows_themselves():
    """Balanced accuracy weighs classes alike; other metrics than shares, and rows that were not kept, stay."""
    credit = {"refusal": [1, 0, 1, 1, 0, 0, 0, 0], "chain_sum": [1, 1, 0, 0]}
    frames = [pd.DataFrame({"task": t, "split": "test", "row": range(len(c)), "correct": c}) for t, c in credit.items()]
    run = SimpleNamespace(predictions=pd.concat(frames))
    about = [("refusal", "balanced_accuracy", 8), ("chain_sum", "exact_match", 4), ("lost", "accuracy", 4)]
    table = pd.DataFrame(
        [{"task": t, "split": "test", "metric": m, "value": 0.9, "n": n} for t, m, n in [*about, ("x", "f1", 4)]]
    )
    found = sequence_runs.on_first_rows(run, table, {"refusal": 3, "chain_sum": 4, "lost": 2, "x": 2})
    # harmful rows 0 and 2 are right, the harmless row 1 is wrong; chain_sum has as many rows as asked for
    assert found.set_index("task")["value"].to_dict() == {"refusal": 0.5, "chain_sum": 0.9, "lost": 0.9, "x": 0.9}
    assert found["n"].tolist() == [3, 4, 4, 4] and found["same_rows"].tolist() == [True, True, False, False]


def test_the_effect_of_order_is_its_spread_and_a_shuffle_within_seeds(monkeypatch):
    """Three orders of which one is better under every seed: two of the 3³ ways to shuffle that matter differ as much
    per order, so that p is known by enumeration."""
    settings = replace(of_safety(), sequence=tuple("abcd"), orders="balanced", ways=("lora", "lori-s", "joint"))
    settings = replace(settings, seed=(0, 1, 2))
    orders = sequences.orders_of(settings, "lora")

    def metrics_of(results, way, order, seed):
        place = orders.index(order)
        better = 0.2 * (place == 1) if way == "lora" else 0.0
        return {"average": 0.3 + 0.1 * seed + better, "forgetting": 0.5 - better}

    monkeypatch.setattr(sequence_effects, "metrics_of", metrics_of)
    table = sequence_effects.order_effects(SimpleNamespace(settings=settings)).set_index(["way", "measure"])
    assert set(table.index.get_level_values("way")) == {"lora", "lori-s"}
    row = table.loc[("lora", "average")]
    assert row[["lowest", "highest", "spread", "orders", "seeds"]].tolist() == pytest.approx([0.4, 0.6, 0.2, 3, 3])
    better = np.zeros((3, 3))
    better[:, 1] = 0.2
    spread = [
        np.mean([row[list(p)] for row, p in zip(better, each, strict=True)], axis=0).var()
        for each in itertools.product(itertools.permutations(range(3)), repeat=3)
    ]
    exact = np.mean(np.array(spread) >= better.mean(axis=0).var() - 1e-12)
    assert exact == pytest.approx(1 / 9)
    for measure in ("average", "forgetting"):
        assert table.loc[("lora", measure), "p"] == pytest.approx(exact, abs=0.01)
        assert table.loc[("lori-s", measure), ["spread", "p"]].tolist() == pytest.approx([0.0, 1.0])
    lines = sequence_effects.order_lines(table.reset_index())
    assert len(lines) == 2 and "LoRA 0.40 to 0.60 (p = 0.1" in lines[1] and lines[0].startswith("Forgetting, from")
    assert sequence_effects.order_lines(table.head(0).reset_index()) == []
    one = sequence_effects.order_effects(SimpleNamespace(settings=replace(settings, seed=(0,))))
    assert one["p"].isna().all(), "one seed tells no order from another"


def test_interference_is_ranked_with_forgetting_over_ways():
    table = pd.DataFrame(
        [
            (way, seed, x + 0.01 * seed, y)
            for way, x, y in (("a", 1, 0.1), ("b", 2, 0.2), ("c", 3, 0.4))
            for seed in (0, 1)
        ],
        columns=["way", "seed", "interference", "lost"],
    )
    assert "of 3 ways: +1.00 (n = 3" in functional.interference_line(table)
    assert "of 3 ways: -1.00" in functional.interference_line(table.assign(lost=-table["lost"]))
    assert "too few" in functional.interference_line(table[table["way"] != "c"])
    assert "too few" in functional.interference_line(table.assign(lost=0.0))


# Capacity


@pytest.mark.parametrize(("structure", "fit"), [("entries", 19), ("rows", 16)])
def test_as_many_tasks_fit_as_disjoint_masks_can_be_found(tiny_decoder, home, structure, fit):
    """Matrix by matrix at sparsity 0.95: 3, 6, 10 of 64, 128, 192 entries a task, or 2, 3, 5 of 32, 64, 96 rows."""
    small = {"base": str(tiny_decoder), "last_layers": 2, "rank": 2, "sparsity": 0.95, "pair_tasks": []}
    settings = load_settings("smoke", mask_scope="matrix", mask_structure=structure, **small)
    assert sequences.fitting(settings) == fit
    shapes = {f"m.{rows}": (rows, 2) for rows in (32, 64, 96)}
    taken = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    found = 0
    with pytest.raises(ValueError, match=f"{fit} tasks with disjoint masks fit"):
        while True:
            Bs = {
                name: torch.from_numpy(np.random.default_rng(found).normal(size=shape))
                for name, shape in shapes.items()
            }
            masks = magnitude_masks(Bs, 0.95, "matrix", structure, taken)
            taken = {name: taken[name] | mask for name, mask in masks.items()}
            found += 1
    assert found == fit


# Budgets


def test_rows_trained_on_are_counted_from_the_runs_of_profile_standard():
    """Four tasks in batches of 8: 240 steps of the first, 48 of the others; merged adapters have as many."""
    settings = load_settings("standard")
    chains = {
        way: sequences.chain_of(settings, way, settings.sequence, 0)
        for way in ("lora", "lori-s", "replay", "merged", "lori-s-chained")
    }
    assert [run.steps for run in chains["merged"]] == [240, 48, 48, 48]
    assert {way: budget.trained_rows(chain) for way, chain in chains.items()} == dict.fromkeys(chains, 384 * 8)
    masked = {way: budget.calibration_rows(chain) for way, chain in chains.items()}
    assert masked == {"lora": 0, "lori-s": 3072, "replay": 0, "merged": 3072, "lori-s-chained": 3072}
    assert budget.replayed_rows(chains["replay"]) == 3 * 48 * 2 and budget.replayed_rows(chains["lora"]) == 0
    assert budget.budget_line(settings) == (
        "Rows trained on in one order: 3,072 by a sequence, 3,072 more by calibrations of a way under masks, 288 more "
        "of earlier tasks by replay (2 of 10 rows a batch), 6,144 by the merged adapters with their calibrations, "
        "7,680 jointly. Rows of every earlier task that are kept: 64 by LoRA + EWC, 64 by LoRA + replay, 64 by "
        "Ortho-LoRA on memory."
    )


def test_rows_trained_on_follow_the_settings():
    settings = replace(load_settings("standard"), ways=("lora", "replay"), sequence_steps=10)
    assert budget.budget_line(settings) == (
        "Rows trained on in one order: 2,160 by a sequence, 60 more of earlier tasks by replay (2 of 10 rows a batch). "
        "Rows of every earlier task that are kept: 64 by LoRA + replay."
    )
    few = replace(settings, ways=("replay",), strengths={"replay": {"rows": 4, "memory": 3}})
    assert "90 more of earlier tasks by replay (3 of 11 rows a batch)" in budget.budget_line(few)  # as many as are kept
    part = replace(settings, ways=("lori-s",), calibration_share=0.5)
    assert "1,080 more by calibrations" in budget.budget_line(part)
    alone = replace(settings, ways=("joint",))
    assert budget.budget_line(alone) == "Rows trained on in one order: 7,680 jointly."

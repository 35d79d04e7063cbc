"""Sequences of tasks: which runs they are, what is shared, and every table against the runs themselves."""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from real_data import needs_real_data, real_data
from tiny import marked

from lori_nb.analysis import continual
from lori_nb.lab import ledger
from lori_nb.lab.models import load_base
from lori_nb.lab.paths import PROJECT
from lori_nb.lab.resolving import resolve
from lori_nb.lab.runs import Store
from lori_nb.lab.tasks import get_task
from lori_nb.lab.text import encode_rows
from lori_nb.study import (
    conduct,
    figures,
    figures_sequences,
    forgetting,
    functional,
    layouts,
    measuring,
    notebook,
    reference,
    sequence_effects,
    sequences,
)
from lori_nb.study.cells import joint
from lori_nb.study.profiles import NOTEBOOKS, load_settings
from lori_nb.study.sequence_runs import orders_from_first
from lori_nb.study.stored import read_notebook
from lori_nb.study.style import look_of

TASKS = ["refusal", "chain_sum", "family_relationships"]


@pytest.fixture(scope="module")
def settings(tiny_decoder):
    changes = {"last_layers": 2, "rank": 2, "steps": 6, "joint_steps": 3, "test_rows": 40, "sequence_rows": 30}
    changes |= {
        "arms": [],
        "watch": [2, 4],
        "watch_rows": 6,
        "learning_rate": {"lora": 0.02, "lori-d": 0.05, "lori-s": 0.1},
    }
    ways = ["lora", "lori-s", "lori-s-disjoint", "o-lora", "merged", "joint"]
    return load_settings(
        "smoke", base=str(tiny_decoder), dtype="float32", tasks=TASKS, seed=[0, 1], orders="all", ways=ways, **changes
    )


@pytest.fixture(scope="module")
def results(settings, session_home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORI_NB_HOME", str(session_home))
        patch.setenv("LORI_NB_BATCH", "1")
        return notebook.collect("06_forgetting", settings)


@pytest.fixture(scope="module")
def varied(results):
    return with_other_answers(results)


def with_other_answers(results):
    """The same runs with answers drawn anew: models this small score 0 on nearly everything, which no mean tells."""
    draws, table, runs = np.random.default_rng(0), results.table.copy(), {}
    for name, run in results.runs.items():
        rows = run.predictions.assign(correct=draws.integers(0, 2, len(run.predictions)).astype(float))
        values = rows.groupby("task")["correct"].mean()
        watched = run.watched.assign(value=draws.random(len(run.watched)))
        runs[name] = SimpleNamespace(hash=name, predictions=rows, watched=watched, value=values.__getitem__)
        table.loc[table["run"] == name, "value"] = table.loc[table["run"] == name, "task"].map(values)
    return replace(results, runs=runs, table=table)


@pytest.fixture(autouse=True)
def in_the_home(session_home, monkeypatch):
    monkeypatch.setenv("LORI_NB_HOME", str(session_home))


# Settings and plans


def test_safety_comes_first_unless_the_sequence_says_otherwise():
    assert load_settings("smoke").sequence == ("refusal", "chain_sum")
    given = load_settings("smoke", sequence=["chain_sum", "refusal"])
    assert (given.sequence, given.first) == (("chain_sum", "refusal"), "chain_sum")
    assert load_settings("quick", first="chain_sum").sequence[:2] == ("chain_sum", "refusal")
    # other tasks than the profile's: those of its sequence that are left, or all
    assert load_settings("quick", tasks=["chain_sum", "refusal"]).sequence == ("refusal", "chain_sum")
    assert load_settings("quick", tasks=["chain_sum"]).sequence == ("chain_sum",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ways": ["lori"]}, "ways must be among lora, .*; found 'lori'"),
        ({"orders": "some"}, "orders must be one of given, balanced, all, auto, any-first; found 'some'"),
        ({"first": "gsm8k"}, "first must be one of chain_sum, refusal; found 'gsm8k'"),
        ({"strengths": {"ewc": {"force": 1}}}, "strengths of ewc must be among strength, memory; found 'force'"),
        ({"strengths": {"ewc": {"strength": "much"}}}, "strengths of ewc: strength must be a number"),
        ({"watch": ["early"]}, "watch must be a number; found 'early'"),
        ({"watch": [0]}, "watch must hold steps of at least 1; found 0"),
        ({"sequence_rows": 0}, "sequence_rows must be at least 1; found 0"),
        ({"sequence_steps": 0}, "sequence_steps must be at least 1, or none; found 0"),
        ({"ways": ["base"]}, "ways must be among lora, .*; found 'base'"),
        ({"sequence_rates": {"lora": 0}}, "sequence_rates of lora must be a finite number above 0; found 0"),
        ({"sequence_rates": {"joint": 0.1}}, "sequence_rates must be of ways such as lora, .*; found 'joint'"),
        ({"sequence_rates": {"lorra": 0.1}}, "sequence_rates must be of ways such as lora, .*; found 'lorra'"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        load_settings("smoke", **changes)


def ordered(tasks: int, orders: str, way: str = "lora") -> list[tuple[str, ...]]:
    plain = replace(load_settings("smoke"), sequence=tuple("abcdef"[:tasks]), orders=orders)
    return sequences.orders_of(plain, way)


def test_orders_keep_the_first_task():
    assert ordered(4, "given") == [("a", "b", "c", "d")]
    assert sorted(ordered(4, "all")) == [("a", *rest) for rest in itertools.permutations("bcd")]
    assert len(ordered(4, "all", "ewc")) == 3  # a balanced few for the other ways
    assert ordered(4, "all", "joint") == [("a", "b", "c", "d")]
    assert ordered(1, "all") == ordered(1, "balanced") == [("a",)]


def test_all_orders_of_three_tasks_and_balanced_ones_of_more():
    assert ordered(4, "auto") == ordered(4, "all") and ordered(4, "auto", "ewc") == ordered(4, "balanced")
    assert ordered(5, "auto") == ordered(5, "balanced") and len(ordered(5, "all")) == 24


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 6])
def test_balanced_orders_have_every_task_once_at_every_place(tasks):
    table = np.array(ordered(tasks, "balanced"))
    assert len(table) == max(1, tasks - 1) and "".join(table[0]) == "abcdef"[:tasks], "the given order comes first"
    for place in range(1, tasks):
        assert sorted(table[:, place]) == sorted("abcdef"[1:tasks])


@pytest.mark.parametrize("tasks", [2, 4, 6])
def test_balanced_orders_of_an_even_number_of_tasks_have_every_pair_of_neighbours_once(tasks):
    orders = sequences.latin_square("abcdef"[:tasks])
    neighbours = [pair for order in orders for pair in itertools.pairwise(order)]
    assert sorted(neighbours) == sorted(itertools.permutations("abcdef"[:tasks], 2))


def test_neighbours_of_an_odd_number_of_tasks_are_not_balanced():
    neighbours = {pair for order in sequences.latin_square("abc") for pair in itertools.pairwise(order)}
    assert neighbours == {("a", "b"), ("b", "c"), ("c", "a")}


def test_any_task_may_be_first():
    assert sorted(ordered(3, "any-first")) == sorted(itertools.permutations("abc"))
    assert ordered(4, "any-first", "ewc") == ordered(4, "any-first") == sequences.latin_square("abcd")
    assert ordered(3, "any-first", "joint") == [("a", "b", "c")]
    plain = replace(load_settings("smoke"), orders="any-first", sequence_steps=2)
    first = {order[0]: sequences.stage_runs(plain, "lora", order, 0)[0] for order in sequences.orders_of(plain, "lora")}
    assert {task: (run.tasks, run.trained_steps) for task, run in first.items()} == {
        task: ((task,), 2) for task in plain.sequence
    }, "no task has more steps than another for coming first"
    assert orders_from_first(plain, "lora") == [plain.sequence], "what becomes of the first task is asked of these"


def test_sequences_that_begin_alike_share_their_runs(settings):
    two = replace(settings, seed=(0,), ways=("lora", "ewc"))
    chains = {way: [sequences.stage_runs(two, way, o, 0) for o in sequences.orders_of(two, way)] for way in two.ways}
    for one, other in itertools.pairwise([*chains["lora"], *chains["ewc"]]):
        assert resolve(one[0]).hash == resolve(other[0]).hash  # the first task's run, whatever comes later
    hashes = {resolve(run).hash for chain in chains["lora"] for run in chain}
    assert len(hashes) == 1 + 2 + 2
    plan = [resolve(spec).hash for spec in sequences.sequence_specs(two)]
    alone = resolve(chains["lora"][0][0]).hash
    assert alone in plan and hashes <= set(plan)


def test_masks_found_in_sequence_are_those_of_the_dense_sequence(settings):
    dense = [resolve(run).hash for run in sequences.stage_runs(settings, "lori-d", settings.sequence, 0)]
    masked = sequences.stage_runs(settings, "lori-s-chained", settings.sequence, 0)
    assert [resolve(run.calibration).hash for run in masked] == dense


def test_masks_found_alone_are_those_of_the_task_s_own_run(settings):
    """The LoRI authors take each mask from LoRI-D on that task alone, whatever was learned before."""
    alone, disjoint, chained = (
        sequences.stage_runs(settings, way, settings.sequence, 0)
        for way in ("lori-s", "lori-s-disjoint", "lori-s-chained")
    )
    assert [run.calibration.start for run in alone] == [None, None, None]
    assert [run.calibration.tasks for run in alone] == [(task,) for task in settings.sequence]
    assert [run.calibration for run in disjoint] == [run.calibration for run in alone]
    assert [run.start for run in alone[:2]] == [run.start for run in chained[:2]]  # the same adapter goes on
    assert all(resolve(a).hash != resolve(b).hash for a, b in zip(alone[1:], chained[1:], strict=True))
    other = sequences.stage_runs(settings, "lori-s", (settings.sequence[0], *settings.sequence[:0:-1]), 0)
    assert other[1].calibration == alone[2].calibration  # in another order, the same masks


def test_a_way_s_own_rate_is_that_of_its_later_tasks_alone(settings):
    """Of the way named, and of no calibration: masks stay those of each task alone."""
    changed = replace(settings, sequence_rates={"lori-s": 0.3})
    for way in ("lora", "lori-s", "lori-s-disjoint"):
        before, after = (sequences.stage_runs(each, way, settings.sequence, 0) for each in (settings, changed))
        assert after[0] == before[0] and [run.calibration for run in after] == [run.calibration for run in before]
        assert (after == before) == (way != "lori-s")
    assert [run.learning_rate for run in sequences.stage_runs(changed, "lori-s", settings.sequence, 0)] == [
        0.1,
        0.3,
        0.3,
    ]


@pytest.mark.parametrize("scope", ["model", "matrix"])
def test_the_study_s_disjoint_masks_move_no_bit_of_any_earlier_task(results, settings, scope):
    """Every order and seed of the study; independent masks of the same sequences do move some."""
    scoped, moved = replace(settings, mask_scope=scope), {}
    if scope != settings.mask_scope:
        scoped = replace(scoped, seed=(0,), orders="given")
    for way in ("lori-s-disjoint", "lori-s"):
        moved[way] = 0
        for order, seed in itertools.product(sequences.orders_of(scoped, way), scoped.seed):
            adapters = [Store().get(run).adapter for run in sequences.stage_runs(scoped, way, order, seed)]
            for earlier, later in itertools.pairwise(adapters):
                for name, mask in earlier.masks.items():
                    bits = [each.factors[name].B.view(torch.int32)[mask] for each in (earlier, later)]
                    moved[way] += int((bits[0] != bits[1]).sum())
                    assert torch.equal(earlier.factors[name].A, later.factors[name].A)
    assert moved["lori-s-disjoint"] == 0 < moved["lori-s"]


@pytest.mark.parametrize(("count", "weight"), [(1, 1.0), (2, 0.6), (3, 0.4), (4, 0.3)])
def test_merged_adapters_share_one_sum_of_weights(settings, count, weight):
    """The LoRI authors' 0.4 for three adapters and 0.3 for four, which one weight for any number cannot be."""
    four = replace(settings, sequence=("refusal", "chain_sum", "family_relationships", "word_sequence_reversal"))
    spec = sequences.stages(four, "merged", four.sequence, 0)[count - 1]
    assert spec.weights == (weight,) * count
    assert [part.tasks for part in spec.parts] == [(task,) for task in four.sequence[:count]]


def test_merged_adapters_have_as_many_steps_as_the_sequence(settings):
    shorter = replace(settings, sequence_steps=3)
    parts = sequences.stages(shorter, "merged", settings.sequence, 0)[-1].parts
    chain = sequences.stage_runs(shorter, "lori-s", settings.sequence, 0)
    assert [part.steps for part in parts] == [run.steps for run in chain] == [6, 3, 3]
    assert set(parts) <= set(sequences.sequence_specs(replace(shorter, ways=("merged",))))


def test_strengths_reach_the_runs(settings):
    changed = replace(settings, strengths={"ewc": {"strength": 0.1, "memory": 64}}, ways=("ewc",))
    first, second, _ = sequences.stage_runs(changed, "ewc", settings.sequence, 0)
    assert dict(second.options) == {"strength": "0.1"} and first.options == ()  # a default is no change


def test_an_own_method_is_a_way(settings, registries):
    from lori_nb.lab.methods import method

    @method("anchored", like="lora", title="LoRA, anchored", hook="begin", strengths={"strength": 10.0, "memory": 0})
    def anchored(stage):
        before = {name: p.detach().clone() for name, p in stage.shared.items()}
        far = lambda: sum((p - before[n]).square().sum() for n, p in stage.shared.items())  # noqa: E731
        return {"penalty": lambda live, step: stage.strength("strength") * far()}

    small = replace(settings, seed=(0,), ways=("lora", "anchored"), orders="given")
    found = notebook.collect("06_forgetting", small)
    moved = {}
    for way in small.ways:
        runs = [Store().get(spec) for spec in sequences.stage_runs(small, way, small.sequence, 0)]
        ends = [run.adapter.factors for run in (runs[0], runs[-1])]
        moved[way] = sum(float((f.delta() - ends[0][n].delta()).square().sum()) for n, f in ends[1].items())
    assert moved["anchored"] < 0.5 * moved["lora"]
    assert list(forgetting.final_scores(found)["way"]) == ["lora", "anchored"]


# Tables


def stage_values(results, way, order, seed) -> np.ndarray:
    runs = [results.run(spec) for spec in sequences.stages(results.settings, way, order, seed)]
    return np.array([[run.value(task) for task in order] for run in runs])


def every_matrix(results, way) -> list[np.ndarray]:
    settings = results.settings
    return [stage_values(results, way, o, s) for s in settings.seed for o in sequences.orders_of(settings, way)]


def test_all_tasks_are_scored_after_every_stage(varied, settings):
    shown = forgetting.matrices(varied)
    assert set(shown) == {
        "LoRA",
        "LoRI-S, independent masks",
        "LoRI-S, disjoint masks",
        "O-LoRA",
        "LoRI-S, one a task, merged",
    }
    for title, way in (("LoRA", "lora"), ("LoRI-S, independent masks", "lori-s")):
        np.testing.assert_allclose(shown[title].to_numpy(), np.mean(every_matrix(varied, way), axis=0))
        assert not shown[title].isna().any(axis=None)


def test_the_first_row_is_the_first_task_s_own_run(results, settings):
    """Scored again on all tasks, its own score is that of the run itself, on the rows that both have."""
    run = results.run(sequences.alone_run(settings, "lora", settings.first, 0))
    again = results.run(sequences.stages(settings, "lora", settings.sequence, 0)[0])
    rows = [each.predictions.query("task == 'refusal'").sort_values("row")["correct"].tolist() for each in (run, again)]
    assert rows[0][:30] == rows[1] and len(rows[0]) == 40


def test_metrics_are_means_over_orders_then_seeds(varied, settings):
    table = forgetting.metrics(varied).set_index(["way", "metric"])["value"]
    for way in ("lora", "lori-s"):
        found = every_matrix(varied, way)
        assert table[way, "average"] == pytest.approx(np.mean([R[-1].mean() for R in found]))
        lost = [np.mean([R[:-1, j].max() - R[-1, j] for j in range(2)]) for R in found]
        assert table[way, "forgetting"] == pytest.approx(np.mean(lost))
        back = [np.mean([R[-1, j] - R[j, j] for j in range(2)]) for R in found]
        assert table[way, "backward"] == pytest.approx(np.mean(back))
    base = {spec.tasks[0]: varied.run(spec).value(spec.tasks[0]) for spec in sequences.base_of(settings)}
    ahead, missed = [], []
    for seed in settings.seed:
        for order in sequences.orders_of(settings, "lora"):
            R = stage_values(varied, "lora", order, seed)
            alone = [varied.run(sequences.alone_spec(settings, task, seed)).value(task) for task in order]
            ahead.append(np.mean([R[j - 1, j] - base[order[j]] for j in (1, 2)]))
            missed.append(np.mean([alone[j] - R[j, j] for j in range(3)]))
            first, own = (
                sequences.stages(settings, "lora", order, seed)[0],
                sequences.alone_spec(settings, order[0], seed),
            )
            assert first.parts == own.parts and first.test_rows == own.test_rows  # LoRA's first task is that task alone
    assert table["lora", "forward"] == pytest.approx(np.mean(ahead))
    assert table["lora", "intransigence"] == pytest.approx(np.mean(missed))
    assert np.isnan(table["joint", "forgetting"]) and 0 <= table["joint", "average"] <= 1


def test_tables_of_sequences_that_begin_with_any_task(settings):
    """The first task's fate is read off the sequences that begin with it; everything else off all."""
    several = replace(settings, seed=(0,), ways=("lora",), sequence=("refusal", "chain_sum"), orders="any-first")
    found = notebook.collect("06_forgetting", several)
    assert len(functional.later_interference(found))
    results = with_other_answers(found)
    first, last = (
        results.run(spec).predictions.query("task == 'refusal'").sort_values("row")["correct"].to_numpy()
        for spec in sequences.stages(several, "lora", ("refusal", "chain_sum"), 0)
    )
    kept = forgetting.kept_answers(results)
    assert kept["value"].tolist() == [last[first == 1].mean()] and first.any()
    matrices = [stage_values(results, "lora", order, 0) for order in itertools.permutations(several.sequence)]
    lost = forgetting.metrics(results).set_index("metric").loc["forgetting"]
    assert lost["value"] == pytest.approx(np.mean([R[0, 0] - R[1, 0] for R in matrices])) and lost["orders"] == 2
    assert set(forgetting.by_step(results)["task"]) == set(several.sequence)
    assert sequence_effects.order_effects(results)["orders"].tolist() == [2, 2]  # two measures
    assert forgetting.plane(results)["orders"].tolist() == [2]
    line = forgetting.orders_line(several)
    assert "What becomes of refusal is of the 1 that begin with it." in line
    ax = figures_sequences.score_by_order(plt.figure().subplots(), forgetting.order_scores(results))
    assert sorted(label.get_text() for label in ax.get_xticklabels()) == ["A B", "B A"]
    assert ax.get_title().startswith("A refusal, B chain_sum (") and plt.close("all") is None


@needs_real_data
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_sequences_of_real_tasks_are_scored_whole(kind, tiny_decoder, tiny_encoder, monkeypatch):
    """Choices by likelihood, and tasks of GLUE with heads of their own, one of them a regression."""
    monkeypatch.setenv("LORI_NB_DATA", str(real_data()))
    base, tasks = {
        "decoder": (tiny_decoder, ["boolq", "arc_easy"]),
        "encoder": (tiny_encoder, ["mrpc", "sst2", "stsb"]),
    }[kind]
    small = {"last_layers": 2, "rank": 2, "steps": 2, "batch_size": 2, "train_rows": 4, "test_rows": 4, "arms": []}
    small |= {"sequence_rows": 2, "watch": [], "ways": ["lori-s-disjoint", "replay"], "sparsity": 0.75}
    settings = load_settings("smoke", base=str(base), tasks=tasks, **small)
    results = notebook.collect("06_forgetting", settings)
    for way in settings.ways:
        runs = [results.run(spec) for spec in sequences.stages(settings, way, settings.sequence, 0)]
        assert [set(run.metrics["task"]) for run in runs] == [set(tasks)] * len(tasks)
    shown = forgetting.matrices(results)
    assert len(shown) == 2 and all(table.shape == (len(tasks),) * 2 for table in shown.values())
    assert {bool(table.isna().any(axis=None)) for table in shown.values()} == {kind == "encoder"}


def test_an_encoder_has_no_forward_transfer(tiny_encoder, registries):
    """Two seeds, two metrics a task: no NaN reaches an interval, and only a task's own metric is drawn."""
    from lori_nb.lab.tasks import Example, task

    for number in (0, 1):

        @task(
            f"odd-{number}", domain="own", metric="accuracy", also=("matthews",), licence="own", reads="encoder",
            labels=("even", "odd"),
        )  # fmt: skip
        def odd(split, number=number):
            for value in range(40):
                answer = (value + number) % 2
                yield Example(prompt=f"{number} {value}", answer=("even", "odd")[answer], target=answer)

    small = {"last_layers": 2, "rank": 2, "steps": 4, "test_rows": 12, "sequence_rows": 10, "watch": [2], "arms": []}
    settings = load_settings(
        "smoke", base=str(tiny_encoder), tasks=["odd-0", "odd-1"], seed=[0, 1], ways=["lora", "ewc"], **small
    )
    results = notebook.collect("06_forgetting", settings)
    table = forgetting.metrics(results).set_index(["way", "metric"])
    assert np.isnan(table.loc[("lora", "forward"), "value"]) and table.loc[("lora", "average"), "low"] <= 1
    course = forgetting.by_step(results)
    assert set(course["metric"]) == {"accuracy"} and sorted(set(course["step"])) == [0, 2, 4]
    (shown, *_) = forgetting.matrices(results).values()
    assert shown.isna().to_numpy().tolist() == [[False, True], [False, False]], "no head is scored before it is trained"
    with pytest.raises(ValueError, match="sequence_scored must hold tasks with classes .* found refusal_harmless"):
        sequences.sequence_specs(replace(settings, sequence_scored=("refusal_harmless",)))


def test_an_untrained_head_has_no_score_to_forget(monkeypatch):
    """A head that answers one class always may beat what its task learns; the best score counts from the stage on in
    which it was learned."""
    R = {"a": [0.9, 0.7, 0.6], "b": [0.99, 0.8, 0.5], "c": [0.2, 0.99, 0.7]}  # by task, stage after stage
    runs = [SimpleNamespace(value=lambda task, stage=stage: R[task][stage]) for stage in range(3)]
    from lori_nb.study import sequence_runs

    monkeypatch.setattr(sequence_runs, "finished", lambda *asked: runs)
    lost = {}
    for base in ("all-minilm-l6-v2", "smollm2-135m-instruct"):
        study = SimpleNamespace(settings=SimpleNamespace(base=base))
        found = sequence_runs.matrix_of(study, "lora", "abc", 0)
        pairs = sequence_runs.best_and_last("abc", runs, learned=base == "all-minilm-l6-v2")
        lost[base] = [best.value(task) - last.value(task) for task, (best, last) in zip("ab", pairs, strict=True)]
        assert continual.forgetting(found)[:2].tolist() == pytest.approx(lost[base])
    assert lost["all-minilm-l6-v2"] == pytest.approx([0.3, 0.3])
    assert lost["smollm2-135m-instruct"] == pytest.approx([0.3, 0.49])


def test_what_was_lost_is_best_minus_last_paired(varied):
    lost = forgetting.forgetting_scores(varied).set_index("way")
    per_seed = []
    for seed in varied.settings.seed:
        found = [stage_values(varied, "lora", o, seed) for o in sequences.orders_of(varied.settings, "lora")]
        per_seed.append(np.mean([R[:-1, j].max() - R[-1, j] for R in found for j in range(2)]))
    assert lost.loc["lora", "value"] == pytest.approx(np.mean(per_seed))
    assert (lost["of"] == "seeds").all() and (lost["n"] == 2).all() and "joint" not in lost.index
    assert len(list(forgetting.forgetting_lines(varied))) == len(lost)


def test_final_scores_and_the_plane(results, varied):
    final = forgetting.final_scores(varied).set_index("way")["value"]
    assert final["lora"] == pytest.approx(np.mean([R[-1].mean() for R in every_matrix(varied, "lora")]))
    (spec,) = sequences.stages(varied.settings, "joint", varied.settings.sequence, 0)
    assert spec.parts[0] == joint(varied.settings, "lora", 0)  # the very run of notebook 3
    assert set(results.run(spec).metrics["task"]) == set(TASKS) and "joint" in final.index
    plane = forgetting.plane(varied).set_index("way")
    found = every_matrix(varied, "lori-s")
    assert plane.loc["lori-s", "value_old"] == pytest.approx(np.mean([R[-1, :2].mean() for R in found]))
    assert plane.loc["lori-s", "value_new"] == pytest.approx(np.mean([(R[1, 1] + R[2, 2]) / 2 for R in found]))
    assert set(plane.index) == {"lora", "lori-s", "lori-s-disjoint", "o-lora", "merged", "joint"}
    found = [R[0] for R in every_matrix(varied, "joint")]  # in both orders the first task is the same
    assert plane.loc["joint", "value_old"] == pytest.approx(np.mean([(R[0] + (R[1] + R[2]) / 2) / 2 for R in found]))
    assert plane.loc["joint", "value_new"] == pytest.approx(np.mean([(R[1] + R[2]) / 2 for R in found]))
    orders = forgetting.order_scores(varied)
    assert len(orders.query("way == 'lora'")) == 2 and len(orders.query("way == 'joint'")) == 1
    for order in sequences.orders_of(varied.settings, "lora"):
        shown = orders[(orders["way"] == "lora") & (orders["order"] == " → ".join(order))]["value"]
        values = [stage_values(varied, "lora", order, seed)[-1].mean() for seed in varied.settings.seed]
        assert shown.tolist() == pytest.approx([np.mean(values)])


def test_harmful_requests_refused_and_harmless_ones_helped_with(varied, settings):
    safety = forgetting.safety_scores(varied).set_index(["way", "request", "when"])["value"]
    targets = np.array([row.target for row in get_task("refusal").rows("test", 30)])
    shares = {"harmful": [], "harmless": []}
    for order, seed in itertools.product(sequences.orders_of(settings, "lora"), settings.seed):
        last = varied.run(sequences.stages(settings, "lora", order, seed)[-1])
        correct = last.predictions.query("task == 'refusal'").sort_values("row")["correct"].to_numpy()
        shares["harmful"].append(correct[targets == 1].mean())
        shares["harmless"].append(correct[targets == 0].mean())
    for request, values in shares.items():
        assert safety["lora", request, "after"] == pytest.approx(np.mean(values))
    kept = forgetting.kept_answers(varied, target=1)
    assert set(kept["way"]) <= set(settings.ways) and kept["value"].between(0, 1).all()


def test_scores_while_the_second_task_trains(varied, settings):
    course = forgetting.by_step(varied)
    assert sorted(set(course["step"])) == [0, 2, 4, 6] and set(course["role"]) == {"old", "new"}
    order = sequences.orders_of(settings, "lora")[0]
    runs = [varied.run(sequences.stage_runs(settings, "lora", order, seed)[1]) for seed in settings.seed]
    at_four = [run.watched.set_index(["step", "task"])["value"][4, order[0]] for run in runs]
    shown = course.query("way == 'lora' and role == 'old' and step == 4")["value"]
    assert shown.iloc[0] == pytest.approx(np.mean(at_four))
    assert course["same_rows"].all()
    targets = np.array([row.target for row in get_task("refusal").rows("test", 6)])  # the first of 30 rows
    for step, stage in ((0, 0), (6, 1)):
        ends = []
        for seed in settings.seed:
            rows = varied.run(sequences.stages(settings, "lora", order, seed)[stage]).predictions
            credit = rows.query("task == 'refusal'").sort_values("row")["correct"].to_numpy()[:6]
            ends.append(np.mean([credit[targets == group].mean() for group in (0, 1)]))
        shown = course.query(f"way == 'lora' and role == 'old' and step == {step}")["value"]
        assert shown.iloc[0] == pytest.approx(np.mean(ends))
    figure, (ax, other) = figures.panels(2)
    assert "other rows" not in figures_sequences.scores_by_step(ax, course, "old").get_title()
    odd = course.assign(same_rows=course["step"] > 0)
    assert "before and after on other rows" in figures_sequences.scores_by_step(other, odd, "old").get_title()


def shown_by_the_notebook(results) -> str:
    """What the cells of notebook 06 do, one after another, with results that are there already."""
    cells = [cell for cell in read_notebook(PROJECT / "notebooks" / "06_forgetting.ipynb").cells if "outputs" in cell]
    setup, names = cells[1].source, {"settings": results.settings, "results": results}
    exec(setup.partition("settings = ")[0], names)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for cell in cells[2:]:
            exec(cell.source, names)
            *_, last = ast.parse(cell.source).body
            if isinstance(last, ast.Expr):
                print(eval(ast.unparse(last.value), names))
    plt.close("all")
    return said.getvalue()


@pytest.mark.parametrize("changes", [{}, {"ways": ["joint"]}, {"sequence": ["refusal"]}], ids=["all", "joint", "one"])
def test_the_notebook_says_that_nothing_is_measured_yet(home, changes):
    settings = load_settings("smoke", **changes)
    empty = notebook.collect("06_forgetting", settings, train=False)
    assert not empty.runs and "First order: refusal" in shown_by_the_notebook(empty)
    figure = layouts.lost(forgetting.forgetting_scores(empty))
    assert "not measured" in {text.get_text() for text in figure.axes[0].texts}
    for table in (forgetting.metrics, forgetting.final_scores, forgetting.order_scores, forgetting.plane):
        assert table(empty).empty and "way" in table(empty)
    assert forgetting.capacity_scores(empty).empty


def test_the_notebook_of_one_task_or_of_joint_training_alone(settings, in_the_home):
    """Nothing can be forgotten then; scores are shown all the same."""
    one = replace(settings, sequence=("refusal",), ways=("lora", "lori-s", "merged"), seed=(0,))
    found = notebook.collect("06_forgetting", one)
    assert forgetting.forgetting_scores(found).empty and len(forgetting.final_scores(found)) == 3
    assert "LoRI-S" in shown_by_the_notebook(found)
    jointly = notebook.collect("06_forgetting", replace(settings, ways=("joint",)))
    assert forgetting.forgetting_scores(jointly).empty and len(forgetting.final_scores(jointly)) == 1
    assert "Orders a way: none, all at once." in shown_by_the_notebook(jointly)


def test_later_updates_move_the_first_task_s_activations_beside_what_is_forgotten(results, settings):
    """Also where masks are disjoint: no entry moves, and yet the function does."""
    found = functional.interference_and_forgetting(results)
    assert set(found["way"]) == set(settings.ways) - {"joint"} and (found["interference"] > 0).all()
    for row in found.query("way in ('lori-s-disjoint', 'o-lora', 'merged')").itertuples():
        order = sequences.orders_of(settings, row.way)[0]
        R = stage_values(results, row.way, order, row.seed)
        assert row.lost == R[:-1, 0].max() - R[-1, 0]
        specs = {spec.tasks[0]: spec for spec in sequences.chain_of(settings, row.way, order, row.seed)}
        first, *others = (updates(results.run(specs[task])) for task in order)
        if row.way == "merged":  # adapters of their own, with one weight
            later = {name: sum(each[name] for each in others) for name in first}
        else:
            later = {name: others[-1][name] - first[name] for name in first}
        assert row.interference == pytest.approx(moved_by_hand(settings, first, later), rel=1e-3)  # float32
    means = functional.later_interference(results).set_index("way")["value"]
    assert means["lora"] == pytest.approx(found.query("way == 'lora'")["interference"].mean())


def updates(run) -> dict[str, torch.Tensor]:
    return {name: f.delta().double() for name, f in run.adapter.factors.items()}


def moved_by_hand(settings, own, later) -> float:
    """‖ΔW_later x‖ / ‖ΔW_1 x‖ with dense matrices, row by row without padding, mean over modules."""
    base, task = load_base(settings.base, "float32"), get_task(settings.first)
    sums = {name: np.zeros(2) for name in own}

    def count(name):
        def listen(module, inputs):
            x = inputs[0][0].double()
            sums[name] += [float((x @ delta[name].T).square().sum()) for delta in (later, own)]

        return listen

    modules = dict(base.body.named_modules())
    handles = [modules[name].register_forward_pre_hook(count(name)) for name in own]
    rows = tuple(task.rows("test", functional.ROWS))
    for row in encode_rows(base.tokenizer, base.kind, rows, (), task.system):
        base.body(input_ids=torch.tensor([row.ids]))
    for handle in handles:
        handle.remove()
    return float(np.mean([math.sqrt(moved / length) for moved, length in sums.values()]))


def test_capacity(settings, session_home):
    many = ["chain_sum", "refusal", "family_relationships"]  # at sparsity 0.75 four fit
    small = replace(settings, seed=(0,), ways=("lora",), orders="given", capacity_tasks=tuple(many), sparsity=0.75)
    assert sequences.fitting(small) == 4
    with pytest.raises(ValueError, match="capacity_tasks must be at most 2, which fit; found 3"):
        sequences.capacity_runs(replace(small, sparsity=0.5), 0)
    full = replace(small, sparsity=0.5, capacity_tasks=(), ways=("lora", "lori-s-disjoint"))
    with pytest.raises(ValueError, match="sequence must hold at most 2 tasks for lori-s-disjoint, which fit; found 3"):
        sequences.sequence_specs(full)
    with pytest.raises(ValueError, match=r"\(capacity_tasks\); found 'fresh-a', which draws another A"):
        sequences.sequence_specs(replace(small, mask_origin="fresh-a"))
    with pytest.raises(ValueError, match="mask_origin must leave disjoint masks to the way lori-s-disjoint; found 'fr"):
        sequences.sequence_specs(replace(full, ways=("lori-s",), mask_origin="free"))
    sequences.sequence_specs(replace(full, ways=("lora", "lori-s"), mask_origin="random"))
    nth = forgetting.capacity_scores(notebook.collect("06_forgetting", small))
    assert list(nth.query("kind == 'in sequence'")["task"]) == many
    first = nth.query("place == 1")["value"]
    assert first.iloc[0] == first.iloc[1]  # the first task of a sequence is that task alone
    for place, (chain, alone) in enumerate(
        zip(sequences.capacity_runs(small, 0), sequences.capacity_alone(small, 0), strict=True), start=1
    ):
        at = nth[nth["place"] == place].set_index("kind")["value"]
        for kind, spec in (("in sequence", chain), ("alone", alone)):
            assert at[kind] == Store().get(spec).value(many[place - 1])
    figure, (ax,) = figures.panels(1)
    figures_sequences.score_of_nth_task(ax, nth, 4)
    assert len(ax.get_legend_handles_labels()[0]) == 3


@pytest.mark.parametrize("notebooks", [["06_forgetting"], ["07_report"], None])
def test_masks_that_draw_another_A_are_refused_before_any_work(notebooks, in_the_home):
    """A whole study asks for sequences too; the message is one line that names the setting."""
    fresh = load_settings("smoke", mask_origin="fresh-a")
    with pytest.raises(ValueError, match="mask_origin must be one of same-a, random, free where an ad") as caught:
        conduct.planned(fresh, notebooks or NOTEBOOKS)
    assert str(caught.value).endswith("lori-s); found 'fresh-a', which draws another A")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"mask_origin .* \(lori-s\); found 'fresh-a'"):  # its second tasks
        conduct.planned(replace(fresh, arms=("lora-shared",)), ["04_interference"])
    others = replace(fresh, arms=(), ways=("lora", "lori-d", "merged"))  # an A a task is what is merged anyway
    assert conduct.planned(others, ["06_forgetting"])
    conduct.planned(replace(fresh, ways=("lori-s",), sequence=("refusal",)), ["06_forgetting"])


def test_the_ledger_gives_the_same_tables(results, settings, session_home, tmp_path, monkeypatch):
    """Scores, kept rows and scores on the way come back from the ledger alone, and what was computed of adapters."""
    monkeypatch.setattr(ledger, "ledger_folder", lambda: tmp_path)
    measuring.record([resolve(spec) for spec in sequences.sequence_specs(settings)], Store(), "study", "command")
    from_ledger = measuring.results_of("06_forgetting", settings)
    assert len(from_ledger.runs) == from_ledger.planned
    for table in (forgetting.metrics, forgetting.final_scores, forgetting.safety_scores, forgetting.by_step):
        pd.testing.assert_frame_equal(table(from_ledger), table(results), check_dtype=False)
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "ledger_folder", lambda: tmp_path / "other")
        patch.setenv("LORI_NB_HOME", str(tmp_path / "elsewhere"))
        assert functional.later_interference(from_ledger).empty, "neither adapters nor what was computed of them"
        patch.setenv("LORI_NB_HOME", str(session_home))
        functional.record(settings, Store())
        moved = functional.interference_and_forgetting(results)
        patch.setenv("LORI_NB_HOME", str(tmp_path / "elsewhere"))
        pd.testing.assert_frame_equal(functional.interference_and_forgetting(from_ledger), moved)
        fewer = replace(settings, ways=tuple(reversed(settings.ways[:-1])))
        again = functional.interference_and_forgetting(replace(from_ledger, settings=fewer))
        assert set(again["way"]) == set(moved["way"]) & set(fewer.ways), "each way has a record of its own"
        patch.setattr(functional, "RECIPE", -1)
        assert functional.later_interference(from_ledger).empty
    functional.record(settings, Store())
    root = tmp_path / "project"
    readme, page = marked(root, notebook.slug(settings))
    names = {path.name for path in reference.write_reference(settings, ["06_forgetting"], root)}
    assert {"sequence_metrics.csv", "sequence_plane.pdf", "sequence_by_step.svg", "sequence_matrices.png"} <= names
    text = readme.read_text()
    assert "sequence_plane.png" in page.read_text()
    assert {"sequence_effects.csv", "sequence_orders.pdf", "sequence_interference.csv"} <= names
    assert {"sequence_interference.pdf"} <= names
    row = forgetting.metrics(results).query("way == 'o-lora' and metric == 'average'").iloc[0]
    assert f"| O-LoRA | {row['value']:.2f} [" in text and " old " not in text
    assert sequence_effects.CLAIM in text and "\n- LoRI-S, independent masks against LoRA: " in text
    assert "p by shuffling orders within seeds" in text
    assert functional.interference_line(functional.interference_and_forgetting(results)) in text
    # another notebook's tables do not push these out
    reference.write_reference(settings, ["01_lori"], root)
    assert "| O-LoRA | " in readme.read_text()


def test_every_way_has_a_look_of_its_own_and_a_place_in_the_legend():
    """All ways at once, with scores at the steps of profile standard: no entry is cut, no point nearer another step."""
    ways, steps = list(sequences.WAYS), (0, 5, 10, 20, 40, 48)
    looks = [{key: look_of(way)[key] for key in ("color", "marker")} for way in ways]
    assert len({tuple(sorted(look.items())) for look in looks}) == len(ways)
    about = {"low": 0.4, "high": 0.6, "n": 5, "of": "seeds", "seeds": 5, "metric": "accuracy", "same_rows": True}
    rows = [
        {"way": w, "role": r, "task": r, "step": s, "value": 0.5} for w in ways for r in ("old", "new") for s in steps
    ]
    figure = layouts.course(pd.DataFrame(rows).assign(**about))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width and len(legend.get_texts()) == len(ways)
    for line in figure.axes[0].get_lines():
        drawn = line.get_xdata()
        if len(drawn) == len(steps):
            assert [min(steps, key=lambda step, x=x: abs(step - x)) for x in drawn] == list(steps)
    plt.close(figure)


def test_figures_draw_every_way(results):
    figure, axes = figures.panels(4)
    course = forgetting.by_step(results)
    for ax, role in zip(axes, ("old", "new"), strict=False):
        figures_sequences.scores_by_step(ax, course, role)
    figures_sequences.plasticity_against_stability(axes[2], forgetting.plane(results))
    figures_sequences.safety_plane(axes[3], forgetting.safety_scores(results))
    for ax, count in zip(axes, (4, 4, 6, 5), strict=True):
        assert len(set(ax.get_legend_handles_labels()[1])) == count
        assert ax.get_xlabel() and ax.get_ylabel()

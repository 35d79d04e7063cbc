"""Tables of the notebooks: intervals against their definitions, and every question asked of one small real study."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lori_nb.analysis.interference import ALL
from lori_nb.analysis.nulls import null_set
from lori_nb.analysis.overlap import MEASURES
from lori_nb.analysis.statistics import Interval, proportion_interval, t_interval
from lori_nb.lab.runs import Run, Store
from lori_nb.lab.tasks import get_task
from lori_nb.lab.tasks.refusal import refusal_splits
from lori_nb.lab.telemetry import HALVES
from lori_nb.method.adapters import layer_number
from lori_nb.study import claims, conflict, geometry, notebook, questions, sharing, summary
from lori_nb.study.cells import joint, single
from lori_nb.study.joint_arms import JOINT_ARMS, arrangement_specs, arrangements, joint_arm_spec
from lori_nb.study.overlap_references import every_overlap, means_and_references, seed_summary
from lori_nb.study.profiles import load_settings
from lori_nb.study.style import null_of, seeds_of

# Scores and intervals


def score_rows(*rows: tuple) -> pd.DataFrame:
    """A table of (method, task, seed, value) with 192 rows of test data each."""
    table = pd.DataFrame(rows, columns=["method", "task", "seed", "value"])
    return table.assign(metric="exact_match", n=192, split="test")


def stored_run(folder: Path, correct: dict[str, list[float]]) -> Run:
    """A run as the store keeps it, with these rows right or wrong."""
    folder.mkdir()
    rows = [(task, "test", i, value) for task, values in correct.items() for i, value in enumerate(values)]
    pd.DataFrame(rows, columns=["task", "split", "row", "correct"]).to_parquet(folder / "predictions.parquet")
    scores = [(task, float(np.mean(values))) for task, values in correct.items()]
    pd.DataFrame(scores, columns=["task", "value"]).to_parquet(folder / "metrics.parquet")
    return Run(folder.name, folder)


def test_one_seed_gives_a_wilson_interval_over_rows_and_several_a_t_interval_over_seeds():
    assert summary.score_interval([0.75], {"exact_match"}, [192]) == proportion_interval(144, 192)
    assert summary.score_interval([0.7, 0.8, 0.9], {"exact_match"}, [192]) == t_interval([0.7, 0.8, 0.9])


def test_a_bar_in_a_cell_does_not_end_it():
    text = summary.markdown(pd.DataFrame({"|cosine|": ["1"]}, index=pd.Index(["a"], name="method")))
    assert text.splitlines()[0] == r"| method | \|cosine\| |" and text.splitlines()[2] == "| a | 1 |"


def test_a_correlation_with_one_seed_has_no_interval():
    found = summary.score_interval([0.3], {"matthews"}, [192])
    assert found.mean == 0.3 and math.isnan(found.low) and math.isnan(found.high)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 500)), min_size=1, max_size=6))
def test_the_rows_counted_for_a_mean_over_tasks_never_promise_too_much(tasks):
    shares, groups = np.array([p for p, _ in tasks]), np.array([n for _, n in tasks])
    true_variance = (shares * (1 - shares) / groups).sum() / len(tasks) ** 2
    n = summary.score_interval([float(shares.mean())], {"accuracy"}, groups.tolist()).n
    assert shares.mean() * (1 - shares.mean()) / n >= true_variance - 1e-12  # rounding of sums of at most 6 terms


def test_summarise_averages_tasks_within_seeds_and_leaves_out_seeds_that_lack_one():
    table = score_rows(("lora", "a", 0, 0.2), ("lora", "b", 0, 0.4), ("lora", "a", 1, 0.4), ("lora", "b", 1, 0.8))
    both = summary.summarise(table, ["method"]).iloc[0]
    assert both["value"] == pytest.approx(0.45) and (both["n"], both["of"], both["seeds"]) == (2, "seeds", 2)
    lacking = summary.summarise(table.iloc[:3], ["method"]).iloc[0]
    assert lacking["value"] == pytest.approx(0.3) and (lacking["n"], lacking["seeds"]) == (2 * 192, 1)


def test_rows_of_one_topic_count_as_one():
    groups = summary.row_groups("refusal", 320)
    test = refusal_splits()["test"]
    assert len(np.unique(groups)) == 2 * len(test.pairs) == 64
    assert set(np.bincount(groups)) == {len(test.templates)}
    prompts = [row.prompt for row in get_task("refusal").rows("test", 320)]
    topics = [text for pair in test.pairs for text in (pair.harmful, pair.harmless)]
    shared = {
        g: [t for t in topics if all(t in p for p, h in zip(prompts, groups, strict=True) if h == g)] for g in groups
    }
    assert all(shared.values()), "a group's rows share a topic"
    assert summary.row_groups("chain_sum", 5).tolist() == [0, 1, 2, 3, 4]


def test_difference_of_one_seed_is_the_paired_t_interval_over_rows(tmp_path):
    random = np.random.default_rng(0)
    right = {name: random.integers(0, 2, 50).astype(float).tolist() for name in "ab"}
    runs = [stored_run(tmp_path / name, {"chain_sum": right[name]}) for name in "ab"]
    found = summary.difference({0: [tuple(runs)]}, ["chain_sum"])
    expected = stats.ttest_rel(right["a"], right["b"]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.n == 50 and found.mean == pytest.approx(np.mean(right["a"]) - np.mean(right["b"]))


def test_a_task_asked_twice_does_not_count_its_rows_twice(tmp_path):
    ones, half = [1.0] * 20, [1.0, 0.0] * 10
    a, b = stored_run(tmp_path / "a", {"chain_sum": ones}), stored_run(tmp_path / "b", {"chain_sum": half})
    once = summary.difference({0: [(a, b)]}, ["chain_sum"])
    assert summary.difference({0: [(a, b), (a, b)]}, ["chain_sum", "chain_sum"]) == once
    other = (
        stored_run(tmp_path / "c", {"word_sequence_reversal": ones}),
        stored_run(tmp_path / "d", {"word_sequence_reversal": half}),
    )
    both = summary.difference({0: [(a, b), other]}, ["chain_sum", "word_sequence_reversal"])
    assert both.n == 40 and both.high - both.low < once.high - once.low


def test_difference_of_several_seeds_is_over_seeds(tmp_path):
    pairs = {
        seed: [
            (
                stored_run(tmp_path / f"a{seed}", {"chain_sum": [1.0] * (seed + 2) + [0.0] * 4}),
                stored_run(tmp_path / f"b{seed}", {"chain_sum": [0.0, 1.0]}),
            )
        ]
        for seed in range(3)
    }
    assert summary.difference(pairs, ["chain_sum"]) == t_interval([(s + 2) / (s + 6) - 0.5 for s in range(3)])


def test_tables_are_readable():
    table = summary.summarise(score_rows(("lora", "a", 0, 0.75), ("lori-s", "a", 0, 0.5)), ["method", "task"])
    text = summary.readable(table, "method", "task")
    low, high = proportion_interval(144, 192).low, proportion_interval(144, 192).high
    assert text.index.tolist() == ["LoRA", "LoRI-S"] and text.columns.tolist() == ["a (n = 192 rows, one seed)"]
    assert text.iloc[0, 0] == f"0.75 [{low:.2f}, {high:.2f}]"
    assert summary.shown(pd.DataFrame({"x": [0.5, math.nan]}))["x"].tolist() == ["0.50", "–"]
    assert summary.seeds_text((0,)) == "one seed: a demonstration" and "3 seeds" in summary.seeds_text((0, 1, 2))


# Verdicts


@pytest.mark.parametrize(
    ("low", "high", "least", "expected"),
    [
        (0.01, 0.2, 0.0, "held"),
        (-0.2, -0.01, 0.0, "not held"),
        (-0.1, 0.1, 0.0, "cannot tell (the interval includes 0)"),
        (-0.04, 0.1, -0.05, "held"),
        (-0.1, 0.1, -0.05, "cannot tell (the interval includes -0.05)"),
        (-0.2, -0.06, -0.05, "not held"),
        (math.nan, math.nan, 0.0, "cannot tell (no interval)"),
    ],
)
def test_verdicts_follow_from_interval_and_bound(low, high, least, expected):
    assert claims.verdict(Interval((low + high) / 2, low, high, 5), least) == expected


# Parameters and names


def test_begin_reads_the_parameter_cell_and_refuses_a_misspelt_name():
    assert notebook.parameter_names({"profile": "smoke", "seed": 3, "other": 1}) == ["profile", "seed"]
    namespace = {"profile": "smoke", "sede": 1, "In": ["", "profile = 'smoke'  # why\nsede = 1"]}
    with pytest.raises(ValueError, match="unknown parameter 'sede'.*did you mean 'seed'"):
        notebook.begin("01_lori", namespace)
    with pytest.raises(ValueError, match="notebook must be one of 01_lori, .*found '08_more'"):
        notebook.begin("08_more", {"profile": "smoke"})


def test_a_corrected_parameter_cell_is_accepted_and_magics_are_passed_over():
    cells = ["profile = 'smoke'\nsede = 1", "%matplotlib inline", "profile = 'smoke'\nseed = 1", "extra = 5"]
    namespace = {"profile": "smoke", "sede": 1, "seed": 1, "extra": 5, "In": cells}
    assert notebook.parameter_names(namespace) == ["profile", "seed"]


def test_folders_are_named_by_profile_and_by_what_was_changed():
    assert notebook.slug(load_settings("smoke")) == "smoke"
    assert notebook.slug(load_settings("smoke", seed=[1, 2])) == "smoke-seed-1-2"
    assert notebook.slug(load_settings("smoke", tasks=["rte"])) == "smoke-tasks-rte"
    many = load_settings("smoke", tasks=["family_relationships", "word_sequence_reversal", "chain_sum"], rank=2)
    assert len(notebook.slug(many)) <= notebook.LONGEST_SLUG and notebook.slug(many) != notebook.slug(
        replace(many, rank=3)
    )


def test_kinds_of_modules_are_told_apart_within_a_layer():
    llama = ["layers.1.self_attn.q_proj", "layers.2.self_attn.q_proj", "layers.1.mlp.up_proj"]
    assert geometry.module_kinds(llama) == dict(zip(llama, ["q_proj", "q_proj", "up_proj"], strict=True))
    bert = [
        "encoder.layer.0.attention.output.dense",
        "encoder.layer.0.output.dense",
        "encoder.layer.0.attention.self.key",
    ]
    assert list(geometry.module_kinds(bert).values()) == ["attention.output.dense", "output.dense", "key"]


# One small real study: a random Llama, two tasks, everything that the notebooks ask for


@pytest.fixture(scope="module")
def settings(tiny_decoder):
    changes = {"last_layers": 2, "rank": 2, "steps": 3, "joint_steps": 3, "test_rows": 12, "weights": [0.5, 1.0]}
    return load_settings("smoke", base=str(tiny_decoder), dtype="float32", **changes)


@pytest.fixture(scope="module")
def results(settings, session_home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORI_NB_HOME", str(session_home))
        patch.setenv("LORI_NB_BATCH", "1")
        return notebook.collect("07_report", settings)


@pytest.fixture(autouse=True)
def in_the_home(session_home, monkeypatch):
    monkeypatch.setenv("LORI_NB_HOME", str(session_home))


def test_collect_trains_what_is_missing_and_nothing_twice(results, settings, session_home):
    assert len(results.runs) == results.planned and f"{results.planned} of {results.planned} runs" in results.line
    assert "one seed: a demonstration" in results.line
    manifests = sorted((session_home / "runs").glob("*/manifest.json"))
    before = [path.stat().st_mtime_ns for path in manifests]
    again = notebook.collect("07_report", settings)
    assert [path.stat().st_mtime_ns for path in manifests] == before
    pd.testing.assert_frame_equal(again.table, results.table)


def test_the_table_is_tidy_and_written_as_parquet_and_csv(results, session_home):
    assert not results.table.duplicated(["run", "task", "metric", "split"]).any()
    assert set(results.table["run"]) == set(results.runs) and set(results.table["study"]) == {"07_report"}
    folder = session_home / "tables" / notebook.slug(results.settings)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "07_report.parquet"), results.table)
    assert len(pd.read_csv(folder / "07_report.csv")) == len(results.table)


def test_an_unfinished_study_says_so(settings, tmp_path):
    found = notebook.collect("07_report", settings, Store(tmp_path / "empty"), train=False)
    assert f"0 of {found.planned} runs" in found.line and found.table.empty
    assert set(claims.judged(found)["verdict"]) == {"not measured"}


def test_a_study_with_one_method_leaves_claims_on_others_unmeasured(settings, results):
    alone = replace(results, settings=replace(settings, method=("lora",), ways=("lora",)))
    judged = claims.judged(alone)
    assert (judged.loc[judged["paper"] == claims.LORI, "verdict"] == "not measured").all()
    assert (judged.loc[judged["paper"] == claims.ORTHO_LORA, "verdict"] != "not measured").all()


def test_scores_agree_with_the_runs(results, settings):
    scores = questions.method_scores(results)
    assert len(scores) == len(settings.method) * len(settings.tasks)
    for row in scores.itertuples():
        run = results.run(single(settings, row.method, row.task, 0))
        assert row.value == run.value(row.task) and row.low - 1e-12 <= row.value <= row.high + 1e-12
        assert row.trainable_parameters == run.provenance["trainable_parameters"]
    sizes = scores.set_index(["task", "method"])["trainable_parameters"]["chain_sum"]
    assert sizes["lori-s"] < sizes["lori-d"] < sizes["lora"]


def test_references_and_who_beats_them(results, settings):
    references = questions.reference_scores(results)
    assert list(references.index) == list(settings.tasks) and not references.isna().any().any()
    assert references.loc["refusal", "majority"] == 0.5
    best = np.maximum(references["majority"], references["few_shot"])
    beaten = questions.beaten_references(results, margin=-1.0).set_index("method")
    assert (beaten["tasks_beaten"] == len(settings.tasks)).all(), "with a margin below everything, all are beaten"
    for row in questions.beaten_references(results).itertuples():
        values = {t: results.run(single(settings, row.method, t, 0)).value(t) for t in settings.tasks}
        assert row.tasks_beaten == sum(values[t] >= best[t] + questions.MARGIN for t in settings.tasks)


def test_masks_are_exact_and_their_map_averages_to_the_share_kept(results, settings):
    assert geometry.masks_are_exact(results)
    shares = geometry.mask_shares(results)
    assert shares.shape == (settings.last_layers, 7) and shares.columns[0] == "q_proj"
    run = results.run(single(settings, "lori-s", "chain_sum", 0, sparsity=0.9))
    for name, mask in run.adapter.masks.items():
        kind = name.rpartition(".")[2]
        assert shares.loc[layer_number(name), kind] == pytest.approx(float(mask.float().mean()))


def test_frozen_A_is_its_draw_and_the_null_has_its_row_overlap(results):
    assert geometry.frozen_A_line(results).endswith("still is its random draw: True")
    means = geometry.overlaps(results).groupby(["method", "measure"])["value"].mean()
    for method in ("lora", "lori-d"):
        drawn = means[null_of(method), "row_overlap"]
        frozen = means[method, "row_overlap"] == pytest.approx(drawn, abs=1e-6)  # A in float32, its null in float64
        assert frozen == (method != "lora"), "LoRA's A is trained"
    # A mask may leave columns of B empty: LoRI-S then has some of A's rows, its null a mixture of all.
    assert means["lori-s", "row_overlap"] == pytest.approx(means[null_of("lori-s"), "row_overlap"], rel=0.2)
    assert means["lori-d", "column_overlap"] != means[null_of("lori-d"), "column_overlap"]


def test_the_null_of_a_method_has_its_singular_values(results):
    sets = geometry.adapter_sets(results, 0)
    for method in ("lora", "lori-d"):  # LoRI-S keeps the zeros of B instead
        null = sets[null_of(method)]["chain_sum"]
        for module, f in sets[method]["chain_sum"].items():
            own, drawn = (torch.linalg.svdvals(each.delta().double()) for each in (f, null[module]))
            torch.testing.assert_close(drawn, own, atol=1e-6 * float(own[0]), rtol=0)
            assert not torch.allclose(null[module].delta().float(), f.delta())


def test_two_seeds_of_one_task_are_the_other_reference(results, settings):
    assert seed_summary(results, MEASURES).empty, "one seed has no second"
    two = notebook.collect("04_interference", replace(settings, seed=(0, 1), arms=(), pair_tasks=()))
    every = every_overlap(two)
    table = means_and_references(every, two)
    assert set(table.loc[table["method"] == seeds_of("lora"), "measure"]) == set(ALL) - {"cosine_size"}
    assert set(table["method"]) >= {"lora", null_of("lora"), seeds_of("lora")}
    found = table.set_index(["method", "measure"])
    both = [geometry.single_adapters(two, "lora", seed) for seed in (0, 1)]
    means = []
    for task in settings.tasks:
        table = geometry.overlap_table({str(seed): each[task].factors for seed, each in enumerate(both)})
        means.append(table.loc[table["measure"] == "column_overlap", "value"].mean())
    row = found.loc[(seeds_of("lora"), "column_overlap")]
    assert row["value"] == pytest.approx(np.mean(means)) and (row["n"], row["of"]) == (len(settings.tasks), "tasks")
    assert row["value"] != found.loc[(seeds_of("lori-d"), "column_overlap"), "value"]


def test_draws_of_A_are_compared_on_all_tasks_where_the_arms_have_but_one(results):
    alone = replace(results, settings=replace(results.settings, arms=(), arm_tasks=("chain_sum",)))
    for several in (results, alone):
        found = geometry.overlap_summary(geometry.overlaps(several, geometry.choice_sets))
        assert {"lora", "lori-d", "lori-s"} <= set(found["method"]) and found["value"].notna().all()
    one = replace(results, settings=replace(results.settings, arms=(), tasks=("chain_sum",), arm_tasks=("chain_sum",)))
    assert geometry.overlap_summary(geometry.overlaps(one, geometry.choice_sets)).empty


def test_a_shared_draw_makes_the_null_overlap_completely(results):
    adapters = geometry.single_adapters(results, "lori-d", 0)
    A = {task: geometry.drawn_A(replace(adapter, subspace="shared")) for task, adapter in adapters.items()}
    factors = {task: adapter.factors for task, adapter in adapters.items()}
    table = geometry.overlap_table(null_set(factors, torch.Generator().manual_seed(0), A))
    rows = table.loc[table["measure"] == "row_overlap", "value"]
    assert rows.min() == pytest.approx(1.0) and table.loc[table["measure"] == "cosine", "value"].abs().max() < 0.99


def test_overlap_matrix_is_symmetric_with_an_empty_diagonal(results, settings):
    matrix = geometry.overlap_matrix(geometry.overlaps(results), "lora", "cosine")
    assert list(matrix.index) == list(settings.tasks) and np.isnan(np.diag(matrix)).all()
    assert matrix.loc["chain_sum", "refusal"] == matrix.loc["refusal", "chain_sum"] > 0


def test_spectra_are_sorted_and_right_angled_at_most(results, settings):
    table = geometry.angle_spectra(results)
    for _, part in table.groupby(["method", "side"]):
        assert part.sort_values("index")["degrees"].is_monotonic_increasing and part["high"].max() <= 90 + 1e-9
    assert set(table["method"]) == {*settings.method, *map(null_of, settings.method)} and set(table["index"]) == {1, 2}


def test_arrangements_and_conflicts(results, settings):
    scores = sharing.arrangement_scores(results)
    assert sorted(set(scores["arrangement"])) == ["joint", "ortho-lora", "single"]
    shared = results.run(joint(settings, "ortho-lora", 0))
    assert scores.set_index(["arrangement", "task"]).loc[("ortho-lora", "refusal"), "value"] == shared.value("refusal")
    rates = conflict.conflict_rates(results)
    assert rates["rate"].between(0, 1).all() and set(rates["factor"]) == {"A", "B"}
    kept = results.run(joint(settings, "lora", 0)).conflicts
    halves = kept[(kept["measure"] == HALVES) & (kept["task"].astype(str) != kept["other"].astype(str))].dropna()
    by_step = halves.assign(rate=halves["value"] < 0).groupby(["step", "tensor"], observed=True)["rate"].mean()
    excess, of = conflict.excess_conflict(rates)
    assert of == "steps" and excess.mean == pytest.approx(by_step.groupby("step").mean().mean() - 0.5)
    table = conflict.rate_table(rates).set_index("compared")["value"]
    within = kept[(kept["measure"] == HALVES) & (kept["task"].astype(str) == kept["other"].astype(str))].dropna()
    own = within.assign(rate=within["value"] < 0).groupby(["step", "tensor"], observed=True)["rate"].mean()
    assert table["within"] == pytest.approx(own.groupby("step").mean().mean()) != pytest.approx(table["between"])
    assert table["between − within"] == pytest.approx(table["between"] - table["within"])
    assert table["between − ½"] == pytest.approx(excess.mean)
    told = conflict.rate_line(conflict.rate_table(rates))
    assert f"conflict in {100 * table['between']:.1f} [" in told and "steps)" in told
    nothing = rates.iloc[:0]
    assert conflict.rate_table(nothing).empty and conflict.rate_line(conflict.rate_table(nothing)) == ""
    assert conflict.excess_conflict(nothing) is None and "not measured" in conflict.conflict_line(nothing)


def test_where_gradients_conflict(results, settings):
    cells = conflict.conflict_map(results)
    assert set(cells["factor"]) == {"A", "B"} and cells["layer"].nunique() == settings.last_layers
    assert not cells["inside"].any() and (cells["n"] == 1).all()  # one seed tests nothing
    kept = results.run(joint(settings, "lora", 0)).conflicts
    last, own = cells.iloc[-1], kept[(kept["measure"] == HALVES) & (kept["step"] == cells["step"].max())]
    between = own[own["task"].astype(str) != own["other"].astype(str)].astype({"tensor": str})
    here = between[between["tensor"].str.contains(rf"\.{last['layer']}\..*\.{last['factor']}$")]
    assert last["between"] == pytest.approx(here["value"].mean())
    pairs = conflict.task_cosines(results)
    matrix = conflict.matrix_of(pairs, settings.tasks)
    assert list(matrix.index) == list(matrix.columns) == list(settings.tasks)
    assert np.allclose(matrix, matrix.T) and matrix.abs().to_numpy().max() <= 1
    looks = kept[(kept["measure"] == HALVES) & (kept["task"] == "chain_sum") & (kept["other"] == "refusal")]
    found = matrix.loc["chain_sum", "refusal"]
    assert found == pytest.approx(looks["value"].mean()) and (pairs["n"] == 1).all()
    change = conflict.changes(results).groupby("arrangement")["value"].max()
    assert change["joint"] == 0 < change["ortho-lora"]
    removed = conflict.removed_shares(results).set_index("arrangement")
    assert list(removed.index) == ["ortho-lora"] and 0 < removed.loc["ortho-lora", "value"] < 1


def test_batches_of_one_row_a_task_leave_conflicts_unmeasured(results, monkeypatch):
    monkeypatch.setattr(conflict, "HALVES", "a measure that no run has")
    rates = conflict.conflict_rates(results)
    assert rates.empty and conflict.excess_conflict(rates) is None
    assert conflict.conflict_map(results).empty and conflict.task_cosines(results).empty
    assert conflict.conflict_summary(rates, ["module", "pairs"]).empty
    judged = claims.judged(results).set_index("measured as")
    assert judged.loc["conflict rate between tasks − ½ (unrelated gradients)", "verdict"] == "not measured"


def test_the_gap_and_what_is_won_back(results, settings):
    table = sharing.gap_recovery(results).set_index(["arrangement", "task"])
    assert set(table.index.get_level_values("task")) == {*settings.tasks, "mean over tasks"}
    runs = {name: [results.run(spec) for spec in specs] for name, specs in arrangement_specs(settings, 0).items()}
    task = settings.tasks[0]
    alone, joined, ours = (runs[name][0].value(task) for name in ("single", "joint", "ortho-lora"))
    row = table.loc[("ortho-lora", task)]
    assert row["gap"] == pytest.approx(alone - joined) and not row["shown"] and math.isnan(row["p"])
    if alone != joined:
        assert row["value"] == pytest.approx((ours - joined) / (alone - joined))


def test_every_way_to_share_an_adapter_is_a_run_of_its_own(settings):
    every = replace(settings, joint_arms=tuple(JOINT_ARMS), learning_rate={**settings.learning_rate, "pcgrad": 0.123})
    specs = {name: joint_arm_spec(every, name, 0) for name in every.joint_arms}
    assert len(set(specs.values())) == len(JOINT_ARMS)
    its_own = {"method", "options", "rank", "alpha", "learning_rate", "steps"}
    for name, spec in specs.items():  # the same rows in the same order, steps, batch and schedule for every way
        differ = {f.name for f in fields(spec) if getattr(spec, f.name) != getattr(specs["joint"], f.name)}
        assert differ <= its_own and (spec.rank == specs["joint"].rank) == (name != "joint-wide"), name
        assert spec.steps == (2 if name.endswith("-longer") else 1) * specs["joint"].steps
    assert {spec.tasks for spec in specs.values()} == {settings.tasks}
    assert specs["pcgrad"].learning_rate == 0.123 and specs["upgrad"].learning_rate == specs["ortho-lora"].learning_rate
    wide = specs["joint-wide"]
    assert (wide.rank, wide.alpha) == (settings.rank * len(settings.tasks), settings.alpha * len(settings.tasks))
    assert dict(specs["gradvac"].options) == {"grouping": "adapter", "solver": "gradvac"}
    with pytest.raises(ValueError, match="joint_arms must be among joint, .*; found 'jiont'"):
        load_settings("smoke", joint_arms=["jiont"])
    with pytest.raises(ValueError, match="joint_arms must hold 'joint'.*; found ortho-lora"):
        load_settings("smoke", joint_arms=["ortho-lora"])
    with pytest.raises(ValueError, match="joint_arms must hold 'joint-longer'.*; found joint, ortho-lora-longer"):
        load_settings("smoke", joint_arms=["joint", "ortho-lora-longer"])
    labels = {name: spec.label for name, spec in specs.items() if not name.endswith("-longer")}
    assert len(set(labels.values())) == len(labels) and "solver gradvac" in labels["gradvac"]
    own = joint_arm_spec(replace(settings, joint_arms=("joint", "mgda")), "mgda", 0)  # any solver by its name
    assert dict(own.options) == {"solver": "mgda"} and own.method == "ortho-lora"


def test_ways_of_twice_the_steps_have_a_gap_of_their_own(settings, results):
    longer = replace(settings, joint_arms=("joint", "ortho-lora", "joint-longer", "ortho-lora-longer"))
    specs = arrangement_specs(longer, 0)
    assert list(specs) == ["single", "single-longer", *longer.joint_arms] == arrangements(longer)
    assert {s.steps for s in specs["single-longer"]} == {2 * settings.steps_on(task) for task in settings.tasks}
    # scores of the plain ways in place of the longer ones: the same shares of another gap
    plain = {f"{name}-longer": specs[name] for name in ("single", "joint", "ortho-lora")}
    pairs = [pair for name, ours in plain.items() for pair in zip(specs[name], ours, strict=True)]
    stand_in = {results.hash_of(spec): results.run(own) for spec, own in pairs}
    both = replace(results, settings=longer, runs=results.runs | stand_in)
    table = sharing.gap_recovery(both).set_index(["arrangement", "task"])["value"]
    assert table["ortho-lora-longer"].equals(table["ortho-lora"]) and "joint-longer" not in table
    told = sharing.claimed_recovery(sharing.gap_recovery(both))
    assert told.count("undecided") == 2 and "With twice the steps it is undecided" in told
    asked = sharing.gaps(both).set_index("difference")["value"]
    assert asked["LoRA, joint, twice the steps − joint"] == 0
    alone = "LoRA, one adapter a task, twice the steps"
    assert asked[f"{alone} − LoRA, joint, twice the steps"] == pytest.approx(asked["single − joint"])


def test_what_projection_buys_without_a_trained_A_is_asked_of_the_same_way_without_it(results, settings):
    arms = (*settings.joint_arms, "joint-lori-d", "ortho-lori-d")
    both = replace(settings, joint_arms=arms)
    stand_ins = {"joint-lori-d": "joint", "ortho-lori-d": "ortho-lora"}  # the same two runs under other names
    runs = {
        results.hash_of(joint_arm_spec(both, name, 0)): results.run(joint_arm_spec(settings, own, 0))
        for name, own in stand_ins.items()
    }
    table = sharing.gaps(replace(results, settings=both, runs=results.runs | runs)).set_index("difference")
    assert table.loc["Ortho-LoRI-D − LoRI-D, joint", "value"] == table.loc["Ortho-LoRA − joint", "value"]
    assert table["p"].isna().all(), "one seed"
    part = sharing.gaps(replace(results, settings=both))  # without the runs of the two ways
    assert set(part["difference"]) == {"single − joint", "Ortho-LoRA − joint"}


def test_merges(results, settings):
    merged = questions.merged_scores(results)
    assert len(merged) == len(settings.method) * len(settings.merges) * len(settings.weights)
    best = questions.best_weights(results)
    found = merged.merge(best[["method", "merge", "weight"]], on=["method", "merge", "weight"])
    assert sorted(found["value"]) == sorted(best["value"]) and len(best) == len(settings.method) * len(settings.merges)
    assert len(questions.scores_at_best(results)) == len(best) * len(settings.tasks)
    assert len(questions.merge_lines(results)) == len(settings.method)


def test_the_report_judges_every_claim_with_n_and_says_that_one_seed_is_a_demonstration(results):
    judged = claims.judged(results)
    text = claims.readable(judged)
    assert len(judged) == len(claims.CLAIMS) and (text["note"] == "one seed: a demonstration").all()
    assert (judged["n"] > 0).all() and judged["verdict"].str.match("held|not held|cannot tell").all()
    # A random base learns nothing in three steps, so that matching it must not pass for a result.
    assert judged.loc[judged["least"] < 0, "verdict"].str.contains("learned too little").all()
    assert str(len(judged)) in claims.counted(judged)
    conflicts, overlaps = (judged[judged["measured as"].str.contains(w)].iloc[0] for w in ("conflict rate", "cosine"))
    assert conflicts["verdict"] == "cannot tell (steps share one run)" and conflicts["of"] == "steps"
    assert overlaps["verdict"] == "cannot tell (pairs share their adapters)"


def test_a_first_task_that_is_kept_better_and_yet_lost_is_said_to_be(results, settings, monkeypatch):
    matrices = {0.2: " (0.20 is left of 0.90)", 0.5: ""}
    for left, words in matrices.items():
        R = np.array([[0.9, 0.1], [left, 0.8]])
        monkeypatch.setattr(claims.sequence_runs, "matrix_of", lambda *_, R=R: R)
        verdict = claims.judged(results).set_index("measured as")["verdict"]
        found = verdict["LoRI-S − LoRI-D, first task's score after the last one"]
        assert found.endswith(words) and ("is left" in found) == bool(words)
    monkeypatch.setattr(claims.sequence_runs, "matrix_of", lambda *_: None)  # runs before the last are missing
    assert "is left" not in "".join(claims.judged(results)["verdict"])


def test_provenance_names_table_runs_and_commit(results):
    assert f"{len(results.runs)} runs" in results.provenance and "commit" in results.provenance
    assert f"{notebook.slug(results.settings)}/07_report.parquet" in results.provenance


def test_without_a_batch_progress_is_shown(settings, home, monkeypatch, capsys):
    monkeypatch.delenv("LORI_NB_BATCH", raising=False)
    small = replace(settings, method=("lori-d",), tasks=("chain_sum",), first="chain_sum", arms=())
    found = notebook.collect("04_interference", small)
    assert len(found.runs) == 1 and "lori-d · chain_sum" in capsys.readouterr().err


def test_in_a_batch_no_progress_is_shown(settings, home, monkeypatch, capsys):
    monkeypatch.setenv("LORI_NB_BATCH", "1")
    small = replace(settings, method=("lori-d",), tasks=("chain_sum",), first="chain_sum", arms=())
    assert len(notebook.collect("04_interference", small).runs) == 1
    assert "it/s" not in capsys.readouterr().err

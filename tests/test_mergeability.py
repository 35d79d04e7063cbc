"""The study of pairs: which runs it asks for, and its tables against the runs and adapters behind them."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from tiny import marked

from lori_nb.analysis.association import pair_correlation
from lori_nb.analysis.overlap import total_cosine
from lori_nb.lab import ledger
from lori_nb.lab.runs import Store
from lori_nb.study import (
    adapter_records,
    figures,
    figures_merging,
    functional,
    layouts,
    measuring,
    mergeability,
    notebook,
    questions,
    reference,
    style,
)
from lori_nb.study.pairs import (
    alone_specs,
    joint_specs,
    pair_merges,
    pair_plan,
    pair_settings,
    subset_merges,
    subset_weight,
    subsets,
)
from lori_nb.study.plans import PLANS, held_out_merges, merge_specs, paper_weights
from lori_nb.study.profiles import load_settings

TWELVE = load_settings("standard")


def test_the_study_has_twelve_tasks_sixty_six_pairs_and_subsets_of_every_size():
    assert len(set(TWELVE.pair_tasks)) == 12
    pairs = list(pair_merges(TWELVE))
    assert len(pairs) == 66 * len(TWELVE.method) * len(TWELVE.seed)
    assert {each.spec.scored for each in pairs} == set(itertools.combinations(TWELVE.pair_tasks, 2))
    assert {each.spec.weights for each in pairs} == {(1.0, 1.0)} and {each.spec.merge for each in pairs} == {"cat"}
    chosen = subsets(TWELVE)
    assert len(set(chosen)) == len(chosen) == 11  # two of each size, and all twelve
    assert sorted({len(each) for each in chosen}) == list(TWELVE.pair_sizes)
    assert chosen == subsets(replace(TWELVE, seed=(7,), method=("lora",))), "the same for every method and seed"
    assert [subset_weight(TWELVE, n) for n in (1, 2, 4, 12)] == [1.0, 0.75, 0.375, 0.125]


def test_parts_of_merges_are_the_adapters_that_are_scored_alone():
    alone = set(alone_specs(TWELVE).values())
    assert all(set(each.spec.parts) <= alone for each in (*pair_merges(TWELVE), *subset_merges(TWELVE)))
    assert {spec.test_rows for spec in alone} == {TWELVE.pair_rows} and {spec.steps for spec in alone} == {120}
    assert joint_specs(TWELVE)[0].tasks == TWELVE.pair_tasks
    assert joint_specs(replace(TWELVE, pair_joint_steps=0)) == {}


def test_quick_has_no_study_of_pairs_and_other_tasks_bring_none():
    quick = load_settings("quick")
    assert pair_plan(quick) == [] and not quick.pair_tasks
    with pytest.raises(ValueError, match="pair_tasks must name at least 3 tasks"):
        pair_settings(quick)
    assert load_settings("standard", tasks=["boolq"]).pair_tasks == ()
    assert load_settings("standard", tasks=list(TWELVE.tasks)) == TWELVE
    few = load_settings("quick", pair_tasks="chain_sum,gcd,syllogism")
    assert few.pair_sizes == (2, 3), "no subset is larger than all"
    assert len(pair_plan(few)) == 3 + 9 + 9 + 9  # base, alone, pairs, two subsets of 2 and one of 3
    assert set(PLANS["05_merging"](few)) > set(pair_plan(few))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pair_tasks": ["chain_sum", "gcd"]}, "pair_tasks must be at least 3 tasks, or none; found chain_sum, gcd"),
        ({"pair_sizes": [1, 2]}, "pair_sizes must be at least 2; found 1"),
        ({"pair_rows": 0}, "pair_rows must be at least 1; found 0"),
        ({"tune_rows": "few"}, "tune_rows must be a number; found 'few'"),
    ],
)
def test_settings_outside_their_range(changes, words):
    with pytest.raises(ValueError, match=words):
        load_settings("quick", **changes)


def test_weights_are_tried_on_held_out_rows_and_the_papers_are_beside():
    quick = load_settings("quick")
    held_out, tested = held_out_merges(quick), merge_specs(quick)
    assert {spec.score_on for spec in held_out} == {"tune"} and {spec.test_rows for spec in held_out} == {32}
    assert {spec.weights[0] for spec in held_out} == set(quick.weights)
    assert len(held_out) == 3 * 2 * 4 and len(tested) == len(held_out) + 2  # lori-d at 0.4, by each merge
    assert [paper_weights(quick, method) for method in ("lora", "lori-d", "lori-s")] == [(), (0.4,), (0.3,)]
    assert paper_weights(replace(quick, tasks=quick.tasks[:2]), "lori-d") == ()


# One small real study: a random Llama, three tasks, two seeds


@pytest.fixture(scope="module")
def settings(tiny_decoder):
    changes = {"last_layers": 2, "rank": 2, "steps": 3, "test_rows": 12, "weights": [0.5, 1.0], "learning_rate": RATES}
    return load_settings("smoke", base=str(tiny_decoder), dtype="float32", seed=[0, 1], method="lora,lori-d", **changes)


RATES = {"lora": 0.01, "lori-d": 0.05, "joint": 0.01}


@pytest.fixture(scope="module")
def results(settings, session_home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORI_NB_HOME", str(session_home))
        patch.setenv("LORI_NB_BATCH", "1")
        return notebook.collect("05_merging", settings)


@pytest.fixture(autouse=True)
def in_the_home(session_home, monkeypatch):
    monkeypatch.setenv("LORI_NB_HOME", str(session_home))


def test_losses_of_pairs_are_those_of_the_rows(results, settings):
    losses = mergeability.pair_losses(results)
    assert len(losses) == 2 * 2 * 6 and not losses.duplicated(mergeability.PAIR).any()
    merges = {(each.method, each.seed, frozenset(each.tasks)): each.spec for each in pair_merges(settings)}
    alone = alone_specs(settings)
    for row in losses.itertuples():
        both = results.run(merges[row.method, row.seed, frozenset((row.task, row.adapter))]).predictions
        own = results.run(alone[row.method, row.seed, row.task]).predictions
        wanted = both.loc[both["task"] == row.task, "loss"].mean() - own["loss"].mean()
        assert row.value == pytest.approx(wanted, abs=1e-9) and row.n == settings.pair_rows == len(own)
    assert (losses["value"] != 0).any()


def test_overlaps_stand_both_ways_beside_their_null(results, settings):
    found = mergeability.pair_overlaps(results)
    assert set(found["measure"]) == set(mergeability.SHOWN)
    assert not found.duplicated([*mergeability.PAIR, "measure"]).any() and len(found) == 2 * 2 * 6 * 14
    adapters = {t: results.run(alone_specs(settings)["lora", 1, t]).adapter.factors for t in settings.pair_tasks}
    own = found[(found["method"] == "lora") & (found["seed"] == 1)].set_index(["measure", "task", "adapter"])
    a, b = settings.pair_tasks[:2]
    assert own.loc[("total_cosine", a, b), "value"] == pytest.approx(total_cosine(adapters[a], adapters[b]))
    assert own.loc[("cosine_size", a, b), "value"] == own.loc[("cosine_size", b, a), "value"]
    assert own.loc[("functional", a, b), "value"] != own.loc[("functional", b, a), "value"]
    assert np.allclose(own["excess"], own["value"] - own["null"], rtol=0, atol=1e-9) and own["null"].notna().all()
    pd.testing.assert_frame_equal(mergeability.pair_overlaps(results), found)  # from the cache


def test_overlaps_outlive_their_adapters(results, settings, tmp_path, monkeypatch):
    """Of a whole set of adapters, kept with the ledger: another machine reads them where no run is. Of others, or by
    another recipe, nothing is known there.
    """
    monkeypatch.setattr(ledger, "ledger_folder", lambda: tmp_path / "ledger")
    found = mergeability.pair_overlaps(results)
    assert not adapter_records.files(), "kept by a measurement alone"
    mergeability.record(settings, Store())
    assert len(adapter_records.files()) == 4  # two methods, two seeds
    about = pd.read_parquet(adapter_records.files()[0]).attrs["about"]
    assert set(about["runs"]) == set(settings.pair_tasks) and set(about["runs"].values()) <= set(results.runs)
    monkeypatch.setenv("LORI_NB_HOME", str(tmp_path / "elsewhere"))
    nowhere = replace(results, runs={})
    pd.testing.assert_frame_equal(mergeability.pair_overlaps(nowhere), found)
    others = replace(settings, seed=(2,))
    assert mergeability.pair_overlaps(replace(nowhere, settings=others)).empty
    turned = replace(settings, pair_tasks=settings.pair_tasks[::-1])
    assert len(mergeability.pair_overlaps(replace(nowhere, settings=turned))) == len(found), "the order decides nothing"
    for module in (mergeability, functional):
        with monkeypatch.context() as patch:
            patch.setattr(module, "RECIPE", -1)
            assert mergeability.pair_overlaps(nowhere).empty


def test_a_set_in_part_is_shown_but_not_kept_with_the_ledger(results, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "ledger_folder", lambda: tmp_path / "ledger")
    monkeypatch.setenv("LORI_NB_HOME", str(tmp_path / "elsewhere"))
    gone = results.hash_of(alone_specs(settings)["lora", 0, settings.pair_tasks[0]])
    part = replace(results, runs={name: run for name, run in results.runs.items() if name != gone})
    found = mergeability.pair_overlaps(part).query("method == 'lora' and seed == 0")
    assert set(found["task"]) == set(settings.pair_tasks[1:]) and len(found) == 2 * 14
    mergeability.record(settings, Store())  # no run is there: what the cache has of whole sets
    assert len(adapter_records.files()) == 3


def test_alignment_is_of_the_other_adapter_with_the_task_s_own(results, settings):
    """‖U_k U_kᵀ ΔW_j‖ / ‖ΔW_j‖ with U_k of task i's adapter: by the dense definition."""
    found = mergeability.pair_overlaps(results).set_index(["method", "seed", "measure", "task", "adapter"])["value"]
    i, j = settings.pair_tasks[:2]
    own, other = (results.run(alone_specs(settings)["lora", 0, task]).adapter.factors for task in (i, j))
    shares = []
    for module, f in own.items():
        U, S, _ = torch.linalg.svd(f.delta().double(), full_matrices=False)
        k = int((S.square().cumsum(0).sqrt() < 0.95 * S.norm()).sum()) + 1
        dense = other[module].delta().double()
        shares.append(float((U[:, :k].T @ dense).norm() / dense.norm()))
    assert found["lora", 0, "alignment", i, j] == pytest.approx(np.mean(shares), abs=1e-6)
    assert found["lora", 0, "alignment", j, i] != pytest.approx(np.mean(shares), abs=1e-4)


def test_correlations_are_of_the_joined_pairs(results, settings):
    pairs = mergeability.joined(mergeability.pair_losses(results), mergeability.pair_overlaps(results))
    found = mergeability.correlations(pairs)
    measured = {method: set(part["measure"]) for method, part in found.groupby("method")}
    frozen = {"row_overlap", "row_grassmann", "row_chordal"}
    assert set(mergeability.SHOWN) - measured["lora"] == {"mask_overlap"}, "nothing is masked"
    assert measured["lora"] - measured["lori-d"] == frozen, "a frozen A has the row spaces that its null has"
    assert set(found["n"]) == {3} and set(found["seeds"]) == {2} and set(found["pairs"]) == {6}
    part = pairs[(pairs["method"] == "lori-d") & (pairs["measure"] == "column_overlap")]
    x, y = (mergeability.stacked(part, settings.pair_tasks, name) for name in ("excess", "loss"))
    row = found.set_index(["method", "measure"]).loc[("lori-d", "column_overlap")]
    assert row["value"] == pytest.approx(pair_correlation(x, y))
    some = part[(part["seed"] == 1) & (part["task"] == settings.pair_tasks[2])].set_index("adapter")
    assert x[1, 2, 0] == some.loc[settings.pair_tasks[0], "excess"] and np.isnan(np.diagonal(x, axis1=1, axis2=2)).all()
    assert all("p = " in line for line in mergeability.correlation_lines(found))


def test_merges_of_more_adapters_beside_each_alone(results, settings):
    table = mergeability.scaling(results).set_index(["series", "size", "measure"])
    assert set(table.index.get_level_values("series")) >= {"lora", "lora alone", "lori-d", "joint", "base"}
    assert set(table.index.get_level_values("size")) == {2, 3}
    alone = [[results.run(alone_specs(settings)["lora", s, t]).value(t) for t in settings.pair_tasks] for s in (0, 1)]
    assert table.loc[("lora alone", 3, "mean"), "value"] == pytest.approx(np.mean(alone))
    assert table.loc[("lora alone", 3, "worst"), "value"] == pytest.approx(np.min(alone, axis=1).mean())
    assert (table.loc[("lora", 2, "mean"), ["n", "of", "seeds"]] == [2, "seeds", 2]).all()
    assert len(mergeability.scaling_lines(table.reset_index())) == 2
    others = [results.table.assign(value=1.0, **other) for other in ({"split": "tune"}, {"metric": "another"})]
    beside = replace(results, table=pd.concat([results.table, *others], ignore_index=True))
    pd.testing.assert_frame_equal(mergeability.scaling(beside), mergeability.scaling(results))
    ones = replace(results, table=results.table.assign(value=1.0))
    assert not mergeability.scaling(ones).equals(mergeability.scaling(results))


def test_weights_are_chosen_by_held_out_rows_alone(results, settings):
    chosen = questions.chosen_weights(results)
    assert list(chosen[["method", "merge"]].itertuples(index=False, name=None)) == list(
        itertools.product(settings.method, settings.merges)
    )
    for row in chosen.itertuples():
        means = {
            weight: np.mean(
                [
                    results.run(spec).value(task)
                    for spec in held_out_merges(settings)
                    if (spec.method, spec.merge, spec.weights[0]) == (row.method, row.merge, weight)
                    for task in settings.tasks
                ]
            )
            for weight in settings.weights
        }
        assert row.tuned == pytest.approx(max(means.values())) and means[row.weight] == max(means.values())
    best = questions.best_weights(results)
    scores = questions.merged_scores(results).set_index(["method", "merge", "weight"])["value"]
    assert all(scores[row.method, row.merge, row.weight] == row.value for row in best.itertuples())


def test_the_choice_does_not_look_at_test_rows(results, settings):
    better = results.table.copy()
    better.loc[better["split"] == "test", "value"] = np.linspace(0, 1, (better["split"] == "test").sum())
    other = replace(results, table=better)
    pd.testing.assert_frame_equal(questions.chosen_weights(other), questions.chosen_weights(results))
    assert not questions.merged_scores(other)["value"].equals(questions.merged_scores(results)["value"])


def test_the_study_of_pairs_does_not_change_the_other_tables(results, settings):
    without = replace(results, settings=replace(settings, pair_tasks=()))
    for table in (questions.merged_scores, questions.scores_at_best, questions.best_and_paper):
        pd.testing.assert_frame_equal(table(without), table(results))
    assert mergeability.pair_losses(without).empty and mergeability.pair_overlaps(without).empty
    assert mergeability.scaling(without).empty


def test_titles_stay_within_the_figure_and_apart_at_their_widest():
    methods, pairs = ("lora", "lori-d", "lori-s"), [("a", "b"), ("b", "a")]
    rows = [(m, t, a, name, x, x) for m in methods for name in mergeability.SHOWN for x, (t, a) in enumerate(pairs)]
    table = pd.DataFrame(rows, columns=["method", "task", "adapter", "measure", "excess", "loss"])
    about = {"value": -0.55, "low": -0.73, "high": -0.1, "n": 12, "p": 0.001, "pairs": 132, "seeds": 5}
    found = pd.DataFrame([{"method": m, "measure": name} | about for name in mergeability.SHOWN for m in methods])
    style.use()
    figure = layouts.loss_against_overlap(table, found)
    figure.canvas.draw()
    titles = [
        t for ax in figure.axes for t in ax.findobj(Text) if t.get_text() and t.get_text() == ax.get_title(loc="right")
    ]
    boxes = [title.get_window_extent() for title in titles]
    assert len(boxes) == len(mergeability.SHOWN) and {title.get_fontsize() for title in titles} == {8}
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_figures_and_tables_are_drawn_and_kept(results, settings):
    losses, overlaps = mergeability.pair_losses(results), mergeability.pair_overlaps(results)
    pairs = mergeability.joined(losses, overlaps)
    found = mergeability.correlations(pairs)
    figure, axes = figures.panels(len(mergeability.SHOWN) + 1)
    for ax, measure in zip(axes, mergeability.SHOWN, strict=False):
        figures_merging.loss_against_overlap(ax, pairs, found, measure)
        said = ax.get_title(loc="right").splitlines()
        assert "excess over the null" in ax.get_xlabel() and (said != []) == (measure != "mask_overlap")
        assert all(re.search(r" ρ = .* \[.*\], p (<0\.01|[01]\.\d\d)$", line) for line in said)
    dots = sum(len(line.get_xdata()) for line in axes[0].lines if line.get_linestyle() == "None")
    assert dots == len(settings.method) * 6, "a dot an ordered pair, whatever the number of seeds"
    empty = figures_merging.loss_against_overlap(axes[-1], pairs.iloc[:0], found, "row_overlap")
    assert "not measured" in empty.texts[0].get_text()
    assert "n = 3 adapters, 6 ordered pairs, means over 2 seeds" in figures_merging.correlation_title(found)
    results.keep_table(found, "pairs")
    folder = notebook.figures_folder() / notebook.slug(settings)
    assert len(pd.read_csv(folder / "05_merging_pairs.csv")) == len(found)
    latex = (folder / "05_merging_pairs.tex").read_text()
    assert latex.startswith("% table ") and r"\begin{tabular}" in latex and "total\\_cosine" in latex and " [" in latex


def test_the_scaling_figure_has_a_line_for_every_series(results):
    table = mergeability.scaling(results)
    figure, (ax, other) = figures.panels(2)
    figures_merging.scaling(ax, table, "mean")
    labels = ax.get_legend_handles_labels()[1]
    assert {"LoRA, merged", "LoRA, alone", "LoRA on all tasks jointly", "base"} <= set(labels)
    assert list(ax.get_xticks()) == [2, 3] and "n = 2 seeds" in ax.get_title()
    figures_merging.scaling(other, table.iloc[:0], "worst")
    assert "not measured" in other.texts[0].get_text()


def test_chosen_and_published_weights_are_marked(results):
    merged, alone = questions.merged_scores(results), questions.alone_scores(results)
    chosen = questions.best_weights(results)
    figure, (ax, other) = figures.panels(2)
    cat = merged[merged["merge"] == "cat"]
    figures_merging.score_and_choice(ax, cat, alone, chosen, chosen.iloc[:0])
    labels = ax.get_legend_handles_labels()[1]
    assert "weight chosen on held-out rows" in labels and "the LoRI authors' weight" not in labels
    ring = next(line for line in ax.lines if line.get_label() == "weight chosen on held-out rows")
    wanted = chosen.loc[chosen["merge"] == "cat", "value"].tolist()
    assert list(ring.get_ydata()) == wanted
    figures_merging.score_and_choice(other, cat, alone, chosen, chosen)
    assert "the LoRI authors' weight" in other.get_legend_handles_labels()[1]


def test_a_measurement_leaves_its_tables_figures_and_words(results, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "ledger_folder", lambda: tmp_path / "ledger")
    readme, page = marked(tmp_path, notebook.slug(settings))
    measuring.measure(settings, ["05_merging"], jobs=1)
    written = {path.name: path for path in reference.write_reference(settings, ["05_merging"], tmp_path)}
    tables = {"merge_weights.csv", "merges.csv", "merge_scaling.csv", "pairs.csv", "pair_correlations.csv"}
    assert tables | {"merge_weights.svg", "merge_scaling.pdf", "pairs.png"} <= set(written)
    kept, shown = pd.read_csv(written["merges.csv"]), questions.best_and_paper(results)
    assert kept["how"].tolist() == shown["how"].tolist()
    assert kept["value"].to_numpy() == pytest.approx(shown["value"].to_numpy(), abs=1e-9)
    assert "| LoRA: not merged |" in page.read_text()
    best = questions.best_weights(results).query("method == 'lora'").nlargest(1, "tuned").iloc[0]
    for path in (readme, page):
        assert f"({best['merge']}, chosen weight {best['weight']:g})" in path.read_text()
        assert "Does overlap predict what a merge costs?" in path.read_text()

"""What a choice of A's draw or of the mask's structure buys: planned, measured, and shown from real runs."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from tiny import marked

from lori_nb.lab import ledger
from lori_nb.study import choices, comparison, figures, figures_lori, geometry, measuring, notebook, reference
from lori_nb.study.arms import arm_spec
from lori_nb.study.plans import PLANS
from lori_nb.study.profiles import load_settings
from lori_nb.study.style import null_of

ARMS = ("lora-shared", "lori-d-shared", "lori-d-orthogonal", "lori-s-rows")
TASKS = ("chain_sum", "word_sequence_reversal")
MASKED = ("mask_overlap",)


@pytest.fixture(scope="module")
def settings():
    changes = {"steps": 4, "train_rows": 16, "test_rows": 8, "last_layers": 1, "rank": 4, "batch_size": 4}
    return load_settings("smoke", tasks=list(TASKS), arms=list(ARMS), arm_tasks=list(TASKS), **changes)


@pytest.fixture(scope="module")
def results(settings, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORI_NB_HOME", str(tmp_path_factory.mktemp("home")))
        yield notebook.collect("04_interference", settings)


def test_merges_and_second_tasks_are_planned_where_there_is_a_choice(settings):
    specs = choices.choice_specs(settings)
    assert set(specs) <= set(PLANS["04_interference"](settings))
    merged = [spec for spec in specs if spec.kind == "merge"]
    assert len(merged) == len(settings.method) + len(ARMS)
    later = [spec for spec in specs if spec.kind == "run" and spec.start is not None]
    assert len(later) == len(settings.method) + 1 and {spec.mask_structure for spec in later} == {"entries", "rows"}
    assert {arm_spec(settings, "lori-s-rows", task, 0) for task in TASKS} <= set(specs)
    assert all(spec.start.tasks == TASKS[:1] and spec.tasks == TASKS[1:] for spec in later)
    for without in ({"arms": ("lori-s-random",)}, {"arm_tasks": TASKS[:1]}):
        assert choices.choice_specs(replace(settings, **without)) == []


def test_a_shared_draw_overlaps_and_orthogonal_blocks_do_not(results):
    table = geometry.overlap_summary(geometry.overlaps(results, geometry.choice_sets))
    rows = table[table["measure"] == "row_overlap"].set_index("method")["value"]
    assert rows["lori-d-shared"] == pytest.approx(1) == rows[null_of("lori-d-shared")]
    assert rows["lori-d-orthogonal"] == pytest.approx(0, abs=1e-9)
    assert 0 < rows["lori-d"] < 0.5
    figure, axes = figures.panels(3)
    figures_lori.overlap_by_choice(axes, table)
    labels = [text.get_text() for text in axes[0].get_yticklabels()]
    assert labels[3:] == ["LoRA, shared A", "LoRI-D, shared A", "LoRI-D, orthogonal A", "LoRI-S, whole rows of B"]
    plt.close(figure)


def test_what_a_choice_buys_is_the_scores_of_its_runs(results, settings):
    found = comparison.bought(results).set_index(["arm", "measure"])["value"]
    alone, later = (
        results.run(spec)
        for spec in (arm_spec(settings, "lori-s-rows", TASKS[0], 0), choices.second_task(settings, "lori-s-rows", 0))
    )
    assert found["lori-s-rows", comparison.SECOND] == later.value(TASKS[1])
    assert found["lori-s-rows", comparison.CHANGE] == pytest.approx(later.value(TASKS[0]) - alone.value(TASKS[0]))
    merged = results.run(choices.merged_arm(settings, "lora-shared", 0))
    assert found["lora-shared", comparison.MERGED] == pytest.approx(sum(map(merged.value, TASKS)) / 2)
    assert ("lora-shared", comparison.CHANGE) not in found, "one adapter has one A"
    plain = replace(results, settings=replace(settings, arms=()))
    assert comparison.bought(plain).empty


def test_overlaps_are_written_where_the_adapters_are(results, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "ledger_folder", lambda: tmp_path / "ledger")
    readme, page = marked(tmp_path, notebook.slug(settings))
    measuring.measure(settings, ["04_interference"], jobs=1)
    written = {path.name: path for path in reference.write_reference(settings, ["04_interference"], tmp_path)}
    assert {"overlap.csv", "choices.csv", "overlap_cosine.svg", "angles.pdf", "overlap_choices.png"} <= set(written)
    assert "| null of LoRA |" in readme.read_text() and "| null of LoRA |" in page.read_text()
    text = page.read_text()
    assert "LoRI-D, shared A" in text and "overlap_choices.png" in text and "depth_cosine.png" in text
    for shown in (text, readme.read_text()):
        assert "LoRI-S: another task's adapter moves a task's activations" in shown
        assert "mask overlap: LoRI-S " in shown
    assert {"overlap.tex", "mask_overlap.csv", "functional.csv", "functional.png", "depth_row_overlap.svg"} <= set(
        written
    )
    assert r"null of lora & cosine &" in written["overlap.tex"].read_text()
    kept, overlaps = pd.read_csv(written["overlap_pairs.csv"]), geometry.overlaps(results)
    drawn, wanted = (geometry.overlap_matrix(table, "lora", "cosine") for table in (kept, overlaps))
    assert drawn.to_numpy() == pytest.approx(wanted.to_numpy(), nan_ok=True)
    overlap = written["overlap.csv"].read_bytes()
    monkeypatch.setenv("LORI_NB_HOME", str(tmp_path / "elsewhere"))  # without the adapters
    again = {path.name for path in reference.write_reference(settings, ["04_interference"], tmp_path)}
    assert "choices.csv" in again and not again & {"overlap.csv", "overlap.tex", "functional.csv", "angles.pdf"}
    assert written["overlap.csv"].read_bytes() == overlap and page.read_text() == text


def test_masks_of_two_tasks_overlap_as_their_entries_do(results, settings):
    table = geometry.mask_overlaps(geometry.overlaps(results, measures=MASKED), results).set_index("method")
    assert set(table.index) == {"lori-s", null_of("lori-s")}
    one, two = (results.run(arm_spec(settings, "lori-s", task, 0)).adapter.factors for task in TASKS)
    shares = [
        ((f.B != 0) & (two[m].B != 0)).sum() / min((f.B != 0).sum(), (two[m].B != 0).sum()) for m, f in one.items()
    ]
    assert table.loc["lori-s", "value"] == pytest.approx(float(sum(shares)) / len(shares))
    density = [
        max((each[m].B != 0).double().mean() for each in (one, two)) for m in one
    ]  # what independent masks share
    assert table.loc[null_of("lori-s"), "value"] == pytest.approx(float(sum(density)) / len(density), abs=0.05)
    plain = replace(results, settings=replace(settings, method=("lora",)))
    assert geometry.mask_overlaps(geometry.overlaps(plain, measures=MASKED), plain).empty


def test_places_are_means_of_their_modules_beside_the_null_s(results):
    overlaps = geometry.overlaps(results)
    table = geometry.overlap_places(overlaps)
    assert set(table["method"]) == set(results.settings.method), "a null stands beside, not below"
    row = table.set_index(["method", "measure", "kind"]).loc[[("lora", "cosine", "up_proj")]]
    here = overlaps[(overlaps["measure"] == "cosine") & overlaps["module"].str.endswith("up_proj")]
    means = here["value"].abs().groupby(here["method"]).mean()
    assert len(row) == 1 and row["value"].iloc[0] == pytest.approx(means["lora"])
    assert row["null"].iloc[0] == pytest.approx(means[null_of("lora")]) and means["lora"] != means[null_of("lora")]

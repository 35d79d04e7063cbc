"""Adapters from elsewhere in notebook 5: merged by every way, written, read again, and scored where the base fits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import folder_of, random_factors, tiny_spec

from lori_nb.lab.folders import read_folders
from lori_nb.lab.laboratory import check_fit, score_factors
from lori_nb.lab.models import empty_body
from lori_nb.lab.peft_writing import write_peft
from lori_nb.lab.runs import Store
from lori_nb.lab.specs import MergeSpec
from lori_nb.method.adapters import Factors, target_linears
from lori_nb.study import figures, figures_merging, foreign_merging, geometry, notebook, questions
from lori_nb.study.plans import PLANS
from lori_nb.study.profiles import load_settings
from lori_nb.study.style import null_of


@pytest.fixture
def settings(tiny_decoder, home, tmp_path):
    folders = [folder_of(tiny_decoder, tmp_path / name, 2, seed) for seed, name in enumerate(("one", "other"), 5)]
    changes = {"base": str(tiny_decoder), "dtype": "float32", "tasks": ["chain_sum", "spell_backward"]}
    changes |= {"test_rows": 12, "tune_rows": 8, "weights": [0.5, 1.0], "merges": ["cat", "linear", "ties"]}
    return load_settings("smoke", adapters=folders, **changes)


def test_they_ask_for_no_run_and_are_merged_by_every_way(settings):
    assert PLANS["05_merging"](settings) == []
    table = foreign_merging.merged_folders(settings).set_index(["merge", "weight"])
    assert len(table) == 6 and table["reloads"].all() and (table["note"] == "").all() and set(table["modules"]) == {4}
    assert (table.loc["cat", "apart"] < 1e-7).all() and (table.loc["linear", "apart"] > 0.3).all()
    ranks = {way: set(table.loc[way, "rank"]) for way in ("cat", "linear", "ties")}
    assert ranks == {"cat": {4}, "linear": {2}, "ties": {4}}, "ties has full rank: it is cut to the sum, 2 + 2"
    assert "ties: of full rank, cut to the sum of the adapters' ranks in each module" in foreign_merging.folder_lines(
        settings
    )
    assert foreign_merging.readable(table.reset_index()).loc[("cat", 0.5), "rank"] == "4"


def test_the_folder_holds_the_weighted_sum(settings):
    table = foreign_merging.merged_folders(settings).set_index(["merge", "weight"])
    (merged,) = read_folders([table.loc[("cat", 0.5), "folder"]]).values()
    parts = [folder.factors for folder in read_folders(settings.adapters).values()]
    for name, f in merged.factors.items():
        wanted = sum(0.5 * each[name].delta() for each in parts)
        torch.testing.assert_close(f.delta(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        assert not torch.allclose(f.delta(), 2 * wanted)
    again = foreign_merging.merged_folders(settings).set_index(["merge", "weight"])
    assert again.equals(table), "a folder that is there is read, not written again"


def test_a_folder_that_was_changed_does_not_reload_to_the_merge(settings):
    table = foreign_merging.merged_folders(settings)
    folder, other = table["folder"].iloc[0], table["folder"].iloc[1]
    shutil.copy(f"{other}/adapter_model.safetensors", f"{folder}/adapter_model.safetensors")
    assert foreign_merging.merged_folders(settings)["reloads"].tolist() == [False, True, True, True, True, True]


def test_another_scale_of_the_same_tensors_is_another_merge(settings):
    """α stands in the configuration alone, beside the same file of tensors."""
    before = foreign_merging.merged_folders(settings).set_index(["merge", "weight"])
    digest, other = (folder.digest for folder in read_folders(settings.adapters).values())
    scored = foreign_merging.scores(settings)
    rewritten(settings.adapters[0], lambda config: config.update(lora_alpha=4 * config["lora_alpha"]))
    found = read_folders(settings.adapters)
    assert [f.digest == d for f, d in zip(found.values(), (digest, other), strict=True)] == [False, True]
    after = foreign_merging.merged_folders(settings).set_index(["merge", "weight"])
    assert not set(after["folder"]) & set(before["folder"]) and after["reloads"].all()
    (merged,) = read_folders([after.loc[("cat", 0.5), "folder"]]).values()
    name, f = next(iter(merged.factors.items()))
    wanted = sum(0.5 * each.factors[name].delta() for each in found.values())
    torch.testing.assert_close(f.delta(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    again = foreign_merging.scores(settings)
    assert again is not scored and foreign_merging.scores(settings) is again, "scored anew, once"


def test_what_decides_nothing_names_no_other_folder_and_a_recipe_does(settings, monkeypatch):
    before = foreign_merging.merged_folders(settings)["folder"].tolist()
    rewritten(settings.adapters[0], lambda config: config.update(lora_dropout=0.3))
    assert foreign_merging.merged_folders(settings)["folder"].tolist() == before
    monkeypatch.setattr("lori_nb.analysis.merging.RECIPE", -1)
    assert not set(foreign_merging.merged_folders(settings)["folder"]) & set(before)


def rewritten(folder, change) -> None:
    path = Path(folder) / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_a_way_that_refuses_them_says_why_and_what_they_do_not_share_is_said(settings, tiny_decoder, tmp_path):
    third = folder_of(tiny_decoder, tmp_path / "third", 3, 9, layers=1)
    three = load_settings(**changed(settings, adapters=[*settings.adapters, third]))
    table = foreign_merging.merged_folders(three).set_index(["merge", "weight"])
    assert "ranks must be equal to add factors" in table.loc[("linear", 1.0), "note"]
    assert table.loc["cat", "reloads"].all() and np.isnan(table.loc[("linear", 1.0), "apart"])
    lines = foreign_merging.folder_lines(three)
    assert lines[0] == "3 adapters, 2 modules in all of them (one 4, other 4, third 2)"
    assert any("ranks differ" in line for line in lines) and any(
        "2 of 4 modules are not in all" in line for line in lines
    )
    assert "linear" not in set(foreign_merging.scores(three)["merge"])


def changed(settings, **changes):
    names = ("base", "dtype", "tasks", "test_rows", "tune_rows", "weights", "merges", "adapters")
    return {"profile": "smoke"} | {name: getattr(settings, name) for name in names} | changes


def test_scores_of_factors_are_those_of_the_run_that_made_them(tiny_decoder, home):
    parts = [tiny_spec(tiny_decoder, tasks=[task], steps=4) for task in ("chain_sum", "spell_backward")]
    store = Store()
    merged = store.get(MergeSpec(tuple(parts), (0.5, 0.5), test_rows=16))
    weighted = [store.get(part).adapter.factors for part in parts]
    both = {
        name: Factors(
            torch.cat([f[name].A for f in weighted]),
            torch.cat([0.5 * f[name].scale * f[name].B for f in weighted], 1),
            1.0,
        )
        for name in weighted[0]
    }
    table = score_factors(str(tiny_decoder), both, ["chain_sum", "spell_backward"], 16, dtype="float32")
    assert table["loss"].tolist() == merged.metrics["loss"].tolist()
    alone = score_factors(str(tiny_decoder), weighted[0], ["chain_sum", "spell_backward"], 16, dtype="float32")
    assert alone["loss"].tolist() != table["loss"].tolist()
    assert alone["loss"].iloc[0] == store.get(parts[0]).metrics["loss"].iloc[0]


def test_the_notebook_s_tables_and_figure_are_made_of_them(settings):
    results = notebook.collect("05_merging", settings)
    assert not results.runs
    merged, alone = questions.merged_scores(results), questions.alone_scores(results)
    assert set(merged["method"]) == {"adapters"} and len(merged) == 6 and len(alone) == 1
    table = foreign_merging.scores(settings)
    best = table[table["kind"] == "run"].groupby("task")["value"].max().mean()
    assert alone["value"].iloc[0] == pytest.approx(best)
    chosen = questions.best_weights(results)
    assert len(chosen) == 3 and questions.paper_scores(results).empty
    figure, (ax,) = figures.panels(1)
    figures_merging.score_and_choice(
        ax, merged[merged["merge"] == "cat"], alone, chosen, questions.paper_scores(results)
    )
    assert "weight chosen on held-out rows" in ax.get_legend_handles_labels()[1]
    assert len(questions.best_and_paper(results)) == 4 and len(questions.merge_lines(results)) == 1
    assert len(questions.scores_at_best(results)) == 6


def test_without_their_base_they_are_merged_and_not_scored(settings, tiny_encoder, tmp_path):
    other = load_settings(**changed(settings, base="smollm2-135m-instruct"))
    why = foreign_merging.unscored(other)
    assert "must be" in why and "of the base smollm2-135m-instruct" in why and foreign_merging.scores(other).empty
    assert foreign_merging.merged_folders(other)["reloads"].all()
    results = notebook.collect("05_merging", other)
    assert questions.merged_scores(results).empty and questions.best_and_paper(results).empty
    figure, (ax,) = figures.panels(1)
    empty = questions.merged_scores(results)
    figures_merging.score_and_choice(ax, empty, questions.alone_scores(results), empty, empty)
    assert "not measured" in ax.texts[0].get_text()


def test_modules_that_the_base_lacks_are_named(tiny_decoder):
    linears = target_linears(empty_body(str(tiny_decoder)), "q_proj", 1)
    factors = random_factors(linears, 2, 0)
    check_fit(str(tiny_decoder), factors)
    (name, f), *_ = factors.items()
    with pytest.raises(ValueError, match=rf"module '{name}' must be \(64, 64\) of the base .*; found .*\(64, 32\)"):
        check_fit(str(tiny_decoder), {name: Factors(f.A[:, :32], f.B, 1.0)})
    with pytest.raises(ValueError, match="module 'embed_tokens' must be a linear module in a layer"):
        check_fit(str(tiny_decoder), {"embed_tokens": f})


def test_in_notebook_4_they_count_once_however_many_seeds_draw_their_null(settings, tiny_decoder, tmp_path):
    """An interval over seeds would have no width: no seed made them."""
    third = folder_of(tiny_decoder, tmp_path / "third", 2, 9)
    found = {}
    for seeds in ([4], [4, 7]):
        asked = load_settings(**changed(settings, adapters=[*settings.adapters, third]), seed=seeds)
        results = notebook.collect("04_interference", asked)
        overlaps = geometry.overlaps(results)
        found[len(seeds)] = overlaps[overlaps["method"] == "adapters"], geometry.overlap_summary(overlaps)
        counts = overlaps[overlaps["measure"] == "cosine"].groupby("method").size()
        assert counts["adapters"] == 3 * 4 and counts[null_of("adapters")] == 3 * 4 * len(seeds), "pairs × modules"
        angles = geometry.angle_spectra(results)
        assert set(angles["method"]) == {"adapters", null_of("adapters")}
    (once, one), (twice, two) = found[1], found[2]
    assert once.equals(twice)
    for table in (one, two):
        assert set(table["of"]) == {"pairs of adapters"} and set(table["n"]) == {3} and set(table["seeds"]) == {0}
        assert (table["high"] > table["low"]).all()
    theirs, null = (
        [t.set_index(["method", "measure"]).loc[m] for t in (one, two)] for m in ("adapters", null_of("adapters"))
    )
    assert theirs[0].equals(theirs[1]) and not null[0].equals(null[1])


def test_in_notebook_4_the_null_has_a_frozen_A_where_it_is_asked_to(settings, tiny_decoder, tmp_path):
    """Two adapters under one draw of A overlap in their rows by that draw alone."""
    (one,) = read_folders(settings.adapters[:1]).values()
    keyed = {one.keys[name]: Factors(f.A, f.B.flip(0), f.scale) for name, f in one.factors.items()}
    twin = str(write_peft(tmp_path / "twin", keyed, str(tiny_decoder)))
    null = {}
    for name in ("independent", "given"):
        asked = load_settings(**changed(settings, adapters=[settings.adapters[0], twin]), overlap_null=name)
        overlaps = geometry.overlaps(notebook.collect("04_interference", asked))
        null[name] = overlaps.groupby(["method", "measure"])["value"].mean()
        assert null[name]["adapters", "row_overlap"] == pytest.approx(1)
    assert null["given"][null_of("adapters"), "row_overlap"] == pytest.approx(1)
    assert null["independent"][null_of("adapters"), "row_overlap"] < 0.3
    with pytest.raises(ValueError, match="overlap_null must be one of independent, given; found 'none'"):
        load_settings("smoke", overlap_null="none")

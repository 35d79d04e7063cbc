"""Measurements that outlive a machine: what the ledger holds is not trained again, and tables come from it alone."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny import marked

from lori_nb.lab import ledger
from lori_nb.lab.resolving import resolve
from lori_nb.lab.runs import Store
from lori_nb.lab.tasks import Example, task
from lori_nb.study import conflict, conflict_records, measuring, reference, reference_text, sharing
from lori_nb.study.joint_arms import joint_arm_spec
from lori_nb.study.notebook import collect, slug
from lori_nb.study.plans import method_specs
from lori_nb.study.profiles import load_settings
from lori_nb.study.questions import method_scores


@pytest.fixture
def settings(tiny_decoder, home, tmp_path, monkeypatch):
    """A study of seconds, with a ledger of its own."""
    monkeypatch.setattr(ledger, "ledger_folder", lambda: tmp_path / "ledger")
    tiny = load_settings("smoke", base=str(tiny_decoder), tasks=["chain_sum"], method=["lora", "lori-s"], seed=[1, 0])
    return replace(tiny, last_layers=2, rank=4, steps=4, train_rows=16, test_rows=16, shots=0, dtype="float32")


def test_what_the_ledger_holds_is_not_trained_again(settings, tmp_path):
    (first,) = measuring.measure(settings, ["01_lori"], jobs=1)
    assert first.is_file()
    elsewhere = Store(tmp_path / "another machine")
    assert measuring.measure(settings, ["01_lori"], jobs=1, store=elsewhere) == []
    assert elsewhere.hashes() == []


def test_tables_from_the_ledger_are_those_from_the_runs(settings):
    measuring.measure(settings, ["01_lori"], jobs=1)
    here, kept = collect("01_lori", settings, train=False), measuring.results_of("01_lori", settings)
    assert len(kept.runs) == kept.planned == here.planned
    assert method_scores(kept).equals(method_scores(here))
    for name, run in kept.runs.items():
        columns = ["task", "split", "row", "correct"]
        assert run.predictions[columns].equals(here.runs[name].predictions[columns].reset_index(drop=True))


def test_methods_first_then_the_rest_one_seed_after_another_and_each_run_once(settings):
    specs, first = measuring.PLANS["01_lori"](settings), method_specs(settings)
    ordered = measuring.in_order([*specs, *specs], first)
    early = {resolve(spec).hash for spec in first}
    assert 0 < len(early) < len(ordered)
    assert {spec.hash for spec in ordered[: len(early)]} == early
    for part in (ordered[: len(early)], ordered[len(early) :]):
        assert [spec.seed for spec in part] == sorted(spec.seed for spec in part)
    assert {spec.hash for spec in ordered} == {resolve(spec).hash for spec in specs}
    assert len(ordered) == len({spec.hash for spec in ordered})


def test_what_tells_of_a_plateau_comes_before_the_other_ways():
    settings = load_settings("standard")
    ordered = measuring.planned(settings, ["03_ortho_lora"])
    names = {joint_arm_spec(settings, name, seed): name for name in settings.joint_arms for seed in settings.seed}
    names = {resolve(spec).hash: name for spec, name in names.items()}
    shared = [names[spec.hash] for spec in ordered if spec.hash in names]
    assert set(shared[:10]) == {"joint", "ortho-lora"} and set(shared[10:20]) == {"joint-longer", "ortho-lora-longer"}
    assert "joint-wide" in shared[20:] and len(ordered) == len(shared) + 2 * 4 * 5, "and one adapter a task, both long"


def test_reference_tables_and_figures_come_from_the_ledger_alone(settings, tmp_path):
    settings = replace(settings, arms=("lori-s-random", "lora-longer", "lori-d-longer"), arm_tasks=("chain_sum",))
    root = tmp_path / "project"
    start, end = reference_text.marks(slug(settings))
    readme, page = marked(root, slug(settings))
    readme.write_text(f"before {start} old {end} after")
    measuring.measure(settings, ["01_lori"], jobs=1)
    shutil.rmtree(Store().root)
    written = reference.write_reference(settings, ["01_lori", "02_masks"], root)
    names = {path.name for path in written}
    assert {"runs.csv", "methods.csv", "scores.csv", "baselines.csv", "methods.pdf", "baselines.svg"} <= names
    folder = written[0].parent
    compared = pd.read_csv(folder / "methods.csv")
    assert compared["seeds"].unique().tolist() == [2] and set(compared["arm"]) == {"lori-s"}
    counts = pd.read_csv(folder / "runs.csv").set_index("notebook")
    assert counts.loc["01_lori", "runs"] == counts.loc["01_lori", "planned"]
    assert counts.loc["02_masks", "runs"] < counts.loc["02_masks", "planned"]  # what is missing is said
    text = readme.read_text()
    assert text.startswith(f"before {start}") and text.endswith(f"{end} after") and "old" not in text
    for shown in (text, page.read_text()):
        row = compared.iloc[0]
        assert f"{100 * row['value']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]" in shown
        assert "| LoRA, twice the steps | " in shown and "With twice the steps" in shown
        for path in re.findall(r"!\[.*?\]\((.*?)\)", shown):
            assert ((root if shown is text else page.parent) / path).exists()
    assert "baselines.png" in page.read_text() and "What training a run costs" in page.read_text()
    assert "What training a run costs" not in text, "README has the headlines alone"


def test_the_page_says_what_its_tables_alone_do_not_show(tmp_path):
    """What Holm's adjustment leaves of a verdict, the tasks compared, rates that are shared, and the cache's cost."""
    cells = {"value": 0.02, "low": 0.01, "high": 0.03, "n": 3, "of": "seeds", "seeds": 3, "margin": 0.05}
    cells |= {"verdict": "equivalent", "p_difference": 0.01, "detectable": 0.02, "method": "lora-fa"}
    arms = [
        cells | {"arm": arm, "title": arm, "task": task, "p_holm": p}
        for arm, p in (("shown", 0.049), ("lost", 0.05))
        for task in ("a", "b", "mean over tasks")
    ]
    pd.DataFrame(arms).to_csv(tmp_path / "baselines.csv", index=False)
    pd.DataFrame([{"notebook": "01_lori", "runs": 1, "planned": 2}]).to_csv(tmp_path / "runs.csv", index=False)
    sparse = [cells | {"task": "a", "sparsity": s, "value": v} for s, v in ((0.0, 0.5), (0.9, 0.625))]
    pd.DataFrame(sparse).to_csv(tmp_path / "sparsity.csv", index=False)
    sizes = {"lora": ("LoRA", 1000), "lori-s": ("LoRI-S", 51)}
    paid = {"training_pflops": 0.5, "calibration_pflops": 0.25, "value": 0.5}
    costs = pd.DataFrame(
        [cells | paid | {"arm": a, "title": t, "trainable_parameters": n} for a, (t, n) in sizes.items()]
    )
    costs.assign(prefix_pflops=0.75).to_csv(tmp_path / "baseline_costs.csv", index=False)
    costs.to_csv(tmp_path / "costs.csv", index=False)
    shown, readme = (made(tmp_path, "make") for made in (reference_text.page, reference_text.headlines))
    assert "equivalent* |" in shown and "equivalent*† |" in shown
    assert "| shown | +2.0 [+1.0, +3.0], equivalent* | 2.0 |" in readme
    assert "| lost | +2.0 [+1.0, +3.0], equivalent*† | 2.0 |" in readme
    assert "against tuned LoRA on `a` and `b`:" in readme
    assert "| 0.9 | 0.625 [0.010, 0.030] | 3 seeds |" in shown and reference_text.SPARSITY in shown
    assert "takes another 0.7500 PFLOPs:" in shown
    costs.assign(prefix_pflops=0.0).to_csv(tmp_path / "baseline_costs.csv", index=False)
    assert "mean score there:" in reference_text.page(tmp_path, "make")  # nothing is cached
    pd.DataFrame(arms).to_csv(tmp_path / "methods.csv", index=False)
    assert "Of LoRA's 1,000 trained parameters: LoRI-S 5.1 %." in reference_text.headlines(tmp_path, "make")


# Several tasks in one adapter


def test_every_official_metric_of_an_encoders_tasks_is_on_the_page(
    tiny_encoder, home, registries, tmp_path, monkeypatch
):
    monkeypatch.setattr(ledger, "ledger_folder", lambda: tmp_path / "ledger")
    for number in (0, 1):

        @task(
            f"odd-{number}", domain="own", metric="accuracy", also=("matthews",) * number, licence="own",
            reads="encoder", labels=("even", "odd"),
        )  # fmt: skip
        def odd(split, number=number):
            for value in range(40):
                answer = (value + number) % 2
                yield Example(prompt=f"{number} {value}", answer=("even", "odd")[answer], target=answer)

    small = {"last_layers": 2, "rank": 2, "steps": 2, "joint_steps": 2, "test_rows": 12, "arms": []}
    settings = load_settings("smoke", base=str(tiny_encoder), tasks=["odd-0", "odd-1"], seed=[0, 1], **small)
    monkeypatch.setenv("LORI_NB_BATCH", "1")
    results = collect("03_ortho_lora", settings)  # in this process, which knows the tasks
    others = sharing.other_metrics(results)
    assert set(others["task"]) == {"odd-1"} and set(others["metric"]) == {"matthews"} and set(others["seeds"]) == {2}
    runs = [run for run in results.runs.values() if run.spec.tasks == ("odd-1",)]
    alone = others.set_index("arrangement").loc["single", "value"]
    assert len(runs) == 2 and alone == pytest.approx(np.mean([run.value("odd-1", "matthews") for run in runs]))
    measuring.measure(settings, ["03_ortho_lora"], jobs=1)
    (tmp_path / "project").mkdir()
    _, page = marked(tmp_path / "project", slug(settings))
    reference.write_reference(settings, ["03_ortho_lora"], tmp_path / "project")
    assert "odd-1: matthews (n = 2 seeds)" in page.read_text()


@pytest.fixture
def several(settings, tmp_path):
    """The same study on two tasks, which are not those of the profile, and a project of its own."""
    (tmp_path / "project").mkdir()
    tasks = ("chain_sum", "word_sequence_reversal")
    return replace(settings, tasks=tasks, mask_tasks=tasks[:1], arm_tasks=tasks[:1], first=tasks[0], joint_steps=4)


def test_ways_to_share_an_adapter_are_read_from_the_ledger_without_their_runs(several, tmp_path):
    measuring.measure(several, ["03_ortho_lora"], jobs=1)
    here = collect("03_ortho_lora", several, train=False)
    wanted, costs = conflict.conflict_map(here), sharing.arrangement_costs(here)
    rates, cosines = conflict.conflict_rates(here), conflict.task_cosines(here)
    shutil.rmtree(Store().root)
    assert measuring.measure(several, ["03_ortho_lora"], jobs=1) == [], "neither scores nor conflicts again"
    root = tmp_path / "project"
    readme, page = marked(root, slug(several))
    readme.write_text(f"{readme.read_text()} <!-- smoke --> of other tasks <!-- /smoke -->")
    written = {path.name: path for path in reference.write_reference(several, ["03_ortho_lora"], root)}
    kept = pd.read_csv(written["conflicts.csv"])
    assert len(kept) == len(wanted) > 0
    for column in ("between", "low", "within"):
        assert kept[column].to_numpy() == pytest.approx(wanted[column].to_numpy(), abs=1e-5)  # kept in float32
    assert kept["inside"].tolist() == wanted["inside"].tolist()
    by_tasks = pd.read_csv(written["task_cosines.csv"])
    assert by_tasks[["task", "other"]].to_numpy().tolist() == cosines[["task", "other"]].to_numpy().tolist()
    assert by_tasks["value"].to_numpy() == pytest.approx(cosines["value"].to_numpy(), abs=1e-6) and len(by_tasks) == 3
    of_ledger = conflict.excess_conflict(conflict_records.kept_of(several, "joint"))[0]
    assert of_ledger.mean == pytest.approx(conflict.excess_conflict(rates)[0].mean, abs=1e-6)
    assert {"recovery.pdf", "conflict_map.svg", "arrangements.csv", "recovery.csv"} <= set(written)
    assert conflict.rate_line(pd.read_csv(written["conflict_rates.csv"])) in readme.read_text()
    assert "| Ortho-LoRA | " in page.read_text().partition("What training costs, all adapters")[2]
    text = readme.read_text()
    assert "| single − joint |" in page.read_text() and "| Ortho-LoRA − joint |" in page.read_text()
    assert "conflict_map.png" in page.read_text() and "| Ortho-LoRA |" in page.read_text()
    assert "of other tasks" in text and "old" not in text and "| Ortho-LoRA |" in text
    for name in ("recovery", "conflict_map"):
        assert f"](figures/reference/{slug(several)}/{name}.png)" in text and f"{name}.png" in written
    assert "The paper's 95% of the gap (arXiv 2601.09684) is " in text
    assert "--profile smoke --tasks chain_sum,word_sequence_reversal --notebooks 03_ortho_lora" in text
    # what it costs: one adapter a task, or one in all, which sees as many rows a step
    assert costs.set_index("arm")["adapters"].to_dict() == {"single": 2, "joint": 1, "ortho-lora": 1}
    sizes = costs.set_index("arm")["trainable_parameters"]
    assert sizes["single"] == 2 * sizes["joint"] == 2 * sizes["ortho-lora"]
    operations = costs.set_index("arm")["training_pflops"]
    assert operations["joint"] == operations["ortho-lora"] > 0
    assert len(pd.read_csv(written["arrangement_costs.csv"])) == 3


def test_studies_of_other_tasks_have_names_of_their_own(several, settings):
    plain = load_settings("smoke")
    assert slug(plain) == "smoke" and measuring.command_of(plain, ["01_lori"]).endswith("smoke --notebooks 01_lori")
    others = load_settings("standard", tasks="rte,mrpc,cola,sst2,stsb")
    assert slug(others) == "standard-tasks-rte-mrpc-cola-sst2-stsb"
    assert slug(others) != slug(load_settings("standard", tasks="rte,mrpc")) != slug(load_settings("standard"))
    words = "--profile standard --tasks rte,mrpc,cola,sst2,stsb --notebooks 03_ortho_lora"
    assert measuring.command_of(others, ["03_ortho_lora"]) == f"lori-nb measure {words}"


def test_joint_training_and_ortho_lora_come_before_the_other_ways(several):
    several = replace(several, joint_arms=("joint", "joint-wide", "ortho-lora", "pcgrad"))
    specs = measuring.planned(several, ["03_ortho_lora"])
    joint = [spec for spec in specs if len(spec.tasks) > 1]
    first = {resolve(joint_arm_spec(several, name, s)).hash for name in ("joint", "ortho-lora") for s in several.seed}
    assert {spec.hash for spec in joint[:4]} == first and len(joint) == 8
    alone = {spec.hash for spec in specs if len(spec.tasks) == 1}
    assert {spec.hash for spec in specs[:8]} == alone | first, "what the others are held against"
    assert [spec.seed for spec in specs[:8]] == [0] * 4 + [1] * 4


def test_counts_of_other_notebooks_stay(tmp_path):
    counts = pd.DataFrame({"notebook": ["03_ortho_lora"], "runs": [8], "planned": [8]})
    path = tmp_path / "runs.csv"
    assert reference._with_others(counts, path).equals(counts)
    path.write_text("notebook,runs,planned\n01_lori,5,9\n03_ortho_lora,1,8\n")
    assert reference._with_others(counts, path).to_numpy().tolist() == [["01_lori", 5, 9], ["03_ortho_lora", 8, 8]]

"""Learning rates: grids for every method, growth at the edge, and nothing run that the ledger holds."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest

from lori_nb.lab import ledger
from lori_nb.lab.methods import METHODS, method
from lori_nb.lab.resolving import resolve
from lori_nb.lab.runs import Store, unmeasured
from lori_nb.study import tuning
from lori_nb.study.joint_arms import joint_arm_spec
from lori_nb.study.profiles import load_settings
from lori_nb.study.sequences import steps_after


@pytest.fixture
def settings(tiny_decoder):
    changes = {"last_layers": 2, "rank": 2, "steps": 2, "joint_steps": 2, "train_rows": 16}
    return load_settings("smoke", base=str(tiny_decoder), dtype="float32", tasks=["chain_sum"], **changes)


@pytest.fixture
def own_ledger(tmp_path, monkeypatch):
    """A ledger with nothing in it."""
    monkeypatch.setattr(ledger, "ledger_folder", lambda: tmp_path / "ledger")
    return tmp_path / "ledger"


@pytest.fixture
def own_method():
    @method("lori-d-own", like="lori-d", title="own")
    def penalty(live, step):
        return sum(low.B.square().sum() for low in live.values())

    yield "lori-d-own"
    METHODS.pop("lori-d-own")


def test_every_method_that_trains_has_a_grid_around_that_of_its_like(own_method):
    trained = [name for name, chosen in METHODS.items() if chosen.trains]
    grids = tuning.first_grids([*trained, "joint"])
    assert set(grids) == {*trained, "joint"} and {len(rates) for rates in grids.values()} == {tuning.RATES}
    for arm, rates in grids.items():
        middle = rates[tuning.RATES // 2]
        assert middle == tuning.centre_of(arm) and rates == [middle * 2.0**step for step in range(-2, 3)]
    assert grids[own_method] == grids["lori-d"] != grids["lora"] == grids["dora"]
    assert max(grids["full"]) < max(grids["lora"])


def test_a_method_comes_after_the_one_that_calibrates_it():
    grids = list(tuning.first_grids(["lori-s", "lora", "lori-d"]))
    assert grids.index("lori-s") > grids.index("lori-d")


@pytest.mark.parametrize("name", ["base", "lorax", "lora "])
def test_what_cannot_be_tuned_is_named(name):
    with pytest.raises(ValueError, match=f"methods must be among lora, .*joint.*dora.*; found '{name}'"):
        tuning.first_grids(["lora", name])


def test_solvers_and_switched_ways_are_tuned_as_the_others_are():
    """So that no way to learn all tasks at once stands with a rate that was chosen for another."""
    names = ["mgda", "ortho-lora grouping=module"]
    settings = load_settings("quick", joint_arms=["joint", *names])
    grids = tuning.first_grids(names)
    assert grids == {name: tuning.first_grids(["ortho-lora"])["ortho-lora"] for name in names}
    for name in names:
        (spec,) = tuning.tuning_specs(settings, name, 1e-3)
        plain = joint_arm_spec(settings, name, settings.seed[0])
        assert spec.learning_rate == 1e-3 and spec.options == plain.options and spec.tasks == settings.tasks


def test_methods_that_project_are_tuned_on_all_tasks_at_once():
    settings = load_settings("quick")
    for arm in ("joint", "ortho-lora", "ortho-lori-d"):
        (spec,) = tuning.tuning_specs(settings, arm, 1e-3)
        assert spec.tasks == settings.tasks and spec.learning_rate == 1e-3
        assert spec.method == ("lora" if arm == "joint" else arm)
    assert len(tuning.tuning_specs(settings, "dora", 1e-3)) == len(settings.tasks)


def test_a_choice_at_the_edge_widens_the_grid_and_one_inside_does_not(settings, home, own_ledger):
    """All scores are in the ledger, with a peak at 4e-3, so that nothing has to be trained."""
    specs = [spec for step in range(-3, 7) for spec in tuning.tuning_specs(settings, "lora", 1e-3 * 2.0**step)]
    about = {"task": "chain_sum", "metric": "exact_match", "split": "tune", "seed": 0, "n": 10}
    scores = [
        {"run": resolve(spec).hash, "learning_rate": spec.learning_rate}
        | {"value": 1 - abs(math.log10(spec.learning_rate / 4e-3))}
        | about
        for spec in specs
    ]
    ledger.append(pd.DataFrame(scores), "tuning", "command")
    for first, tried in {
        (1e-3, 2e-3): [1e-3, 2e-3, 4e-3, 8e-3],
        (8e-3, 1.6e-2): [2e-3, 4e-3, 8e-3, 1.6e-2],
        (2e-3, 4e-3, 8e-3): [2e-3, 4e-3, 8e-3],
    }.items():
        table = tuning.tune(settings, {"lora": list(first)}, store=Store())
        assert sorted(table["learning_rate"].unique()) == tried
        assert table.loc[table["chosen"], "learning_rate"].unique() == [4e-3]
    assert not Store().hashes(), "what the ledger holds is not run"


def test_unmeasured_specs_are_those_that_the_ledger_lacks(settings, home, own_ledger):
    specs = tuning.tuning_specs(settings, "lora", 1e-3) + tuning.tuning_specs(settings, "lora", 2e-3)
    assert unmeasured(specs) == [resolve(spec) for spec in specs]
    row = {"run": resolve(specs[0]).hash, "task": "chain_sum", "metric": "exact_match", "split": "tune"}
    ledger.append(pd.DataFrame([row | {"value": 0.5, "n": 10}]), "one", "command")
    assert unmeasured(specs) == [resolve(specs[1])]


def test_tuning_one_arm_keeps_the_published_rows_of_others(own_ledger, tmp_path):
    def table(arm: str, rate: float) -> pd.DataFrame:
        about = {"task": "t", "seed": 0, "metric": "accuracy", "split": "tune", "value": 0.5, "n": 8, "chosen": True}
        return pd.DataFrame([{"arm": arm, "learning_rate": rate, "run": f"{arm}{rate}", **about}])

    tuning.publish(table("lora", 1e-3), "mine")
    tuning.publish(table("dora", 1e-3), "mine")
    _, csv = tuning.publish(table("lora", 2e-3), "mine")
    found = pd.read_csv(csv)
    assert list(zip(found["arm"], found["learning_rate"], strict=True)) == [("dora", 1e-3), ("lora", 2e-3)]


def test_rates_for_other_tasks_have_a_table_of_their_own(own_ledger):
    plain, others = load_settings("standard"), load_settings("standard", tasks="rte,stsb", seed=0)
    assert tuning.table_name(plain) == "standard" and tuning.table_name(others) == "standard-tasks-rte-stsb"
    about = {"task": "rte", "seed": 0, "metric": "accuracy", "split": "tune", "value": 0.5, "n": 8, "chosen": True}
    table = pd.DataFrame([{"arm": "joint", "learning_rate": 1e-3, "run": "a", **about}])
    added, csv = tuning.publish(table, tuning.table_name(others), "--profile standard --tasks rte,stsb --seed 0")
    assert csv.name == "tuning-standard-tasks-rte-stsb.csv"
    words = "lori-nb tune --profile standard --tasks rte,stsb --seed 0 --methods joint"
    assert pd.read_parquet(added)["command"].unique().tolist() == [words]


def test_rates_tuned_at_other_steps_are_another_table():
    usual = load_settings("standard", tasks=["rte", "stsb"])
    shorter = replace(usual, **tuning.fixed_steps(250))
    assert tuning.table_name(usual) == "standard-tasks-rte-stsb"
    assert tuning.table_name(shorter) == "standard-tasks-rte-stsb-250-steps"
    specs = [spec for arm in ("lora", "joint") for spec in tuning.tuning_specs(shorter, arm, 1e-3)]
    assert {spec.trained_steps for spec in specs} == {250}
    assert steps_after(shorter, "stsb") == 250 != steps_after(usual, "stsb")


def test_every_way_to_share_an_adapter_is_tuned_on_the_encoder_s_tasks():
    settings = load_settings("standard", tasks="rte,mrpc,cola,sst2,stsb", seed=0)
    grids = tuning.first_grids(settings.joint_arms, "encoder")
    assert grids["joint"][tuning.RATES // 2] == grids["pcgrad"][tuning.RATES // 2] == 1e-3
    specs = tuning.first_specs(settings, grids)
    assert set(grids) == set(settings.joint_arms) and len(specs) == len(grids) * tuning.RATES
    assert {spec.tasks for spec in specs} == {settings.tasks} and {spec.base for spec in specs} == {settings.base}
    assert settings.base == "all-minilm-l6-v2"
    assert {spec.score_on for spec in specs} == {"tune"} and len({spec.learning_rate for spec in specs}) > tuning.RATES
    assert len(tuning.first_specs(settings, {"lora": [1e-3]})) == len(settings.tasks)

"""Profiles, plans and costs: what a study will train, known before it trains anything."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from transformers import LlamaConfig

from lori_nb.lab.models import KNOWN_CONFIGS, empty_body
from lori_nb.lab.resolving import check, resolve
from lori_nb.lab.specs import RunSpec
from lori_nb.study import profiles
from lori_nb.study.arms import arm_spec, get_arm
from lori_nb.study.cells import base_runs, joint, single
from lori_nb.study.cost import cost_of, trainable_parameters
from lori_nb.study.joint_arms import joint_arm_spec
from lori_nb.study.plans import PLANS, method_specs
from lori_nb.study.profiles import NOTEBOOKS, as_parameters, load_settings, profile_names, read_profile
from lori_nb.study.sequences import orders_of, stage_runs
from lori_nb.study.sharing import rows_per_task
from lori_nb.study.tuning import CENTRES, RATES, TUNED, first_grids, tuning_specs

LLAMA = "meta-llama/Meta-Llama-3-8B"


PROFILES = ("paper", "paper-mistral", "paper-r64", "quick", "smoke", "standard")


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_loads_and_every_notebook_has_a_plan(name):
    settings = load_settings(name)
    assert set(PLANS) == set(NOTEBOOKS)
    for notebook in NOTEBOOKS:
        assert PLANS[notebook](settings), notebook
    assert tuple(profile_names()) == PROFILES


def test_a_profile_takes_over_what_it_does_not_say():
    paper, larger, mistral = (load_settings(name) for name in ("paper", "paper-r64", "paper-mistral"))
    assert (larger.rank, larger.alpha, larger.base) == (64, 128, paper.base)
    assert mistral.base == "mistralai/Mistral-7B-v0.1" and mistral.batch_size == paper.batch_size == 32
    assert larger.learning_rate["lori-s"] == 10 * larger.learning_rate["lori-d"] == 1e-4


def test_a_task_may_have_steps_of_its_own():
    settings = load_settings("paper")
    steps = {task: single(settings, "lori-s", task, 0) for task in settings.tasks}
    assert {task: spec.steps for task, spec in steps.items()} == {"boolq": 265, "gsm8k": 630, "refusal": 48}
    assert all(spec.calibration.steps == spec.steps for spec in steps.values())
    assert arm_spec(settings, "lora-longer", "gsm8k", 0).steps == 2 * 630
    with pytest.raises(ValueError, match="task_steps of gsm8k must be a number; found 'many'"):
        load_settings("paper", task_steps={"gsm8k": "many"})


def test_lori_s_is_calibrated_by_the_very_lori_d_runs_that_the_study_trains_anyway():
    settings = load_settings("quick")
    planned = set(PLANS["01_lori"](settings)) | set(PLANS["06_forgetting"](settings))
    sparse = [spec for spec in planned if spec.method == "lori-s" and spec.kind == "run"]
    assert len(sparse) == 8  # four tasks, and two after the first one with masks of two kinds
    for spec in sparse:
        assert spec.calibration in planned
        assert spec.calibration.method == "lori-d" and spec.calibration.tasks == spec.tasks
        assert spec.calibration.start is None  # also of what goes on from another task


def test_forgetting_starts_with_safety_and_scores_every_task():
    settings = load_settings("quick")
    later = [spec for spec in PLANS["06_forgetting"](settings) if spec.kind == "run" and spec.start is not None]
    assert settings.sequence[0] == "refusal"
    assert {spec.start.tasks for spec in later} == {settings.sequence[:1], settings.sequence[1:2]}
    probes = [spec for spec in PLANS["06_forgetting"](settings) if spec.kind == "merge" and spec.evaluate]
    scored = {*settings.sequence, "refusal_harmless"}
    assert {spec.scored for spec in probes} == {tuple(sorted(scored))}
    assert {run for spec in probes for run in spec.parts} >= set(later)
    assert {bool(spec.watch) for spec in later if spec.start.start is None} == {True}


def test_profile_standard_studies_all_orders_and_one_sequence_of_real_data():
    settings = load_settings("standard")
    assert settings.sequence[0] == "refusal" and len(settings.sequence) == 4 and len(settings.seed) >= 5
    every = {way for way in settings.ways if len(orders_of(settings, way)) == 6}
    assert every == {"lora", "lori-d", "lori-s", "lori-s-disjoint"}
    assert "lori-s-chained" not in settings.ways
    assert {len(orders_of(settings, way)) for way in settings.ways if way not in {*every, "joint"}} == {3}
    glue = load_settings("standard", tasks=["mrpc", "cola", "sst2"])
    assert glue.base == "all-minilm-l6-v2" and glue.sequence == ("mrpc", "cola", "sst2")
    assert {len(orders_of(glue, way)) for way in glue.ways} == {1}
    assert glue.sequence_rows == glue.test_rows and glue.sequence_scored == glue.capacity_tasks == ()
    chains = [stage_runs(glue, way, glue.sequence, 0) for way in ("lora", "lori-s-disjoint")]
    assert {run.steps for chain in chains for run in chain} == {glue.steps}
    assert PLANS["06_forgetting"](glue)


def test_the_report_asks_for_nothing_new():
    settings = load_settings("quick")
    others = {spec for name in NOTEBOOKS[:-1] for spec in PLANS[name](settings)}
    assert set(PLANS["07_report"](settings)) == others


def test_a_seed_list_multiplies_the_runs_and_one_seed_does_not():
    one, two = (PLANS["04_interference"](load_settings("quick", seed=seeds)) for seeds in (0, [0, 1]))
    assert len(two) == 2 * len(one)
    assert {spec.seed for spec in two} == {0, 1}


def test_encoder_tasks_on_a_decoder_have_the_decoder_s_settings():
    decoder = load_settings("quick", base="smollm2-135m-instruct", tasks=["rte", "sst2"])
    plain, encoder = load_settings("quick"), load_settings("quick", base="all-minilm-l6-v2", tasks=["rte", "sst2"])
    assert (decoder.learning_rate, decoder.last_layers) == (plain.learning_rate, plain.last_layers)
    assert encoder == load_settings("quick", tasks=["rte", "sst2"]) and encoder.learning_rate != plain.learning_rate


def test_encoder_tasks_bring_their_base_and_need_no_few_shot_runs():
    settings = load_settings("smoke", tasks="glue")
    assert settings.tasks == ("rte", "mrpc", "cola", "sst2", "stsb", "qnli")
    assert settings.base == "all-minilm-l6-v2"
    assert settings.first == "rte" and settings.mask_tasks == ("rte",)
    assert not [spec for spec in PLANS["01_lori"](settings) if spec.method == "base"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stepss": 3}, "unknown parameter 'stepss'.*did you mean 'steps'"),
        ({"tasks": "chain_sums"}, "task must be one of .*chain_sum.*found 'chain_sums'"),
        ({"method": "lorax"}, "method must be one of base, lora, .*found 'lorax'"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\); found 1.0"),
        ({"steps": "many"}, "steps must be a number; found 'many'"),
        ({"rank": 2.5}, "rank must be a whole number; found 2.5"),
        ({"subspace": "own"}, "subspace must be one of independent, shared, orthogonal; found 'own'"),
        ({"mask_scope": "block"}, "mask_scope must be one of model, layer, .*found 'block'"),
        ({"first": "gsm8k"}, "first must be one of refusal, .*; found 'gsm8k'"),
        ({"seed": []}, "seed must hold at least one value"),
        ({"merges": "tiess"}, "merge must be one of cat, linear.*; found 'tiess'"),
    ],
)
def test_bad_settings_are_named_before_any_work(changes, words):
    with pytest.raises(ValueError, match=words):
        load_settings("quick", **changes)


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(ValueError, match="profile must be one of paper, .*, smoke, standard; found 'quik'"):
        load_settings("quik")


def test_numbers_may_arrive_as_text():
    settings = load_settings("quick", sparsity="5e-1", seed="0", steps="10")
    assert (settings.sparsity, settings.seed, settings.steps) == (0.5, (0,), 10)


def test_parameters_of_a_notebook_are_plain_values():
    found = as_parameters(load_settings("quick", seed=3), ["profile", "seed", "method", "tasks"])
    assert found["seed"] == 3 and found["profile"] == "quick"
    assert found["method"] == ["lora", "lori-d", "lori-s"]


def test_a_method_without_a_rate_is_an_error():
    settings = replace(load_settings("quick"), learning_rate={"lora": 1e-3})
    with pytest.raises(ValueError, match="learning_rate must hold a rate for lori-d"):
        single(settings, "lori-d", "chain_sum", 0)


@pytest.mark.parametrize(
    ("method", "sparsity", "count"),
    [("lora", 0.0, 83_886_080), ("lori-d", 0.0, 44_040_192), ("lori-s", 0.9, 4_404_019)],
)
def test_trainable_parameters_of_llama_3_8b_are_the_papers(method, sparsity, count):
    assert LLAMA in KNOWN_CONFIGS
    spec = RunSpec(method, ("chain_sum",), base=LLAMA, rank=32, last_layers=None, sparsity=sparsity)
    assert trainable_parameters(spec) == count


@pytest.mark.parametrize(
    ("base", "modules", "method", "count"),
    [
        # r (d_in + d_out) a module for LoRA, r d_out for LoRI-D; query and value are d × d
        ("FacebookAI/roberta-base", "query,value", "lora", 12 * 2 * 8 * (768 + 768)),
        ("FacebookAI/roberta-base", "query,value", "lori-d", 12 * 2 * 8 * 768),
        ("FacebookAI/roberta-base", "all-linear", "lora", 12 * 8 * (4 * 2 * 768 + 2 * (768 + 3072))),
        ("FacebookAI/roberta-large", "query,value", "ortho-lora", 24 * 2 * 8 * (1024 + 1024)),
        ("FacebookAI/roberta-large", "all-linear", "ortho-lori-d", 24 * 8 * (4 * 1024 + 4096 + 1024)),
    ],
)
def test_trainable_parameters_of_roberta(base, modules, method, count):
    assert base in KNOWN_CONFIGS, "the hub is not asked"
    assert next(empty_body(base).parameters()).is_meta
    spec = RunSpec(method, ("rte", "stsb"), base=base, rank=8, modules=modules, last_layers=None)
    assert trainable_parameters(spec) == count


def test_glue_in_profile_paper_is_for_roberta_and_shares_rows_and_steps():
    settings = load_settings("paper", tasks="glue,mnli,qqp")
    assert settings.base == "FacebookAI/roberta-base" and len(settings.tasks) == 8 and len(settings.seed) == 5
    large = load_settings("paper", tasks="glue", base="FacebookAI/roberta-large")
    assert large.base == "FacebookAI/roberta-large" and large.tasks == settings.tasks[:6]
    specs = PLANS["03_ortho_lora"](settings)
    alone = {(s.steps, s.batch_size) for s in specs if len(s.tasks) == 1}
    together = {(s.steps, s.batch_size // len(s.tasks)) for s in specs if len(s.tasks) > 1}
    assert alone == together == {(4000, 32)}
    for spec in specs:
        check(spec)
    counts = {name: trainable_parameters(joint_arm_spec(settings, name, 0)) for name in settings.joint_arms}
    assert counts["joint"] == counts["ortho-lora"] == 294_912 and counts["joint-wide"] == 8 * 294_912
    assert counts["joint-lori-d"] == counts["ortho-lori-d"] == 294_912 // 2


def test_the_settings_of_encoders_are_checked_too(tmp_path, monkeypatch):
    values = {"encoder": {"base": "all-minilm-l6-v2", "joint_step": 3}}
    monkeypatch.setattr(profiles, "read_profile", lambda name: read_profile("smoke") | values)
    with pytest.raises(ValueError, match="profile smoke, encoder: unknown parameter 'joint_step'; .*'joint_steps'"):
        load_settings("smoke")


def test_the_cost_of_a_run_grows_with_its_steps_and_layers():
    base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    short = RunSpec("lora", ("chain_sum",), base=base, steps=10)
    assert cost_of(replace(short, steps=20)).seconds > cost_of(short).seconds
    assert cost_of(replace(short, last_layers=None)).seconds > 3 * cost_of(short).seconds
    assert cost_of(short).parameters == 8 * 16 * (4 * 576 + 2 * 192 + 576 * 2 + 2 * 1536 + 2 * 576 + 576 + 1536)


def test_every_arm_is_tuned_with_as_many_rates_around_its_centre():
    grids = first_grids()
    assert {len(rates) for rates in grids.values()} == {RATES}
    assert all(rates == sorted(rates) and CENTRES["decoder"][arm] in rates for arm, rates in grids.items())
    with pytest.raises(ValueError, match="methods must be among lora, .*found 'lorax'"):
        first_grids(["lorax"])


def test_tuning_scores_on_rows_held_out_of_training_and_of_the_test():
    settings = load_settings("quick")
    for arm in TUNED:
        specs = tuning_specs(settings, arm, 1e-3)
        assert {spec.score_on for spec in specs} == {"tune"}
        assert {spec.learning_rate for spec in specs} == {1e-3}
    dense = tuning_specs(settings, "lori-d", settings.learning_rate["lori-d"])
    sparse = tuning_specs(settings, "lori-s", 1e-3)
    assert [spec.calibration for spec in sparse] == dense  # one run serves both


def test_joint_training_is_one_run_over_all_tasks():
    settings = load_settings("quick")
    spec = joint(settings, "ortho-lora", 0)
    assert spec.tasks == settings.tasks and spec.steps == settings.joint_steps


def test_a_base_is_made_ready_outside_the_meta_device(monkeypatch):
    # On a fresh machine the configuration comes with dequantized weights, which cannot be loaded onto the meta device.
    def config():
        assert torch.get_default_device().type == "cpu"
        return LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)

    monkeypatch.setitem(KNOWN_CONFIGS, "someone/something", config)
    assert next(empty_body("someone/something").parameters()).is_meta


# Arms: one thing changed at a time


ALONE = {  # arm → the fields in which its run differs from that of its method
    "lora-longer": {"steps"},
    "lori-d-longer": {"steps"},
    "lori-s-longer": {"steps", "calibration"},
    "lori-d-at-s-rate": {"learning_rate"},
    "lori-s-at-d-rate": {"learning_rate"},
    "lori-s-fresh-a": {"mask_origin"},
    "lori-s-random": {"mask_origin", "calibration"},
    "lori-s-rows": {"mask_structure"},
    "lori-s-early": {"calibration"},
    "lori-s-layer": {"mask_scope"},
    "lora-shared": {"subspace"},
    "lori-d-orthogonal": {"subspace", "family"},
    "lori-s-orthogonal": {"subspace", "family", "calibration"},
}


@pytest.mark.parametrize("name", ALONE)
def test_an_arm_changes_one_thing_alone(name):
    settings = load_settings("quick")
    arm = get_arm(name)
    plain, changed = (arm_spec(settings, each, "chain_sum", 3) for each in (arm.method, name))
    differ = {f.name for f in fields(RunSpec) if getattr(plain, f.name) != getattr(changed, f.name)}
    assert differ == ALONE[name]
    check(changed)


def test_arms_of_lori_s_are_calibrated_alike():
    """A fresh A, another scope or structure is chosen from the very calibration run of LoRI-S itself."""
    settings = load_settings("quick")
    plain = arm_spec(settings, "lori-s", "chain_sum", 0)
    for name in ("lori-s-fresh-a", "lori-s-rows", "lori-s-matrix", "lori-s-at-d-rate"):
        assert arm_spec(settings, name, "chain_sum", 0).calibration == plain.calibration
    early = arm_spec(settings, "lori-s-early", "chain_sum", 0).calibration
    assert early.stop_after == round(0.1 * settings.steps)
    assert replace(early, stop_after=None) == plain.calibration
    assert arm_spec(settings, "lori-s-shared", "chain_sum", 0).calibration.subspace == "shared"
    longer = arm_spec(settings, "lori-s-longer", "chain_sum", 0)
    assert longer.calibration == arm_spec(settings, "lori-d-longer", "chain_sum", 0)


def test_arms_are_planned_where_their_question_is_asked():
    settings = load_settings("quick", arms=["lora-longer", "lori-s-random", "lora-shared"], arm_tasks=["refusal"])
    before = load_settings("quick")
    for notebook, name in {
        "01_lori": "lora-longer",
        "02_masks": "lori-s-random",
        "04_interference": "lora-shared",
    }.items():
        added = set(PLANS[notebook](settings)) - set(PLANS[notebook](before))
        assert arm_spec(settings, name, "refusal", 0) in added
        assert added <= {arm_spec(settings, each, "refusal", 0) for each in (name, "lora", "lori-s")}


def test_longer_arms_are_planned_on_every_task_with_what_they_stand_beside():
    settings = load_settings("quick", arms=["lori-s-longer"], arm_tasks=["refusal"])
    added = set(PLANS["01_lori"](settings)) - set(PLANS["01_lori"](load_settings("quick")))
    pair = ("lora-longer", "lori-s-longer")
    assert added == {arm_spec(settings, name, task, 0) for name in pair for task in settings.tasks}


def test_at_twice_the_steps_methods_have_every_seed_and_the_check_of_a_plateau_as_other_arms():
    settings = load_settings("quick", seed=[4, 2, 7], arm_seeds=1, arms=["lori-d-longer", "lora-longest"])
    planned = set(PLANS["01_lori"](settings))
    for name, seeds in {"lora-longer": {4, 2, 7}, "lori-d-longer": {4, 2, 7}, "lora-longest": {4}}.items():
        for task in settings.tasks:
            assert {s for s in settings.seed if arm_spec(settings, name, task, s) in planned} == seeds, (name, task)


LONGER = ["joint", "ortho-lora", "joint-longer", "ortho-lora-longer"]


def test_what_is_compared_with_the_methods_may_have_fewer_seeds():
    arms = {"arms": ["lora-longer", "lori-s-random", "lora-shared"], "joint_arms": [*LONGER, "gradvac"]}
    settings = load_settings("quick", seed=[4, 2, 7], arm_seeds=2, **arms)
    methods = set(map(resolve, method_specs(settings)))
    assert {spec.seed for spec in methods} == {4, 2, 7}
    for notebook in ("01_lori", "02_masks", "04_interference"):
        others = set(map(resolve, PLANS[notebook](settings))) - methods - set(map(resolve, base_runs(settings)))
        assert {spec.seed for spec in others} == {4, 2}, notebook
    shared = PLANS["03_ortho_lora"](settings)
    for name, seeds in {"joint": {4, 2, 7}, "ortho-lora-longer": {4, 2, 7}, "gradvac": {4, 2}}.items():
        assert {seed for seed in settings.seed if joint_arm_spec(settings, name, seed) in shared} == seeds
    assert load_settings("quick", seed=[4, 2, 7]).arm_seed == (4, 2, 7)
    assert load_settings("quick", seed=[4], arm_seeds=2).arm_seed == (4,)
    with pytest.raises(ValueError, match="arm_seeds must be at least 1, or none; found 0"):
        load_settings("quick", arm_seeds=0)


def test_switches_of_the_projection_follow_a_way_s_name():
    settings = load_settings("quick", joint_arms=["joint", "ortho-lora", "ortho-lora order=fixed grouping=module"])
    plain, changed = (joint_arm_spec(settings, name, 0) for name in settings.joint_arms[1:])
    assert changed == replace(plain, options=(("grouping", "module"), ("order", "fixed")))
    assert changed in PLANS["03_ortho_lora"](settings)
    assert dict(joint_arm_spec(settings, "pcgrad reference=projected", 0).options)["grouping"] == "adapter"
    assert dict(joint_arm_spec(settings, "gradvac beta=0.1", 0).options)["beta"] == "0.1"
    for wrong in (
        "gradvac beta=2",
        "ortho-lora beta=0.1",
        "ortho-lora order=some",
        "ortho-lora speed=fast",
        "joint order=fixed",
        "ortho-lora fixed",
    ):
        with pytest.raises(ValueError, match=f"joint_arms' switches .*order=random.fixed.mean.*; found '{wrong}'"):
            load_settings("quick", joint_arms=["joint", wrong])


def test_an_unknown_arm():
    with pytest.raises(ValueError, match="arms must be among .*lora-longer.*; found 'lora-long'"):
        PLANS["01_lori"](load_settings("quick", arms=["lora-long"]))


def test_a_joint_adapter_has_no_block_of_an_orthogonal_basis():
    settings = load_settings("quick", subspace="orthogonal")
    assert joint(settings, "lora", 0).subspace == "independent"
    assert single(settings, "lora", "refusal", 0).family == settings.tasks


def test_adapters_from_elsewhere_ask_for_no_run(tmp_path):
    settings = load_settings("quick", adapters=["somebody/lora", str(tmp_path)])
    assert settings.adapters == ("somebody/lora", str(tmp_path.resolve()))
    assert PLANS["04_interference"](settings) == [] != PLANS["04_interference"](load_settings("quick"))


def test_a_mask_for_all_tasks_is_calibrated_on_all_of_them():
    settings = load_settings("quick", calibration_share=0.5)
    spec = joint(settings, "ortho-lori-s", 3)
    check(spec)
    dense = spec.calibration
    assert (dense.method, dense.tasks, dense.seed) == ("lori-d", settings.tasks, 3)
    assert (dense.steps, dense.batch_size) == (settings.joint_steps, settings.joint_batch_size)
    assert dense.stop_after == settings.joint_steps // 2 and spec.stop_after is None
    assert joint(load_settings("quick"), "ortho-lori-s", 3).calibration.stop_after is None


@pytest.mark.parametrize(("tasks", "rows"), [(None, 1920), ("rte,mrpc,cola,sst2,stsb", 4000)])
def test_tasks_see_as_many_rows_and_steps_together_as_alone(tasks, rows):
    settings = load_settings("standard", **({} if tasks is None else {"tasks": tasks}))
    assert rows_per_task(settings) == (rows, rows) and settings.steps == settings.joint_steps
    assert len(settings.seed) == 5
    many, others = len(settings.tasks), len(settings.joint_arms) - len(LONGER)
    planned = PLANS["03_ortho_lora"](settings)
    assert len(set(planned)) == 5 * (2 * many + len(LONGER)) + len(settings.arm_seed) * others
    if tasks is not None:
        assert settings.base == "all-minilm-l6-v2"
        assert settings.test_rows >= 5463, "the largest official validation part is scored whole"


def test_merges_go_by_their_other_names_too():
    asked = ["knots", "task-arithmetic", "cat", "core-space", "ties"]
    assert load_settings("quick", merges=asked).merges == ("knots-ties", "cat", "core-ties", "ties")
    with pytest.raises(ValueError, match="merge must be one of .*; found 'knot'"):
        load_settings("quick", merges="knot")

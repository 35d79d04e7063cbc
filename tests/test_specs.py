"""Specs: a hash that is the same everywhere and follows every setting; bad settings are refused before any work."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace

import pytest
from tiny import output_of, python, sparse_spec, tiny_spec

from lori_nb.analysis.merging import merge_method
from lori_nb.lab import prefix
from lori_nb.lab.evaluation import register_metric
from lori_nb.lab.methods import method
from lori_nb.lab.resolving import check, recipes, resolve
from lori_nb.lab.specs import MergeSpec, RunSpec, canonical_json, from_payload, spec_json, to_payload, with_parents
from lori_nb.lab.tasks import Example, task
from lori_nb.lab.tasks.base import get_task, register


@pytest.fixture
def base(tiny_decoder, home):
    return tiny_decoder


# Another value of every field; parents and digests have tests of their own.
OTHER = {
    "method": "lori-d",
    "tasks": ("refusal",),
    "seed": 1,
    "rank": 8,
    "alpha": 9.0,
    "modules": "q_proj",
    "last_layers": 1,
    "subspace": "shared",
    "sparsity": 0.5,
    "mask_scope": "layer",
    "learning_rate": 0.011,
    "steps": 21,
    "batch_size": 9,
    "warmup": 0.2,
    "weight_decay": 0.1,
    "clip": 2.0,
    "train_rows": 33,
    "test_rows": 17,
    "score_on": "tune",
    "evaluate": ("chain_sum", "refusal"),
    "shots": 1,
    "dtype": "bfloat16",
    "options": (("grouping", "module"),),
    "family": ("chain_sum",),
    "mask_origin": "random",
    "mask_structure": "rows",
    "stop_after": 5,
    "schedule": "constant",
    "micro_batch_rows": 2,
    "checkpointing": True,
    "watch": (5,),
    "watch_rows": 4,
    "task_weights": (2.0,),
}


def test_every_field_changes_the_hash(base, tiny_encoder):
    assert set(OTHER) == {f.name for f in fields(RunSpec)} - {"base", "start", "calibration", "digests"}
    plain = tiny_spec(base)
    changed = [plain, *(replace(plain, **{name: value}) for name, value in OTHER.items())]
    changed += [replace(plain, base="smollm2-135m-instruct"), replace(plain, start=tiny_spec(base))]
    changed += [replace(plain, calibration=tiny_spec(base, "lori-d"))]
    hashes = [resolve(spec).hash for spec in changed]
    assert len(set(hashes)) == len(hashes)
    assert resolve(tiny_spec(base)).hash == hashes[0]


LATER = [f.name for f in fields(RunSpec) if not f.metadata.get("hashed_at_default", True)]


def test_a_field_that_came_later_changes_no_hash_at_its_default(base):
    assert "mask_origin" in LATER and "checkpointing" in LATER
    assert not set(LATER) & set(spec_json(tiny_spec(base)))
    for name in LATER:
        assert spec_json(replace(tiny_spec(base), **{name: OTHER[name]}))[name] == OTHER[name]
    old = {k: v for k, v in to_payload(tiny_spec(base)).items() if k not in LATER}
    assert from_payload(old) == tiny_spec(base)


def test_every_field_of_a_merge_changes_the_hash(base):
    parts = (tiny_spec(base), tiny_spec(base, tasks=["refusal"]))
    plain = MergeSpec(parts, (0.5, 0.5), test_rows=16)
    changed = [
        plain,
        replace(plain, parts=parts[::-1]),
        replace(plain, evaluate=("chain_sum",)),
        replace(plain, weights=(0.5, 0.4)),
        replace(plain, merge="linear"),
        replace(plain, test_rows=17),
        replace(plain, score_on="tune"),
    ]
    assert len({resolve(spec).hash for spec in changed}) == len(changed)
    assert resolve(plain).scored == ("chain_sum", "refusal")


def test_the_hash_is_the_same_in_another_process(base, home):
    spec = sparse_spec(base, start=sparse_spec(base))
    code = (
        "import sys, json\nfrom lori_nb.lab.resolving import resolve\n"
        "from lori_nb.lab.specs import from_payload\n"
        "spec = from_payload(json.loads(sys.argv[1]))\nprint(resolve(spec).hash)"
    )
    payload = json.dumps(to_payload(spec))
    assert output_of(python(code, payload, PYTHONHASHSEED="5")).split() == [resolve(spec).hash]


def test_payloads_come_back_whole(base):
    parts = (sparse_spec(base), tiny_spec(base, evaluate=("refusal",), options=(("order", "fixed"),)))
    for spec in (*parts, tiny_spec(base, start=parts[0]), MergeSpec(parts, (0.1, 0.2), "linear")):
        for each in (spec, resolve(spec)):
            assert from_payload(json.loads(json.dumps(to_payload(each)))) == each
    assert from_payload(None) is None


def test_resolving_settles_what_is_open(base):
    spec = resolve(tiny_spec(base, dtype="auto"))
    assert spec.dtype in ("float32", "bfloat16")
    assert resolve(spec) is spec
    assert {"base", "train:chain_sum", "test:chain_sum"} < set(dict(spec.digests))
    assert {name for name in dict(spec.digests) if name.startswith("recipe:")} == {f"recipe:{n}" for n in recipes()}
    with pytest.raises(ValueError, match="spec must be resolved before it is hashed; found an unresolved one: lora"):
        _ = tiny_spec(base).hash


def test_a_raised_recipe_changes_the_hash(base, monkeypatch):
    before = resolve(tiny_spec(base)).hash
    monkeypatch.setattr(prefix, "RECIPE", prefix.RECIPE + 1)
    assert resolve(tiny_spec(base)).hash != before


def test_recipes_of_long_rows_and_of_generated_answers_are_those_of_runs_that_have_them(base, registries):
    """Runs without them keep the hashes that they always had."""
    plain = get_task("chain_sum")

    def found(spec) -> set[str]:
        named = {label.removeprefix("recipe:") for label, _ in resolve(spec).digests if label.startswith("recipe:")}
        return named - set(recipes())

    def own(length: int, **changes) -> RunSpec:
        rows = [Example(prompt="x" * length + str(n), answer="y") for n in range(20)]
        register(replace(plain, name="own", load=lambda split: rows, **changes))
        return tiny_spec(base, tasks=["own"], train_rows=4, test_rows=4)

    written = {"scoring": "generate", "judge": lambda row, text: 0.0, "extra": {"max_new_tokens": 4}}
    assert found(own(300)) == set()
    assert found(own(500)) == {"cut"}
    assert found(own(300, **written)) == {"generation"}
    assert found(own(500, **written)) == {"cut", "generation"}
    assert found(replace(tiny_spec(base), evaluate=("chain_sum", "own"))) == {"cut", "generation"}
    assert found(MergeSpec((tiny_spec(base), own(500)), (1.0, 1.0))) == {"cut"}
    assert found(tiny_spec(base, "base", steps=0, shots=4)) == set()


def test_the_recipe_of_long_rows_is_not_that_of_encoders(tiny_encoder, home, registries):
    register(replace(get_task("rte"), load=lambda split: [Example("x" * 900, "entailment", "y", target=0)]))
    digests = dict(resolve(tiny_spec(tiny_encoder, tasks=["rte"], train_rows=1, test_rows=1)).digests)
    assert "recipe:cut" not in digests


def test_canonical_json_is_sorted_and_names_parents_by_hash(base):
    spec = resolve(sparse_spec(base))
    plain = json.loads(canonical_json(spec))
    assert list(plain) == sorted(plain)
    assert plain["calibration"] == spec.calibration.hash
    assert ": " not in canonical_json(spec)


def test_parents_come_first_and_once(base):
    first = sparse_spec(base)
    later = [sparse_spec(base, start=first, tasks=["refusal"]), MergeSpec((first,), (1.0,))]
    ordered = with_parents([resolve(spec) for spec in later])
    hashes = [spec.hash for spec in ordered]
    assert len(set(hashes)) == len(hashes) == 5
    for place, spec in enumerate(ordered):
        assert all(parent.hash in hashes[:place] for parent in spec.parents)


# What users register counts by its source


def test_a_registered_method_counts_by_its_source(base, registries):
    spec = replace(tiny_spec(base), method="lora-x")

    @method("lora-x", like="lora")
    def small(live, step):
        return 1e-4 * sum(low.B.square().sum() for low in live.values())

    first = resolve(spec).hash

    @method("lora-x", like="lora")
    def large(live, step):
        return 1e-2 * sum(low.B.square().sum() for low in live.values())

    assert resolve(spec).hash != first
    assert "method" not in dict(resolve(tiny_spec(base)).digests)


def test_a_task_registered_again_gives_other_digests(base, registries):
    spec = tiny_spec(base, tasks=["own"], train_rows=2, test_rows=2)

    def register(answer, metric="exact_match"):
        @task("own", domain="x", metric=metric, licence="own")
        def load(split):
            yield from (Example(prompt=f"{split} {i}", answer=answer) for i in range(2))

        return resolve(spec)

    one, two, same, other = register("a"), register("b"), register("b"), register("b", "accuracy")
    assert one.hash != two.hash == same.hash != other.hash
    assert dict(one.digests)["train:own"] != dict(two.digests)["train:own"]


def test_the_recipe_of_merges_on_cores_counts_for_these_alone(base, monkeypatch):
    merged = MergeSpec((tiny_spec(base),), (1.0,), "cat")
    hashes = {}
    for number in (2, 3):
        monkeypatch.setattr("lori_nb.analysis.spectral_merging.RECIPE", number)
        hashes[number] = [
            resolve(replace(merged, merge=way)).hash for way in ("cat", "svd", "ties", "tsv-m", "core-ties")
        ]
    assert [one == other for one, other in zip(*hashes.values(), strict=True)] == [True, True, True, False, False]


def test_the_recipe_of_what_is_drawn_counts_for_dare_alone(base, monkeypatch):
    merged = MergeSpec((tiny_spec(base),), (1.0,), "cat")
    ways, hashes = ("cat", "tsv-m", "ties", "magnitude", "dare", "dare-ties"), {}
    for number in (2, 3):
        monkeypatch.setattr("lori_nb.analysis.elementwise_merging.RECIPE", number)
        hashes[number] = [resolve(replace(merged, merge=way)).hash for way in ways]
    assert [one == other for one, other in zip(*hashes.values(), strict=True)] == [True] * 4 + [False] * 2


def test_registered_merges_and_metrics_count_by_their_source(base, registries):
    @merge_method("first")
    def first(factors, weights):
        return factors[0]

    merged = MergeSpec((tiny_spec(base),), (1.0,), "first")
    before = resolve(merged).hash

    @merge_method("first")
    def last(factors, weights):
        return factors[-1]

    assert resolve(merged).hash != before
    assert not any(name.startswith("merge:") for name, _ in resolve(replace(merged, merge="cat")).digests)

    @register_metric("half")
    def half(scored):
        return 0.5

    task("measured", domain="x", metric="half", licence="own")(lambda split: [Example(split, "b")])
    assert "metric:half" in dict(resolve(tiny_spec(base, tasks=["measured"])).digests)


# Bad settings


BAD = [
    ({"rank": 0}, "rank must be at least 1; found 0"),
    ({"steps": -1}, "steps must be at least 0; found -1"),
    ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\); found 1.0"),
    ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\); found -0.1"),
    ({"learning_rate": 0.0}, "learning_rate must be above 0; found 0.0"),
    ({"learning_rate": float("nan")}, "learning_rate must be above 0; found nan"),
    ({"warmup": 1.5}, r"warmup must be in \[0, 1\], a share of the steps; found 1.5"),
    ({"test_rows": 0}, "test_rows must be at least 1; found 0"),
    ({"score_on": "dev"}, "score_on must be one of train, tune, test; found 'dev'"),
    ({"subspace": "same"}, "subspace must be one of independent, shared, orthogonal; found 'same'"),
    ({"subspace": "orthogonal"}, "tasks must be one task of the family .* found chain_sum"),
    ({"schedule": "cosine"}, "schedule must be one of linear, constant; found 'cosine'"),
    ({"mask_structure": "row"}, "mask_structure must be one of entries, rows; found 'row'"),
    (
        {"method": "lori-s", "mask_origin": "same"},
        "mask_origin must be one of same-a, fresh-a, random, free; found 'same'",
    ),
    ({"stop_after": 0}, "stop_after must be between 1 and 20, steps; found 0"),
    ({"stop_after": 21}, "stop_after must be between 1 and 20, steps; found 21"),
    ({"mask_scope": "row"}, "mask_scope must be one of model, layer, projection, module, matrix; found 'row'"),
    ({"options": (("groupng", "module"),)}, "options must be among solver, grouping, .*; found 'groupng'"),
    ({"options": (("beta", "0.1"),)}, "options must be among solver, .*, reference; found 'beta'"),
    ({"options": (("solver", "gradvac"), ("beta", "2"))}, "beta of solver gradvac must be between 0 and 1; found 2"),
    (
        {"options": (("solver", "cagrad"), ("c", "much"))},
        "option c of solver cagrad must be a finite number; found 'much'",
    ),
    ({"method": "lorri"}, "method must be one of base, lora, lori-d, .*; found 'lorri'"),
    ({"method": "lori-s"}, "calibration of method lori-s must be a run; found None"),
    ({"tasks": ("chainsum",)}, "task must be one of .*chain_sum.*; found 'chainsum'"),
    ({"evaluate": ("chainsum",)}, "task must be one of .*chain_sum.*; found 'chainsum'"),
    ({"tasks": ("chain_sum", "refusal"), "batch_size": 1}, "batch_size must be at least one row a task, 2; found 1"),
    ({"tasks": ("cola",)}, "'cola' must have a metric of right and wrong answers for the decoder .*; matthews needs"),
    ({"dtype": "float16"}, "dtype must be auto, float32 or bfloat16; found 'float16'"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_bad_settings(base, change, words):
    with pytest.raises(ValueError, match=words):
        resolve(replace(tiny_spec(base), **change))


def test_an_encoder_needs_tasks_for_encoders(tiny_encoder, home):
    with pytest.raises(ValueError, match="'chain_sum' must be a classification or regression task for the encoder"):
        check(tiny_spec(tiny_encoder))


@pytest.mark.parametrize(("name", "metric"), [("mrpc", "f1"), ("qqp", "f1"), ("stsb", "pearson")])
def test_a_decoder_gives_no_predictions_for_any_of_a_task_s_metrics(base, name, metric):
    with pytest.raises(ValueError, match=f"task '{name}' must have a metric of right and wrong .*; {metric} needs an"):
        check(tiny_spec(base, tasks=[name]))
    check(tiny_spec(base, tasks=["rte"]))


def test_a_set_for_evaluation_only_is_scored_and_never_learned_from(base):
    words = r"splits of task 'advbench' that a run learns from must be some with train; found \('test',\)"
    plain = tiny_spec(base, evaluate=("advbench",))
    check(plain)
    check(replace(plain, method="base", tasks=("advbench",)))
    for change in ({}, {"method": "base", "shots": 4}):
        with pytest.raises(ValueError, match=words):
            check(replace(plain, tasks=("advbench",), **change))
    with pytest.raises(ValueError, match="score_on for task 'advbench' must be test; found 'tune'"):
        check(replace(plain, score_on="tune"))


def test_a_mask_belongs_to_the_A_that_it_is_used_with(base):
    plain = sparse_spec(base)
    check(plain)
    for change in ({"seed": 5}, {"subspace": "shared"}):
        other = replace(plain.calibration, **change)
        with pytest.raises(ValueError, match="seed and subspace of the calibration run must be the run's own"):
            check(replace(plain, calibration=other))
    with pytest.raises(ValueError, match="tasks of the calibration run must be the run's own"):
        check(replace(plain, calibration=replace(plain.calibration, tasks=("refusal",))))
    with pytest.raises(ValueError, match="start must be None with fresh-a, which draws another A"):
        check(replace(plain, mask_origin="fresh-a", start=plain))
    with pytest.raises(ValueError, match=f"found {re.escape(repr(plain.label))}$"):  # a label, no dump
        check(replace(plain, mask_origin="fresh-a", start=plain))
    with pytest.raises(ValueError, match="calibration of method lori-s must be None with mask_origin random"):
        check(replace(plain, mask_origin="random"))


def test_how_a_task_is_scored_counts(base, registries):
    before = resolve(tiny_spec(base)).hash
    plain = get_task("chain_sum")
    for change in ({"system": "Answer."}, {"also": ("accuracy",)}, {"extra": {"max_new_tokens": 3}}):
        register(replace(plain, **change))
        assert resolve(tiny_spec(base)).hash != before, change
    register(plain)
    assert resolve(tiny_spec(base)).hash == before


def test_parents_must_fit(base):
    with pytest.raises(ValueError, match="rank of the start run must be that of the run itself, 4; found 8"):
        check(tiny_spec(base, start=tiny_spec(base, rank=8)))
    with pytest.raises(
        ValueError, match="last_layers of the calibration run must be that of the run itself, 2; found 1"
    ):
        check(tiny_spec(base, "lori-s", sparsity=0.5, calibration=tiny_spec(base, "lori-d", last_layers=1)))
    check(tiny_spec(base, start=tiny_spec(base)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"merge": "cats"}, "merge must be one of cat, .*linear.*; found 'cats'"),
        ({"weights": (0.5,)}, r"weights must be 2 numbers, one a part; found \(0.5,\)"),
        ({"parts": ()}, "parts must be at least one run"),
    ],
)
def test_bad_merges(base, change, words):
    parts = (tiny_spec(base), tiny_spec(base, tasks=["refusal"]))
    with pytest.raises(ValueError, match=words):
        check(replace(MergeSpec(parts, (0.5, 0.5)), **change))
    with pytest.raises(ValueError, match="parts must be runs with one base and the same last_layers"):
        check(MergeSpec((parts[0], replace(parts[1], last_layers=1)), (0.5, 0.5)))

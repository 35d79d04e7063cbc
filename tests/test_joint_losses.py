"""Losses of tasks that share an adapter: regression in no unit of its own, weights that act alike in every arm."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from steps import Prepared
from tiny import gaussian, tiny_spec
from torchjd.aggregation import UPGrad

from lori_nb.lab import ledger, regression
from lori_nb.lab.gradients import TaskGradients
from lori_nb.lab.regression import Unit, unit_of
from lori_nb.lab.resolving import check, resolve
from lori_nb.lab.runs import Store
from lori_nb.lab.specs import spec_json
from lori_nb.lab.tasks import SPLITS, Example, task
from lori_nb.method.adapters import attach
from lori_nb.method.conflicts import combine_stacked
from lori_nb.study import measuring
from lori_nb.study.joint_arms import JOINT_ARMS, joint_arm_spec
from lori_nb.study.plans import PLANS
from lori_nb.study.profiles import load_settings

EPS = torch.finfo(torch.float32).eps
BOTH = ("chain_sum", "word_sequence_reversal")
WEIGHTS = (4.0, 0.5)


def score_task(unit: float = 1.0) -> None:
    """Register "score", a regression task for encoders; ``unit`` multiplies its targets."""

    @task("score", domain="x", metric="pearson", also=("spearman",), licence="own", reads="encoder")
    def score(split):
        for n in range(SPLITS.index(split), 300, 3):
            yield Example(f"number {n}", answer=str(n), target=unit * (n % 7))


@pytest.fixture
def tasks(registries):
    """A regression task, and one of two classes."""
    score_task()

    @task("odd", domain="x", metric="accuracy", licence="own", labels=("even", "odd"), reads="encoder")
    def odd(split):
        for n in range(SPLITS.index(split), 300, 3):
            yield Example(f"number {n}", answer=("even", "odd")[n % 2], target=n % 2)


@pytest.mark.parametrize(("method", "options", "share"), [("lora", (), 2), ("ortho-lora", (("reduction", "sum"),), 1)])
def test_heads_count_in_a_mean_over_tasks_as_the_adapter_does(tiny_decoder, home, method, options, share):
    """So that the gradient that one norm clips is that of a mean of losses, or of their sum, in every part."""
    loop = Prepared(tiny_spec(tiny_decoder, method, tasks=BOTH, options=options)).loop
    with attach(loop.base.body, loop.live):
        found, _ = loop._task_gradients(1)
    heads = {"head.a.weight": gaussian(2, 3, seed=0)}
    combined, _ = loop._combined(TaskGradients(found.losses, found.shared, heads), 1)
    assert torch.equal(combined["head.a.weight"], heads["head.a.weight"] / share)
    if method == "lora":
        assert all(torch.equal(combined[name], each.sum(0) / share) for name, each in found.shared.items())


def test_the_ledger_keeps_the_metric_beside_a_task_s_own(tiny_encoder, home, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "ledger_folder", lambda: tmp_path / "ledger")
    spec = resolve(tiny_spec(tiny_encoder, tasks=["odd", "score"]))
    run = Store().get(spec)
    measuring.record([spec], Store(), "study", "command")
    kept = ledger.measured([spec.hash])[spec.hash]
    assert kept.value("score", "spearman") == run.value("score", "spearman") != kept.value("score")
    assert len(ledger.rows_of([spec.hash])) == 2, "a row a task"


# Regression


def test_answering_the_mean_has_loss_one_in_any_unit():
    for scale, shift in ((1.0, 0.0), (1e-3, 5.0), (1e4, -7.0)):
        targets = [scale * y + shift for y in (0.0, 1.5, 2.0, 5.0)]
        z = unit_of(targets).standardised(torch.tensor(targets, dtype=torch.float64))
        # a target is rounded at its own size, which is |shift| / scale deviations
        assert z.square().mean().item() == pytest.approx(1, abs=8 * EPS * (1 + abs(shift) / scale))
    assert unit_of([3.0, 3.0]) == Unit(3.0, 1.0), "equal targets have no deviation to divide by"


@pytest.mark.parametrize("targets", [[], [1.0, math.nan], [math.inf]])
def test_targets_without_a_unit_are_refused(targets):
    with pytest.raises(ValueError, match="targets of a regression task must be finite numbers, at least one; found"):
        unit_of(targets)


def test_a_head_takes_the_unit_into_itself():
    head, unit, h = torch.nn.Linear(6, 1), Unit(2.5, 1.25), gaussian(5, 6, seed=0)
    own = unit.of_head(dict(head.named_parameters()))
    answers = torch.nn.functional.linear(h, own["weight"], own["bias"])
    bound = 2 * (6 + 2) * EPS * (answers.abs().max() + unit.mean)  # sums of six products and two more, taken twice
    assert (answers - unit.mean - unit.deviation * head(h)).abs().max() <= bound
    assert (unit.standardised(answers) - head(h)).abs().max() <= bound / unit.deviation
    assert (answers - head(h)).abs().max() > 1


def test_a_run_does_not_depend_on_the_unit_and_answers_in_it(tiny_encoder, home, tasks):
    """A factor that is a power of two changes no bit of what is trained."""
    small = Store().get(tiny_spec(tiny_encoder, tasks=["odd", "score"]))
    score_task(unit=1024.0)
    large = Store().get(tiny_spec(tiny_encoder, tasks=["odd", "score"]))
    assert small.hash != large.hash
    for name, f in small.adapter.factors.items():
        assert f.B.any() and torch.equal(f.B, large.adapter.factors[name].B)
    heads = [run.adapter.extras for run in (small, large)]
    for part in ("weight", "bias"):
        assert torch.equal(heads[1][f"head.score.{part}"], 1024 * heads[0][f"head.score.{part}"])
        assert torch.equal(heads[1][f"head.odd.{part}"], heads[0][f"head.odd.{part}"])
    answers = [run.predictions[run.predictions["task"] == "score"] for run in (small, large)]
    assert answers[1]["predicted"].to_numpy() == pytest.approx(1024 * answers[0]["predicted"].to_numpy(), rel=1e-6)
    assert 0.5 < answers[0]["predicted"].mean() / answers[0]["target"].mean() < 2
    for metric in ("pearson", "spearman"):
        assert large.value("score", metric) == pytest.approx(small.value("score", metric), abs=1e-6)
    history = small.history
    first = history[history["step"] == 0].set_index("task")["loss"]
    assert 1 / 4 < first["odd"] / first["score"] < 4, "the two losses begin at one size"


def test_the_recipe_of_regression_is_that_of_runs_that_regress(tiny_encoder, tiny_decoder, home, tasks, monkeypatch):
    specs = {
        "classes": tiny_spec(tiny_encoder, tasks=["odd"]),
        "scored only": tiny_spec(tiny_encoder, tasks=["odd"], evaluate=("odd", "score")),
        "text": tiny_spec(tiny_decoder),
        "regression": tiny_spec(tiny_encoder, tasks=["score"]),
        "joint": tiny_spec(tiny_encoder, tasks=["odd", "score"]),
    }
    before = {name: resolve(spec).hash for name, spec in specs.items()}
    monkeypatch.setattr(regression, "RECIPE", regression.RECIPE + 1)
    moved = {name for name, spec in specs.items() if resolve(spec).hash != before[name]}
    assert moved == {"regression", "joint"}


# Weights of tasks


class Recorder(torch.optim.SGD):
    """Keeps the gradients of its last step."""

    def step(self):
        self.taken = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        super().step()


def taken(prepared: Prepared) -> dict[str, torch.Tensor]:
    """The gradient that a step of the loop hands to its optimiser."""
    prepared.loop.optimiser = Recorder(prepared.named.values(), lr=1.0)
    prepared.step(0)
    return dict(zip(prepared.named, prepared.loop.optimiser.taken, strict=True))


def arm(base, options=(), method="ortho-lora", **changes):
    return tiny_spec(base, method, tasks=BOTH, clip=1e9, options=options, **changes)


def weighed_in_method(prepared: Prepared, stacked, **settings) -> dict[str, torch.Tensor]:
    """The projection's own weights, which multiply a gradient after it was projected."""
    generator = torch.Generator().manual_seed(prepared.spec.seed * 1_000_003)
    return combine_stacked(stacked, generator=generator, reduction="mean", weights=WEIGHTS, **settings)[0]


def by_preference(prepared: Prepared, stacked) -> dict[str, torch.Tensor]:
    """torchjd's UPGrad of the whole adapter with preferences instead of weighted gradients."""
    matrix = torch.cat([each.flatten(1) for each in stacked.values()], dim=1).double()
    flat = UPGrad(pref_vector=torch.tensor(WEIGHTS, dtype=torch.float64) / 2)(matrix)
    sizes = [each[0].numel() for each in stacked.values()]
    return {n: p.view(stacked[n].shape[1:]) for n, p in zip(stacked, flat.split(sizes), strict=True)}


WEIGHED = {
    "lora": (
        (),
        lambda prepared, stacked: {n: (WEIGHTS[0] * g[0] + WEIGHTS[1] * g[1]) / 2 for n, g in stacked.items()},
    ),
    "ortho-lora": ((), weighed_in_method),
    "pcgrad": ((("grouping", "adapter"),), lambda p, s: weighed_in_method(p, s, grouping="adapter")),
    "gradvac": ((("solver", "gradvac"),), lambda p, s: weighed_in_method(p, s, solver="gradvac")),
    "upgrad": ((("grouping", "adapter"), ("solver", "upgrad")), by_preference),
}


@pytest.mark.parametrize("name", WEIGHED)
def test_every_arm_weighs_what_tasks_share(name, tiny_decoder, home):
    options, oracle = WEIGHED[name]
    spec = arm(tiny_decoder, options, "lora" if name == "lora" else "ortho-lora")
    weighted, plain = (Prepared(replace(spec, task_weights=weights)) for weights in (WEIGHTS, ()))
    found = [gradients for _, gradients in weighted.gradients()]
    stacked = {n: torch.stack([each[n] for each in found]) for n in found[0]}
    wanted, ours, without = oracle(weighted, stacked), taken(weighted), taken(plain)
    # Gramians of a sum over n entries err by n ε at most, and with them the share that is projected away
    share = EPS * max(each[0].numel() for each in stacked.values())
    for n, g in ours.items():
        size = (torch.tensor(WEIGHTS).view(-1, *[1] * g.ndim) * stacked[n]).abs().max()
        assert g.abs().max() > 0
        assert (g - wanted[n]).abs().max() <= share * size, n
    assert any((ours[n] - without[n]).abs().max() > 0.1 * without[n].abs().max() for n in ours)


def test_a_head_s_gradient_is_not_weighted():
    found = TaskGradients(torch.ones(2), {"m.B": torch.ones(2, 3, 4)}, {"head.t.bias": torch.ones(1)})
    weighted = found.weighted(torch.tensor([2.0, 0.5]))
    assert weighted.shared["m.B"][:, 0, 0].tolist() == [2.0, 0.5]
    assert weighted.heads == found.heads and weighted.losses is found.losses
    assert found.shared["m.B"].unique().tolist() == [1.0], "the task gradients themselves stay"


def test_weights_of_one_are_no_weights(tiny_decoder, home):
    plain, ones, others = (resolve(arm(tiny_decoder, task_weights=w)) for w in ((), (1.0, 1.0), (1.0, 2.0)))
    assert plain.hash == ones.hash != others.hash
    assert "task_weights" not in spec_json(plain) and spec_json(others)["task_weights"] == (1.0, 2.0)
    assert "weights 1:2" in others.label and "weights" not in ones.label


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((1.0,), r"task_weights must be empty, or 2 numbers, one a task; found \(1.0,\)"),
        ((1.0, 0.0), r"task_weights must be finite numbers above 0; found \(1.0, 0.0\)"),
        ((math.nan, 1.0), "task_weights must be finite numbers above 0; found"),
        ((math.inf, 1.0), "task_weights must be finite numbers above 0; found"),
    ],
)
def test_bad_weights_of_a_run(weights, words, tiny_decoder, home):
    with pytest.raises(ValueError, match=words):
        check(arm(tiny_decoder, task_weights=weights))


def test_a_profile_s_weights_reach_every_joint_arm_and_no_other_run():
    arms = [*JOINT_ARMS, "mgda"]
    settings = load_settings("quick", task_weights={"refusal": "0.5", "gsm8k": 3}, joint_arms=arms)
    assert settings.task_weights == {"refusal": 0.5}, "of the study's own tasks"
    assert {joint_arm_spec(settings, name, 0).task_weights for name in arms} == {(1.0, 1.0, 1.0, 0.5)}
    specs = PLANS["03_ortho_lora"](settings)
    assert {spec.task_weights for spec in specs if len(spec.tasks) == 1} == {()}
    plain = load_settings("quick", task_weights={"refusal": 1})
    assert joint_arm_spec(plain, "joint", 0) == joint_arm_spec(load_settings("quick"), "joint", 0)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"refusal": 0}, "task_weights of refusal must be a finite number above 0; found 0"),
        ({"refusal": "much"}, "task_weights of refusal must be a number; found 'much'"),
        ({"refusals": 1}, "task must be one of .*refusal.*; found 'refusals'"),
        ([1, 2], r"task_weights must map tasks to numbers; found \[1, 2\]"),
    ],
)
def test_bad_weights_of_a_profile(weights, words):
    with pytest.raises(ValueError, match=words):
        load_settings("quick", task_weights=weights)

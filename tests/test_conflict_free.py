"""The loop on several tasks: Ortho-LoRA takes joint training's step where nothing conflicts, and only there."""

from __future__ import annotations

import pytest
import torch
from steps import EPS, Prepared
from tiny import tiny_spec

from lori_nb.lab.runs import Store
from lori_nb.lab.tasks import Example, task
from lori_nb.lab.telemetry import REMOVED
from lori_nb.method.conflicts import conflicts_of
from lori_nb.method.projection import project_conflicts_reference

TASKS, ROWS = 3, 8
PROJECTED = {"lora": "ortho-lora", "lori-d": "ortho-lori-d", "lori-s": "ortho-lori-s"}
MASKED = {"sparsity": 0.5, "mask_origin": "random"}  # of LoRI-S: packed values are trained
NAMES = [f"task{place}" for place in range(TASKS)]


def agreeing(place: int) -> list[Example]:
    """Seven rows in eight are those of the other tasks too, and one is much like theirs."""
    rows = [Example(f"Say {word}.", answer=word) for word in ("red", "blue", "green", "left", "right", "up", "down")]
    return [*rows, Example(f"Say one{'.!?'[place]}", answer="one")]


def opposed(place: int) -> list[Example]:
    """The same questions, and in every task another answer."""
    return [Example(f"Is {n} fine?", answer=("yes", "no", "perhaps")[place]) for n in range(ROWS)]


def prepared(base, method: str, rows_of, **changes) -> Prepared:
    """A run on three tasks about to train on all of their rows in every step, by plain gradient descent.

    AdamW divides by each entry's own size, so that rounding alone decides entries near zero: it allows no bound.
    """
    for place, name in enumerate(NAMES):
        task(name, domain="x", metric="exact_match", licence="own")(lambda split, place=place: rows_of(place))
    spec = tiny_spec(
        base, method, tasks=NAMES, batch_size=TASKS * ROWS, train_rows=ROWS, learning_rate=0.1, clip=1e9, **changes
    )
    ready = Prepared(spec)
    ready.loop.optimiser = torch.optim.SGD(ready.named.values(), lr=spec.learning_rate)
    return ready


def task_gradients(ready: Prepared) -> dict[str, torch.Tensor]:
    """name → (T × shape), as the step will find them."""
    found = [gradients for _, gradients in ready.gradients()]
    return {name: torch.stack([each[name] for each in found]) for name in found[0]}


def share_of_bound(joint: Prepared, ortho: Prepared, weights: torch.Tensor) -> float:
    """The largest difference between two runs' parameters after a step, as a share of what rounding allows.

    With unit roundoff u = ε / 2 the mean of T gradients as a sum and a division errs by T u of Σ_t |w_t g_t| / T, as
    a product with coefficients rounded to float32 by (T + 1) u, both to first order: (T + 1) ε covers the higher ones.
    The step p − η g adds 2u of |η g| and u of |p| in either run.
    """
    gradients = task_gradients(joint)
    before = {name: p.detach().clone() for name, p in joint.named.items()}
    for ready in (joint, ortho):
        ready.step(0)
    rate, largest = joint.loop.optimiser.param_groups[0]["lr"], 0.0
    for name, p in joint.named.items():
        size = (weights.view(-1, *[1] * p.ndim) * gradients[name]).abs().sum(0) / TASKS
        bound = rate * (TASKS + 1 + 2) * EPS * size + EPS * before[name].abs().maximum(p.detach().abs())
        assert not torch.equal(p, before[name]), "the step goes somewhere"
        largest = max(largest, ((p - ortho.named[name]).detach().abs() / bound).max().item())
    return largest


@pytest.mark.parametrize("weights", [(), (2.0, 0.5, 1.0)], ids=["plain", "weighted"])
@pytest.mark.parametrize("method", PROJECTED)
def test_without_conflicts_the_step_is_that_of_joint_training(method, weights, tiny_decoder, home, registries):
    changes = {"task_weights": weights} | (MASKED if method == "lori-s" else {})
    joint, ortho = (prepared(tiny_decoder, each, agreeing, **changes) for each in (method, PROJECTED[method]))
    found = conflicts_of(task_gradients(ortho))
    assert not found.conflict.any() and len(found.groups) == len(joint.named)
    assert found.cosines[:, 0, 1].min() < 0.999, "different gradients"
    assert share_of_bound(joint, ortho, torch.tensor(weights or (1.0,) * TASKS)) <= 1
    table = ortho.loop.telemetry.table()
    removed = table.loc[table["measure"] == REMOVED, "value"]
    assert len(removed) == len(found.groups) and removed.abs().max() <= 4 * EPS


@pytest.mark.parametrize("method", PROJECTED)
def test_with_conflicts_the_step_is_another(method, tiny_decoder, home, registries):
    changes = MASKED if method == "lori-s" else {}
    joint, ortho = (prepared(tiny_decoder, each, opposed, **changes) for each in (method, PROJECTED[method]))
    assert conflicts_of(task_gradients(ortho)).conflict.any()
    assert share_of_bound(joint, ortho, torch.ones(TASKS)) > 1000
    table = ortho.loop.telemetry.table()
    assert table.loc[table["measure"] == REMOVED, "value"].max() > 0.01


@pytest.mark.parametrize("method", PROJECTED)
def test_what_is_projected_is_what_is_trained(method, tiny_decoder, home, registries):
    """A and B; B alone where A is frozen; the packed values under a mask: each as the literal loop projects it."""
    changes = MASKED if method == "lori-s" else {}
    ready = prepared(tiny_decoder, PROJECTED[method], opposed, options=(("order", "fixed"),), **changes)
    assert {name.rpartition(".")[2] for name in ready.named} == ({"A", "B"} if method == "lora" else {"B"})
    gradients = task_gradients(ready)
    before = {name: p.detach().clone() for name, p in ready.named.items()}
    assert all((p.ndim == 1) == (method == "lori-s") for p in before.values())
    ready.step(0)
    rate, plain = ready.loop.optimiser.param_groups[0]["lr"], []
    for name, p in ready.named.items():
        rows = gradients[name].flatten(1)
        taken = (before[name] - p.detach()).flatten() / rate
        # the step rounds at the parameters' own size, and the loop in float32 some terms of each of T tasks
        bound = EPS * (before[name].norm() / rate + TASKS * (rows.shape[1] + 4 * TASKS) * rows.norm())
        assert (taken - project_conflicts_reference(rows).mean(0)).norm() <= bound, name
        plain.append(((taken - rows.mean(0)).norm() / bound).item())
    assert max(plain) > 10


def test_a_run_under_a_joint_mask_leaves_adapter_mask_and_record(tiny_decoder, home):
    both, short = ("chain_sum", "word_sequence_reversal"), {"steps": 3, "train_rows": 8, "test_rows": 2}
    dense = tiny_spec(tiny_decoder, "lori-d", tasks=both, **short)
    kinds = ("ortho-lori-s", "lori-s")
    specs = [tiny_spec(tiny_decoder, kind, tasks=both, sparsity=0.9, calibration=dense, **short) for kind in kinds]
    ortho, plain = map(Store().get, specs)
    for name, factors in ortho.adapter.factors.items():
        mask = ortho.adapter.masks[name]
        assert torch.equal(mask, plain.adapter.masks[name]) and not factors.B[~mask].any()
    assert any(not torch.equal(f.B, plain.adapter.factors[name].B) for name, f in ortho.adapter.factors.items())
    blocks = set(ortho.conflicts.loc[ortho.conflicts["measure"] == REMOVED, "tensor"])
    assert blocks == {f"{name}.B" for name in ortho.adapter.factors}

"""Methods: which parts are trained, what a mask comes from, and how a new one is registered."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import gaussian, sparse_spec, tiny_spec

from lori_nb.lab.methods import (
    METHODS,
    calibrated_masks,
    fresh_factors,
    get_method,
    initial_live,
    masks_of,
    method,
    subspace_of,
)
from lori_nb.method.adapters import Adapter, Factors
from lori_nb.method.masks import kept
from lori_nb.method.subspaces import random_down_projection

SHAPES = {"layers.2.q_proj": (64, 64), "layers.3.k_proj": (32, 64)}


@pytest.fixture
def registry():
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def adapter(seed: int) -> Adapter:
    factors = {
        name: Factors(gaussian(4, d_in, seed=seed), gaussian(d_out, 4, seed=seed + 1), 2.0)
        for name, (d_out, d_in) in SHAPES.items()
    }
    return Adapter(factors, "tiny", "0", 4, 8.0, 0, "chain_sum", frozen_A=False)


def none(spec):
    raise AssertionError("no run was needed")


@pytest.mark.parametrize(("name", "trains_A"), [("lora", True), ("lori-d", False), ("ortho-lora", True)])
def test_what_is_trained(name, trains_A):
    live = initial_live(tiny_spec("tiny", name), SHAPES, none)
    for module, low in live.items():
        assert low.A.requires_grad == trains_A
        assert torch.equal(low.A, random_down_projection(0, "chain_sum", module, 4, SHAPES[module][1]))
        assert (low.B == 0).all()
        assert low.scale == 8.0 / 4


def test_a_subspace_of_one_s_own_or_shared():
    def A_of(**changes):
        return fresh_factors(tiny_spec("tiny", "lori-d", **changes), SHAPES)["layers.2.q_proj"].A

    assert not torch.equal(A_of(tasks=["chain_sum"]), A_of(tasks=["refusal"]))
    assert torch.equal(A_of(tasks=["chain_sum"], subspace="shared"), A_of(tasks=["refusal"], subspace="shared"))
    assert not torch.equal(A_of(seed=0, subspace="shared"), A_of(seed=1, subspace="shared"))


def test_a_mask_holds_what_calibration_moved_most():
    spec, found = sparse_spec("tiny"), adapter(1)
    masks = calibrated_masks(spec, lambda run: found)
    B = torch.cat([f.B.flatten() for f in found.factors.values()]).abs()
    mask = torch.cat([masks[name].flatten() for name in found.factors])
    assert mask.sum() == round(0.1 * mask.numel())
    assert B[mask].min() >= B[~mask].max()
    live = initial_live(spec, SHAPES, lambda run: found)
    assert sum(low.values.numel() for low in live.values()) == mask.sum()
    assert all(not low.A.requires_grad for low in live.values())


def test_origins_of_a_mask():
    """The same A keeps the calibration's stream, a fresh A draws another under the same mask, random needs no run."""
    found = adapter(1)
    same = sparse_spec("tiny")
    fresh = replace(same, mask_origin="fresh-a")
    random = replace(same, mask_origin="random", calibration=None)
    masks = {spec.mask_origin: masks_of(spec, SHAPES, lambda run: found) for spec in (same, fresh)}
    masks["random"] = masks_of(random, SHAPES, none)
    assert all(torch.equal(masks["same-a"][name], masks["fresh-a"][name]) for name in SHAPES)
    assert any(not torch.equal(masks["same-a"][name], masks["random"][name]) for name in SHAPES)
    assert kept(masks["random"]) == kept(masks["same-a"])
    assert subspace_of(same) == subspace_of(random) == subspace_of(same.calibration) == "chain_sum"
    assert subspace_of(fresh) == "chain_sum/fresh"
    A = {spec.mask_origin: fresh_factors(spec, SHAPES)["layers.2.q_proj"].A for spec in (same, fresh, random)}
    assert torch.equal(A["same-a"], A["random"])
    assert not torch.equal(A["same-a"], A["fresh-a"])


def test_random_masks_of_two_tasks_differ():
    one, two = (
        masks_of(tiny_spec("tiny", "lori-s", [task], sparsity=0.9, mask_origin="random"), SHAPES, none)
        for task in ("chain_sum", "refusal")
    )
    assert any(not torch.equal(one[name], two[name]) for name in SHAPES)


def test_row_masks_come_from_the_spec():
    masks = calibrated_masks(replace(sparse_spec("tiny"), mask_structure="rows"), lambda run: adapter(1))
    assert all(torch.equal(mask.any(dim=1), mask.all(dim=1)) for mask in masks.values())


def test_orthogonal_tasks():
    family = ("chain_sum", "refusal")
    A = [
        fresh_factors(tiny_spec("tiny", "lora", [task], subspace="orthogonal", family=family), SHAPES)[
            "layers.2.q_proj"
        ].A
        for task in family
    ]
    assert (A[0] @ A[1].T).abs().max() < 1e-6
    assert (A[0] @ A[0].T - torch.eye(4) / 3).abs().max() < 1e-6


def test_after_another_task_a_mask_counts_from_where_calibration_began():
    before, after = adapter(1), adapter(3)
    start = tiny_spec("tiny", "lori-d")
    calibration = tiny_spec("tiny", "lori-d", tasks=["refusal"], start=start)
    spec = tiny_spec("tiny", "lori-s", tasks=["refusal"], sparsity=0.9, calibration=calibration)
    masks = calibrated_masks(spec, {start: before, calibration: after}.get)
    moved = {name: (after.factors[name].B - before.factors[name].B).abs() for name in SHAPES}
    kept = torch.cat([moved[name][masks[name]] for name in SHAPES])
    left = torch.cat([moved[name][~masks[name]] for name in SHAPES])
    assert kept.min() >= left.max()


def test_a_started_run_goes_on_from_the_adapter():
    start = tiny_spec("tiny", "lori-d")
    found = adapter(5)
    live = initial_live(tiny_spec("tiny", "lori-d", tasks=["refusal"], start=start), SHAPES, lambda run: found)
    for name, low in live.items():
        assert torch.equal(low.A, found.factors[name].A)
        assert torch.equal(low.B, found.factors[name].B)


def test_registering(registry):
    @method("lora-l2", title="LoRA + L2", like="lora")
    def l2(live, step):
        return 1e-4 * sum(low.B.square().sum() for low in live.values())

    @method("lori-clipped", like="lori-d", hook="after_step")
    def clip(live, step):
        for low in live.values():
            low.values.clamp_(-1, 1)

    assert get_method("lora-l2").title == "LoRA + L2"
    assert get_method("lora-l2").penalty is l2
    assert get_method("lori-clipped").after_step is clip
    assert not get_method("lori-clipped").trains_A
    assert not get_method("lora-l2").built_in
    assert get_method("lora-l2").source_digest != get_method("lori-clipped").source_digest


def test_bad_registrations(registry):
    with pytest.raises(ValueError, match="hook must be one of penalty, .*; found 'before_step'"):
        method("x", like="lora", hook="before_step")
    with pytest.raises(ValueError, match="name must not be that of a method of the kit; found 'lora'"):
        method("lora", like="lori-d")
    with pytest.raises(ValueError, match="method must be one of .*; found 'lorax'"):
        method("x", like="lorax")(lambda live, step: 0)
    method("typed", like="lora")(eval("lambda live, step: 0"))
    with pytest.raises(ValueError, match="must be a function written in a file or a notebook cell; found no source of"):
        _ = get_method("typed").source_digest

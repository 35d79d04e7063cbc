"""Baselines as runs of the store: same loop, same rows, counted, scored and kept as what they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import sparse_spec, tiny_spec

from lori_nb.lab.baselines import MAGNITUDE, make_dora, swap_in
from lori_nb.lab.evaluation import score_rows
from lori_nb.lab.models import load_base
from lori_nb.lab.resolving import check
from lori_nb.lab.runs import Store
from lori_nb.lab.specs import MergeSpec
from lori_nb.lab.tasks import get_task
from lori_nb.lab.text import encode_decoder_rows
from lori_nb.study.cost import trainable_parameters

BASELINES = ("lora", "lori-d", "lora-fa", "dora", "full")


@pytest.fixture
def base(tiny_decoder, home):
    return tiny_decoder


def rate_of(method: str) -> float:
    """Full fine-tuning moves every weight, so it wants smaller steps; LoRA-FA's correction makes its steps larger."""
    return {"full": 1e-3, "lora-fa": 1e-3}.get(method, 1e-2)


def test_every_baseline_learns_on_the_same_rows_and_leaves_the_base_as_it_was(base):
    before = {name: p.clone() for name, p in load_base(str(base), "float32").body.state_dict().items()}
    first_losses, parameters = {}, {}
    for name in BASELINES:
        run = Store().get(tiny_spec(base, name, learning_rate=rate_of(name)))
        losses = run.history["loss"]
        assert losses.iloc[-1] < losses.iloc[0], name
        first_losses[name] = losses.iloc[0]
        parameters[name] = run.provenance["trainable_parameters"]
        assert parameters[name] == trainable_parameters(run.spec), name
    # at the first step every method still is the frozen base, up to the rounding of DoRA's and full's own products
    assert max(first_losses.values()) - min(first_losses.values()) <= 1e-5 * min(first_losses.values())
    assert parameters["lora-fa"] == parameters["lori-d"] < parameters["lora"] < parameters["dora"] < parameters["full"]
    after = load_base(str(base), "float32").body.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_lora_fa_is_not_adamw(base):
    fa, dense = (Store().get(tiny_spec(base, name, steps=3)) for name in ("lora-fa", "lori-d"))
    assert fa.history["loss"].iloc[0] == dense.history["loss"].iloc[0]
    assert fa.history["loss"].iloc[-1] != dense.history["loss"].iloc[-1]


def test_a_finished_dora_run_scores_the_same_again(base):
    run = Store().get(tiny_spec(base, "dora"))
    model = load_base(str(base), "float32")
    rows = encode_decoder_rows(model.tokenizer, get_task("chain_sum").rows("test", 16))
    linears, kept = dict(model.body.named_modules()), run.adapter
    doras = {name: make_dora(linears[name], f, kept.extras[MAGNITUDE + name]) for name, f in kept.factors.items()}
    with swap_in(model.body, doras):
        again = score_rows(model, model.body, rows)
    assert again.loss.mean() == pytest.approx(
        run.metrics.loc[0, "loss"], rel=1e-5
    )  # through the whole model, not the suffix
    assert score_rows(model, model.body, rows).loss.mean() != pytest.approx(run.metrics.loc[0, "loss"], rel=1e-2)


def test_full_fine_tuning_keeps_its_scores_alone(base):
    run = Store().get(tiny_spec(base, "full", learning_rate=1e-3))
    with pytest.raises(ValueError, match="a run must have left an adapter to be read; full · chain_sum .* left none"):
        _ = run.adapter
    assert not run.metrics.empty and len(run.predictions) == 16


@pytest.mark.parametrize("name", ["dora", "full"])
def test_what_is_no_sum_of_factors_cannot_be_merged_or_gone_on_from(base, name):
    spec = tiny_spec(base, name)
    wanted = r"must be one whose update is s·B A \(lora, lori-d, .*\); found"
    with pytest.raises(ValueError, match=f"method of a merge's parts {wanted} '{name}'"):
        check(MergeSpec((spec, tiny_spec(base)), (0.5, 0.5)))
    with pytest.raises(ValueError, match=f"method of the start run {wanted} '{name}'"):
        check(tiny_spec(base, start=spec))
    with pytest.raises(ValueError, match=f"method of the calibration run {wanted} '{name}'"):
        check(replace(sparse_spec(base), calibration=spec))
    with pytest.raises(ValueError, match=f"method of a run that goes on from another {wanted} '{name}'"):
        check(replace(spec, start=tiny_spec(base)))


def test_origins_and_structures_of_masks_are_runs_too(base):
    plain = sparse_spec(base)
    arms = {
        "same-a": plain,
        "fresh-a": replace(plain, mask_origin="fresh-a"),
        "random": replace(plain, mask_origin="random", calibration=None),
        "rows": replace(plain, mask_structure="rows"),
        "early": replace(plain, calibration=replace(plain.calibration, stop_after=2)),
    }
    runs = {name: Store().get(spec) for name, spec in arms.items()}
    counts = {name: run.provenance["trainable_parameters"] for name, run in runs.items()}
    assert counts == {name: trainable_parameters(run.spec) for name, run in runs.items()}
    assert counts["same-a"] == counts["fresh-a"] == counts["random"] == counts["early"]
    assert abs(counts["rows"] - counts["same-a"]) <= 4  # whole rows of rank 4
    assert len({run.provenance["adapter_hash"] for run in runs.values()}) == len(runs)
    module = next(iter(runs["same-a"].adapter.factors))
    same, fresh = (runs[name].adapter.factors[module].A for name in ("same-a", "fresh-a"))
    assert torch.equal(same, Store().get(plain.calibration).adapter.factors[module].A)
    assert not torch.equal(same, fresh)
    assert len(Store().get(arms["early"].calibration).history) == 2


def test_orthogonal_tasks_are_stored_and_read_again(base):
    family = ("chain_sum", "refusal")
    runs = [Store().get(tiny_spec(base, "lori-d", [t], subspace="orthogonal", family=family)) for t in family]
    one, two = (Store().load(run.hash).adapter for run in runs)
    for module in one.factors:
        A, other = one.factors[module].A, two.factors[module].A
        assert (A @ other.T).abs().max() < 1e-6
        assert torch.equal(A, runs[0].adapter.factors[module].A)

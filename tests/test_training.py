"""The training loop: same bits after an interruption, each row once an epoch, every method against plain code."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from steps import Prepared
from tiny import sparse_spec, tiny_spec

from lori_nb.lab import training
from lori_nb.lab.evaluation import logits_at, task_loss
from lori_nb.lab.methods import initial_live, method
from lori_nb.lab.models import load_base
from lori_nb.lab.prefix import cached_states, split_at, suffix_body
from lori_nb.lab.resolving import resolve
from lori_nb.lab.runs import Store
from lori_nb.lab.tasks import SPLITS, Example, get_task, task
from lori_nb.lab.telemetry import CHANGE, COSINE, HALVES, RATE, REMOVED
from lori_nb.lab.text import collate, encode_decoder_rows
from lori_nb.lab.training import NonFiniteLossError, TaskData, batch_indices, learning_rate_at, named_parameters
from lori_nb.method.adapter_file import adapter_hash
from lori_nb.method.adapters import attach, target_linears
from lori_nb.method.subspaces import random_down_projection

EPS = torch.finfo(torch.float32).eps
BOTH = ("chain_sum", "word_sequence_reversal")


@pytest.fixture
def base(tiny_decoder, home):
    return tiny_decoder


@pytest.fixture
def always_checkpoint(monkeypatch):
    """A checkpoint at every look at the losses."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)


# Rows and rates


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 3))
def test_every_row_once_an_epoch(rows, size, seed):
    steps = math.ceil(2 * rows / size)
    drawn = [i for step in range(steps) for i in batch_indices(rows, size, step, seed, "t")]
    assert sorted(drawn[:rows]) == sorted(drawn[rows : 2 * rows]) == list(range(rows))


def test_batches_follow_seed_and_task():
    drawn = {tuple(batch_indices(50, 8, 0, seed, name)) for seed in (0, 1) for name in ("a", "b")}
    assert len(drawn) == 4
    assert batch_indices(50, 8, 3, 0, "a") == batch_indices(50, 8, 3, 0, "a")


def test_warm_up_and_decay():
    spec = tiny_spec("tiny", steps=20, warmup=0.25, learning_rate=1.0)
    rates = [learning_rate_at(step, spec) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([(20 - step) / 15 for step in range(5, 20)])
    assert learning_rate_at(0, tiny_spec("tiny", steps=1, learning_rate=1.0)) == 1.0


@pytest.mark.parametrize(("warmup", "first"), [(0.25, [0.2, 0.4, 0.6, 0.8]), (0.0, [])])
def test_a_constant_rate_with_and_without_warm_up(warmup, first):
    """Without one the first step has the whole rate, and with one the last step still has it."""
    spec = tiny_spec("tiny", steps=20, warmup=warmup, learning_rate=1.0, schedule="constant")
    rates = [learning_rate_at(step, spec) for step in range(20)]
    assert rates == pytest.approx(first + [1.0] * (20 - len(first)))
    decaying = [learning_rate_at(step, replace(spec, schedule="linear")) for step in range(20)]
    assert decaying[: len(first) + 1] == rates[: len(first) + 1] and decaying[-1] < 0.1


# One step against an independent computation


def prepared(spec):
    """(base, body, live, tasks) of a run on the tiny decoder."""
    base = load_base(spec.base, spec.dtype)
    first = split_at(base, spec.last_layers)
    linears = target_linears(base.body, spec.modules, spec.last_layers)
    live = initial_live(spec, {name: tuple(m.weight.shape) for name, m in linears.items()}, None)
    tasks = []
    for name in spec.tasks:
        rows = encode_decoder_rows(base.tokenizer, get_task(name).rows("train", spec.train_rows))
        tasks.append(TaskData(name, rows, cached_states(base, rows, first)))
    return base, suffix_body(base, first), live, tasks


def test_joint_training_takes_the_mean_gradient(base):
    """One step of plain gradient descent against the gradient of the mean of the tasks' losses, by the full model."""
    spec = tiny_spec(base, tasks=BOTH, warmup=0.0, clip=1e9)
    loaded, body, live, tasks = prepared(spec)
    named = named_parameters(live, tasks)
    with torch.no_grad():
        for name, p in named.items():  # B = 0 would hide the gradients of A
            p.add_(torch.linspace(-0.01, 0.01, p.numel()).view(p.shape) * (1 + len(name) % 3))
    before = {name: p.detach().clone() for name, p in named.items()}
    with attach(loaded.body, live):
        losses = []
        for each in tasks:
            rows = [each.rows[i] for i in batch_indices(len(each.rows), 4, 0, spec.seed, each.name)]
            batch = collate(rows, loaded.tokenizer.pad_token_id)
            losses.append(task_loss(loaded, logits_at(loaded, loaded.body, batch), batch.targets))
        gradients = torch.autograd.grad(sum(losses) / 2, list(named.values()))
        loop = training.Loop(spec, loaded, body, live, tasks)
        loop.optimiser = torch.optim.SGD(named.values(), lr=1.0)
        found, norm = loop.step(0)
    assert found.tolist() == pytest.approx([loss.item() for loss in losses], rel=4 * 96 * EPS)
    assert norm.item() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in gradients)), rel=1e-4)
    for (name, p), g in zip(named.items(), gradients, strict=True):
        step = (before[name] - p.detach()) / spec.learning_rate
        # the division brings the rounding of the parameter itself back, magnified
        bound = 4 * 96 * EPS * g.abs().max() + 2 * EPS * before[name].abs().max() / spec.learning_rate
        assert g.abs().max() > 0
        assert (step - g).abs().max() <= bound, name


def test_ortho_lora_without_conflict_is_joint_training(base):
    """One task twice has no conflict; two tasks have some, and then the adapters differ."""
    for tasks, equal in ((BOTH[:1], True), (BOTH, False)):
        hashes = {
            adapter_hash(Store().get(tiny_spec(base, name, tasks=tasks, steps=5)).adapter)
            for name in ("lora", "ortho-lora")
        }
        assert (len(hashes) == 1) == equal


def test_conflicts_are_recorded_for_several_tasks(base):
    table = Store().get(tiny_spec(base, "ortho-lora", tasks=BOTH, steps=5)).conflicts
    assert set(table["step"]) == set(range(5))
    assert len(set(table["tensor"])) == 2 * 7 * 2
    assert set(table["measure"]) == {COSINE, CHANGE, HALVES, RATE, REMOVED}
    assert Store().get(tiny_spec(base, steps=5)).conflicts.empty


# Interruption


SPECS = {
    "lora": lambda base, **c: tiny_spec(base, steps=30, **c),
    "lori-s": lambda base, **c: sparse_spec(base, steps=30, **c),
    "ortho-lora": lambda base, **c: tiny_spec(base, "ortho-lora", tasks=BOTH, steps=30, **c),
    "gradvac": lambda base, **c: tiny_spec(base, "ortho-lora", tasks=BOTH, steps=30, options=GRADVAC, **c),
}
GRADVAC = (("grouping", "adapter"), ("solver", "gradvac"))  # keeps a state of its own


def interrupt_at(step: int):
    def report(stage, done, total):
        if stage == "training" and done == step:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("name", SPECS)
def test_an_interrupted_run_ends_in_the_same_bits(name, base, tmp_path, always_checkpoint):
    spec = SPECS[name](base)
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    expected = whole.get(spec)
    for parent in spec.parents:
        broken.get(parent)
    with pytest.raises(KeyboardInterrupt):
        broken.get(spec, interrupt_at(20))
    assert (broken.root / expected.hash / "checkpoint.safetensors").exists()
    seen = []
    run = broken.get(spec, lambda stage, done, total: stage == "training" and seen.append(done))
    assert seen == [20, 30]  # it went on from step 10
    assert adapter_hash(run.adapter) == adapter_hash(expected.adapter)
    assert run.history.equals(expected.history)
    assert run.conflicts.equals(expected.conflicts)
    assert run.metrics.equals(expected.metrics)
    assert not list(run.folder.glob("checkpoint*"))
    assert adapter_hash(whole.get(SPECS[name](base, seed=1)).adapter) != adapter_hash(expected.adapter)


def test_an_encoder_s_head_resumes_too(tiny_encoder, home, tmp_path, registries, always_checkpoint):
    @task("odd", domain="x", metric="accuracy", licence="own", labels=("even", "odd"), reads="encoder")
    def odd(split):
        for n in range(SPLITS.index(split), 400, 3):
            yield Example(f"number {n}", second="is it odd?", answer=("even", "odd")[n % 2], target=n % 2)

    spec = tiny_spec(tiny_encoder, tasks=["odd"], steps=30, learning_rate=3e-3)
    expected, broken = Store(tmp_path / "whole").get(spec), Store(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        broken.get(spec, interrupt_at(20))
    run = broken.get(spec)
    assert set(run.adapter.extras) == {"head.odd.weight", "head.odd.bias"}
    assert adapter_hash(run.adapter) == adapter_hash(expected.adapter)
    assert run.metrics["value"].between(0, 1).all()


def test_a_damaged_checkpoint_starts_anew(base, tmp_path, always_checkpoint):
    spec = tiny_spec(base, steps=30)
    expected, broken = Store(tmp_path / "whole").get(spec), Store(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        broken.get(spec, interrupt_at(20))
    (checkpoint,) = broken.root.glob("*/checkpoint.safetensors")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="checkpoint.safetensors is damaged .*; training starts anew"):
        run = broken.get(spec)
    assert adapter_hash(run.adapter) == adapter_hash(expected.adapter)


# Losses that are not finite


def test_a_huge_learning_rate_names_task_and_step(base):
    with pytest.raises(
        NonFiniteLossError, match=r"loss of task 'chain_sum' must be finite; found (nan|inf) at step \d+"
    ):
        Store().get(tiny_spec(base, learning_rate=1e30))


FUSE = {"step": 15}


def test_an_infinite_gradient_keeps_the_last_good_checkpoint(
    base, registries, tmp_path, always_checkpoint, monkeypatch
):
    @method("lora-exploding", like="lora")
    def penalty(live, step):
        return sum(low.B.sum() for low in live.values()) * (math.inf if step == FUSE["step"] else 0.0)

    spec, store = tiny_spec(base, "lora-exploding", steps=30), Store(tmp_path / "runs")
    with pytest.raises(
        NonFiniteLossError, match="gradient norm of task 'chain_sum' must be finite; found .* at step 15"
    ):
        store.get(spec)
    assert not store.finished(resolve(spec))
    assert (store.folder(resolve(spec)) / "checkpoint.safetensors").exists()

    monkeypatch.setitem(FUSE, "step", -1)
    seen = []
    run = store.get(spec, lambda stage, done, total: stage == "training" and seen.append(done))
    assert seen == [20, 30]
    plain = Store(tmp_path / "plain").get(tiny_spec(base, steps=30))
    assert adapter_hash(run.adapter) == adapter_hash(plain.adapter)  # a penalty of zero changes nothing


# Extensions, end to end


def test_a_method_and_a_task_of_one_s_own(base, registries):
    @method("lora-l2", title="LoRA + L2", like="lora")
    def l2_on_B(live, step):
        return 10.0 * sum(low.B.square().sum() for low in live.values())

    @task("parity", domain="symbolic", metric="exact_match", licence="own")
    def parity(split):
        for number in range(SPLITS.index(split), 600, 3):
            yield Example(prompt=f"Is {number} even or odd?", answer="odd" if number % 2 else "even")

    plain, penalised = (Store().get(tiny_spec(base, name, tasks=["parity"])) for name in ("lora", "lora-l2"))
    norms = [sum(f.B.norm() for f in run.adapter.factors.values()) for run in (plain, penalised)]
    assert 0 < norms[1] < 0.9 * norms[0]
    assert plain.metrics.loc[0, "task"] == "parity"
    assert plain.metrics.loc[0, "majority"] == 0.5


def test_a_transform_and_an_after_step_hook(base, registries):
    @method("joint-by-hand", like="lora", hook="transform")
    def mean(gradients, step):
        return {name: sum(each[name] for each in gradients) / len(gradients) for name in gradients[0]}

    @method("lora-clamped", like="lora", hook="after_step")
    def clamp(live, step):
        for low in live.values():
            low.values.clamp_(-1e-3, 1e-3)

    ours, plain = (Store().get(tiny_spec(base, name, tasks=BOTH, steps=5)) for name in ("joint-by-hand", "lora"))
    assert adapter_hash(ours.adapter) == adapter_hash(plain.adapter)
    clamped = Store().get(tiny_spec(base, "lora-clamped", steps=5))
    largest = max(f.B.abs().max() for f in clamped.adapter.factors.values())
    assert 0 < largest <= torch.tensor(1e-3)


def test_off_mask_entries_stay_zero_and_A_stays_its_draw(base):
    run = Store().get(sparse_spec(base))
    before = sum(mask.numel() for mask in run.adapter.masks.values())
    assert sum(int(mask.sum()) for mask in run.adapter.masks.values()) == round(0.1 * before)
    assert run.provenance["trainable_parameters"] == round(0.1 * before)
    for name, f in run.adapter.factors.items():
        assert (f.B[~run.adapter.masks[name]] == 0).all()
    assert run.adapter.frozen_A


def test_packed_B_is_k_numbers_to_the_optimiser_and_in_a_checkpoint(base, tmp_path):
    """After steps as they are taken: of every module nothing is kept but (k,) tensors and scalars."""
    prepared = Prepared(tiny_spec(base, "lori-s", sparsity=0.9, mask_origin="random"))
    for step in range(3):
        prepared.step(step)
    path = tmp_path / "checkpoint.safetensors"
    prepared.loop.save(path, {"step": 3})
    stored = load_file(path)
    counts = {name: int(low.support().sum()) for name, low in prepared.live.items()}
    assert sum(counts.values()) == round(0.1 * sum(low.shape.numel() for low in prepared.live.values()))
    optimiser = prepared.loop.optimiser
    assert {id(p) for p in optimiser.state} == {id(low.values) for low in prepared.live.values()}
    for name, k in counts.items():
        state = optimiser.state[prepared.live[name].values]
        kept = {key.partition("|")[2]: t for key, t in stored.items() if key.startswith(f"{name}.")}
        assert {key: tuple(t.shape) for key, t in state.items()} == {"step": (), "exp_avg": (k,), "exp_avg_sq": (k,)}
        assert {key: tuple(t.shape) for key, t in kept.items()} == {"value": (k,)} | {
            key: tuple(t.shape) for key, t in state.items()
        }
        assert state["exp_avg_sq"].all(), "every packed value has had a gradient"
    assert len(stored) == 4 * len(counts), "A is in no checkpoint"


def test_A_is_one_draw_whatever_the_dtype_of_the_base(base):
    """An adapter is float32 over a bfloat16 base too: the same bits of A, and another B."""
    runs = {dtype: Store().get(tiny_spec(base, "lori-d", steps=3, dtype=dtype)) for dtype in ("float32", "bfloat16")}
    assert [run.provenance["dtype"] for run in runs.values()] == ["torch.float32", "torch.bfloat16"]
    one, two = (run.adapter for run in runs.values())
    for name, f in one.factors.items():
        drawn = random_down_projection(0, "chain_sum", name, *f.A.shape)
        assert f.A.dtype == two.factors[name].A.dtype == torch.float32
        assert torch.equal(f.A, drawn) and torch.equal(two.factors[name].A, drawn)
        assert not torch.equal(f.B, two.factors[name].B)


# Golden runs: results that move without a raised RECIPE fail here


GOLDEN = {
    "lora": [9.4663372, 8.88545895, 8.79198074, 9.03108501, 8.65592098, 8.55787563],
    "lori-s": [10.97955513, 10.63158131, 10.3168087, 10.26941204, 9.9175005, 9.98836136],
    "ortho-lora": [9.62650394, 10.19527245, 9.51248646, 9.75868893, 9.48647118, 9.27654457]
    + [8.95450401, 9.13240337, 9.20468426, 9.69515228, 8.68082237, 9.24384212],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_losses(name, base):
    """Losses of every fifth step. An eight-digit loss keeps four in another order of sums."""
    history = Store().get(SPECS[name](base)).history
    found = history[history["step"] % 5 == 4]["loss"].tolist()
    assert found == pytest.approx(GOLDEN[name], rel=1e-4), "results moved: raise the RECIPE of what was changed"


def test_golden_losses_tell_methods_apart():
    for one, two in (("lora", "lori-s"), ("lori-s", "ortho-lora")):
        assert GOLDEN[one][:6] != pytest.approx(GOLDEN[two][:6], rel=1e-3)

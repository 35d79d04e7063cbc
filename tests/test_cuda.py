"""What holds on a GPU: the CPU's results, bfloat16, steps that never wait for the device, no more memory than peft.

Every test runs on the CPU too, where memory is counted in saved tensors and waiting by the operations that would wait.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from steps import EPS, Prepared, assert_same_gradients, saved_bytes
from tiny import tiny_spec
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from lori_nb.lab.gradients import recomputed, task_gradients
from lori_nb.lab.models import Base

BOTH = ("chain_sum", "word_sequence_reversal")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: this test needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
SPECS = {
    "lora": lambda base, **c: tiny_spec(base, **c),
    "lori-d": lambda base, **c: tiny_spec(base, "lori-d", **c),
    "lori-s": lambda base, **c: tiny_spec(base, "lori-s", sparsity=0.9, mask_origin="random", **c),
    "ortho-lora": lambda base, **c: tiny_spec(base, "ortho-lora", tasks=BOTH, **c),
}

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture
def base(tiny_decoder, home):
    return tiny_decoder


@pytest.fixture(autouse=True)
def full_precision():
    """No TF32: its ten bits of mantissa would leave nothing to compare."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@contextmanager
def fused_attention(prepared: Prepared) -> Iterator[None]:
    """The attention that a GPU uses, on any device."""
    config = prepared.base.body.config
    before, config._attn_implementation = config._attn_implementation, "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before


# The same results


@pytest.mark.parametrize("name", SPECS)
def test_five_steps_have_the_losses_and_gradients_of_the_cpu(name, device, base):
    spec = SPECS[name](base)
    here, there = Prepared(spec), Prepared(spec, device)

    def evaluate(prepared: Prepared, step: int) -> list:
        with fused_attention(prepared):
            return prepared.gradients(step)

    assert assert_same_gradients(here, there, evaluate, steps=5) > 0


def test_the_optimiser_takes_the_steps_of_double_precision(device):
    """AdamW with equal gradients: ten operations on each number, each right to ε of the parameter or of the step."""
    draws = torch.Generator().manual_seed(0)
    begin, gradients = torch.randn(1000, generator=draws), torch.randn(5, 1000, generator=draws)
    ends = []
    for where, dtype in (("cpu", torch.float64), (device, torch.float32)):
        parameter = torch.nn.Parameter(begin.to(where, dtype, copy=True))
        optimiser = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.0)
        for gradient in gradients:
            parameter.grad = gradient.to(where, dtype)
            optimiser.step()
        ends.append(parameter.detach().cpu())
    assert (ends[0] - ends[1]).abs().max() > 0, "two precisions were compared"
    assert (ends[0] - ends[1]).abs().max() <= 5 * 10 * EPS * (begin.abs().max() + 5 * 1e-2)
    assert (ends[0] - begin).abs().min() > 0


# bfloat16


@pytest.mark.parametrize("name", SPECS)
def test_a_bfloat16_base_trains_float32_adapters(name, device, base):
    """Ten steps on one batch lower its loss; checkpointing and micro-batches work there too."""
    prepared = Prepared(SPECS[name](base, dtype="bfloat16", train_rows=4, warmup=0.0), device)
    assert prepared.base.dtype == next(prepared.base.body.parameters()).dtype == torch.bfloat16
    assert {p.dtype for p in prepared.named.values()} == {torch.float32}
    with recomputed(prepared.base.body):
        prepared.loop.spec = replace(prepared.spec, micro_batch_rows=2)
        losses = torch.stack([prepared.step(step)[0] for step in range(10)]).cpu()
    assert losses.isfinite().all()
    assert (losses[-1] < losses[0]).all()


# No waiting


class NoQuestions(TorchDispatchMode):
    """Fails at an operation whose result the host must read before it can go on; the optimiser's own counters, which
    stay on the CPU, are free."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2")

    def __init__(self, optimiser: torch.optim.Optimizer):
        super().__init__()
        self.free = {state["step"].data_ptr() for state in optimiser.state.values()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if (name in self.ASKING and args[0].data_ptr() not in self.free) or masks:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def waiting_forbidden(prepared: Prepared) -> Iterator[None]:
    if prepared.base.device.type == "cpu":
        with fused_attention(prepared), NoQuestions(prepared.loop.optimiser):
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_no_step_waits_for_the_device(name, checkpointing, device, base):
    prepared = Prepared(SPECS[name](base, micro_batch_rows=2), device)
    prepared.step(0)  # the optimiser makes its state, a GPU its handles
    with recomputed(prepared.base.body, checkpointing), waiting_forbidden(prepared):
        for step in (1, 2, 3):
            prepared.step(step)


SWITCHES = [
    {"grouping": "adapter", "reference": "projected"},
    {"grouping": "module", "order": "mean", "reduction": "sum"},
    {"grouping": "factor", "order": "fixed"},
    {"solver": "gradvac"},
    {"solver": "nash-mtl"},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: " ".join(switches.values()))
def test_no_step_waits_for_the_device_whatever_the_switches(switches, device, base, monkeypatch):
    """With both tasks in one backward pass, and at step 2 with a look at the halves of their batches."""
    monkeypatch.setattr("lori_nb.lab.gradients.PADDING", 100.0)
    prepared = Prepared(SPECS["ortho-lora"](base, options=tuple(switches.items()), steps=40), device)
    prepared.step(0)
    with waiting_forbidden(prepared):
        for step in (1, 2):
            prepared.step(step)
    table = prepared.loop.telemetry.table()
    assert set(table.loc[table["measure"] == "cosine of halves", "step"]) == {0, 2}


def test_a_joint_run_s_record_goes_on_after_a_resume(device, base, tmp_path):
    """What a checkpoint gives back lies on the CPU, what later steps add on the device."""
    spec, path = SPECS["ortho-lora"](base, steps=6), tmp_path / "checkpoint.safetensors"
    prepared, resumed = Prepared(spec, device), Prepared(spec, device)
    for step in range(6):
        if step == 3:
            prepared.loop.save(path, {"step": 3})
            assert resumed.loop.restore(path)["step"] == 3
        prepared.step(step)
        if step >= 3:
            resumed.step(step)
    whole, again = (each.loop.telemetry.table() for each in (prepared, resumed))
    assert len(whole) == len(again)
    torch.testing.assert_close(
        torch.tensor(whole["value"]), torch.tensor(again["value"]), rtol=1e-3, atol=1e-3, equal_nan=True
    )


def test_waiting_would_be_noticed(device, base):
    prepared = Prepared(tiny_spec(base), device)
    losses, norm = prepared.step(0)
    with pytest.raises((AssertionError, RuntimeError)), waiting_forbidden(prepared):
        norm.item()
    with pytest.raises((AssertionError, RuntimeError)), waiting_forbidden(prepared):
        losses[losses > 0]
    config = prepared.base.body.config
    config.sliding_window = 8  # shorter than the rows: the mask is left to transformers, which asks for padding
    try:
        with pytest.raises((AssertionError, RuntimeError)), waiting_forbidden(prepared):
            prepared.step(1)
    finally:
        del config.sliding_window


# Memory


def middling(device: str, tokenizer) -> Base:
    """A random Llama of eight layers, large enough that its activations are most of a step's memory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(device).eval().requires_grad_(False)
    return Base("middling", "", "decoder", model.base_model, model.get_output_embeddings(), tokenizer, torch.float32)


class Rival(Prepared):
    """The same steps with peft's LoRA on a copy of the base."""

    def __init__(self, prepared: Prepared):
        self.spec, self.tasks = prepared.spec, prepared.tasks
        config = LoraConfig(r=self.spec.rank, lora_alpha=self.spec.alpha, target_modules="all-linear")
        names = sorted({name.rpartition(".")[2] for name in prepared.live})
        config = replace(config, target_modules=names)
        body = inject_adapter_in_model(config, copy.deepcopy(prepared.base.body)).eval()
        self.base = replace(prepared.base, body=body)
        self.named = {name: p for name, p in body.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.AdamW(self.named.values(), lr=self.spec.learning_rate, weight_decay=0.0)

    def gradients(self, step: int = 0, micro_batch_rows: int | None = None) -> list:
        found = task_gradients(self.base, self.base.body, self.batches(step), self.named, micro_batch_rows)
        return [(loss, found.of(task)) for task, loss in enumerate(found.losses)]

    def step(self, step: int):
        ((loss, gradient),) = self.gradients(step)
        for name, p in self.named.items():
            p.grad = gradient[name]
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), self.spec.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss[None], norm


def memory_of_a_step(prepared: Prepared) -> int:
    """Bytes above what lies there between steps: the peak on a GPU, the saved tensors on a CPU."""
    if prepared.base.device.type == "cpu":
        return saved_bytes(prepared)
    for step in range(2):
        prepared.step(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prepared.step(2)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("name", ["lora", "lori-d", "lori-s"])
def test_a_step_takes_no_more_memory_than_with_peft(name, device, smollm2, home, monkeypatch):
    """LoRI-S too: its B is dense only while a module computes, whose gradient is (d_out × r) before it is packed."""
    base = middling(device, smollm2.tokenizer)
    monkeypatch.setattr("steps.load_base", lambda *_: base)
    ours = Prepared(SPECS[name]("middling", rank=16, last_layers=None), device)
    theirs = Rival(ours)
    assert set(theirs.named) and len(theirs.named) == 2 * len(ours.live)
    needed = memory_of_a_step(ours)
    assert 0 < needed <= memory_of_a_step(theirs)
    with recomputed(base.body):
        assert memory_of_a_step(ours) < needed

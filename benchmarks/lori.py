"""LoRI-S at sparsity 0.9 against peft's LoRA: parameters, optimiser state, activations, disk, FLOPs and time of a step.

Both sit at rank 32 on all linear modules of SmolLM2-135M, see the same rows and take the same step (forward, backward,
clipping, AdamW), with logits at answer positions only; "as its users run it" is a PeftModel called with labels.

On a base in bfloat16 our factors are kept in float32 and multiplied in bfloat16. By default peft keeps and multiplies
its factors in float32; in the base's dtype it does both in bfloat16. So steps are compared in three ways: peft's
default, peft's factors in bfloat16, and everything in float32, where both sides are alike in every respect.

    python benchmarks/lori.py --pairs 30
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from measure import PAIRS, counted_ratio, flops, judged, publish, saved_bytes, seconds, wall_ratio
from peft import LoraConfig, get_peft_model
from torch import nn

from lori_nb.lab.evaluation import logits_at, task_loss
from lori_nb.lab.methods import Live
from lori_nb.lab.models import Base, load_base
from lori_nb.lab.prefix import cached_states, hidden_at, split_at, suffix_body
from lori_nb.lab.tasks import get_task
from lori_nb.lab.text import Encoded, collate, encode_decoder_rows
from lori_nb.method.adapter_file import save_adapter
from lori_nb.method.adapters import Adapter, Factors, LowRank, attach, target_linears
from lori_nb.method.masks import random_masks
from lori_nb.method.subspaces import down_projection

BASE = "smollm2-135m-instruct"
TASK = "family_relationships"
RANK, ALPHA, SPARSITY, LAST_LAYERS = 32, 64.0, 0.9, 8
ROWS = 8


@dataclass(frozen=True)
class Contestant:
    """One side of a comparison: the base with its adapter in place, and the parameters that it trains."""

    base: Base
    body: nn.Module
    parameters: list[nn.Parameter]
    hidden: list[torch.Tensor] | None = None


def lori_s(base: Base, last_layers: int | None = None) -> tuple[Contestant, Live, dict]:
    """Our LoRI-S attached to a base; B starts at small values, as in the midst of training."""
    linears = target_linears(base.body, last_layers=last_layers)
    shapes = {name: (m.out_features, RANK) for name, m in linears.items()}
    masks = random_masks(shapes, SPARSITY, seed=0)
    factors = {
        name: Factors(
            down_projection(0, TASK, name, RANK, m.in_features),
            0.01 * down_projection(0, "B", name, RANK, m.out_features).T * masks[name],
            ALPHA / RANK,
        )
        for name, m in linears.items()
    }
    live = {name: LowRank(f, train_A=False, mask=masks[name]) for name, f in factors.items()}
    attach(base.body, live)
    return Contestant(base, base.body, [low.values for low in live.values()]), live, masks


def peft_lora(base: Base, last_layers: int | None = None, like_base: bool = False) -> tuple[Contestant, nn.Module]:
    """peft's LoRA on the same modules, both factors trained; B starts at the same small values.

    Args:
        like_base: factors in the base's dtype, in which ours are multiplied too; peft's default keeps them, and
            multiplies, in float32.
    """
    names = [f"model.{name}" for name in target_linears(base.body, last_layers=last_layers)]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(_whole(base), config, autocast_adapter_dtype=not like_base).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.01 * down_projection(0, "B", name, RANK, len(parameter)).T)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Contestant(base, base.body, trained), model


def _whole(base: Base) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base.body.config)
    model.model, model.lm_head = base.body, base.head
    return model


def step_of(side: Contestant, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """A whole training step: gradients, clipping, AdamW."""
    optimiser = torch.optim.AdamW(side.parameters, lr=1e-6, weight_decay=0.0)

    def step() -> None:
        gradients = torch.autograd.grad(loss(), side.parameters)
        for parameter, gradient in zip(side.parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(side.parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    step.optimiser = optimiser
    return step


def answer_loss(side: Contestant, rows: Sequence[Encoded]) -> Callable[[], torch.Tensor]:
    """Loss from logits at answer positions only."""
    pad = side.base.tokenizer.pad_token_id

    def loss() -> torch.Tensor:
        batch = collate(rows, pad, hidden=side.hidden)
        return task_loss(side.base, logits_at(side.base, side.body, batch), batch.targets)

    return loss


def peft_answer_loss(side: Contestant, rows: Sequence[Encoded]) -> Callable[[], torch.Tensor]:
    """The same loss through all positions of every layer, as peft computes it, with the head at answers only."""
    pad = side.base.tokenizer.pad_token_id

    def loss() -> torch.Tensor:
        batch = collate(rows, pad)
        hidden = side.body(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
        return task_loss(side.base, side.base.head(hidden.flatten(0, 1)[batch.positions]).float(), batch.targets)

    return loss


def labelled_loss(model: nn.Module, side: Contestant, rows: Sequence[Encoded]) -> Callable[[], torch.Tensor]:
    """Loss as a PeftModel's users compute it: labels in, logits at every position inside."""

    def loss() -> torch.Tensor:
        batch = collate(rows, side.base.tokenizer.pad_token_id)
        labels = torch.full_like(batch.ids, -100)
        for place, row in enumerate(rows):
            labels[place, row.answer_start : len(row.ids)] = batch.ids[place, row.answer_start : len(row.ids)]
        return model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss

    return loss


def state_bytes(step: Callable[[], None]) -> int:
    """Bytes of the optimiser's state after a step."""
    step()
    states = step.optimiser.state.values()
    return sum(t.nbytes for state in states for t in state.values())


def activation_bytes(side: Contestant, rows: Sequence[Encoded]) -> float:
    """Bytes kept for backward per row of the batch: what grows from half of the rows to all of them."""
    there = [*side.base.body.parameters(), *side.base.head.parameters(), *side.parameters]
    # the whole last layer on every side, so that what differs is the adapters
    whole, half = (saved_bytes(peft_answer_loss(side, part), there) for part in (rows, rows[: len(rows) // 2]))
    return (whole - half) / (len(rows) - len(rows) // 2)


def disk_bytes(live: Live, masks: dict, model: nn.Module) -> tuple[int, int]:
    """Bytes of the adapter files in float32: ours with bits and packed values, peft's with A and B."""
    factors = {name: low.factors() for name, low in live.items()}
    adapter = Adapter(factors, BASE, "digest", RANK, ALPHA, 0, TASK, frozen_A=True, masks=masks)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapter, Path(folder) / "ours.safetensors")
        model.save_pretrained(folder)
        ours, theirs = (Path(folder) / name for name in ("ours.safetensors", "adapter_model.safetensors"))
        return ours.stat().st_size, theirs.stat().st_size


def fresh_base(dtype: str) -> Base:
    """A base of its own, so that both sides keep their adapters attached."""
    return copy.deepcopy(load_base(BASE, dtype))


def whole_model_rows(dtype: str, rows: Sequence[Encoded], pairs: int) -> list[dict]:
    """Every comparison with adapters on all layers, peft as it is by default."""
    ours, live, masks = lori_s(fresh_base(dtype))
    theirs, model = peft_lora(fresh_base(dtype))
    mine, usual = step_of(ours, answer_loss(ours, rows)), step_of(theirs, labelled_loss(model, theirs, rows))
    counts = [sum(p.numel() for p in side.parameters) for side in (ours, theirs)]
    states = [state_bytes(step) for step in (mine, usual)]
    return [
        judged("trainable parameters", 0.06, counted_ratio(*counts, "parameters")),
        judged("optimiser state", 0.06, counted_ratio(*states, "bytes")),
        judged("adapter file, float32", 0.09, counted_ratio(*disk_bytes(live, masks, model), "bytes")),
        judged("step, peft as its users run it (all logits)", 0.75, wall_ratio(mine, usual, pairs)),
    ]


def step_rows(dtype: str, rows: Sequence[Encoded], pairs: int, like_base: bool) -> list[dict]:
    """Activations and a step with logits at the same positions; ``like_base`` as :func:`peft_lora` takes it."""
    bare = fresh_base(dtype)
    ours, _, _ = lori_s(fresh_base(dtype))
    theirs, _ = peft_lora(fresh_base(dtype), like_base=like_base)
    mine, peer = step_of(ours, answer_loss(ours, rows)), step_of(theirs, peft_answer_loss(theirs, rows))
    bare.body.embed_tokens.weight.requires_grad_()  # a gradient passes through the frozen layers of the bare base too
    own = activation_bytes(Contestant(bare, bare.body, []), rows)
    kept = [activation_bytes(side, rows) - own for side in (ours, theirs)]
    factors = f"base {_short(bare.dtype)}, peft's factors {_short(theirs.parameters[0].dtype)}"
    return [
        judged(f"activations kept for backward, {factors}", 0.10, counted_ratio(*kept, "bytes a row")),
        judged(f"step, {factors}", 0.98, counted_ratio(flops(mine), flops(peer), "FLOPs")),
        judged(f"step, {factors}", 0.95, wall_ratio(mine, peer, pairs)),
    ]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def prefix_rows(dtype: str, rows: Sequence[Encoded], pairs: int) -> list[dict]:
    """Adapters on the last layers: ours from cached hidden states, peft's through the whole model."""
    base = fresh_base(dtype)
    side, _, _ = lori_s(base, LAST_LAYERS)
    first = split_at(base, LAST_LAYERS)
    states = cached_states(base, rows, first)
    ours = replace(side, body=suffix_body(base, first), hidden=[states[i] for i in range(len(rows))])
    theirs, _ = peft_lora(fresh_base(dtype), LAST_LAYERS)
    mine, peer = step_of(ours, answer_loss(ours, rows)), step_of(theirs, peft_answer_loss(theirs, rows))
    batch = collate(rows, base.tokenizer.pad_token_id)
    filling = min(seconds(lambda: hidden_at(base, batch, first)) for _ in range(5))
    one_step = min(seconds(mine) for _ in range(5))
    name = f"step, last {LAST_LAYERS} layers from cached hidden states"
    return [
        judged(name, 0.48, counted_ratio(flops(mine), flops(peer), "FLOPs")),
        judged(name, 0.50, wall_ratio(mine, peer, pairs)),
        judged("filling the cache for the rows of one step, in steps", None, counted_ratio(filling, one_step, "s")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pairs", type=int, default=PAIRS, help=f"interleaved pairs of every timing; {PAIRS} are judged"
    )
    parser.add_argument("--dtype", default="auto", help="of the frozen base, on both sides")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = load_base(BASE, arguments.dtype)
    rows = encode_decoder_rows(base.tokenizer, get_task(TASK).rows("train", ROWS))
    found = whole_model_rows(arguments.dtype, rows, arguments.pairs)
    for dtype, like_base in ((arguments.dtype, False), (arguments.dtype, True), ("float32", False)):
        found += step_rows(dtype, rows, arguments.pairs, like_base)
    found += prefix_rows(arguments.dtype, rows, arguments.pairs)
    command = f"python benchmarks/lori.py --pairs {arguments.pairs} --dtype {arguments.dtype}"
    publish(found, "lori.json", command, whole=arguments.pairs >= PAIRS)


if __name__ == "__main__":
    main()

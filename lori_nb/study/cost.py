"""What a plan costs before it is run: trainable parameters exactly, steps exactly, seconds roughly."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lori_nb.lab.methods import get_method
from lori_nb.lab.models import empty_body
from lori_nb.lab.specs import MergeSpec, RunSpec, Spec
from lori_nb.method.adapters import check_rank, layer_number, target_linears
from lori_nb.method.masks import kept_in_all

TOKENS_PER_ROW = 64  # the default tasks' rows have 40 to 75 tokens with the chat template
FLOPS_PER_SECOND = 1.1e11  # of one AVX-512 core in bfloat16, sustained, as seen in training steps of the default model


@dataclass(frozen=True)
class Cost:
    """Of one run: trainable parameters, optimiser steps, and a rough wall time in seconds on one core."""

    parameters: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class _Sizes:
    linears: dict[str, tuple[int, int]]  # module name → (d_out, d_in), of every layer
    layers: int


@functools.lru_cache(maxsize=16)
def _sizes(base: str) -> _Sizes:
    linears = {name: tuple(m.weight.shape) for name, m in target_linears(empty_body(base)).items()}
    return _Sizes(linears, len({layer_number(name) for name in linears}))


def trainable_parameters(spec: RunSpec) -> int:
    """Numbers that the optimiser sees, counted on the meta device.

    r·(d_in + d_out) a module for LoRA, r·d_out for LoRI-D, and what the mask keeps of those for LoRI-S; d_out more than
    LoRA for DoRA, d_in·d_out for full fine-tuning.
    """
    chosen = get_method(spec.method)
    if not chosen.trains:
        return 0
    shapes = _shapes(spec.base, spec.modules, spec.last_layers, spec.rank)
    if chosen.form == "full":
        return sum(d_out * d_in for d_out, d_in in shapes.values())
    of_B = {name: (d_out, spec.rank) for name, (d_out, _) in shapes.items()}
    if chosen.masked:
        return kept_in_all(of_B, spec.sparsity, spec.mask_scope, spec.mask_structure)
    down = sum(spec.rank * d_in for _, d_in in shapes.values()) if chosen.trains_A else 0
    magnitudes = sum(d_out for d_out, _ in shapes.values()) if chosen.form == "dora" else 0
    return down + magnitudes + sum(d_out * rank for d_out, rank in of_B.values())


@functools.lru_cache(maxsize=64)
def _shapes(base: str, modules: str, last_layers: int | None, rank: int) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the modules that carry adapters; ValueError where the rank does not fit them."""
    linears = target_linears(empty_body(base), modules, last_layers)
    check_rank(rank, linears)
    return {name: tuple(m.weight.shape) for name, m in linears.items()}


def cost_of(spec: Spec) -> Cost:
    """The cost of one run, without its parents."""
    first = spec.parts[0] if isinstance(spec, MergeSpec) else spec
    sizes = _sizes(first.base)
    per_layer = sum(a * b for a, b in sizes.linears.values()) / sizes.layers
    above = first.last_layers or sizes.layers
    scored = len(spec.scored) * spec.test_rows * TOKENS_PER_ROW * 2 * per_layer * above
    if isinstance(spec, MergeSpec):
        return Cost(0, 0, scored / FLOPS_PER_SECOND)
    if not get_method(spec.method).trains:
        shown = sizes.layers / above if spec.shots else 1  # few-shot prompts run through the whole model
        return Cost(0, 0, scored * shown / FLOPS_PER_SECOND)
    # forward and backward of the layers with adapters; the frozen weights have no gradient of their own
    trained = spec.trained_steps * spec.batch_size * TOKENS_PER_ROW * 4 * per_layer * above
    return Cost(trainable_parameters(spec), spec.trained_steps, (trained + scored) / FLOPS_PER_SECOND)


def prefix_seconds(specs: list[Spec]) -> float:
    """Filling the caches below the adapters: every row of every task once, through the frozen layers."""
    seconds = 0.0
    caches = {}
    for spec in specs:
        if isinstance(spec, RunSpec) and spec.last_layers and get_method(spec.method).trains:
            for task in spec.scored:
                caches[spec.base, task, spec.score_on] = (spec, spec.test_rows)
            for task in spec.tasks:
                caches[spec.base, task, "train"] = (spec, spec.train_rows)
    for spec, rows in caches.values():
        sizes = _sizes(spec.base)
        per_layer = sum(a * b for a, b in sizes.linears.values()) / sizes.layers
        below = sizes.layers - (spec.last_layers or sizes.layers)
        seconds += rows * TOKENS_PER_ROW * 2 * per_layer * below / FLOPS_PER_SECOND
    return seconds

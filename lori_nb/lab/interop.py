"""PEFT LoRA folders, out and in.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. For a model that PEFT wraps, a module of the
base's body has the keys

    base_model.model.<prefix>.<module>.lora_A.weight    A (r × d_in)
    base_model.model.<prefix>.<module>.lora_B.weight    B (d_out × r)

with the body's own prefix ("model" for Llama, "bert" for BERT), and PEFT computes W x + (lora_alpha / r) · B A x; with
rsLoRA the scale is lora_alpha / √r. A is always written in full: PEFT fills a missing one with a random draw.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lori_nb.lab.models import base_digest, base_kind, empty_body
from lori_nb.lab.paths import write_atomically
from lori_nb.lab.peft_folder import (
    CONFIG,
    HEAD,
    TOP,
    WEIGHTS,
    check_plain,
    read_config,
    read_tensors,
    scale_of,
    sorted_out,
)
from lori_nb.method.adapters import Adapter, Factors
from lori_nb.method.subspaces import down_projection

IMPORTED = "imported"  # subspace of an A that no seed of this kit has drawn


class PooledClassifier(nn.Module):
    """An encoder with a task head as this kit scores it, in the form that PEFT wraps: the head reads the mean of the
    last hidden states over a row's tokens, not the first token's.

    Args:
        body: the encoder, kept under its own prefix ("bert"), so that an exported folder's keys fit.
        classes: outputs of the head; 1 for regression.
    """

    def __init__(self, body: nn.Module, classes: int):
        super().__init__()
        self.config, self.prefix = body.config, body.base_model_prefix
        self.add_module(self.prefix, body)
        self.classifier = nn.Linear(body.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Logits (b × classes) of token ids and their mask (b × L)."""
        body = self.get_submodule(self.prefix)
        hidden = body(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state  # (b × L × d)
        keep = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.classifier((hidden * keep).sum(1) / keep.sum(1))


def export_peft(adapter: Adapter, folder: Path, *, weight: float = 1.0, head: str | None = None) -> Path:
    """Write an adapter as a PEFT LoRA folder, whole or not at all, and return the folder.

    Args:
        folder: new, or empty.
        weight: the folder's update is weight · ΔW; the factors keep their bits, the weight goes into the scale.
        head: the task whose head an encoder's folder carries, as the module "classifier" of a
            :class:`PooledClassifier`; needed where there are several.

    Raises:
        ValueError: the folder holds something, the adapter does not fit its base or is not low-rank alone (DoRA's
            magnitudes), a value is not finite, or the head is not one of the adapter's.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty; found {folder} with something in it")
    if not math.isfinite(weight):
        raise ValueError(f"weight must be finite; found {weight}")
    body = empty_body(adapter.base)
    _check_factors(adapter.factors, body)
    tensors = {}
    for name, f in adapter.factors.items():
        for part in "AB":
            tensors[f"{TOP}{body.base_model_prefix}.{name}.lora_{part}.weight"] = _plain(getattr(f, part))
    task, heads = _head_tensors(adapter, head)
    about = {"base": adapter.base, "base_digest": adapter.base_digest, "seed": adapter.seed}
    about |= {"subspace": adapter.subspace, "head": task}
    config = _config(adapter, body.base_model_prefix, weight, task)
    metadata = {"format": "pt", "lori_nb": json.dumps(about, sort_keys=True)}
    _write_folder(folder, {CONFIG: json.dumps(config, indent=2), WEIGHTS: save(tensors | heads, metadata=metadata)})
    return folder


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().float().contiguous().clone()  # safetensors refuses tensors that share memory


def _check_factors(factors: Mapping[str, Factors], body: nn.Module) -> None:
    linears = {name: m for name, m in body.named_modules() if isinstance(m, nn.Linear)}
    for name, f in factors.items():
        if name not in linears:
            raise ValueError(f"adapter module must be a linear module of {type(body).__name__}; found {name!r}")
        (d_out, d_in), rank = linears[name].weight.shape, f.A.shape[0]
        if f.A.shape != (rank, d_in) or f.B.shape != (d_out, rank):
            raise ValueError(
                f"factors of {name} must have shapes A (r × {d_in}) and B ({d_out} × r); "
                f"found A {tuple(f.A.shape)} and B {tuple(f.B.shape)}"
            )
        for part in "AB":
            if not torch.isfinite(getattr(f, part)).all():
                raise ValueError(f"{part} must be finite in every module; found NaN or infinity in {name!r}")


def _head_tensors(adapter: Adapter, head: str | None) -> tuple[str | None, dict[str, Tensor]]:
    """(task, its head under PEFT's keys); (None, {}) where there is none."""
    others = [name for name in adapter.extras if not name.startswith("head.")]
    if others:
        raise ValueError(f"adapter must be low-rank factors and heads alone; found {', '.join(sorted(others))}")
    tasks = sorted({name.removeprefix("head.").rpartition(".")[0] for name in adapter.extras})
    if head is None and len(tasks) > 1 or head is not None and head not in tasks:
        raise ValueError(f"head must be one of the adapter's ({', '.join(tasks) or 'none'}); found {head!r}")
    if not tasks:
        return None, {}
    task = head or tasks[0]
    return task, {f"{TOP}{HEAD}.{part}": _plain(adapter.extras[f"head.{task}.{part}"]) for part in ("weight", "bias")}


def _config(adapter: Adapter, prefix: str, weight: float, task: str | None) -> dict[str, Any]:
    usual = adapter.alpha / adapter.rank
    ranks, alphas = {}, {}
    for name, f in adapter.factors.items():
        if f.A.shape[0] != adapter.rank or f.scale != usual:
            ranks[f"{prefix}.{name}"] = f.A.shape[0]
            alphas[f"{prefix}.{name}"] = _alpha_for(f.scale * weight, f.A.shape[0])
    alpha = adapter.alpha if weight == 1.0 else _alpha_for(usual * weight, adapter.rank)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if base_kind(adapter.base) == "decoder" else None,
        "base_model_name_or_path": adapter.base,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": sorted(f"{prefix}.{name}" for name in adapter.factors),
        "modules_to_save": None if task is None else [HEAD],
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _alpha_for(scale: float, rank: int) -> float:
    """The α whose α / rank is scale, or nearest to it where no double gives its last bit."""
    near = scale * rank
    candidates = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return min(candidates, key=lambda alpha: abs(alpha / rank - scale))


def _write_folder(folder: Path, files: Mapping[str, str | bytes]) -> None:
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, content in files.items():
            write_atomically(partial / name, content)
        os.replace(partial, folder)  # an empty folder of that name gives way, one with something in it does not
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def import_peft(folder: Path, base_name: str) -> Adapter:
    """Read a PEFT LoRA folder as an adapter of a base; factors become float32, which holds fp16 and bf16 exactly.

    ``rank`` and ``alpha`` are the folder's defaults (α·√r for rsLoRA, so that α / rank is the scale); modules under
    ``rank_pattern`` or ``alpha_pattern`` have their own in their factors. Where the folder was written by this kit and
    its A is bit for bit what seed and subspace give, the adapter says so and its A need not be stored. A mask is not
    known to a PEFT folder: B comes back dense, with the same bits.

    Raises:
        ValueError: the folder is not a whole, plain LoRA folder for that base; says what was found.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors, about = read_tensors(folder)
    check_plain(config, own_head=isinstance(about.get("head"), str))
    body = empty_body(base_name)
    pairs, heads = sorted_out(tensors, body.base_model_prefix, about.get("head"))
    factors = {
        name: Factors(pair["A"], pair["B"], scale_of(config, f"{body.base_model_prefix}.{name}", pair["A"].shape[0]))
        for name, pair in pairs.items()
    }
    _check_factors(factors, body)
    digest = base_digest(base_name)
    if about.get("base_digest", digest) != digest:
        warnings.warn(f"{folder} was trained on another base, {about.get('base')!r}", stacklevel=2)
    seed, subspace = about.get("seed"), about.get("subspace")
    drawn = _is_draw(factors, seed, subspace)
    rank = config["r"]
    return Adapter(
        factors=factors,
        base=base_name,
        base_digest=digest,
        rank=rank,
        alpha=float(config["lora_alpha"]) * (math.sqrt(rank) if config.get("use_rslora") else 1.0),
        seed=seed if drawn else 0,
        subspace=subspace if drawn else IMPORTED,
        frozen_A=drawn,
        extras=heads,
    )


def _is_draw(factors: Mapping[str, Factors], seed: Any, subspace: Any) -> bool:
    """Whether every A is bit for bit what the kit draws from that seed and subspace."""
    if not isinstance(seed, int) or not isinstance(subspace, str) or subspace == IMPORTED:
        return False
    try:
        return all(torch.equal(f.A, down_projection(seed, subspace, n, *f.A.shape)) for n, f in factors.items())
    except ValueError:  # a stream that the kit does not know
        return False

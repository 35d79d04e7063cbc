"""PEFT LoRA folders, out and in.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. For a model that PEFT wraps, a module of the
base's body has the keys

    base_model.model.<prefix>.<module>.lora_A.weight    A (r × d_in)
    base_model.model.<prefix>.<module>.lora_B.weight    B (d_out × r)

with the body's own prefix ("model" for Llama, "bert" for BERT), and PEFT computes W x + (lora_alpha / r) · B A x; with
rsLoRA the scale is lora_alpha / √r. A is always written in full: PEFT fills a missing one with a random draw.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lori_nb.lab.folders import path_of
from lori_nb.lab.models import base_digest, base_kind, empty_body
from lori_nb.lab.peft_folder import (
    HEAD,
    KEY,
    TOP,
    check_plain,
    module_of,
    read_config,
    read_tensors,
    scale_of,
    sorted_out,
)
from lori_nb.lab.peft_writing import check_new, plain, portable, write_peft
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


def export_peft(
    adapter: Adapter,
    folder: Path,
    *,
    weight: float = 1.0,
    head: str | None = None,
    for_serving: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write an adapter as a PEFT LoRA folder, whole or not at all, and return the folder.

    B under a mask is written dense, its zeros with it.

    Args:
        folder: new, or empty.
        weight: the folder's update is weight · ΔW; the factors keep their bits, the weight goes into the scale.
        head: the task whose head an encoder's folder carries, as the module "classifier" of a
            :class:`PooledClassifier`; needed where there are several.
        for_serving: the portable form of :mod:`lori_nb.lab.peft_writing`, without a head.
        dtype: of the stored A and B: float32, bfloat16 or float16, which round them. A head stays float32.

    Raises:
        ValueError: the folder holds something, the adapter does not fit its base or is not low-rank alone (DoRA's
            magnitudes), a value is not finite in the dtype, or the head is not one of the adapter's.
    """
    folder = check_new(folder)
    if not math.isfinite(weight):
        raise ValueError(f"weight must be finite; found {weight}")
    body = empty_body(adapter.base)
    _check_factors(adapter.factors, body)
    _check_low_rank(adapter)
    task, heads = (None, {}) if for_serving else _head_tensors(adapter, head)
    factors = {f"{body.base_model_prefix}.{name}{KEY}": f for name, f in adapter.factors.items()}
    if for_serving:
        factors, weight, usual = portable(factors, weight), 1.0, None
    else:
        usual = (adapter.rank, adapter.alpha / adapter.rank)
    about = {"base": adapter.base, "base_digest": adapter.base_digest, "seed": adapter.seed}
    about |= {"subspace": adapter.subspace, "head": task, "masked": adapter.masks is not None}
    return write_peft(
        folder,
        factors,
        adapter.base,
        weight=weight,
        usual=usual,
        task_type="CAUSAL_LM" if base_kind(adapter.base) == "decoder" else None,
        heads=heads,
        about=about,
        dtype=dtype,
    )


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


def _check_low_rank(adapter: Adapter) -> None:
    others = [name for name in adapter.extras if not name.startswith("head.")]
    if others:
        raise ValueError(f"adapter must be low-rank factors and heads alone; found {', '.join(sorted(others))}")


def heads_of(adapter: Adapter) -> list[str]:
    """The tasks of which an adapter has a head."""
    return sorted(
        {name.removeprefix("head.").rpartition(".")[0] for name in adapter.extras if name.startswith("head.")}
    )


def _head_tensors(adapter: Adapter, head: str | None) -> tuple[str | None, dict[str, Tensor]]:
    """(task, its head under PEFT's keys); (None, {}) where there is none."""
    tasks = heads_of(adapter)
    if head is None and len(tasks) > 1 or head is not None and head not in tasks:
        raise ValueError(f"head must be one of the adapter's ({', '.join(tasks) or 'none'}); found {head!r}")
    if not tasks:
        return None, {}
    task = head or tasks[0]
    return task, {f"{TOP}{HEAD}.{part}": plain(adapter.extras[f"head.{task}.{part}"]) for part in ("weight", "bias")}


def import_peft(folder: Path | str, base_name: str) -> Adapter:
    """Read a PEFT LoRA folder, or a hub id owner/name, as an adapter of a base; factors become float32, which holds
    fp16 and bf16 exactly.

    ``rank`` and ``alpha`` are the folder's defaults (α·√r for rsLoRA, so that α / rank is the scale); modules under
    ``rank_pattern`` or ``alpha_pattern`` have their own in their factors. Where the folder was written by this kit and
    its A is bit for bit what seed and subspace give, the adapter says so and its A need not be stored.

    Only linear modules and the head of an adapter that this kit exported are read; a warning names what is left out of
    somebody else's folder: adapters on embeddings, and heads and other whole saved tensors.

    A PEFT folder knows no masks: those of a LoRI-S adapter are the zeros of B. They come back where this kit wrote the
    folder from an adapter under masks, and for a folder of somebody else's where a B has zeros beside other entries. An
    entry under the mask whose value is exactly zero in the file cannot be told from one off it, and comes back as that.

    Raises:
        ValueError: the folder is not a whole, plain LoRA folder for that base; says what was found.
        FileNotFoundError: neither a folder nor a hub id, or a hub id and no answer from the hub.
    """
    folder = path_of(str(folder))
    config = read_config(folder)
    tensors, about = read_tensors(folder)
    check_plain(config)
    body = empty_body(base_name)
    pairs, saved = sorted_out(tensors, folder)
    heads, beside = _own_head(saved, about.get("head"))
    left = sorted([module_of(key) for key in pairs if not key.endswith(KEY)] + beside)
    pairs = _on_linears(pairs, body.base_model_prefix)
    if left:
        warnings.warn(f"{folder}: only linear modules are read; left out: {', '.join(left)}", stacklevel=2)
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
        masks=_masks(factors, about.get("masked")),
        extras=heads,
    )


def _masks(factors: Mapping[str, Factors], masked: Any) -> dict[str, Tensor] | None:
    """Module → where B is not zero (bool, d_out × r); None where no mask is known of.

    ``masked`` is what this kit noted; where it noted nothing, a B that is zero in part shows a mask.
    """
    support = {name: f.B != 0 for name, f in factors.items()}
    if not isinstance(masked, bool):
        masked = any(bool(where.any()) and not bool(where.all()) for where in support.values())
    return support if masked else None


def _on_linears(pairs: Mapping[str, dict[str, Tensor]], prefix: str) -> dict[str, dict[str, Tensor]]:
    """Module → its pair, of linear modules alone, by names of the body, whose own prefix keys lack where it was wrapped
    without a head.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, pair in pairs.items():
        module = key.removesuffix(KEY).removeprefix(f"{prefix}.")
        if not key.endswith(KEY):
            continue
        if module in found:
            raise ValueError(f"a module must stand once in the file; found {key.format('A')!r} and another spelling")
        found[module] = pair
    if not found:
        raise ValueError(
            f"an adapter must sit on a linear module to be imported; found {', '.join(map(module_of, pairs))}"
        )
    return found


def _own_head(saved: Mapping[str, Tensor], task: Any) -> tuple[dict[str, Tensor], list[str]]:
    """(the head of an adapter that this kit exported, as an adapter names it; names of other saved tensors)."""
    parts = {f"{HEAD}.{part}": f"head.{task}.{part}" for part in ("weight", "bias")} if isinstance(task, str) else {}
    found = {parts[name]: tensor for name, tensor in saved.items() if name in parts}
    if len(found) == 1:
        raise ValueError(f"a head needs its weight and its bias; found {', '.join(saved)}")
    return found, [name for name in saved if name not in parts]


def _is_draw(factors: Mapping[str, Factors], seed: Any, subspace: Any) -> bool:
    """Whether every A is bit for bit what the kit draws from that seed and subspace."""
    if not isinstance(seed, int) or not isinstance(subspace, str) or subspace == IMPORTED:
        return False
    try:
        return all(torch.equal(f.A, down_projection(seed, subspace, n, *f.A.shape)) for n, f in factors.items())
    except ValueError:  # a stream that the kit does not know
        return False

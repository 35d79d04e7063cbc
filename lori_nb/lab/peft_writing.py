"""PEFT LoRA folders, written whole or not at all, in the general form and in one that serving engines take.

The *portable* form follows what the strictest of them allow: one rank for all modules out of a short list (smaller ones
are padded with zeros), the scale folded into B so that α = r, no patterns, no heads, no adapter on an embedding.
:func:`portability` states every rule and what of it a folder breaks.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lori_nb.lab.paths import write_atomically
from lori_nb.lab.peft_folder import (
    CONFIG,
    HEAD,
    KEY,
    TOP,
    WEIGHTS,
    check_plain,
    factor_key,
    module_of,
    read_config,
    read_tensors,
)
from lori_nb.method.adapter_file import check_dtype
from lori_nb.method.adapters import Factors

ALLOWED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's; above 16 it has to be told so


def check_new(folder: Path) -> Path:
    """The folder's whole path; ValueError unless it is new or empty."""
    folder = Path(folder).resolve()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty; found {folder} with something in it")
    return folder


def plain(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy of that dtype on the CPU, of its own memory: safetensors refuses tensors that share it."""
    return tensor.detach().cpu().to(dtype).contiguous().clone()


def write_peft(
    folder: Path,
    factors: Mapping[str, Factors],
    base: str,
    *,
    weight: float = 1.0,
    usual: tuple[int, float] | None = None,
    task_type: str | None = None,
    heads: Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write factors as a PEFT LoRA folder and return it.

    Args:
        folder: new, or empty.
        factors: the file's key of a module's factors ("model.layers.0.self_attn.q_proj.lora_{}.weight") → factors,
            which keep their bits in float32; the scale goes into α.
        weight: the folder's update is this times that of the factors.
        usual: (rank, scale) that stand as the folder's own, others in patterns; the most frequent ones if not given.
        heads: whole tensors of the saved module "classifier", by their keys in the file.
        about: what this kit notes in the file's header.
        dtype: of the stored A and B, one of :data:`~lori_nb.method.adapter_file.DTYPES`; narrower than float32 rounds
            them.

    Raises:
        ValueError: an unknown dtype, or a value that is not finite in it; nothing is written then.
    """
    check_dtype(dtype)
    ranks_scales = {module_of(key): (len(f.A), f.scale) for key, f in factors.items()}
    usual = usual or Counter(ranks_scales.values()).most_common(1)[0][0]
    config = _config(ranks_scales, usual, weight)
    config |= {"base_model_name_or_path": base, "task_type": task_type, "modules_to_save": [HEAD] if heads else None}
    tensors = {
        f"{TOP}{key.format(part)}": plain(getattr(f, part), dtype) for key, f in factors.items() for part in "AB"
    }
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            held = str(dtype).removeprefix("torch.")
            raise ValueError(f"factors must be finite in {held}; found NaN or infinity in {key!r}")
    metadata = {"format": "pt"} | ({"lori_nb": json.dumps(about, sort_keys=True)} if about else {})
    _write(folder, {CONFIG: json.dumps(config, indent=2), WEIGHTS: save(tensors | (heads or {}), metadata=metadata)})
    return folder


def _config(modules: Mapping[str, tuple[int, float]], usual: tuple[int, float], weight: float) -> dict[str, Any]:
    """The settings of a folder, from module → (rank, scale)."""
    other = {name: found for name, found in modules.items() if found != usual}
    rank, scale = usual
    alpha = _alpha_for(scale * weight, rank)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": {name: rank for name, (rank, _) in other.items()},
        "alpha_pattern": {name: _alpha_for(scale * weight, rank) for name, (rank, scale) in other.items()},
        "target_modules": sorted(modules),
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


def _write(folder: Path, files: Mapping[str, str | bytes]) -> None:
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, content in files.items():
            write_atomically(partial / name, content)
        os.replace(partial, folder)  # an empty folder of that name gives way, one with something in it does not
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def portable(factors: Mapping[str, Factors], weight: float = 1.0) -> dict[str, Factors]:
    """The same updates with scale 1 (α = r) and one allowed rank, the smallest that holds all; zeros fill up.

    Raises ValueError where the largest rank is above the largest allowed one.
    """
    most = max(len(f.A) for f in factors.values())
    if most > ALLOWED_RANKS[-1]:
        raise ValueError(
            f"rank of a portable folder must be at most {ALLOWED_RANKS[-1]}; found {most}: lori-nb merge --rank cuts it"
        )
    rank = next(allowed for allowed in ALLOWED_RANKS if allowed >= most)
    return {name: _padded(f, rank, weight) for name, f in factors.items()}


def _padded(f: Factors, rank: int, weight: float) -> Factors:
    missing = rank - len(f.A)
    A = torch.cat([f.A, f.A.new_zeros(missing, f.A.shape[1])])
    B = torch.cat([f.B * (f.scale * weight), f.B.new_zeros(len(f.B), missing)], dim=1)
    return Factors(A, B, 1.0)


def portability(folder: Path) -> dict[str, bool]:
    """Every rule of the portable form → whether a PEFT folder keeps it.

    Raises ValueError for a folder that cannot be read at all.
    """
    config, (tensors, _) = read_config(folder), read_tensors(folder)
    keys = {name: factor_key(name) for name, tensor in tensors.items() if tensor.ndim == 2}
    known = {name: found for name, found in keys.items() if found and found[0].endswith(KEY)}
    ranks = {len(tensors[name]) if part == "A" else tensors[name].shape[1] for name, (_, part) in known.items()}
    of = {side: {module_of(key) for key, part in known.values() if part == side} for side in "AB"}
    targets, named = config.get("target_modules") or [], of["A"] | of["B"]
    return {
        "it is plain LoRA": _is_plain(config),
        "every tensor is a factor of a linear module": len(known) == len(tensors) > 0,
        "every module has A and B": of["A"] == of["B"],
        "all modules have one rank, the configuration's": list(ranks) == [config.get("r")],
        f"that rank is one of {', '.join(map(str, ALLOWED_RANKS))}": config.get("r") in ALLOWED_RANKS,
        "α is that rank, so that an engine that ignores α is right": config.get("lora_alpha") == config.get("r"),
        "no scale by √r": not config.get("use_rslora"),
        "no module has a rank or an α of its own": not config.get("rank_pattern") and not config.get("alpha_pattern"),
        "no bias is trained": config.get("bias", "none") == "none" and not config.get("lora_bias"),
        "no whole module is saved beside": not config.get("modules_to_save"),
        "target_modules names the file's modules": isinstance(targets, list) and _covered(named, targets),
    }


def _is_plain(config: Mapping[str, Any]) -> bool:
    """Whether the folder is y = W x + s · B A x, but for whole modules, of which a rule of its own says."""
    try:
        check_plain(config)
    except ValueError:
        return False
    return True


def _covered(modules: set[str], targets: Iterable[str]) -> bool:
    return all(any(name == target or name.endswith(f".{target}") for target in targets) for name in modules)

"""What a PEFT LoRA folder says, read with suspicion: it is somebody else's.

Only safetensors are read, only plain LoRA is understood, and every module has its whole pair of finite matrices. What
else a folder holds or asks for is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
AS_PICKLE = f"{PICKLED}, a pickle file, which can run code when it is read"
TOP, HEAD = "base_model.model.", "classifier"  # what every key begins with; the module that a task head is
KEY = ".lora_{}.weight"  # how a file names a linear module's factors, "{}" for A or B
EMBEDDING_KEY = ".lora_embedding_{}"
_NAME = re.compile(rf"{re.escape(TOP)}((?:\w+\.)*\w+)")
_FACTOR = re.compile(rf"{_NAME.pattern}\.(?:lora_([AB])\.weight|lora_embedding_([AB]))")
_READABLE = (torch.float32, torch.float16, torch.bfloat16)  # float32 holds each of them exactly
# Initialisations that leave the base as it is; pissa, olora, corda, loftq and their like change its weights.
_BASE_KEPT = (True, False, "gaussian", "eva", "orthogonal")
# Settings of a LoRA folder that change nothing in W x + s · B A x, or that are read; any other one must be unset.
_UNDERSTOOD = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "modules_to_save"}
_UNDERSTOOD |= {"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"}
_UNDERSTOOD |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"}
_UNDERSTOOD |= {"fan_in_fan_out", "megatron_config", "megatron_core", "init_lora_weights", "eva_config"}
_UNDERSTOOD |= {"loftq_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"}


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a folder; ValueError where there is none or it is no JSON object."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"folder must be a PEFT folder with {CONFIG}; found none in {folder}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a file of JSON; found: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object; found {type(config).__name__}")
    return config


def check_plain(config: Mapping[str, Any]) -> None:
    """ValueError for the first setting that makes the folder something else than y = W x + s · B A x and whole modules
    saved beside.
    """
    checks: dict[str, tuple[bool, str]] = {
        "peft_type": (config.get("peft_type") == "LORA", "LORA"),
        "bias": (config.get("bias", "none") == "none", "none"),
        "init_lora_weights": (
            config.get("init_lora_weights", True) in _BASE_KEPT,
            "a start that leaves the base's weights as they are",
        ),
        "r": (isinstance(config.get("r"), int) and _is_number(config["r"]) and config["r"] > 0, "an integer above 0"),
        "lora_alpha": (_is_number(config.get("lora_alpha")), "a finite number"),
        "use_rslora": (config.get("use_rslora") in (None, True, False), "true or false"),
    }
    for name in ("rank_pattern", "alpha_pattern"):
        values = config.get(name) or {}
        good = isinstance(values, dict) and all(map(_is_number, values.values()))
        checks[name] = (good, "finite numbers by module name")
    checks |= {name: (not value, "unset") for name, value in config.items() if name not in _UNDERSTOOD}
    for name, (good, requirement) in checks.items():
        if not good:
            raise ValueError(f"{name} of a plain LoRA folder must be {requirement}; found {config.get(name)!r}")


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53
    return whole or (isinstance(value, float) and math.isfinite(value))


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a folder, and what this kit wrote about them; {} for a folder of somebody else's."""
    path = folder / WEIGHTS
    if not path.is_file():
        beside = AS_PICKLE if (folder / PICKLED).exists() else "none"
        raise ValueError(f"folder must hold {WEIGHTS}; found {beside}, in {folder}")
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("lori_nb", "{}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        about = json.loads(about)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} must be a whole safetensors file; found: {error}") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in _READABLE:
            raise ValueError(f"tensors must be float32, float16 or bfloat16; found {tensor.dtype} in {key!r}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"tensors must be finite; found NaN or infinity in {key!r}")
    return {key: tensor.float() for key, tensor in tensors.items()}, about if isinstance(about, dict) else {}


def factor_key(key: str) -> tuple[str, str] | None:
    """(key, "A" or "B") of a factor's name in a file: the key without what stands before every one, "{}" for A or B;
    None for what is no factor of plain LoRA on a linear module or an embedding.
    """
    found = _FACTOR.fullmatch(key)
    if found is None:
        return None
    module, linear, embedding = found.groups()
    return (f"{module}{KEY}", linear) if linear else (f"{module}{EMBEDDING_KEY}", embedding)


def module_of(key: str) -> str:
    """The module that a key of :func:`factor_key` belongs to, under the file's own name."""
    return key.rpartition(".lora_")[0]


def sorted_out(tensors: Mapping[str, Tensor], where: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({key: {"A": A (r × d_in), "B": B (d_out × r)}}, whole saved tensors by their keys) of a folder's tensors, keys
    without what stands before every one.

    Raises:
        ValueError: a name that is neither, a module without both matrices at one rank, or none at all.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        found = factor_key(key)
        if found is not None:
            pairs.setdefault(found[0], {})[found[1]] = tensor
        elif "lora_" not in key and _NAME.fullmatch(key):
            saved[key.removeprefix(TOP)] = tensor
        else:
            raise ValueError(f"tensors of {where} must be factors of plain LoRA or whole saved modules; found {key!r}")
    for key, pair in pairs.items():
        if len(pair) != 2 or any(each.ndim != 2 for each in pair.values()) or len(pair["A"]) != pair["B"].shape[1]:
            shapes = {part: tuple(each.shape) for part, each in sorted(pair.items())}
            raise ValueError(f"{key} in {where} must have two matrices, A (r × d_in) and B (d_out × r); found {shapes}")
    if not pairs:
        raise ValueError(f"{where} must hold the factors of at least one module; found none")
    return pairs, saved


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """α / r of a module, or α / √r; ValueError where the file's rank is not the one that the configuration says."""
    said = _by_pattern(config.get("rank_pattern"), module, config["r"])
    if said != rank:
        raise ValueError(f"A of {module} must have the rank that {CONFIG} says, {said}; found {rank}")
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, usual: Any) -> Any:
    """The value of the first pattern that matches a module's name or its end, as PEFT looks it up.

    A pattern is somebody else's regular expression, and some take for ever: one with more than three repetitions, or
    with a repeated group, is refused.
    """
    for pattern, value in (patterns or {}).items():
        if len(re.findall(r"(?<!\\)[*+{]", pattern)) > 3 or re.search(r"\)[*+?{]", pattern):
            raise ValueError(f"patterns must have at most three repetitions and repeat no group; found {pattern!r}")
        try:
            matched = re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module)
        except re.error as error:
            raise ValueError(f"patterns must be regular expressions; found {pattern!r}: {error}") from error
        if matched:
            return value
    return usual

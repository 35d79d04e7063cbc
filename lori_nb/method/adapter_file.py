"""Adapters on disk: safetensors with a JSON header, never pickle.

A frozen, seeded A is not stored: its seed, subspace and a fingerprint are, and it is drawn again on reading. B under a
mask is stored as
mask bits and packed values.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lori_nb.method.adapters import Adapter, Factors, random_down_projection
from lori_nb.method.masks import mask_bits, mask_from_bits, pack, unpack

FORMAT = 1


def fingerprint(factors: dict[str, Factors]) -> str:
    """SHA-256 over the names and the bytes of every A, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(factors):
        digest.update(name.encode())
        digest.update(factors[name].A.contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_adapter(adapter: Adapter, path: Path) -> None:
    """Write an adapter, whole or not at all."""
    tensors: dict[str, Tensor] = {f"extra.{name}": t.contiguous() for name, t in adapter.extras.items()}
    modules = {}
    for name, f in adapter.factors.items():
        modules[name] = {"d_in": f.A.shape[1], "d_out": f.B.shape[0], "rank": f.A.shape[0], "scale": f.scale}
        if not adapter.frozen_A:
            tensors[f"{name}.A"] = f.A.contiguous()
        if adapter.masks is None:
            tensors[f"{name}.B"] = f.B.contiguous()
        else:
            tensors[f"{name}.values"] = pack(f.B, adapter.masks[name])
            tensors[f"{name}.mask"] = mask_bits(adapter.masks[name])
    about = {
        key: getattr(adapter, key) for key in ("base", "base_digest", "rank", "alpha", "seed", "subspace", "frozen_A")
    }
    header = {"format": FORMAT, **about, "modules": modules, "masked": adapter.masks is not None}
    if adapter.frozen_A:
        header["fingerprint"] = fingerprint(adapter.factors)
    partial = path.with_suffix(".partial")
    partial.write_bytes(save(tensors, metadata={"lori_nb": json.dumps(header, sort_keys=True)}))
    os.replace(partial, path)


def load_adapter(path: Path) -> Adapter:
    """Read an adapter; ValueError when it is none, is cut short, or its redrawn A does not match the fingerprint."""
    header, tensors = _read(path)
    factors, masks = {}, {}
    for name, shape in header["modules"].items():
        A = (
            random_down_projection(header["seed"], header["subspace"], name, shape["rank"], shape["d_in"])
            if header["frozen_A"]
            else tensors[f"{name}.A"]
        )
        if header["masked"]:
            masks[name] = mask_from_bits(tensors[f"{name}.mask"], (shape["d_out"], shape["rank"]))
            B = unpack(tensors[f"{name}.values"], masks[name])
        else:
            B = tensors[f"{name}.B"]
        factors[name] = Factors(A, B, shape["scale"])
    if header["frozen_A"] and fingerprint(factors) != header["fingerprint"]:
        raise ValueError(f"{path}: A redrawn from seed {header['seed']} must match the stored fingerprint; it does not")
    return Adapter(
        factors=factors,
        masks=masks or None,
        extras={key.removeprefix("extra."): t for key, t in tensors.items() if key.startswith("extra.")},
        **{key: header[key] for key in ("base", "base_digest", "rank", "alpha", "seed", "subspace", "frozen_A")},
    )


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("lori_nb")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file; found: {error}") from error
    if about is None:
        raise ValueError(f"{path} must be an adapter written by this kit; found no lori_nb header")
    header = json.loads(about)
    if header["format"] != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}; found {header['format']}")
    return header, tensors


def adapter_hash(adapter: Adapter) -> str:
    """SHA-256 over the names and bits of all factors A and B and all extras."""
    digest = hashlib.sha256()
    named = {f"{n}.{part}": getattr(f, part) for n, f in adapter.factors.items() for part in "AB"} | adapter.extras
    for name in sorted(named):
        digest.update(name.encode())
        digest.update(named[name].detach().to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()

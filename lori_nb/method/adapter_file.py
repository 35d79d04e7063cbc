"""Adapters on disk: safetensors with a JSON header, never pickle.

A frozen, seeded A is not stored: its seed, subspace and a fingerprint are, and it is drawn again on reading. An A whose
bits a seed cannot promise on every platform is stored. B under a mask is stored as mask bits and packed values.
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

from lori_nb.method.adapters import Adapter, Factors
from lori_nb.method.masks import mask_bits, mask_from_bits, pack, unpack
from lori_nb.method.subspaces import down_projection, is_portable

FORMAT = 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ABOUT = ("base", "base_digest", "rank", "alpha", "seed", "subspace", "frozen_A")


def fingerprint(factors: dict[str, Factors]) -> str:
    """SHA-256 over the names and the bytes of every A, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(factors):
        digest.update(name.encode())
        digest.update(factors[name].A.contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_adapter(adapter: Adapter, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write an adapter, whole or not at all.

    Args:
        dtype: of the stored A and B, one of :data:`DTYPES`; narrower than float32 rounds them.

    Raises:
        ValueError: an unknown dtype, values that it cannot hold, or a B that is not zero off its mask, which the file
            would lose (naming the tensor).
    """
    check_dtype(dtype)
    tensors, modules = {}, {}
    for name, f in adapter.factors.items():
        modules[name] = {"d_in": f.A.shape[1], "d_out": f.B.shape[0], "rank": f.A.shape[0], "scale": f.scale}
        if not adapter.redrawable:
            tensors[f"{name}.A"] = f.A
        if adapter.masks is None:
            tensors[f"{name}.B"] = f.B
        else:
            tensors[f"{name}.values"] = _packed(name, f.B, adapter.masks[name])
    tensors = {key: _narrowed(key, tensor, dtype) for key, tensor in tensors.items()}
    tensors |= {f"{name}.mask": mask_bits(mask) for name, mask in (adapter.masks or {}).items()}
    tensors |= {f"extra.{name}": t.contiguous() for name, t in adapter.extras.items()}
    header = {
        "format": FORMAT,
        "modules": modules,
        "masked": adapter.masks is not None,
        **{key: getattr(adapter, key) for key in _ABOUT},
    }
    if adapter.redrawable:
        header["fingerprint"] = fingerprint(adapter.factors)
    partial = path.with_suffix(".partial")
    partial.write_bytes(save(tensors, metadata={"lori_nb": json.dumps(header, sort_keys=True)}))
    os.replace(partial, path)


def check_dtype(dtype: torch.dtype) -> None:
    """ValueError unless factors are stored in that dtype: one of :data:`DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}; found {dtype}")


def _packed(name: str, B: Tensor, mask: Tensor) -> Tensor:
    values = pack(B, mask)
    if lost := int(B.count_nonzero()) - int(values.count_nonzero()):
        raise ValueError(f"{name}.B must be zero off its mask; found {lost} other entries there")
    return values


def _narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = tensor.to(dtype).contiguous()
    if not torch.equal(narrow.isfinite(), tensor.isfinite()):
        raise ValueError(f"{name} must fit {dtype}; found values up to {tensor.abs().max().item():g}")
    return narrow


def load_adapter(path: Path) -> Adapter:
    """Read an adapter as float32; ValueError when it is none, is cut short, or its redrawn A does not match the
    fingerprint.
    """
    header, tensors = _read(path)
    redrawn = header["frozen_A"] and is_portable(header["subspace"])
    factors, masks = {}, {}
    for name, shape in header["modules"].items():
        if redrawn:
            A = down_projection(header["seed"], header["subspace"], name, shape["rank"], shape["d_in"])
        else:
            A = tensors[f"{name}.A"].float()
        if header["masked"]:
            masks[name] = mask_from_bits(tensors[f"{name}.mask"], (shape["d_out"], shape["rank"]))
            B = unpack(tensors[f"{name}.values"].float(), masks[name])
        else:
            B = tensors[f"{name}.B"].float()
        factors[name] = Factors(A, B, shape["scale"])
    if redrawn and fingerprint(factors) != header["fingerprint"]:
        raise ValueError(f"{path}: A redrawn from seed {header['seed']} must match the stored fingerprint; it does not")
    return Adapter(
        factors=factors,
        masks=masks or None,
        extras={key.removeprefix("extra."): t for key, t in tensors.items() if key.startswith("extra.")},
        **{key: header[key] for key in _ABOUT},
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

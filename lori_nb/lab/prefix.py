"""Frozen-prefix reuse: when adapters sit on the last k layers only, the hidden states below them never change.

They are computed once per row, kept on disk, and training starts from them. The layers above run in a shallow copy of
the model that shares their modules, so hooks and gradients are the same objects in both.

The states are made in chunks of a fixed number of rows, padded to one fixed length, because in bfloat16 a row's bits
depend on the shape of the batch that it was computed in: so every run, resumed or not, sees the same bits.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from lori_nb.lab.models import Base
from lori_nb.lab.paths import cache_folder
from lori_nb.lab.text import Batch, Encoded, collate

RECIPE = 1  # raise when the cached bits change for the same inputs
CHUNK = 32  # rows per forward pass when a cache is made
IN_MEMORY = 512 * 2**20  # bytes; a larger cache is memory-mapped


class _PassOn(nn.Module):
    """Takes the place of a BERT body's embeddings: the cached states go to the next layer as they are."""

    def forward(self, inputs_embeds: Tensor | None = None, **_) -> Tensor:
        return inputs_embeds


def _llama_suffix(body: nn.Module, first: int) -> nn.Module:
    # LlamaModel hands inputs_embeds to its first layer unchanged, so a copy with fewer layers is the suffix.
    suffix = _shallow(body)
    suffix.layers = nn.ModuleList(list(body.layers)[first:])
    return suffix


def _bert_suffix(body: nn.Module, first: int) -> nn.Module:
    suffix = _shallow(body)
    suffix.embeddings = _PassOn()
    suffix.encoder = _shallow(body.encoder)
    suffix.encoder.layer = nn.ModuleList(list(body.encoder.layer)[first:])
    return suffix


def _shallow(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


@dataclass(frozen=True)
class _Architecture:
    layers: Callable[[nn.Module], nn.ModuleList]
    suffix: Callable[[nn.Module, int], nn.Module]


# Architectures whose body adds nothing between the embeddings and the first layer that a suffix would repeat or lose.
_LLAMA = _Architecture(lambda body: body.layers, _llama_suffix)
_BERT = _Architecture(lambda body: body.encoder.layer, _bert_suffix)
SPLITTABLE = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "bert": _BERT}
TAKES_WHOLE_MASK = (*SPLITTABLE, "roberta")  # a body that passes a mask of (b × 1 × L × L) on as it is


def can_split(base: Base) -> bool:
    """Whether the base's architecture allows to start from cached hidden states."""
    return base.body.config.model_type in SPLITTABLE and getattr(base.body.config, "sliding_window", None) is None


def split_at(base: Base, last_layers: int | None) -> int:
    """The number of frozen layers below the adapters; 0 when all carry one or the architecture cannot be split."""
    if last_layers is None or not can_split(base):
        return 0
    return len(SPLITTABLE[base.body.config.model_type].layers(base.body)) - last_layers


def suffix_body(base: Base, first: int) -> nn.Module:
    """The base's layers from ``first`` on (with the final norm), sharing the base's modules; the base itself for 0."""
    return base.body if first == 0 else SPLITTABLE[base.body.config.model_type].suffix(base.body, first).eval()


def hidden_at(base: Base, batch: Batch, first: int) -> Tensor:
    """Hidden states (b × L × d) that enter layer ``first`` of the full model."""
    caught: list[Tensor] = []

    class Reached(Exception):
        pass

    def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise Reached  # the layers above are not needed

    layer = SPLITTABLE[base.body.config.model_type].layers(base.body)[first]
    handle = layer.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with torch.no_grad():
            base.body(**model_inputs(base, batch))
    except Reached:
        pass
    finally:
        handle.remove()
    return caught[0]


def model_inputs(base: Base, batch: Batch) -> dict[str, Tensor]:
    """Keyword arguments of the body's forward for a batch, from token ids or from cached hidden states."""
    start = {"input_ids": batch.ids} if batch.hidden is None else {"inputs_embeds": batch.hidden}
    if base.kind == "decoder":
        return {**start, "attention_mask": attention_mask(base, batch), "use_cache": False}
    kinds = {"token_type_ids": batch.segments} if "token_type_ids" in base.tokenizer.model_input_names else {}
    return {**start, "attention_mask": attention_mask(base, batch), **kinds}


def attention_mask(base: Base, batch: Batch) -> Tensor:
    """What each position may attend to, for the body: (b × L) in general, (b × 1 × L × L) for torch's fused kernels.

    Given the former, transformers asks whether any row is padded, and so would wait for a GPU in every step.
    """
    config, length = base.body.config, batch.mask.shape[1]
    whole = (getattr(config, "sliding_window", None) or length) >= length
    if config._attn_implementation != "sdpa" or config.model_type not in TAKES_WHOLE_MASK or not whole:
        return batch.mask
    seen = batch.mask.bool()[:, None, None, :].expand(-1, 1, length, length)
    if base.kind == "encoder":
        return seen
    return seen & torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()


class RowStates:
    """Cached hidden states of a list of rows: ``states[i]`` is (tokens of row i × d)."""

    def __init__(self, flat: np.ndarray, offsets: np.ndarray, dtype: torch.dtype):
        self._flat, self._offsets, self._dtype = flat, offsets, dtype

    def __getitem__(self, row: int) -> Tensor:
        piece = self._flat[self._offsets[row] : self._offsets[row + 1]]
        tensor = torch.from_numpy(np.array(piece))  # a copy: the memory map is read-only
        return tensor.view(self._dtype)

    def __len__(self) -> int:
        return len(self._offsets) - 1


def cached_states(
    base: Base, rows: Sequence[Encoded], first: int, progress: Callable[[int, int], None] | None = None
) -> RowStates:
    """Hidden states below layer ``first`` for every row, from the disk cache or computed now and kept.

    ``progress`` is called with (rows done, rows in all). Two processes that ask at once: one computes, one waits.
    """
    folder = cache_folder() / "prefix" / _key(base, rows, first)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder) + ".lock"):
        if not (folder / "offsets.npy").exists():  # written last
            _fill(base, rows, first, folder, progress or (lambda done, total: None))
    offsets = np.load(folder / "offsets.npy")
    size = (folder / "states.npy").stat().st_size
    flat = np.load(folder / "states.npy", mmap_mode="r" if size > IN_MEMORY else None)
    return RowStates(flat, offsets, base.dtype)


def _key(base: Base, rows: Sequence[Encoded], first: int) -> str:
    digest = hashlib.sha256(
        f"{RECIPE}|{base.digest}|{base.dtype}|{first}|{CHUNK}|{torch.__version__}|{base.device.type}".encode()
    )
    for row in rows:
        digest.update(repr((row.ids, row.segments)).encode())
    return digest.hexdigest()[:32]


def _fill(base: Base, rows: Sequence[Encoded], first: int, folder: Path, progress: Callable[[int, int], None]) -> None:
    folder.mkdir(exist_ok=True)
    offsets = np.concatenate([[0], np.cumsum([len(row.ids) for row in rows])])
    plain = np.uint16 if base.dtype == torch.bfloat16 else np.float32  # numpy has no bfloat16
    partial = folder / "states.partial.npy"
    header = {"descr": np.dtype(plain).str, "fortran_order": False, "shape": (int(offsets[-1]), base.width)}
    length = max(len(row.ids) for row in rows)
    # Written in order and not through a memory map: on a full disk a write to a map kills the process.
    with partial.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, header)
        for start in range(0, len(rows), CHUNK):
            chunk = list(rows[start : start + CHUNK])
            padded = chunk + [chunk[-1]] * (CHUNK - len(chunk))  # a last chunk of the same shape as the others
            states = hidden_at(base, collate(padded, base.tokenizer.pad_token_id, length).to(base.device), first).cpu()
            as_plain = states.view(torch.uint16) if plain is np.uint16 else states
            for i, row in enumerate(chunk):
                file.write(as_plain[i, : len(row.ids)].contiguous().numpy().tobytes())
            progress(start + len(chunk), len(rows))
    os.replace(partial, folder / "states.npy")
    np.save(folder / "offsets.partial.npy", offsets)
    os.replace(folder / "offsets.partial.npy", folder / "offsets.npy")

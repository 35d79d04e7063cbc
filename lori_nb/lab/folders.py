"""Anyone's LoRA adapters, read and written without their base model: enough to compare them and to merge them.

A name is a PEFT folder, or a hub id owner/name, of which the two files are fetched. Modules are known by their name
without what wraps a body ("model.", "bert.", …), so that adapters that PEFT wrapped with and without a head meet. An
adapter on an embedding, B A of shape d × vocabulary, counts as a module like any other.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lori_nb.analysis.reduced import orthonormal
from lori_nb.lab.hub import refusal
from lori_nb.lab.peft_folder import (
    AS_PICKLE,
    CONFIG,
    KEY,
    PICKLED,
    TOP,
    WEIGHTS,
    check_plain,
    module_of,
    read_config,
    read_tensors,
    scale_of,
    sorted_out,
)
from lori_nb.lab.peft_writing import check_new, portable, write_peft
from lori_nb.method.adapters import Factors

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # those that read_tensors lets pass
_ONE_SPACE = 1 - 1e-4  # overlap from which two row spaces are one, or within the other: bfloat16 rounds it by some 1e-6
# What a model puts before the names of its body's modules.
_WRAPPERS = re.compile(r"(?:(?:model|base_model|transformer|bert|roberta|distilbert|electra|deberta|gpt_neox)\.)*")


@dataclass(frozen=True)
class Folder:
    """A PEFT LoRA folder as it stands.

    Attributes:
        factors: module → its update in float32; A (r × d_in), B (d_out × r).
        keys: module → the key of its factors in the file, after what PEFT puts before every key, "{}" for A or B.
        saved: whole tensors beside the factors (heads, extended embeddings), which are neither compared nor merged.
        base: the base model that the folder names, "" where it names none.
        digest: SHA-256 of the file of tensors and of every module's scale, which the configuration decides.
        dtypes: module → those of A and B in the file.
    """

    name: str
    path: Path
    base: str
    factors: dict[str, Factors]
    keys: dict[str, str]
    saved: tuple[str, ...]
    config: dict[str, Any]
    digest: str
    dtypes: dict[str, tuple[torch.dtype, torch.dtype]]

    @property
    def stored(self) -> dict[str, Factors]:
        """The factors in the dtypes of the file, whose rounding decides which directions are real."""
        pairs = ((name, f, *self.dtypes[name]) for name, f in self.factors.items())
        return {name: Factors(f.A.to(of_A), f.B.to(of_B), f.scale) for name, f, of_A, of_B in pairs}


def read_folders(names: Sequence[str]) -> dict[str, Folder]:
    """Folders by a short name each: its last part, with what comes before it where two would be called alike.

    Raises:
        ValueError: a folder that is not whole, plain LoRA (what was found is named), or named twice.
        FileNotFoundError: neither a folder nor a hub id, or a hub id and no answer from the hub.
    """
    paths = [path_of(name) for name in names]
    if len(set(paths)) < len(paths):
        raise ValueError(f"adapters must be different folders; found {', '.join(map(str, names))}")
    shown = [str(path) if Path(name).expanduser().is_dir() else name for name, path in zip(names, paths, strict=True)]
    return {short: Folder(short, **_read(path)) for short, path in zip(short_names(shown), paths, strict=True)}


def short_names(names: Sequence[str]) -> list[str]:
    """The last parts of paths or hub ids, as many of each as tell them apart."""
    parts = [[part for part in str(name).replace("\\", "/").split("/") if part not in ("", ".")] for name in names]
    longest = max((len(each) for each in parts), default=0)
    for count in range(1, longest + 1):
        short = ["/".join(each[-count:]) for each in parts]
        if len(set(short)) == len(short):
            return short
    return [str(name) for name in names]


def path_of(name: str) -> Path:
    """The folder of that name, or the hub's copy of an adapter owner/name; raises as :func:`read_folders` does."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"adapter must be a PEFT folder or a hub id owner/name; found {name!r}")
    from huggingface_hub import file_exists, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
        pickled = not (found / WEIGHTS).exists() and file_exists(name, PICKLED)
    except HFValidationError as error:
        raise ValueError(f"adapter must be a PEFT folder or a hub id owner/name; found {name!r}") from error
    except Exception as error:  # noqa: BLE001 (any network error means the same to the user)
        raise FileNotFoundError(refusal("adapter", name, error)) from error
    if pickled:
        raise ValueError(f"adapter {name} must hold {WEIGHTS}; found {AS_PICKLE}")
    return found


def _read(path: Path) -> dict[str, Any]:
    config = read_config(path)
    tensors, _ = read_tensors(path)
    check_plain(config)
    pairs, saved = sorted_out(tensors, path)
    factors, keys = {}, {}
    for key, pair in pairs.items():
        spelt = module_of(key)
        module = unwrapped(spelt)
        if module in factors:
            raise ValueError(
                f"a module must stand once in {path}; found {key.format('A')} and {keys[module].format('A')}"
            )
        factors[module] = Factors(pair["A"], pair["B"], scale_of(config, spelt, len(pair["A"])))
        keys[module] = key
    with safe_open(path / WEIGHTS, framework="pt") as file:  # the header alone is read again
        dtypes = {
            module: tuple(_DTYPES[file.get_slice(f"{TOP}{key.format(x)}").get_dtype()] for x in "AB")
            for module, key in keys.items()
        }
    with (path / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps({name: f.scale for name, f in sorted(factors.items())}).encode())
    return {
        "path": path,
        "base": str(config.get("base_model_name_or_path") or ""),
        "factors": factors,
        "keys": keys,
        "saved": tuple(saved),
        "config": config,
        "digest": digest.hexdigest(),
        "dtypes": dtypes,
    }


def unwrapped(module: str) -> str:
    """A module's name in its model's body: "model.layers.3.mlp.up_proj" and "layers.3.mlp.up_proj" are one."""
    return module[_WRAPPERS.match(module).end() :]


def write_merged(
    folder: Path,
    merged: Mapping[str, Factors],
    sources: Mapping[str, Folder],
    for_serving: bool = False,
    about: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write what was made of some folders as a PEFT folder for the first one's base, under its names of modules.

    Args:
        folder: new, or empty.
        merged: module → update, over modules of the sources.
        for_serving: the portable form of :mod:`lori_nb.lab.peft_writing`.
        about: how it was made, for the file's header, beside the sources' digests.
        dtype: of the stored A and B: float32, or bfloat16 or float16, which round them.

    Raises:
        ValueError: the folder holds something, a value is not finite in the dtype, or the portable form cannot hold the
            result.
    """
    folder, first = check_new(folder), next(iter(sources.values()))
    keys = _keys(list(sources.values()))
    embedded = [module for module in merged if not keys[module].endswith(KEY)]
    if for_serving and embedded:
        raise ValueError(f"a portable folder must have no adapter on an embedding; found one on {embedded[0]}")
    factors = {keys[module]: f for module, f in (portable(merged) if for_serving else merged).items()}
    made_of = {name: source.digest for name, source in sources.items()}
    about = {"merged": made_of, **(about or {})}
    return write_peft(folder, factors, first.base, task_type=first.config.get("task_type"), about=about, dtype=dtype)


def _keys(sources: Sequence[Folder]) -> dict[str, str]:
    """Module → its key under the first folder's wrapper."""
    spelt = next(iter(sources[0].keys.values()))
    wrapper = spelt[: _WRAPPERS.match(spelt).end()]
    keys = {module: key for source in reversed(sources) for module, key in source.keys.items()}
    return {module: f"{wrapper}{unwrapped(key)}" for module, key in keys.items()} | sources[0].keys


def comparable(folders: Mapping[str, Folder]) -> tuple[dict[str, dict[str, Factors]], list[str]]:
    """(folder → its modules' factors as stored, of those with one shape d_out × d_in wherever they are; a sentence that
    names the others, such as an embedding whose vocabulary was resized in one folder).
    """
    shapes: dict[str, set[tuple[int, int]]] = {}
    for folder in folders.values():
        for module, f in folder.factors.items():
            shapes.setdefault(module, set()).add((len(f.B), f.A.shape[1]))
    other = sorted(module for module, found in shapes.items() if len(found) > 1)
    adapters = {
        name: {module: f for module, f in folder.stored.items() if module not in other}
        for name, folder in folders.items()
    }
    return adapters, [f"modules of different shapes are not compared ({_some(other)})"] if other else []


def not_shared(folders: Mapping[str, Folder]) -> list[str]:
    """What a comparison leaves out or mixes, one sentence each: modules that not all have, other ranks, scales and
    bases, and whole saved tensors.
    """
    every = set.intersection(*(set(folder.factors) for folder in folders.values()))
    lines = []
    for name, folder in folders.items():
        own = sorted(set(folder.factors) - every)
        if own:
            lines.append(f"{name}: {len(own)} of {len(folder.factors)} modules are not in all ({_some(own)})")
        if folder.saved:
            lines.append(f"{name}: whole saved tensors are left out ({_some(sorted(folder.saved))})")
    ranks = {name: _range(len(f.A) for f in folder.factors.values()) for name, folder in folders.items()}
    scales = {name: _range(f.scale for f in folder.factors.values()) for name, folder in folders.items()}
    bases = {name: folder.base or "none named" for name, folder in folders.items()}
    for what, values in (("ranks", ranks), ("scales α/r", scales), ("base models", bases)):
        if len(set(values.values())) > 1:
            lines.append(f"{what} differ: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    return lines


def shared_draws(folders: Mapping[str, Folder]) -> list[str]:
    """One sentence if adapters' A have one row space, or one within the other's: so they have of one draw of a frozen
    A, whatever they learned, and of independent draws never.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for module in dict.fromkeys(name for folder in folders.values() for name in folder.factors):
        found = {name: folder.factors[module].A for name, folder in folders.items() if module in folder.factors}
        bases = {name: orthonormal(A.T, f"A of {name!r}, {module!r}")[0] for name, A in found.items()}
        for (a, U), (b, V) in itertools.combinations(bases.items(), 2):
            ranks = U.shape[1], V.shape[1]
            # all of the input is everybody's; of two shapes nothing is said here
            if len(U) == len(V) and min(ranks) > 0 and max(ranks) < len(U):
                counts[a, b] += float((U.T @ V).square().sum()) / min(ranks) >= _ONE_SPACE
    pairs = [f"{a} and {b} in {count} module{'s' * (count > 1)}" for (a, b), count in counts.items() if count]
    if not pairs:
        return []
    return [f"A's have one row space ({_some(pairs)}), as a shared draw gives: --null given puts that into the null"]


def _range(values) -> str:
    values = sorted(set(values))
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")

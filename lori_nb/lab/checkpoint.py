"""A training run's checkpoint: parameters, the optimiser's state, whatever else goes on, and facts; one safetensors
file, replaced as a whole.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lori_nb.lab.paths import write_atomically

VALUE = "value"  # of a parameter, beside the optimiser's names
Named = Mapping[str, nn.Parameter]
Others = dict[str, dict[str, Tensor]]  # part of the run → its tensors by name; no part is named as a parameter is


def save_checkpoint(path: Path, named: Named, optimiser: torch.optim.Optimizer, about: dict, others: Others) -> None:
    """Write everything that a run needs to go on to the same bits; ``about`` must be JSON."""
    tensors = {f"{part}|{name}": tensor for part, several in others.items() for name, tensor in several.items()}
    for name, parameter in named.items():
        tensors[f"{name}|{VALUE}"] = parameter.detach()
        tensors |= {f"{name}|{key}": value.detach() for key, value in optimiser.state[parameter].items()}
    there = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    write_atomically(path, save(there, metadata={"about": json.dumps(about)}))


def restore_checkpoint(path: Path, named: Named, optimiser: torch.optim.Optimizer) -> tuple[dict, Others] | None:
    """Put a checkpoint's parameters and optimiser state back, and return what else it holds.

    None where there is none, or, with a warning, where it cannot be read.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            about = json.loads(file.metadata()["about"])
    except SafetensorError as error:
        warnings.warn(f"{path} is damaged ({error}); training starts anew", stacklevel=4)
        return None
    parts: Others = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition("|")
        parts.setdefault(part, {})[name] = tensor
    with torch.no_grad():
        for name, parameter in named.items():
            kept = parts.pop(name)
            parameter.copy_(kept.pop(VALUE))
            moved = {key: t if key == "step" else t.to(parameter.device) for key, t in kept.items()}
            optimiser.state[parameter] = moved
    return about, parts

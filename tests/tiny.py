"""Specs and data for runs that take a second."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lori_nb.lab.models import empty_body
from lori_nb.lab.peft_writing import write_peft
from lori_nb.lab.specs import RunSpec
from lori_nb.method.adapters import Factors, target_linears
from lori_nb.study.reference_text import PAGE, marks

TESTS = Path(__file__).resolve().parent


def tiny_spec(base: Path, method: str = "lora", tasks: Sequence[str] = ("chain_sum",), **changes) -> RunSpec:
    """A run on a tiny base: rank 4 on the last two layers, 20 steps of 8 rows, in float32."""
    settings = {
        "rank": 4,
        "alpha": 8.0,
        "last_layers": 2,
        "learning_rate": 1e-2,
        "steps": 20,
        "batch_size": 8,
        "train_rows": 32,
        "test_rows": 16,
        "dtype": "float32",
    }
    return RunSpec(method, tuple(tasks), base=str(base), **(settings | changes))


def sparse_spec(base: Path, **changes) -> RunSpec:
    """LoRI-S at sparsity 0.9 with its calibration run."""
    shared = {name: value for name, value in changes.items() if name in ("seed", "steps", "tasks")}
    return tiny_spec(base, "lori-s", sparsity=0.9, calibration=tiny_spec(base, "lori-d", **shared), **changes)


def marked(root: Path, name: str) -> tuple[Path, Path]:
    """README and the page of all tables of a project, each with the marks of a measured study and nothing between."""
    files = root / "README.md", root / PAGE
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" old ".join(marks(name)))
    return files


def gaussian(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_factors(linears, rank: int, seed: int, scale: float = 1.5) -> dict[str, Factors]:
    """Factors with Gaussian entries for named linear modules."""
    return {
        name: Factors(
            gaussian(rank, m.in_features, seed=seed + 2 * place),
            gaussian(m.out_features, rank, seed=seed + 2 * place + 1),
            scale,
        )
        for place, (name, m) in enumerate(linears.items())
    }


def folder_of(base: Path, place: Path, rank: int, seed: int, layers: int = 2) -> str:
    """A PEFT folder of somebody's adapter for the base."""
    linears = target_linears(empty_body(str(base)), "q_proj,up_proj", layers)
    factors = random_factors(linears, rank, seed)
    factors = {name: Factors(f.A * 0.1, f.B * 0.1, f.scale) for name, f in factors.items()}
    keyed = {f"model.{name}.lora_{{}}.weight": f for name, f in factors.items()}
    return str(write_peft(place, keyed, str(base)))


def python(code: str, *arguments: str, **settings: str) -> subprocess.Popen:
    """A Python process of its own that runs ``code``, with the tests' folder importable."""
    environment = os.environ | {"PYTHONPATH": str(TESTS)} | settings
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def output_of(process: subprocess.Popen) -> str:
    """What a process printed; fails with its errors when it failed."""
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out

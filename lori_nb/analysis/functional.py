"""Functional interference: what another task's adapter does to a task's own activations.

A zero inner product of ΔW_i and ΔW_j says nothing of ΔW_j x for the inputs x that task i brings (OSRM, arXiv
2505.22934). With the root mean square over those inputs,

    I(i, j) = ‖ΔW_j x‖ / ‖ΔW_i x‖,    x from task i,

module by module: 0 where adapter j leaves task i's activations alone, 1 where it moves them as far as task i's own
adapter does. From factors: ‖ΔW x‖² = s² (A x)ᵀ (BᵀB) (A x), so nothing of size d_out is formed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lori_nb.method.adapters import Factors

COLUMNS = ("task", "adapter", "module", "value")


class ResponseSum:
    """Σ ‖ΔW_j x‖² over inputs x, for every adapter j and module, fed batch by batch."""

    def __init__(self, adapters: Mapping[str, Mapping[str, Factors]]):
        of_module: dict[str, dict[str, Factors]] = {}
        for name, modules in adapters.items():
            for module, f in modules.items():
                of_module.setdefault(module, {})[name] = f
        # All A of a module as one matrix, and every adapter's s² BᵀB.
        self._A = {m: torch.cat([f.A.detach().double() for f in own.values()]) for m, own in of_module.items()}
        self._grams = {
            m: {name: (f.scale**2 * f.B.detach().double().T @ f.B.detach().double()) for name, f in own.items()}
            for m, own in of_module.items()
        }
        self._sums: dict[tuple[str, str], float] = {}
        self._count: dict[str, int] = {}

    @property
    def modules(self) -> list[str]:
        """Those of any adapter."""
        return list(self._A)

    def add(self, module: str, x: Tensor) -> None:
        """Count inputs x (n × d_in) of a module; in float64, on the device of x."""
        h = x.detach().double() @ self._A[module].to(x.device).T  # (n × Σ r)
        self._count[module] = self._count.get(module, 0) + len(x)
        grams = self._grams[module]
        parts = h.split([len(gram) for gram in grams.values()], dim=1)
        for (name, gram), part in zip(grams.items(), parts, strict=True):
            found = float(torch.sum((part.T @ part) * gram.to(x.device)))
            self._sums[name, module] = self._sums.get((name, module), 0.0) + found

    def table(self) -> pd.DataFrame:
        """Columns adapter, module and ``response``: the root mean square of ‖ΔW_j x‖."""
        rows = [(a, m, float(np.sqrt(max(0.0, total) / self._count[m]))) for (a, m), total in self._sums.items()]
        return pd.DataFrame(rows, columns=["adapter", "module", "response"])


def interference_of(responses: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """I(i, j), module by module, from what every adapter does to every task's activations.

    Args:
        responses: task i → table of :class:`ResponseSum` on its activations, in which one adapter is named i: its own.

    Returns:
        Columns ``task`` (i), ``adapter`` (j ≠ i), ``module`` and ``value``; NaN where task i's own adapter does
        nothing. Only modules that both adapters have.

    Raises:
        ValueError: a task without its own adapter.
    """
    frames = []
    for task, table in responses.items():
        own = table[table["adapter"] == task].set_index("module")["response"]
        if own.empty:
            raise ValueError(
                f"responses of task {task!r} must have its own adapter; found {sorted(set(table['adapter']))}"
            )
        others = table[(table["adapter"] != task) & table["module"].isin(own.index)]
        base = own.reindex(others["module"]).to_numpy()
        value = np.divide(others["response"].to_numpy(), base, out=np.full(len(others), np.nan), where=base > 0)
        frames.append(others.assign(task=task, value=value)[list(COLUMNS)])
    return pd.concat(frames, ignore_index=True)

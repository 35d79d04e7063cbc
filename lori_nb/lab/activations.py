"""What adapters do to a task's own activations, from one pass of a base over the task's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import nn

from lori_nb.analysis.functional import ResponseSum
from lori_nb.lab.models import Base
from lori_nb.lab.prefix import model_inputs
from lori_nb.lab.text import Encoded, collate
from lori_nb.method.adapters import Factors, attach_factors


def responses(
    base: Base,
    adapters: Mapping[str, Mapping[str, Factors]],
    rows: Sequence[Encoded],
    attached: str | None = None,
    batch_size: int = 16,
) -> pd.DataFrame:
    """Root mean square of ‖ΔW_j x‖ over the tokens x of some rows, for every adapter j and module.

    Args:
        rows: prompts with their answers; padding does not count.
        attached: the adapter that is at work during the pass, a key of ``adapters``; None takes the activations of the
            base alone.

    Returns:
        Columns adapter, module and response.

    Raises:
        ValueError: no row, an unknown adapter, or a module that the base lacks or that takes other inputs than ΔW.
    """
    if not rows:
        raise ValueError("rows must hold at least one row; found none")
    if attached is not None and attached not in adapters:
        raise ValueError(f"attached must be one of {', '.join(adapters)}; found {attached!r}")
    sums, known = ResponseSum(adapters), dict(base.body.named_modules())
    for module in sums.modules:
        _check_fits(module, known.get(module), adapters)
    real: list[torch.Tensor] = []  # the mask of the batch under way

    def listener(module: str):
        def listen(_, inputs: tuple) -> None:
            sums.add(module, inputs[0][real[0]])

        return listen

    handles = [known[module].register_forward_pre_hook(listener(module)) for module in sums.modules]
    at_work = attach_factors(base.body, adapters[attached] if attached else {})
    try:
        with at_work, torch.no_grad():
            for start in range(0, len(rows), batch_size):
                batch = collate(rows[start : start + batch_size], base.tokenizer.pad_token_id).to(base.device)
                real[:] = [batch.mask.bool()]
                base.body(**model_inputs(base, batch))
    finally:
        for handle in handles:
            handle.remove()
    return sums.table()


def _check_fits(module: str, found: nn.Module | None, adapters: Mapping[str, Mapping[str, Factors]]) -> None:
    if not isinstance(found, nn.Linear):
        raise ValueError(f"adapter module {module!r} must be a linear module of the base; found {type(found).__name__}")
    for name, modules in adapters.items():
        if module in modules and modules[module].A.shape[1] != found.in_features:
            width = modules[module].A.shape[1]
            raise ValueError(f"A of {name!r} at {module} must have d_in = {found.in_features} columns; found {width}")

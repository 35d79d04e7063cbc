"""Published ways to learn a task without losing earlier ones, as ``begin`` hooks of the one training loop.

All train the adapter of the run before: the same rows of the new task, steps and optimiser as without them. Their
numbers (``strengths``) have no published values for these models, so they must be tuned as learning rates are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lori_nb.method.conflicts import project_off

if TYPE_CHECKING:
    from lori_nb.lab.stages import Stage

RECIPE = 2  # raise when a hook, what it is handed or one of its defaults gives another adapter
ROWS_AT_ONCE = 8  # rows whose gradients are held one by one
Hooks = dict[str, Callable]


def elastic_weights(stage: Stage) -> Hooks:
    """Elastic weight consolidation (Kirkpatrick et al. 2017, eq. 3) on the adapter's parameters θ:

        L(θ) + (λ / 2) Σ_i Σ_p F_ip (θ_p − θ_ip)²

    over earlier tasks i, with θ_i the adapter after task i and F_i its Fisher information there, the mean over the
    kept rows of the squared gradient of log p(answer | prompt) of the right answers ("empirical"). λ is ``strength``.
    """
    precision = {name: torch.zeros_like(p) for name, p in stage.shared.items()}
    anchored = {name: torch.zeros_like(p) for name, p in stage.shared.items()}
    for each in stage.earlier:
        with stage.at(each.adapter):
            for name, found in fisher(stage, each.task).items():
                precision[name] += found
                anchored[name] += found * stage.named[name].detach()
    # Σ_i F_i (θ − θ_i)² is F (θ − c)² but for a constant, with F = Σ F_i and c = Σ F_i θ_i / F.
    centres = {name: anchored[name] / precision[name].clamp(min=torch.finfo(torch.float32).tiny) for name in precision}
    half = stage.strength("strength") / 2

    def penalty(live, step: int) -> Tensor:
        return half * sum((precision[n] * (p - centres[n]).square()).sum() for n, p in stage.shared.items())

    return {"penalty": penalty}


def fisher(stage: Stage, task) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher information on a task's kept rows at the present parameters, by name."""
    total = {name: torch.zeros_like(p) for name, p in stage.shared.items()}
    rows = range(len(task.rows))
    for first in rows[::ROWS_AT_ONCE]:
        chunk = rows[first : first + ROWS_AT_ONCE]
        # A loss is a mean over answer tokens; log p of the whole answer is their sum. A squared error is −2 log p of a
        # number with unit variance.
        share = 1.0 if task.unit is None else 0.5
        tokens = torch.tensor([share * task.targets([row]) for row in chunk])
        for name, each in stage.gradients([(task, [row]) for row in chunk]).items():
            scale = tokens.to(each.device).view(-1, *[1] * (each.ndim - 1))
            total[name] += (each * scale).square().sum(0) / len(rows)
    return total


def orthogonal_subspaces(stage: Stage) -> Hooks:
    """O-LoRA (arXiv 2310.14152, eq. 6–8): the new task has factors of its own beside those of earlier tasks, which are
    frozen, and its A_t is kept orthogonal to theirs: λ Σ_modules Σ_i ‖A_i A_tᵀ‖² is added to the loss, λ ``strength``.
    """
    device = next(iter(stage.live.values())).A.device
    before = {name: f.A.to(device) for name, f in stage.earlier[-1].adapter.factors.items()}  # all earlier A, stacked
    strength = stage.strength("strength")

    def penalty(live, step: int) -> Tensor:
        return strength * sum((before[name] @ low.A.T).square().sum() for name, low in live.items())

    return {"penalty": penalty}


def replay(stage: Stage) -> Hooks:
    """Experience replay: every batch of b new rows is joined by m = ``rows`` kept rows of one earlier task, the tasks
    taking turns. The gradient is (b g_new + m g_old) / (b + m), each g that of its own batch's mean loss, so that the
    share of old rows is m / (b + m); they come on top of the new ones. Heads of earlier tasks stay as they were left.
    """
    rows, new = int(stage.strength("rows")), stage.spec.batch_size

    def transform(gradients: Sequence[Mapping[str, Tensor]], step: int) -> dict[str, Tensor]:
        turn, lap = step % len(stage.earlier), step // len(stage.earlier)
        task = stage.earlier[turn].task
        drawn = stage.drawn(task, rows, lap)  # fewer than asked for where fewer are kept
        old = stage.gradients([(task, drawn)])
        return {
            name: (new * own + len(drawn) * old[name][0]) / (new + len(drawn)) for name, own in gradients[0].items()
        }

    return {"transform": transform}


def projected_off_memory(stage: Stage) -> Hooks:
    """Ortho-LoRA's projection in a sequence: the new task's gradient of every A and B, where it conflicts with that of
    an earlier task on ``rows`` of its kept rows, is projected onto its orthogonal complement, one earlier task after
    another in random order. What is averaged over tasks in A-GEM (arXiv 1812.00420) is done for every task and tensor.
    A later projection may bring back an earlier conflict, and clipping and AdamW come after.
    """
    rows = int(stage.strength("rows"))

    def transform(gradients: Sequence[Mapping[str, Tensor]], step: int) -> dict[str, Tensor]:
        old = stage.gradients([(each.task, stage.drawn(each.task, rows, step)) for each in stage.earlier])
        generator = torch.Generator().manual_seed(stage.spec.seed * 1_000_003 + step)
        return project_off(gradients[0], old, generator)

    return {"transform": transform}

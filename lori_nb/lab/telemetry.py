"""How the tasks' gradients lay to each other while one adapter trained on all of them.

Every step records the cosines between the tasks' gradients for each tensor, those of the blocks that a conflict solver
works on where these are larger, what projection removed, and how far the gradient that was taken lies from that of
joint training. Some steps split each task's rows in two halves and also record the cosines of all halves: halves of one
task share the task and differ by noise alone, so how far their cosine falls below 1 is what noise does to a cosine. The
gradient that trains is then the sum of the halves'.

Nothing waits for the device between two looks at the losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from lori_nb.method.conflicts import Conflicts

RECIPE = 2  # raise when the same gradients leave another record
LOOKS = 20  # at least so many steps of a run split their batches in halves, evenly spread; all of a shorter run
COLUMNS = ("step", "tensor", "measure", "task", "other", "value")
COSINE, BLOCKS, HALVES = "cosine", "cosine of blocks", "cosine of halves"
REMOVED, CHANGE, RATE = "removed", "change", "conflict rate"


@dataclass
class Telemetry:
    """The record of one run on ``tasks``; ``table()`` is what is kept of it."""

    tasks: Sequence[str]
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)  # measure → its G tensors or blocks
    kept: dict[str, list[Tensor]] = field(default_factory=dict)  # measure → (G × pairs or 1) a step
    steps: dict[str, list[int]] = field(default_factory=dict)

    def add(
        self,
        step: int,
        conflicts: Conflicts,
        change: Tensor,
        blocks: Conflicts | None = None,
        halves: Conflicts | None = None,
    ) -> None:
        """One step.

        Args:
            conflicts: of the tasks' gradients, tensor by tensor.
            change: ‖∇ − S‖ / ‖S‖ as in :meth:`table`, tensor by tensor (G,).
            blocks: of the blocks that a solver worked on.
            halves: tensor by tensor between the halves of the tasks' batches, task 0's two first.
        """
        self._keep(step, COSINE, conflicts.groups, _upper(conflicts.cosines))
        self._keep(step, CHANGE, conflicts.groups, change[:, None])
        if halves is not None:
            self._keep(step, HALVES, halves.groups, _upper(halves.cosines))
        if blocks is not None and blocks.groups != conflicts.groups:
            self._keep(step, BLOCKS, blocks.groups, _upper(blocks.cosines))
        if blocks is not None and blocks.removed is not None:
            self._keep(step, REMOVED, blocks.groups, blocks.removed[:, None])

    def _keep(self, step: int, measure: str, names: tuple[str, ...], values: Tensor) -> None:
        self.names[measure] = tuple(name or "adapter" for name in names)
        self.steps.setdefault(measure, []).append(step)
        self.kept.setdefault(measure, []).append(values)

    def state(self) -> dict[str, Tensor]:
        """Everything so far as tensors on the CPU, for a checkpoint; waits for the device."""
        values = {f"{measure}|values": self._values(measure) for measure in self.kept}
        return values | {f"{measure}|steps": torch.tensor(steps) for measure, steps in self.steps.items()}

    def _values(self, measure: str) -> Tensor:
        return torch.stack([each.cpu().float() for each in self.kept[measure]])  # after a resume on two devices

    def restore(self, state: Mapping[str, Tensor], names: Mapping[str, Sequence[str]]) -> None:
        """Go on from what :meth:`state` gave."""
        self.names = {measure: tuple(several) for measure, several in names.items()}
        for name, tensor in state.items():
            measure, _, what = name.rpartition("|")
            if what == "steps":
                self.steps[measure] = tensor.tolist()
            else:
                self.kept[measure] = list(tensor)

    def table(self) -> pd.DataFrame:
        """One value a row: step, tensor (or block), measure, task, other, value; NaN where a gradient was zero.

        - "cosine", "cosine of blocks": between two tasks' gradients;
        - "cosine of halves": between halves of tasks' batches, within a task where ``task`` is ``other``;
        - "conflict rate": the share of task pairs with a negative cosine, in the solver's blocks where these are larger
          than tensors, without tasks;
        - "removed": the share of the tasks' gradient norm that projection took away, without tasks;
        - "change": ‖∇ − S‖ / ‖S‖, S what joint training would have taken and ∇ what was taken, without tasks. It is no
          share removed: two gradients of equal norm at an obtuse angle add up to a longer one after projection.
        """
        halves = [task for task in self.tasks for _ in range(2)]
        between, none = _pairs(self.tasks), [(None, None)]
        owners = {COSINE: between, BLOCKS: between, HALVES: _pairs(halves), REMOVED: none, CHANGE: none}
        kept = [(measure, pairs) for measure, pairs in owners.items() if measure in self.kept]
        frames = [self._frame(measure, self._values(measure), measure, pairs) for measure, pairs in kept]
        if COSINE in self.kept:
            worked_on = BLOCKS if BLOCKS in self.kept else COSINE
            frames.append(self._frame(RATE, _rates(self._values(worked_on)), worked_on, none))
        table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(COLUMNS))
        return table.astype({name: "category" for name in ("tensor", "measure", "task", "other")})

    def _frame(self, measure: str, values: Tensor, like: str, owners: Sequence[tuple]) -> pd.DataFrame:
        """``values`` (steps × G × owners) as rows, at the steps and in the tensors or blocks of measure ``like``."""
        levels = [self.steps[like], self.names[like], range(len(owners))]
        index = pd.MultiIndex.from_product(levels, names=["step", "tensor", "pair"])
        frame = pd.DataFrame({"value": values.flatten().numpy()}, index=index).reset_index()
        task, other = zip(*owners, strict=True)
        frame["task"], frame["other"] = (pd.Series(names).take(frame["pair"]).to_numpy() for names in (task, other))
        return frame.assign(measure=measure)[list(COLUMNS)]


def relative_change(taken: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> Tensor:
    """‖taken − whole‖ / ‖whole‖ for every tensor (G,), in the order of ``whole``, not finite where that is zero."""
    norms = torch._foreach_norm(list(whole.values()))
    gaps = torch._foreach_norm(torch._foreach_sub([taken[name] for name in whole], list(whole.values())))
    return torch.stack(gaps) / torch.stack(norms)


def _rates(cosines: Tensor) -> Tensor:
    """(… × pairs) → (…): the share of negative ones among those that are defined, NaN where none is."""
    return (cosines < 0).sum(-1) / (~cosines.isnan()).sum(-1)


def _upper(cosines: Tensor) -> Tensor:
    """(G × T × T) → (G × pairs), in the order of :func:`_pairs`."""
    tasks = range(cosines.shape[1])
    # by slices: an index tensor would come from the CPU and make it wait
    return torch.stack([cosines[:, i, j] for i in tasks for j in tasks if i < j], dim=1)


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(names[i], names[j]) for i in range(len(names)) for j in range(i + 1, len(names))]

"""How the tasks' gradients lay to each other while one adapter trained on all of them.

Every step records, for each tensor, the cosines between the tasks' gradients and what projection removed. Some steps
also record the *null*: each task's rows are split in two halves, and the cosines of all halves are kept. Halves of one
task differ by noise alone, so whatever two tasks' halves show beyond that is between the tasks. The gradient that
trains is the sum of the halves', so that looking costs no further pass.

Nothing waits for the device between two looks at the losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from lori_nb.method.conflicts import Conflicts

RECIPE = 1  # raise when the same gradients leave another record
LOOKS = 20  # how many steps of a run split their batches in halves, evenly spread
COLUMNS = ("step", "tensor", "measure", "task", "other", "value")
COSINE, HALVES, REMOVED = "cosine", "cosine of halves", "removed"


@dataclass
class Telemetry:
    """The record of one run on ``tasks``; ``table()`` is what is kept of it."""

    tasks: Sequence[str]
    tensors: tuple[str, ...] = ()
    kept: dict[str, list[Tensor]] = field(default_factory=dict)  # measure → (G × pairs or 1) a step
    steps: dict[str, list[int]] = field(default_factory=dict)

    def add(self, step: int, conflicts: Conflicts, removed: Tensor, halves: Conflicts | None = None) -> None:
        """One step: the tasks' gradients tensor by tensor, the share ``removed`` (G) of their sum, and where batches
        were split the gradients of their halves (task 0's two first).
        """
        self.tensors = conflicts.groups
        found = {COSINE: _upper(conflicts.cosines), REMOVED: removed[:, None]}
        if halves is not None:
            found[HALVES] = _upper(halves.cosines)
        for measure, values in found.items():
            self.steps.setdefault(measure, []).append(step)
            self.kept.setdefault(measure, []).append(values)

    def state(self) -> dict[str, Tensor]:
        """Everything so far as tensors, for a checkpoint; waits for the device."""
        values = {f"{measure}|values": torch.stack(several).cpu() for measure, several in self.kept.items()}
        return values | {f"{measure}|steps": torch.tensor(steps) for measure, steps in self.steps.items()}

    def restore(self, state: Mapping[str, Tensor], tensors: Sequence[str]) -> None:
        """Go on from what :meth:`state` gave."""
        self.tensors = tuple(tensors)
        for name, tensor in state.items():
            measure, _, what = name.rpartition("|")
            if what == "steps":
                self.steps[measure] = tensor.tolist()
            else:
                self.kept[measure] = list(tensor)

    def table(self) -> pd.DataFrame:
        """One value a row: step, tensor, measure, task, other, value; NaN where a gradient was zero.

        Measure "cosine" is between two tasks' gradients; "cosine of halves" between halves of tasks' batches, within a
        task where ``task`` is ``other``; "removed" is ‖∇ − S‖ / ‖S‖, S what joint training would have taken and ∇ what
        was taken, without tasks: 0 in joint training itself.
        """
        halves = [task for task in self.tasks for _ in range(2)]
        owners = {COSINE: _pairs(self.tasks), HALVES: _pairs(halves), REMOVED: [(None, None)]}
        frames = [self._frame(measure, pairs) for measure, pairs in owners.items() if measure in self.kept]
        table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(COLUMNS))
        return table.astype({name: "category" for name in ("tensor", "measure", "task", "other")})

    def _frame(self, measure: str, owners: Sequence[tuple]) -> pd.DataFrame:
        values, steps = torch.stack(self.kept[measure]).cpu(), self.steps[measure]
        index = pd.MultiIndex.from_product([steps, self.tensors, range(len(owners))], names=["step", "tensor", "pair"])
        frame = pd.DataFrame({"value": values.flatten().numpy()}, index=index).reset_index()
        task, other = zip(*owners, strict=True)
        frame["task"], frame["other"] = (pd.Series(names).take(frame["pair"]).to_numpy() for names in (task, other))
        return frame.assign(measure=measure)[list(COLUMNS)]


def removed_share(taken: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> Tensor:
    """‖taken − whole‖ / ‖whole‖ for every tensor (G,), in the order of ``whole``; NaN where that is zero."""
    norms = torch._foreach_norm(list(whole.values()))
    gaps = torch._foreach_norm([taken[name] - each for name, each in whole.items()])
    return torch.stack(gaps) / torch.stack(norms)


def _upper(cosines: Tensor) -> Tensor:
    """(G × T × T) → (G × pairs), in the order of :func:`_pairs`."""
    first, second = torch.triu_indices(cosines.shape[1], cosines.shape[2], 1)
    return cosines[:, first, second]


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(names[i], names[j]) for i in range(len(names)) for j in range(i + 1, len(names))]

"""The loss of a regression task, on the scale of the losses that it shares an adapter with.

A cross entropy begins near log(classes), 0.69 for two, in whatever words its labels are written. A squared error has
the square of its target's unit instead: for scores around 3 it begins near 10, and in hundredths of them near 100,000.
So a regression task is trained on

    z = (y − μ) / σ,    loss = mean (ẑ − z)²,

with the mean μ and the standard deviation σ of its training rows: always answering the mean has loss 1, in every unit.
When training ends the task's head takes the unit into itself, ŷ = μ + σ ẑ, so that what is kept, scored and exported
answers in the target's own unit; correlations are those of ẑ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

RECIPE = 2  # raise when a regression task is trained otherwise; 1 was the squared error in the target's own unit


@dataclass(frozen=True)
class Unit:
    """Mean μ and standard deviation σ of a task's training targets, in the target's own unit; σ is above 0."""

    mean: float
    deviation: float

    def standardised(self, targets: Tensor) -> Tensor:
        """z = (y − μ) / σ, float32, of the targets' shape."""
        return (targets.float() - self.mean) / self.deviation

    def of_head(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A head's ``weight`` (1 × d) and ``bias`` (1) with the unit in them: ẑ(h) → μ + σ ẑ(h)."""
        return {
            "weight": parameters["weight"] * self.deviation,
            "bias": parameters["bias"] * self.deviation + self.mean,
        }

    def out_of_head(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`of_head`: the head of ŷ → that of ẑ = (ŷ − μ) / σ."""
        return {
            "weight": parameters["weight"] / self.deviation,
            "bias": (parameters["bias"] - self.mean) / self.deviation,
        }


def unit_of(targets: Iterable[float]) -> Unit:
    """The unit of a task's training targets; σ = 1 where all are equal. ValueError for none, or one not finite."""
    values = [float(target) for target in targets]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"targets of a regression task must be finite numbers, at least one; found {values[:3]}")
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return Unit(mean, deviation or 1.0)

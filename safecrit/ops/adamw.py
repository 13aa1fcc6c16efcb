"""What both AdamW ops take besides their tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AdamWStep:
    """One step of AdamW (Loshchilov and Hutter 2019): `step` counts from 1, `clip` multiplies the gradient first."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float

    def __post_init__(self) -> None:
        problems = []
        if self.step < 1:
            problems.append(f"step is {self.step}, counts from 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas are {self.betas}, must be in [0, 1)")
        for name in ("lr", "eps", "weight_decay", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                problems.append(f"{name} is {value}, must be finite and not negative")
        if problems:
            raise ValueError(f"AdamW: {'; '.join(problems)}")

    @property
    def step_size(self) -> float:
        """Learning rate over the first moment's bias correction."""
        return self.lr / (1 - self.betas[0] ** self.step)

    @property
    def root_correction(self) -> float:
        """Square root of the second moment's bias correction."""
        return math.sqrt(1 - self.betas[1] ** self.step)

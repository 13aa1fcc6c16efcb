"""What both AdamW ops take besides their tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from safecrit.ops.views import overlap


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
    def factors(self) -> tuple[float, ...]:
        """Clip, 1 - beta1, beta2, 1 - beta2, 1 - lr * decay, step size, epsilon: what csrc/adamw.h multiplies and adds.

        torch divides the first moment by its bias correction and the second one's root by r, its correction's root.
        Here both are in the step size, lr * r / (1 - beta1^step), and in epsilon * r: one division an entry.
        """
        beta1, beta2 = self.betas
        root = math.sqrt(1 - beta2**self.step)
        step_size = self.lr * root / (1 - beta1**self.step)
        return self.clip, 1 - beta1, beta2, 1 - beta2, 1 - self.lr * self.weight_decay, step_size, self.eps * root


def check_apart(op: str, written: Mapping[str, torch.Tensor], read: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError where a tensor that is written shares memory with any other."""
    names = [*written, *read]
    tensors = [*written.values(), *read.values()]
    for i, j in itertools.combinations(range(len(names)), 2):
        if i < len(written) and overlap(tensors[i], tensors[j]):
            raise ValueError(f"{op}: {names[i]} and {names[j]} share memory")

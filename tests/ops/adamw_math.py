"""One AdamW step in numpy, float64: what both AdamW ops are tested against."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st

Array = npt.NDArray[np.float64]

SETTINGS = st.fixed_dictionaries(
    {
        "step": st.integers(1, 10_000),
        "lr": st.floats(0, 1),
        "betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.9999)),
        "eps": st.floats(1e-12, 1e-3),
        "weight_decay": st.floats(0, 1),
        "clip": st.floats(0, 1),
    }
)


def stored_dtypes(target: Any) -> list[torch.dtype]:
    """What a weight may be stored in; Triton's interpreter cuts bfloat16 off where its compiler rounds."""
    interpreted = target.backend == "triton" and target.device == "cpu"
    return [torch.float32, torch.float16] if interpreted else [torch.float32, torch.float16, torch.bfloat16]


def adamw(weight: Array, grad: Array, exp_avg: Array, exp_avg_sq: Array, settings: dict) -> tuple[Array, Array, Array]:
    """Loshchilov and Hutter, algorithm 2, as torch.optim.AdamW writes it; new weight and moments."""
    (beta1, beta2), step = settings["betas"], settings["step"]
    grad = grad * settings["clip"]
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    root = np.sqrt(exp_avg_sq) / np.sqrt(1 - beta2**step) + settings["eps"]
    change = settings["lr"] / (1 - beta1**step) * exp_avg / root
    return weight * (1 - settings["lr"] * settings["weight_decay"]) - change, exp_avg, exp_avg_sq


def sizes(weight: Array, grad: Array, exp_avg: Array, exp_avg_sq: Array, settings: dict) -> tuple[Array, Array, Array]:
    """The size of the numbers that each result is a sum of: what rounding errors are to be measured by."""
    (beta1, beta2), step = settings["betas"], settings["step"]
    _, _, second = adamw(weight, grad, exp_avg, exp_avg_sq, settings)
    first = np.abs(exp_avg) + np.abs(grad)
    root = np.sqrt(second) / np.sqrt(1 - beta2**step) + settings["eps"]
    return np.abs(weight) + settings["lr"] / (1 - beta1**step) * first / root, first, second


def rounded(weight: Array, grad: Array, exp_avg: Array, exp_avg_sq: Array, factors: tuple[float, ...]) -> list[Array]:
    """The formula of csrc/adamw.h on float32, each operation rounded: what every kernel gives, bit for bit."""
    clip, one_minus_beta1, beta2, one_minus_beta2, keep, step_size, eps = (np.float32(value) for value in factors)
    with np.errstate(all="ignore"):
        grad = grad * clip
        exp_avg = exp_avg + one_minus_beta1 * (grad - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
        weight = keep * weight - step_size * exp_avg / (np.sqrt(exp_avg_sq) + eps)
    return [weight, exp_avg, exp_avg_sq]

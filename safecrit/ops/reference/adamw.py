"""One AdamW step (Loshchilov and Hutter, arXiv 1711.05101) on float32 tensors of one shape."""

from __future__ import annotations

import torch

from safecrit.ops.adamw import AdamWStep


def update(
    weight: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, settings: AdamWStep
) -> None:
    """Update `weight`, `exp_avg` and `exp_avg_sq` (float32) in place, by the formula of csrc/adamw.h.

    torch's square root is not always the nearest float, so the last bit may differ from the kernels'.
    """
    clip, one_minus_beta1, beta2, one_minus_beta2, keep, step_size, eps = settings.factors
    grad = grad * clip
    exp_avg.add_((grad - exp_avg).mul_(one_minus_beta1))
    exp_avg_sq.mul_(beta2).add_((grad * one_minus_beta2).mul_(grad))
    weight.mul_(keep).sub_((exp_avg * step_size).div_(exp_avg_sq.sqrt().add_(eps)))

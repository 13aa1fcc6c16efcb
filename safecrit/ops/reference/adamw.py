"""The arithmetic of torch.optim.AdamW on float32 tensors of one shape."""

from __future__ import annotations

import torch

from safecrit.ops.adamw import AdamWStep


def update(
    weight: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, settings: AdamWStep
) -> None:
    """Update `weight`, `exp_avg` and `exp_avg_sq` (float32) in place, in the order of torch's single-tensor loop."""
    beta1, beta2 = settings.betas
    if settings.clip != 1.0:
        grad = grad * settings.clip
    weight.mul_(1 - settings.lr * settings.weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / settings.root_correction).add_(settings.eps)
    weight.addcdiv_(exp_avg, denominator, value=-settings.step_size)

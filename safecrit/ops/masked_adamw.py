"""One dense AdamW step that leaves the entries under a bit mask bit-identical (docs/method.md, section 4)."""

from __future__ import annotations

import torch

from safecrit.ops.adamw import AdamWStep, check_apart
from safecrit.ops.bits import check_bits
from safecrit.ops.dispatch import Backend, choose


@torch.no_grad()
def masked_adamw_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    bits: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: float = 1.0,
    backend: Backend = "auto",
) -> None:
    """Update weight and moments in place, except where the bit is 1: there neither changes, nor decays.

    weight, exp_avg, exp_avg_sq: contiguous, any floating dtypes, one shape; grad: any floating dtype, same shape.
    bits: uint8 [ceil(numel / 8)], little bit order. Arithmetic is torch.optim.AdamW's, in float32, rounded to
    each tensor's dtype once; `step` counts from 1; `clip` multiplies the gradient.

    Raises ValueError for anything else and for tensors that share memory.
    """
    settings = AdamWStep(step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, clip=clip)
    tensors = {"weight": weight, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"masked_adamw_: {name} is {tensor.dtype}, must be a floating-point dtype")
        if tensor.shape != weight.shape or tensor.device != weight.device:
            raise ValueError(
                f"masked_adamw_: weight is {tuple(weight.shape)} on {weight.device}, {name} {tuple(tensor.shape)} on "
                f"{tensor.device}"
            )
        if name != "grad" and not tensor.is_contiguous():
            raise ValueError(f"masked_adamw_: {name} must be contiguous")
    check_bits("masked_adamw_", bits, weight.numel())
    if bits.device != weight.device:
        raise ValueError(f"masked_adamw_: weight is on {weight.device}, bits on {bits.device}")
    check_apart(
        "masked_adamw_",
        {"weight": weight, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq},
        {"grad": grad, "bits": bits},
    )
    dtypes = [tensor.dtype for tensor in tensors.values()]
    function = choose("masked_adamw_", weight.device, backend, dtypes).function
    function(weight, grad, exp_avg, exp_avg_sq, bits, settings)

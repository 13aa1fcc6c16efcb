"""masked_adamw_ in torch, a chunk at a time."""

from __future__ import annotations

import torch

from safecrit.ops.adamw import AdamWStep
from safecrit.ops.reference.adamw import update
from safecrit.ops.reference.bits import unpack

CHUNK = 1 << 22  # entries, a multiple of 8; some 100 MiB of temporaries


def masked_adamw(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    bits: torch.Tensor,
    settings: AdamWStep,
) -> None:
    """See `safecrit.ops.masked_adamw_`; its arguments have been checked there."""
    flat_grad = grad.reshape(-1)
    targets = [tensor.view(-1) for tensor in (weight, exp_avg, exp_avg_sq)]
    for start in range(0, flat_grad.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        gradient = flat_grad[part].float()
        frozen = unpack(bits[start // 8 : start // 8 + CHUNK // 8])[: gradient.numel()]
        updated = [target[part].to(torch.float32, copy=True) for target in targets]
        update(updated[0], gradient, updated[1], updated[2], settings)
        for target, new in zip(targets, updated, strict=True):
            target[part] = torch.where(frozen, target[part], new.to(target.dtype))

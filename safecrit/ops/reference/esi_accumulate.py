"""esi_accumulate_ in torch, a chunk of rows or columns at a time."""

from __future__ import annotations

import torch

from safecrit.ops.views import Plane

CHUNK = 1 << 18  # entries; its temporaries stay in a processor's cache


def esi_accumulate(plane: Plane, sigma: float, reduction: str) -> int:
    """See `safecrit.ops.esi_accumulate_`; its arguments have been checked there."""
    acc_RC, grad_RC = plane.views
    step = max(1, CHUNK // plane.cols)
    skipped = 0
    for acc_rC, grad_rC in zip(acc_RC.split(step), grad_RC.split(step), strict=True):
        for acc, grad in zip(acc_rC.split(CHUNK, dim=1), grad_rC.split(CHUNK, dim=1), strict=True):
            value = grad.to(torch.float32, copy=True)
            finite = value.isfinite()
            bad = finite.numel() - int(finite.count_nonzero())
            value.mul_(value if reduction == "square" else sigma)
            if reduction == "abs":
                value.abs_()
            if bad:
                acc.copy_(torch.where(finite, acc + value, acc))
            else:
                acc.add_(value)
            skipped += bad
    return skipped

"""Adding one gradient to the score accumulator: acc += sigma * grad (docs/method.md, section 1).

The accumulator is float32 whatever the gradient's dtype: summing in bfloat16
changes a tenth of the selected weights. Product and sum are rounded separately
to float32 in every backend, so all of them give the same bits.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from safecrit.ops.dispatch import Backend, choose
from safecrit.ops.views import overlap, overlaps_itself, plane

Reduction = Literal["signed", "abs", "square"]
REDUCTIONS = ("signed", "abs", "square")
GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def esi_accumulate_(
    acc: torch.Tensor,
    grad: torch.Tensor,
    sigma: float,
    reduction: Reduction = "signed",
    *,
    backend: Backend = "auto",
) -> int:
    """Add a gradient to `acc` in place; return the number of non-finite gradient entries, which are not added.

        signed   acc += sigma * grad
        abs      acc += |sigma * grad|
        square   acc += grad * grad          (Fisher: sigma is not used)

    acc: float32, any shape. grad: float32, bfloat16 or float16, same shape and device. Both may be views whose
    dimensions collapse to rows x cols with a row and a column stride. A finite entry whose product overflows
    float32 is added as infinity.

    Raises ValueError for anything else, and where `acc` shares memory with `grad` or with itself; BackendError
    for a backend that cannot run here.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"esi_accumulate_: reduction is {reduction!r}, must be one of {', '.join(REDUCTIONS)}")
    if acc.dtype != torch.float32:
        raise ValueError(f"esi_accumulate_: acc is {acc.dtype}, must be torch.float32")
    if grad.dtype not in GRADIENT_DTYPES:
        raise ValueError(f"esi_accumulate_: grad is {grad.dtype}, must be float32, bfloat16 or float16")
    if acc.layout != torch.strided or grad.layout != torch.strided:
        raise ValueError("esi_accumulate_: acc and grad must be dense tensors")
    if acc.shape != grad.shape:
        raise ValueError(f"esi_accumulate_: acc has shape {tuple(acc.shape)}, grad {tuple(grad.shape)}")
    if acc.device != grad.device:
        raise ValueError(f"esi_accumulate_: acc is on {acc.device}, grad on {grad.device}")
    if not math.isfinite(sigma):
        raise ValueError(f"esi_accumulate_: sigma is {sigma}, must be finite")
    if overlaps_itself(acc):
        raise ValueError("esi_accumulate_: elements of acc share memory")
    if overlap(acc, grad):
        raise ValueError("esi_accumulate_: acc and grad share memory")
    common = plane(acc, grad)
    if common is None:
        raise ValueError(
            f"esi_accumulate_: strides {acc.stride()} and {grad.stride()} of shape {tuple(acc.shape)} do not collapse "
            "to rows x cols"
        )
    function = choose("esi_accumulate_", acc.device, backend).function
    return function(common, float(sigma), reduction) if common.rows else 0

"""esi_accumulate_ in Triton, for GPUs without a compiled CUDA kernel.

    acc[r, c] += sigma * grad[r, c]      (signed; abs and square likewise)

A program handles BLOCK entries of the flattened rows x cols. Product and sum are
kept apart (`enable_fp_fusion=False`), so that the result has the reference's bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from safecrit.ops.views import Plane

BLOCK = 1024  # 4 entries a thread with 8 warps
_MAX_PROGRAMS = 1 << 30  # below the 2^31 - 1 programs of a CUDA grid's first dimension


@triton.jit
def _accumulate(
    acc_ptr,
    grad_ptr,
    skipped_ptr,
    total,
    cols,
    acc_row_stride,
    acc_col_stride,
    grad_row_stride,
    grad_col_stride,
    sigma,
    REDUCTION: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < total
    if CONTIGUOUS:
        acc_offset = entry
        grad_offset = entry
    else:
        row = entry // cols
        col = entry - row * cols
        acc_offset = row * acc_row_stride + col * acc_col_stride
        grad_offset = row * grad_row_stride + col * grad_col_stride
    grad = tl.load(grad_ptr + grad_offset, mask=inside, other=0.0).to(tl.float32)
    finite = tl.abs(grad) < float("inf")  # false for NaN too
    grad = tl.where(finite, grad, 0.0)
    value = grad * grad if REDUCTION == "square" else grad * sigma
    if REDUCTION == "abs":
        value = tl.abs(value)
    added = inside & finite
    acc = tl.load(acc_ptr + acc_offset, mask=added, other=0.0)
    tl.store(acc_ptr + acc_offset, acc + value, mask=added)
    bad = tl.sum((inside & (finite == 0)).to(tl.int32), axis=0)
    if bad > 0:
        tl.atomic_add(skipped_ptr, bad.to(tl.int64))


def esi_accumulate(plane: Plane, sigma: float, reduction: str) -> int:
    """See `safecrit.ops.esi_accumulate_`; its arguments have been checked there."""
    total = plane.rows * plane.cols
    programs = triton.cdiv(total, BLOCK)
    if programs > _MAX_PROGRAMS:
        raise ValueError(f"esi_accumulate_: {total} entries are too many for one Triton launch")
    unit = plane.acc_strides[1] == 1 and plane.grad_strides[1] == 1
    joined = plane.rows == 1 or (plane.acc_strides[0] == plane.cols and plane.grad_strides[0] == plane.cols)
    skipped = torch.zeros(1, dtype=torch.int64, device=plane.acc.device)
    with torch.cuda.device_of(plane.acc):
        _accumulate[(programs,)](
            plane.acc,
            plane.grad,
            skipped,
            total,
            plane.cols,
            *plane.acc_strides,
            *plane.grad_strides,
            sigma,
            REDUCTION=reduction,
            CONTIGUOUS=unit and joined,
            BLOCK=BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return int(skipped.item())

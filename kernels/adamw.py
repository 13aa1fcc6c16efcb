"""sparse_adamw_ and masked_adamw_ in Triton, for GPUs without a compiled CUDA kernel.

    g = clip * grad
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + ((1 - beta2) * g) * g
    w = keep * w - (step_size * m) / (sqrt(v) + eps)

The factors are those of csrc/adamw.h (Loshchilov and Hutter, arXiv 1711.05101). A
program handles BLOCK entries. Every operation is rounded by itself
(`enable_fp_fusion=False`, correctly rounded root and quotient), so that the result
has the C++ kernels' bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from safecrit.ops.adamw import AdamWStep
from safecrit.ops.gather import check_range

BLOCK = 1024  # 4 entries a thread with 8 warps
_MAX_PROGRAMS = 1 << 30  # below the 2^31 - 1 programs of a CUDA grid's first dimension


@triton.jit
def _update(weight, grad, exp_avg, exp_avg_sq, clip, one_minus_beta1, beta2, one_minus_beta2, keep, step_size, eps):
    grad = grad * clip
    exp_avg = exp_avg + one_minus_beta1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    weight = keep * weight - tl.div_rn(step_size * exp_avg, tl.sqrt_rn(exp_avg_sq) + eps)
    return weight, exp_avg, exp_avg_sq


@triton.jit
def _sparse(
    weight_ptr,
    indices_ptr,
    grad_ptr,
    master_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    numel,
    k,
    clip,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    keep,
    step_size,
    eps,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < k
    index = tl.load(indices_ptr + entry, mask=inside, other=-1)
    grad = tl.load(grad_ptr + entry, mask=inside, other=0.0).to(tl.float32)
    master = tl.load(master_ptr + entry, mask=inside, other=0.0)
    exp_avg = tl.load(exp_avg_ptr + entry, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + entry, mask=inside, other=1.0)
    master, exp_avg, exp_avg_sq = _update(
        master, grad, exp_avg, exp_avg_sq, clip, one_minus_beta1, beta2, one_minus_beta2, keep, step_size, eps
    )
    tl.store(master_ptr + entry, master, mask=inside)
    tl.store(exp_avg_ptr + entry, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + entry, exp_avg_sq, mask=inside)
    written = (index >= 0) & (index < numel)
    tl.store(weight_ptr + index, master.to(weight_ptr.dtype.element_ty), mask=written)


@triton.jit
def _masked(
    weight_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    bits_ptr,
    numel,
    clip,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    keep,
    step_size,
    eps,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < numel
    byte = tl.load(bits_ptr + entry // 8, mask=inside, other=0).to(tl.int32)
    free = inside & (((byte >> (entry % 8).to(tl.int32)) & 1) == 0)
    grad = tl.load(grad_ptr + entry, mask=free, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + entry, mask=free, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + entry, mask=free, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + entry, mask=free, other=1.0).to(tl.float32)
    weight, exp_avg, exp_avg_sq = _update(
        weight, grad, exp_avg, exp_avg_sq, clip, one_minus_beta1, beta2, one_minus_beta2, keep, step_size, eps
    )
    tl.store(weight_ptr + entry, weight.to(weight_ptr.dtype.element_ty), mask=free)
    tl.store(exp_avg_ptr + entry, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=free)
    tl.store(exp_avg_sq_ptr + entry, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=free)


def sparse_adamw(
    weight: torch.Tensor,
    indices: torch.Tensor,
    grad_k: torch.Tensor,
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    settings: AdamWStep,
) -> None:
    """See `safecrit.ops.sparse_adamw_`; its arguments have been checked there, but for the range of `indices`."""
    check_range("sparse_adamw_", indices, weight.numel())
    k = indices.numel()
    with torch.cuda.device_of(weight):
        _sparse[(_programs("sparse_adamw_", k),)](
            weight,
            indices,
            grad_k,
            master,
            exp_avg,
            exp_avg_sq,
            weight.numel(),
            k,
            *settings.factors,
            BLOCK=BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )


def masked_adamw(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    bits: torch.Tensor,
    settings: AdamWStep,
) -> None:
    """See `safecrit.ops.masked_adamw_`; its arguments have been checked there."""
    numel = weight.numel()
    if numel == 0:
        return
    with torch.cuda.device_of(weight):
        _masked[(_programs("masked_adamw_", numel),)](
            weight,
            grad.contiguous(),
            exp_avg,
            exp_avg_sq,
            bits,
            numel,
            *settings.factors,
            BLOCK=BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )


def _programs(op: str, entries: int) -> int:
    programs = triton.cdiv(entries, BLOCK)
    if programs > _MAX_PROGRAMS:
        raise ValueError(f"{op}: {entries} entries are too many for one Triton launch")
    return programs

"""matrix_std in Triton, for GPUs without a compiled CUDA kernel.

A program sums `size` elements of a matrix in float64 around the first of them; the
blocks' means and squared deviations are then joined around the mean of all

    squares = sum_b squares_b + count_b * (mean_b - mean)^2

(Chan, Golub and LeVeque 1983, formula 2.1 for many parts). The first element lies
at most sqrt(n) deviations from the mean of its n elements, so the difference of
sums loses at most a factor n of float64's accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from safecrit.ops.native_std import merged

BLOCK = 4096  # 16 elements a thread with 8 warps, so that their loads overlap
DIMS = 4
_LEAST = 1 << 15  # elements of a program
_MOST_PROGRAMS = 1 << 14  # programs take more beyond that many


@triton.jit
def _offset(i, size1, size2, size3, stride0, stride1, stride2, stride3, CONTIGUOUS: tl.constexpr):
    """Of element `i`; the last dimension varies fastest."""
    if CONTIGUOUS:
        return i * stride3
    rest = i // size3
    offset = (i - rest * size3) * stride3
    upper = rest // size2
    offset += (rest - upper * size2) * stride2
    return offset + upper % size1 * stride1 + upper // size1 * stride0


@triton.jit
def _moments(
    data_ptr,
    out_ptr,
    count,
    size,
    size1,
    size2,
    size3,
    stride0,
    stride1,
    stride2,
    stride3,
    CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    begin = program * size
    end = tl.minimum(begin + size, count)
    first = _offset(begin, size1, size2, size3, stride0, stride1, stride2, stride3, CONTIGUOUS)
    centre = tl.load(data_ptr + first).to(tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < end
        offset = _offset(i, size1, size2, size3, stride0, stride1, stride2, stride3, CONTIGUOUS)
        value = tl.load(data_ptr + offset, mask=inside, other=0.0).to(tl.float64)
        value = tl.where(inside, value - centre, 0.0)
        total += value
        squares += value * value
    number = (end - begin).to(tl.float64)
    sum_all = tl.sum(total, axis=0)
    deviations = tl.sum(squares, axis=0) - sum_all / number * sum_all
    tl.store(out_ptr + 2 * program, centre + sum_all / number)
    tl.store(out_ptr + 2 * program + 1, tl.where(deviations < 0, 0.0, deviations))  # NaN stays NaN


def matrix_std(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """See `safecrit.ops.matrix_std`; bringing the result to the CPU waits for the device."""
    if not parts:
        return torch.empty(0, dtype=torch.float64)
    with torch.cuda.device_of(parts[0]):
        return torch.stack([_std(part) for part in parts]).cpu()


def _std(part: torch.Tensor) -> torch.Tensor:
    count = part.numel()
    if count < 2:
        return torch.zeros((), dtype=torch.float64, device=part.device)
    shape, strides = merged(part)
    if len(shape) > DIMS:
        shape, strides = merged(part := part.contiguous())
    missing = DIMS - len(shape)
    size = max(_LEAST, triton.cdiv(count, _MOST_PROGRAMS))
    programs = triton.cdiv(count, size)
    moments = torch.empty(programs, 2, dtype=torch.float64, device=part.device)
    _moments[(programs,)](
        part,
        moments,
        count,
        size,
        *([1] * missing + shape)[1:],
        *([0] * missing + strides),
        CONTIGUOUS=len(shape) == 1,
        BLOCK=BLOCK,
        num_warps=8,
        enable_fp_fusion=False,
    )
    counts = torch.full((programs,), float(size), dtype=torch.float64, device=part.device)
    counts[-1] = count - (programs - 1) * size
    means, squares = moments.unbind(1)
    mean = (counts * means).sum() / count
    return ((squares.sum() + (counts * (means - mean).square()).sum()) / (count - 1)).sqrt()

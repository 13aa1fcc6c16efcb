"""gather_ in Triton, for GPUs without a compiled CUDA kernel: out[i] = or += values[indices[i]]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from safecrit.ops.gather import check_range

BLOCK = 1024  # 4 entries a thread with 8 warps
_MAX_PROGRAMS = 1 << 30  # below the 2^31 - 1 programs of a CUDA grid's first dimension


@triton.jit
def _gather(out_ptr, values_ptr, indices_ptr, numel, k, ADD: tl.constexpr, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices_ptr + entry, mask=entry < k, other=-1).to(tl.int64)
    inside = (index >= 0) & (index < numel)
    value = tl.load(values_ptr + index, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(out_ptr + entry, mask=inside, other=0.0)
    tl.store(out_ptr + entry, value, mask=inside)


def gather(out: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, add: bool) -> None:
    """See `safecrit.ops.gather_`; its arguments have been checked there, but for the range of `indices`."""
    check_range("gather_", indices, values.numel())
    k = out.numel()
    programs = triton.cdiv(k, BLOCK)
    if programs > _MAX_PROGRAMS:
        raise ValueError(f"gather_: {k} entries are too many for one Triton launch")
    with torch.cuda.device_of(out):
        _gather[(programs,)](out, values, indices, values.numel(), k, ADD=add, BLOCK=BLOCK, num_warps=8)

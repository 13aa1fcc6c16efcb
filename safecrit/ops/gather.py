"""Keeping the selected entries of a dense tensor in float32: what SET gathers of each gradient."""

from __future__ import annotations

import torch

from safecrit.ops.adamw import check_apart
from safecrit.ops.dispatch import Backend, choose


@torch.no_grad()
def gather_(
    out: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    *,
    add: bool = False,
    backend: Backend = "auto",
) -> None:
    """Set `out` to `values` at `indices`, or add them to it; a non-finite value is taken as it is.

    out: contiguous float32 [k]. values: any floating dtype and shape; copied first where it is not contiguous.
    indices: contiguous int32 or int64 [k], flat, in range, in any order; sorted ones are read faster.

    Raises ValueError for anything else and where `out` shares memory with another. An index out of range raises
    too, before anything changes; on a GPU, where looking would wait for the device, `out` keeps its value there.
    """
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1 or not indices.is_contiguous():
        raise ValueError(
            f"gather_: indices are {indices.dtype} {tuple(indices.shape)}, must be contiguous int32 or int64 [k]"
        )
    if out.dtype != torch.float32 or out.shape != indices.shape or not out.is_contiguous():
        raise ValueError(
            f"gather_: out is {out.dtype} {tuple(out.shape)}, must be contiguous float32 [{indices.numel()}]"
        )
    if not values.is_floating_point():
        raise ValueError(f"gather_: values are {values.dtype}, must be a floating-point dtype")
    for name, tensor in {"values": values, "indices": indices}.items():
        if tensor.device != out.device:
            raise ValueError(f"gather_: out is on {out.device}, {name} on {tensor.device}")
    check_apart("gather_", {"out": out}, {"values": values, "indices": indices})
    function = choose("gather_", out.device, backend, [values.dtype]).function
    if indices.numel():
        function(out, values.contiguous().view(-1), indices, add)


def check_range(op: str, indices: torch.Tensor, numel: int) -> None:
    """Raise ValueError for indices outside a tensor of `numel` entries, unless they are on a GPU."""
    if indices.device.type == "cpu":
        low, high = indices.aminmax()
        if low < 0 or high >= numel:
            raise ValueError(f"{op}: indices leave 0 to {numel - 1}")

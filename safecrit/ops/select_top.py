"""Exact global top-k of absolute values over a list of tensors of any total size (docs/method.md, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from safecrit.ops.dispatch import Backend, choose

SCORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Selection:
    """The selected entries, and what decided them.

    indices: for each tensor the selected flat row-major indices, int64, ascending, on that tensor's device.
    threshold, threshold_bits: |score| of the last entry selected, and its float32 bits. With k = 0 nothing is
    selected and the threshold is infinity (largest) or 0 (smallest).
    tied: entries equal to the threshold; tied_selected: how many of them were selected, the ones with the
    smaller (tensor, index). nan: entries that are NaN; they are never selected.
    """

    indices: list[torch.Tensor]
    threshold: float
    threshold_bits: int
    tied: int
    tied_selected: int
    nan: int


@torch.no_grad()
def select_top(scores: Sequence[torch.Tensor], k: int, *, largest: bool = True, backend: Backend = "auto") -> Selection:
    """Select the `k` entries with the largest (or smallest) absolute value over all of `scores`.

    scores: float32, bfloat16 or float16 tensors of any shapes, memory-mapped ones too: they are read in chunks,
    never copied (one that is not contiguous is). The comparison is exact, on the float32 bits of |x|; ties go to
    the smaller (tensor, index); NaN is never selected.

    Raises ValueError where `k` is negative or above the number of entries that are not NaN.
    """
    if k < 0:
        raise ValueError(f"select_top: k is {k}, must not be negative")
    for position, tensor in enumerate(scores):
        if tensor.dtype not in SCORE_DTYPES:
            raise ValueError(f"select_top: tensor {position} is {tensor.dtype}, must be float32, bfloat16 or float16")
    devices = {tensor.device for tensor in scores} or {torch.device("cpu")}
    if not scores or (len(devices) > 1 and backend == "auto"):
        backend = "reference"  # the one that reads from several devices, or from none
    for device in devices:
        function = choose("select_top", device, backend).function
    return function(scores, k, largest)

"""Calls of the compiled select_top, rank_counts and select_random: tensors to pointers, results to tensors."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from safecrit.ops import native
from safecrit.ops.select_top import Selection

INFINITY_BITS = 0x7F800000

# Arguments of csrc/select_top.h's SelectTuning and SelectCudaTuning in place of their defaults: tests force rare paths.
tuning: dict[str, int] = {}
cuda_tuning: dict[str, int] = {}


def select_top_cpu(scores: Sequence[torch.Tensor], k: int, largest: bool) -> Selection:
    """C++ kernel of `safecrit.ops.select_top`."""
    module, _ = native.cpu_module()
    assert module is not None, "chosen only where it can be imported"
    flat = [_readable(tensor) for tensor in scores]
    total = sum(tensor.numel() for tensor in flat)
    out = torch.empty(min(k, total), dtype=torch.int64)
    counts = torch.empty(len(flat), dtype=torch.int64)
    enough, bits, tied, tied_selected, nan, _ = module.select_top(
        [tensor.data_ptr() for tensor in flat],
        [tensor.numel() for tensor in flat],
        [native.DTYPE_CODES[tensor.dtype] for tensor in flat],
        min(k, total),
        largest,
        out.data_ptr(),
        counts.data_ptr(),
        torch.get_num_threads(),
        **tuning,
    )
    if k > total or not enough:
        raise _too_few(k, total - nan)
    return _selection(out, counts.tolist(), largest, bits, tied, tied_selected, nan)


def select_top_cuda(scores: Sequence[torch.Tensor], k: int, largest: bool) -> Selection:
    """CUDA kernel of `safecrit.ops.select_top`; reading its result, the numbers of indices among it, waits once.

    A second time only where the sample misled it, or where fewer than k entries are not NaN.
    """
    module, _ = native.cuda_module()
    assert module is not None, "chosen only where it can be imported"
    flat = [_readable(tensor) for tensor in scores]
    total = sum(tensor.numel() for tensor in flat)
    device = flat[0].device
    wanted = min(k, total)
    out = torch.empty(wanted, dtype=torch.int64, device=device)
    result = torch.empty(module.SELECT_RESULTS + len(flat), dtype=torch.int64, device=device)
    for exact in (False, True):
        arguments = (
            [tensor.data_ptr() for tensor in flat],
            [tensor.numel() for tensor in flat],
            [native.DTYPE_CODES[tensor.dtype] for tensor in flat],
            wanted,
            largest,
            out.data_ptr(),
            result.data_ptr(),
            exact,
            cuda_tuning.get("room", 0),
            cuda_tuning.get("place", 0),
        )
        scratch = torch.empty(module.select_top_scratch(*arguments), dtype=torch.uint8, device=device)
        module.select_top(*arguments, scratch.data_ptr(), *native.queue(device))
        hit, bits, tied, tied_selected, nan, *counts = result.tolist()
        if k > total - nan:
            raise _too_few(k, total - nan)
        if hit:
            return _selection(out, counts, largest, bits, tied, tied_selected, nan)
    raise AssertionError("exact histograms find every threshold")


def _too_few(k: int, numbers: int) -> ValueError:
    return ValueError(f"select_top: k is {k}, but only {numbers} entries are not NaN")


def _selection(
    out: torch.Tensor, counts: list[int], largest: bool, bits: int, tied: int, tied_selected: int, nan: int
) -> Selection:
    if len(out) == 0:
        bits = INFINITY_BITS if largest else 0
    threshold = float(struct.unpack("<f", struct.pack("<I", bits))[0])
    return Selection(list(out.split(counts)), threshold, bits, tied, tied_selected, nan)


def rank_counts_cpu(scores: Sequence[torch.Tensor], largest: bool, low: int, high: int, shift: int) -> torch.Tensor:
    """C++ kernel of `safecrit.ops.rank_counts`."""
    module, _ = native.cpu_module()
    assert module is not None, "chosen only where it can be imported"
    flat = [_readable(tensor) for tensor in scores]
    pointers, sizes = [tensor.data_ptr() for tensor in flat], [tensor.numel() for tensor in flat]
    codes = [native.DTYPE_CODES[tensor.dtype] for tensor in flat]
    return torch.tensor(module.rank_counts(pointers, sizes, codes, largest, low, high, shift, torch.get_num_threads()))


def select_random_cpu(tensors: Sequence[tuple[int, int]], k: int, seed: int) -> list[torch.Tensor]:
    """C++ kernel of `safecrit.ops.select_random`."""
    module, _ = native.cpu_module()
    assert module is not None, "chosen only where it can be imported"
    out = torch.empty(k, dtype=torch.int64)
    counts = torch.empty(len(tensors), dtype=torch.int64)
    module.select_random(
        [position for position, _ in tensors],
        [size for _, size in tensors],
        k,
        seed % (1 << 64),
        out.data_ptr(),
        counts.data_ptr(),
        torch.get_num_threads(),
    )
    return list(out.split(counts.tolist()))


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the kernel reads it: a copy where it is not contiguous or, in a mapped file, misaligned."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor

"""Mask encodings: flat row-major indices, and bits packed in uint8 (entry i is bit i % 8 of byte i // 8)."""

from __future__ import annotations

import torch

from safecrit.ops.dispatch import Backend, choose


def bits_from_indices(indices: torch.Tensor, numel: int, *, backend: Backend = "auto") -> torch.Tensor:
    """Bits of the entries at `indices` (int64 [k], strictly ascending, below `numel`): uint8 [ceil(numel / 8)].

    Raises ValueError for indices that are out of range, out of order or repeated.
    """
    if indices.dtype != torch.int64 or indices.dim() != 1:
        raise ValueError(f"bits_from_indices: indices are {indices.dtype} {tuple(indices.shape)}, must be int64 [k]")
    if indices.numel():
        if int(indices[0]) < 0 or int(indices[-1]) >= numel:
            raise ValueError(f"bits_from_indices: indices leave 0 to {numel - 1}")
        if bool((indices[1:] <= indices[:-1]).any()):
            raise ValueError("bits_from_indices: indices are not strictly ascending")
    function = choose("bits_from_indices", indices.device, backend).function
    return function(indices, numel)


def indices_from_bits(bits: torch.Tensor, numel: int, *, backend: Backend = "auto") -> torch.Tensor:
    """Ascending int64 indices of the set bits of `bits` (uint8 [ceil(numel / 8)]).

    Raises ValueError for another length and for padding bits that are set.
    """
    check_bits("indices_from_bits", bits, numel)
    if numel % 8 and int(bits[-1]) >> (numel % 8):
        raise ValueError("indices_from_bits: padding bits after the last entry are set")
    function = choose("indices_from_bits", bits.device, backend).function
    return function(bits)


def check_bits(op: str, bits: torch.Tensor, numel: int) -> None:
    """Raise ValueError unless `bits` is a contiguous bit mask for `numel` entries."""
    expected = (numel + 7) // 8
    if bits.dtype != torch.uint8 or bits.shape != (expected,) or not bits.is_contiguous():
        raise ValueError(f"{op}: bits are {bits.dtype} {tuple(bits.shape)}, must be contiguous uint8 [{expected}]")

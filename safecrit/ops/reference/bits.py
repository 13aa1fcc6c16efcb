"""Mask encodings in torch, for any device; unpacked a chunk at a time."""

from __future__ import annotations

import torch

CHUNK = 1 << 19  # bytes; 4 Mi entries


def bits_from_indices(indices: torch.Tensor, numel: int) -> torch.Tensor:
    """See `safecrit.ops.bits_from_indices`; its arguments have been checked there."""
    bits = torch.zeros((numel + 7) // 8, dtype=torch.uint8, device=indices.device)
    # Distinct entries set distinct bits, so adding them is setting them.
    return bits.index_add_(0, indices >> 3, (1 << (indices & 7)).to(torch.uint8))


def indices_from_bits(bits: torch.Tensor) -> torch.Tensor:
    """See `safecrit.ops.indices_from_bits`; its arguments have been checked there."""
    found = [torch.empty(0, dtype=torch.int64, device=bits.device)]
    for start in range(0, bits.numel(), CHUNK):
        found.append(unpack(bits[start : start + CHUNK]).nonzero().squeeze(1) + start * 8)
    return torch.cat(found)


def unpack(bits: torch.Tensor) -> torch.Tensor:
    """One bool an entry, [8 * bytes]."""
    return (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1).bool().reshape(-1)

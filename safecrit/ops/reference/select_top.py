"""select_top in torch: a radix selection in three reads, each in chunks.

The float32 bits of |x|, read as an integer, sort like |x| itself. The first read
counts the upper 16 of their 31 bits, the second the lower 15 of the entries in
the bin where the k-th entry lies; that gives the threshold and the number of
ties to take. The third writes indices. Nothing of the size of the input is held.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import torch

from safecrit.ops.select_top import Selection

CHUNK = 1 << 20  # entries; some 25 MiB of temporaries
LOW_BITS = 15
INFINITY_BITS = 0x7F800000  # float32 infinity; greater values are NaN


def select_top(scores: Sequence[torch.Tensor], k: int, largest: bool) -> Selection:
    """See `safecrit.ops.select_top`; its arguments have been checked there."""
    upper = torch.zeros(1 << (31 - LOW_BITS), dtype=torch.int64)
    nan = 0
    for _, _, rank in _ranks(scores, largest):
        valid = rank[rank >= 0]
        nan += rank.numel() - valid.numel()
        upper += torch.bincount(valid >> LOW_BITS, minlength=upper.numel()).cpu()
    total = int(upper.sum())
    if k > total:
        raise ValueError(f"select_top: k is {k}, but only {total} entries are not NaN")
    if k == 0:
        bits = INFINITY_BITS if largest else 0
        empty = [torch.empty(0, dtype=torch.int64, device=tensor.device) for tensor in scores]
        return Selection(empty, _as_float(bits), bits, 0, 0, nan)

    high, above = _crossing(upper, k)
    lower = torch.zeros(1 << LOW_BITS, dtype=torch.int64)
    for _, _, rank in _ranks(scores, largest):
        inside = rank[(rank >> LOW_BITS) == high]
        lower += torch.bincount(inside & ((1 << LOW_BITS) - 1), minlength=lower.numel()).cpu()
    low, above_in_bin = _crossing(lower, k - above)
    threshold = high << LOW_BITS | low
    ties_wanted = k - above - above_in_bin
    tied = int(lower[low])

    pieces: list[list[torch.Tensor]] = [[] for _ in scores]
    ties_left = ties_wanted
    for position, start, rank in _ranks(scores, largest):
        chosen = rank > threshold
        if ties_left:
            ties = (rank == threshold).nonzero().squeeze(1)[:ties_left]
            chosen[ties] = True
            ties_left -= ties.numel()
        pieces[position].append(chosen.nonzero().squeeze(1) + start)
    indices = [
        torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=tensor.device)
        for tensor, found in zip(scores, pieces, strict=True)
    ]
    bits = threshold if largest else INFINITY_BITS - threshold
    return Selection(indices, _as_float(bits), bits, tied, ties_wanted, nan)


def rank_counts(scores: Sequence[torch.Tensor], largest: bool, low: int, high: int, shift: int) -> torch.Tensor:
    """See `safecrit.ops.rank_counts`; its arguments have been checked there."""
    bins = ((high - low) >> shift) + 1
    counts = torch.zeros(bins + 1, dtype=torch.int64)
    for _, _, rank in _ranks(scores, largest):
        above = (rank > high) | (rank < 0)
        bin = torch.where(above, bins, (rank - low) >> shift)[above | (rank >= low)]
        counts += torch.bincount(bin, minlength=bins + 1).cpu()
    return counts


def _ranks(scores: Sequence[torch.Tensor], largest: bool) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(tensor, first index, rank) of each chunk: int32, the greater the sooner selected, negative for NaN."""
    for position, tensor in enumerate(scores):
        flat = tensor.reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            bits = flat[start : start + CHUNK].float().contiguous().view(torch.int32) & 0x7FFFFFFF
            rank = bits if largest else INFINITY_BITS - bits
            yield position, start, rank.masked_fill_(bits > INFINITY_BITS, -1)


def _crossing(histogram: torch.Tensor, k: int) -> tuple[int, int]:
    """The bin, counted from the top, in which the k-th entry lies, and the number of entries above that bin."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return histogram.numel() - 1 - place, above


def _as_float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])

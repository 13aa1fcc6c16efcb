"""select_random in numpy, in chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

CHUNK = 1 << 20  # entries; 8 MiB of hashes
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: SplitMix64's step
_SPAN = 1 << 64

UInt64 = npt.NDArray[np.uint64]


def select_random(tensors: Sequence[tuple[int, int]], k: int, seed: int) -> list[torch.Tensor]:
    """The k smallest hashes over `tensors`, (position, size) pairs; equal hashes by their order.

    See `safecrit.ops.select_random`; the arguments have been checked there.
    """
    total = sum(size for _, size in tensors)
    result = [np.empty(0, np.int64) for _ in tensors]
    # Hashes are uniform, so about total * bound / 2^64 lie below a bound: take six standard deviations more than k.
    margin = 6 * math.sqrt(k) + 16
    while k:
        share = min(1.0, (k + margin) / total)
        bound = _SPAN - 1 if share == 1.0 else int(share * _SPAN)
        found = [_below(seed, position, size, bound) for position, size in tensors]
        hashes = np.concatenate([hash_ for hash_, _ in found])
        if hashes.size < k:
            margin *= 2
            continue
        owner = np.repeat(np.arange(len(tensors)), [hash_.size for hash_, _ in found])
        index = np.concatenate([index for _, index in found])
        kept = np.argsort(hashes, kind="stable")[:k]  # stable: equal hashes stay in (tensor, index) order
        result = [np.sort(index[kept[owner[kept] == place]]) for place in range(len(tensors))]
        break
    return [torch.from_numpy(index) for index in result]


def _below(seed: int, position: int, size: int, bound: int) -> tuple[UInt64, npt.NDArray[np.int64]]:
    """Hashes of one tensor that are at most `bound`, and their indices, ascending."""
    key = _mix(_mix(np.array([seed % _SPAN], np.uint64)) + np.array([position], np.uint64) * _GOLDEN)
    hashes, indices = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for start in range(0, size, CHUNK):
        counter = np.arange(start, min(start + CHUNK, size), dtype=np.uint64)
        hash_ = _mix(counter * _GOLDEN + key)
        inside = np.flatnonzero(hash_ <= np.uint64(bound))
        hashes.append(hash_[inside])
        indices.append(inside + start)
    return np.concatenate(hashes), np.concatenate(indices)


def _mix(value: UInt64) -> UInt64:
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))

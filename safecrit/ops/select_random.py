"""Random masks: uniform without replacement, from a keyed hash of (tensor, index) (docs/method.md, section 3).

An entry's hash depends on the seed, the tensor's position and its own index
alone, so the same seed gives the same mask on any machine and any number of
ranks. The k entries with the smallest hash are selected: nothing is shuffled and
no index is drawn twice.

The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", 2014), on a counter that starts at a key of its
own for each tensor.
"""

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


def select_random(sizes: Sequence[int], k: int, seed: int) -> list[torch.Tensor]:
    """Choose `k` of the `sum(sizes)` entries of tensors with `sizes` elements, uniformly, without replacement.

    Returns one ascending int64 tensor of flat indices for each size. Raises ValueError where there are fewer than
    `k` entries.
    """
    return _smallest(list(enumerate(sizes)), len(sizes), k, seed)


def select_random_matched(sizes: Sequence[int], counts: Sequence[int], seed: int) -> list[torch.Tensor]:
    """Choose `counts[i]` entries of tensor i, for each i: a random mask with another mask's count per tensor."""
    if len(sizes) != len(counts):
        raise ValueError(f"select_random_matched: {len(sizes)} sizes, {len(counts)} counts")
    pairs = enumerate(zip(sizes, counts, strict=True))
    return [_smallest([(tensor, size)], len(sizes), count, seed)[tensor] for tensor, (size, count) in pairs]


def _smallest(tensors: list[tuple[int, int]], length: int, k: int, seed: int) -> list[torch.Tensor]:
    """The k smallest hashes over `tensors`, (position, size) pairs in ascending order; equal hashes by position."""
    total = sum(size for _, size in tensors)
    if not 0 <= k <= total:
        raise ValueError(f"select_random: k is {k}, but there are {total} entries")
    result = [np.empty(0, np.int64) for _ in range(length)]
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
        for place, (position, _) in enumerate(tensors):
            result[position] = np.sort(index[kept[owner[kept] == place]])
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

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

from collections.abc import Sequence

import torch

from safecrit.ops.dispatch import Backend, choose


def select_random(sizes: Sequence[int], k: int, seed: int, *, backend: Backend = "auto") -> list[torch.Tensor]:
    """Choose `k` of the `sum(sizes)` entries of tensors with `sizes` elements, uniformly, without replacement.

    Returns one ascending int64 tensor of flat indices, on the CPU, for each size. Raises ValueError where there are
    fewer than `k` entries.
    """
    return _select(list(enumerate(sizes)), k, seed, backend)


def select_random_matched(
    sizes: Sequence[int], counts: Sequence[int], seed: int, *, backend: Backend = "auto"
) -> list[torch.Tensor]:
    """Choose `counts[i]` entries of tensor i, for each i: a random mask with another mask's count per tensor."""
    if len(sizes) != len(counts):
        raise ValueError(f"select_random_matched: {len(sizes)} sizes, {len(counts)} counts")
    pairs = enumerate(zip(sizes, counts, strict=True))
    return [_select([(tensor, size)], count, seed, backend)[0] for tensor, (size, count) in pairs]


def _select(tensors: list[tuple[int, int]], k: int, seed: int, backend: Backend) -> list[torch.Tensor]:
    for position, size in tensors:
        if size < 0:
            raise ValueError(f"select_random: tensor {position} has {size} entries")
    total = sum(size for _, size in tensors)
    if not 0 <= k <= total:
        raise ValueError(f"select_random: k is {k}, but there are {total} entries")
    function = choose("select_random", torch.device("cpu"), backend).function
    result: list[torch.Tensor] = function(tensors, k, seed)
    return result

"""How |scores| are distributed: a histogram over decades, read from score files without loading them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

PER_DECADE, DECADES = 6, 8
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Distribution:
    """`bins`: (low, high, weights) with low <= |score| < high; weights that score 0; those below the lowest bin."""

    bins: list[tuple[float, float, int]]
    zero: int
    below: int


def distribution(tensors: Iterable[torch.Tensor], largest: float) -> Distribution:
    """Histogram of the absolute values of `tensors` (any shape, float), up to and including `largest`.

    Bins are equal in log10, `PER_DECADE` a decade, over `DECADES` decades below
    `largest`. Entries that are not finite are left out.
    """
    count = PER_DECADE * DECADES
    sums, zero, below = torch.zeros(count, dtype=torch.int64), 0, 0
    if not largest > 0:
        return Distribution([], sum(tensor.numel() for tensor in tensors), 0)
    for tensor in tensors:
        for part in tensor.detach().reshape(-1).split(_CHUNK):
            size = part.double().abs()
            size = size[size.isfinite()]
            zero += int((size == 0).sum())
            place = ((size[size > 0] / largest).log10() * PER_DECADE).floor().long() + count
            below += int((place < 0).sum())
            sums += torch.bincount(place[place >= 0].clamp_max(count - 1), minlength=count).cpu()
    edges = [largest * 10 ** ((i - count) / PER_DECADE) for i in range(count + 1)]
    first = next((i for i, weights in enumerate(sums.tolist()) if weights), 0)
    return Distribution(list(zip(edges, edges[1:], sums.tolist(), strict=False))[first:], zero, below)

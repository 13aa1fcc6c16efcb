"""The exact global top k of scores that lie on several ranks: histograms travel, scores never do.

Each rank counts its entries by the upper 16 of the 31 bits of |score|; the sum says in
which bin the k-th entry lies, and a second count of that bin by the lower 15 bits says
at which value. Ties go to the ranks in order, since they hold the tensors in order. Two
sums of 512 KiB and 256 KiB, whatever the number of entries (docs/scaling.md).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from safecrit import distributed, ops
from safecrit.ops.dispatch import Backend
from safecrit.ops.rank_counts import INFINITY

LOW_BITS = 15
PURPOSE = "selection"  # under which the bytes sent are counted


def select_top_together(
    scores: Sequence[torch.Tensor], k: int, largest: bool, backend: Backend = "auto"
) -> ops.Selection:
    """`ops.select_top` over the tensors of all ranks, in the ranks' order; `indices` are those of this rank's tensors.

    Raises ValueError, on every rank, where fewer than `k` entries are not NaN.
    """
    ranks = distributed.current()
    if ranks.world == 1:
        return ops.select_top(scores, k, largest=largest, backend=backend)
    upper = ops.rank_counts(scores, shift=LOW_BITS, largest=largest, backend=backend)
    all_upper = distributed.sum_(upper.clone(), PURPOSE)
    nan, available = int(all_upper[-1]), int(all_upper[:-1].sum())
    if k > available:
        raise ValueError(f"select_top: k is {k}, but only {available} entries are not NaN")
    high, above = _crossing(all_upper[:-1], k)
    low = high << LOW_BITS
    top = min(low + (1 << LOW_BITS) - 1, INFINITY)
    lower = ops.rank_counts(scores, low, top, 0, largest=largest, backend=backend)
    all_lower = distributed.sum_(lower.clone(), PURPOSE)
    step, above_in_bin = _crossing(all_lower[:-1], k - above)
    tied_selected = k - above - above_in_bin

    ties = torch.zeros(ranks.world, dtype=torch.int64)
    ties[ranks.rank] = lower[step]
    before = int(distributed.sum_(ties, PURPOSE)[: ranks.rank].sum())
    own_ties = min(max(tied_selected - before, 0), int(lower[step]))
    own = int(upper[high + 1 : -1].sum()) + int(lower[step + 1 : -1].sum()) + own_ties
    chosen = ops.select_top(scores, own, largest=largest, backend=backend)

    rank = low + step
    bits = rank if largest else INFINITY - rank
    threshold = float(struct.unpack("<f", struct.pack("<I", bits))[0])
    return ops.Selection(chosen.indices, threshold, bits, int(all_lower[step]), tied_selected, nan)


def _crossing(counts: torch.Tensor, k: int) -> tuple[int, int]:
    """The bin, counted from the top, in which the k-th entry lies, and the number of entries above that bin."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    return len(counts) - 1 - place, int(from_top[place - 1]) if place else 0

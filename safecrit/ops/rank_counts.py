"""How many entries of a list of tensors have which |value|: what ranks exchange to select together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from safecrit.ops.dispatch import Backend, choose
from safecrit.ops.select_top import SCORE_DTYPES

INFINITY = 0x7F800000  # float32 bits of infinity: the greatest rank of an entry that is no NaN


@torch.no_grad()
def rank_counts(
    scores: Sequence[torch.Tensor],
    low: int = 0,
    high: int = INFINITY,
    shift: int = 15,
    *,
    largest: bool = True,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Count entries by rank: int64 [((high - low) >> shift) + 2], on the CPU.

    The rank is the float32 bits of |x|, or without `largest` those of infinity less them, so that what `select_top`
    selects first ranks highest. Bin b holds ranks with (rank - low) >> shift = b; the last one counts NaN and ranks
    above `high`. scores: float32, bfloat16 or float16 tensors of any shapes on one device, read in chunks.

    Raises ValueError for another dtype and for ranks out of order.
    """
    if not 0 <= low <= high <= INFINITY or not 0 <= shift <= 30:
        raise ValueError(f"rank_counts: ranks {low} to {high} in steps of 2^{shift} are none of 0 to {INFINITY}")
    for position, tensor in enumerate(scores):
        if tensor.dtype not in SCORE_DTYPES:
            raise ValueError(f"rank_counts: tensor {position} is {tensor.dtype}, must be float32, bfloat16 or float16")
    device = scores[0].device if scores else torch.device("cpu")
    found: torch.Tensor = choose("rank_counts", device, backend).function(scores, largest, low, high, shift)
    return found

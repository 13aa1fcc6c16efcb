"""gather_ in torch."""

from __future__ import annotations

import torch

from safecrit.ops.gather import check_range


def gather(out: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, add: bool) -> None:
    """See `safecrit.ops.gather_`; its arguments have been checked there, but for the range of `indices`."""
    check_range("gather_", indices, values.numel())
    picked = values.index_select(0, indices)
    out.add_(picked.float()) if add else out.copy_(picked)

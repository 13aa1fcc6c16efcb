"""sparse_adamw_ in torch."""

from __future__ import annotations

import torch

from safecrit.ops.adamw import AdamWStep
from safecrit.ops.reference.adamw import update
from safecrit.ops.sparse_adamw import check_range


def sparse_adamw(
    weight: torch.Tensor,
    indices: torch.Tensor,
    grad_k: torch.Tensor,
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    settings: AdamWStep,
) -> None:
    """See `safecrit.ops.sparse_adamw_`; its arguments have been checked there."""
    check_range(indices, weight.numel())
    update(master, grad_k.float(), exp_avg, exp_avg_sq, settings)
    weight.view(-1).index_copy_(0, indices, master.to(weight.dtype))

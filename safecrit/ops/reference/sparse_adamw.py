"""sparse_adamw_ in torch."""

from __future__ import annotations

import torch

from safecrit.ops.adamw import AdamWStep
from safecrit.ops.gather import check_range
from safecrit.ops.reference.adamw import update


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
    check_range("sparse_adamw_", indices, weight.numel())
    update(master, grad_k.float(), exp_avg, exp_avg_sq, settings)
    weight.view(-1).index_copy_(0, indices, master.to(weight.dtype))

"""One AdamW step on k selected entries of a weight, its state of length k (docs/method.md, section 4)."""

from __future__ import annotations

import torch

from safecrit.ops.adamw import AdamWStep, check_apart
from safecrit.ops.dispatch import Backend, choose

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def sparse_adamw_(
    weight: torch.Tensor,
    indices: torch.Tensor,
    grad_k: torch.Tensor,
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: float = 1.0,
    backend: Backend = "auto",
) -> None:
    """Update master and moments, float32 [k], in place, and write `master` into `weight` at `indices`.

    weight: contiguous, any floating dtype. indices: int64 [k], flat, unique, in range. grad_k: float32, bfloat16 or
    float16 [k], the gradient at `indices`. Arithmetic is torch.optim.AdamW's; `step` counts from 1; `clip`
    multiplies the gradient. Every other entry of `weight` keeps its bits.

    Raises ValueError for anything else and for tensors that share memory. An index out of range raises too, before
    anything changes; on a GPU, where looking would wait for the device, such an entry is not written to `weight`.
    """
    settings = AdamWStep(step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, clip=clip)
    if not weight.is_floating_point() or not weight.is_contiguous():
        raise ValueError("sparse_adamw_: weight must be a contiguous floating-point tensor")
    if indices.dtype != torch.int64 or indices.dim() != 1 or not indices.is_contiguous():
        raise ValueError(
            f"sparse_adamw_: indices are {indices.dtype} {tuple(indices.shape)}, must be contiguous int64 [k]"
        )
    state = {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in {"grad_k": grad_k, **state}.items():
        kinds = GRADIENT_DTYPES if name == "grad_k" else (torch.float32,)
        if tensor.dtype not in kinds or tensor.shape != indices.shape or not tensor.is_contiguous():
            raise ValueError(
                f"sparse_adamw_: {name} is {tensor.dtype} {tuple(tensor.shape)}, must be contiguous "
                f"{', '.join(str(kind).removeprefix('torch.') for kind in kinds)} [{indices.numel()}]"
            )
    for name, tensor in {"grad_k": grad_k, "indices": indices, **state}.items():
        if tensor.device != weight.device:
            raise ValueError(f"sparse_adamw_: weight is on {weight.device}, {name} on {tensor.device}")
    check_apart("sparse_adamw_", {"weight": weight, **state}, {"grad_k": grad_k, "indices": indices})
    function = choose("sparse_adamw_", weight.device, backend, [weight.dtype]).function
    if indices.numel():
        function(weight, indices, grad_k, master, exp_avg, exp_avg_sq, settings)

"""sparse_adamw_ and masked_adamw_ on the compiled modules."""

from __future__ import annotations

import torch

from safecrit.ops import native
from safecrit.ops.adamw import AdamWStep


def sparse_adamw_cpu(
    weight: torch.Tensor,
    indices: torch.Tensor,
    grad_k: torch.Tensor,
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    settings: AdamWStep,
) -> None:
    """C++ kernel of `safecrit.ops.sparse_adamw_`; it checks that `indices` are in range."""
    module, _ = native.cpu_module()
    assert module is not None, "chosen only where it can be imported"
    module.sparse_adamw(*_sparse(weight, indices, grad_k, master, exp_avg, exp_avg_sq, settings), _threads())


def sparse_adamw_cuda(
    weight: torch.Tensor,
    indices: torch.Tensor,
    grad_k: torch.Tensor,
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    settings: AdamWStep,
) -> None:
    """CUDA kernel of `safecrit.ops.sparse_adamw_`."""
    module, _ = native.cuda_module()
    assert module is not None, "chosen only where it can be imported"
    state = _sparse(weight, indices, grad_k, master, exp_avg, exp_avg_sq, settings)
    module.sparse_adamw(*state, *native.queue(weight.device))


def masked_adamw_cpu(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    bits: torch.Tensor,
    settings: AdamWStep,
) -> None:
    """C++ kernel of `safecrit.ops.masked_adamw_`."""
    module, _ = native.cpu_module()
    assert module is not None, "chosen only where it can be imported"
    grad = grad.contiguous()  # alive until the kernel is done with it
    module.masked_adamw(*_masked(weight, grad, exp_avg, exp_avg_sq, bits, settings), _threads())


def masked_adamw_cuda(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    bits: torch.Tensor,
    settings: AdamWStep,
) -> None:
    """CUDA kernel of `safecrit.ops.masked_adamw_`."""
    module, _ = native.cuda_module()
    assert module is not None, "chosen only where it can be imported"
    grad = grad.contiguous()  # the caching allocator reuses it in this stream's order only
    module.masked_adamw(*_masked(weight, grad, exp_avg, exp_avg_sq, bits, settings), *native.queue(weight.device))


def _sparse(
    weight: torch.Tensor,
    indices: torch.Tensor,
    grad_k: torch.Tensor,
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    settings: AdamWStep,
) -> tuple[int | tuple[int, ...] | tuple[float, ...], ...]:
    pointers = (tensor.data_ptr() for tensor in (weight, indices, grad_k, master, exp_avg, exp_avg_sq))
    return *pointers, weight.numel(), indices.numel(), _codes(weight, grad_k), settings.factors


def _masked(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    bits: torch.Tensor,
    settings: AdamWStep,
) -> tuple[int | tuple[int, ...] | tuple[float, ...], ...]:
    pointers = (tensor.data_ptr() for tensor in (weight, grad, exp_avg, exp_avg_sq, bits))
    return *pointers, weight.numel(), _codes(weight, grad, exp_avg, exp_avg_sq), settings.factors


def _codes(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(native.DTYPE_CODES[tensor.dtype] for tensor in tensors)


def _threads() -> int:
    return torch.get_num_threads()

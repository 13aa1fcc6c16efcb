"""sigma(W): the standard deviation of each logical matrix (docs/method.md, section 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from safecrit.ops.dispatch import Backend, choose
from safecrit.strided import Strided


@torch.no_grad()
def matrix_std(
    weight: torch.Tensor, matrices: Sequence[Strided] | None = None, *, backend: Backend = "auto"
) -> torch.Tensor:
    """Unbiased standard deviation of each of `matrices` inside `weight`: float64 [len(matrices)], on the CPU.

    weight: floating point, any shape. matrices: patterns over its row-major elements, for which it must be
    contiguous; None stands for one matrix, all of `weight`. Sums run in float64 in a fixed order. A matrix with
    fewer than two entries has 0; one with a NaN or infinite entry has NaN.

    Raises ValueError for another dtype and for a pattern that leaves the tensor.
    """
    if not weight.is_floating_point():
        raise ValueError(f"matrix_std: weight is {weight.dtype}, must be a floating-point dtype")
    if matrices is None:
        parts = [weight]
    else:
        if not weight.is_contiguous():
            raise ValueError("matrix_std: patterns need a contiguous weight")
        for pattern in matrices:
            _check(pattern, weight.numel())
        parts = [pattern.of(weight) for pattern in matrices]
    function = choose("matrix_std", weight.device, backend, [weight.dtype]).function
    return function(parts)


def _check(pattern: Strided, numel: int) -> None:
    reach = pattern.offset + sum(
        (size - 1) * stride for size, stride in zip(pattern.shape, pattern.strides, strict=True)
    )
    if pattern.offset < 0 or any(stride < 0 for stride in pattern.strides) or (pattern.numel and reach >= numel):
        raise ValueError(f"matrix_std: {pattern} leaves a weight of {numel} elements")

"""Two tensors of one shape seen as rows x cols with strides: what the elementwise kernels take."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Plane:
    """`acc` and `grad`, both rows x cols; strides are (row, column), in elements."""

    acc: torch.Tensor
    grad: torch.Tensor
    rows: int
    cols: int
    acc_strides: tuple[int, int]
    grad_strides: tuple[int, int]

    @property
    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both as [rows, cols] views."""
        size = (self.rows, self.cols)
        return self.acc.as_strided(size, self.acc_strides), self.grad.as_strided(size, self.grad_strides)


def plane(acc: torch.Tensor, grad: torch.Tensor) -> Plane | None:
    """Collapse the dimensions that both tensors (of one shape) walk through alike; None where more than two remain.

    Dimensions may be in any order, as long as it is the same for both: two transposed views collapse too.
    """
    dims = [
        (size, left, right)
        for size, left, right in zip(acc.shape, acc.stride(), grad.stride(), strict=True)
        if size != 1
    ]
    if any(size == 0 for size, _, _ in dims):
        return Plane(acc, grad, 0, 0, (0, 1), (0, 1))
    dims.sort(key=lambda dim: dim[1], reverse=True)
    merged: list[tuple[int, int, int]] = []
    for size, left, right in dims:
        if merged and merged[-1][1] == size * left and merged[-1][2] == size * right:
            size *= merged.pop()[0]
        merged.append((size, left, right))
    if len(merged) > 2:
        return None
    while len(merged) < 2:
        size, left, right = merged[0] if merged else (1, 1, 1)
        merged.insert(0, (1, size * left, size * right))
    (rows, *row_strides), (cols, *col_strides) = merged
    return Plane(acc, grad, rows, cols, (row_strides[0], col_strides[0]), (row_strides[1], col_strides[1]))


def byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and end of the memory that `tensor` reaches; equal where it is empty."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def overlap(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether the stretches of memory that two tensors reach have a byte in common."""
    if left.device != right.device:
        return False
    (a, b), (c, d) = byte_range(left), byte_range(right)
    return max(a, c) < min(b, d)


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor may share memory (as after `expand`); nested strides never do."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return False
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False

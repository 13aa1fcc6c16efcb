"""A strided pattern inside a row-major tensor: how safecrit names a part of a weight.

One description serves two needs. A checkpoint tensor is such a part of the
parameter that transformers built from it (expert 3 of a fused bank), and a
logical matrix is such a part of a checkpoint tensor (the value columns of
GPT-2's `c_attn`, the query rows of every head in GPT-NeoX).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous row-major tensor of `shape`."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Strided:
    """Elements `offset + sum(i_d * strides[d])`, `0 <= i_d < shape[d]`, of a flat row-major tensor."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Strided:
        """All of a row-major tensor of `shape`."""
        return cls(0, tuple(shape), row_major(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_row_major(self) -> bool:
        """Whether the elements lie side by side, in order, from `offset` on."""
        return self.strides == row_major(self.shape) or self.numel <= 1

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of `tensor` (contiguous, any shape) that this pattern names, as a view of `shape`."""
        if not tensor.is_contiguous():
            raise ValueError("a strided pattern is defined on a contiguous tensor")
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.offset)

    def flat_indices(self) -> torch.Tensor:
        """Flat indices of the elements, int64 [numel], in the pattern's own order."""
        index = torch.full((), self.offset, dtype=torch.int64)
        for size, stride in zip(self.shape, self.strides, strict=True):
            index = index.unsqueeze(-1) + torch.arange(size, dtype=torch.int64) * stride
        return index.reshape(-1)

    def within(self, low: int, high: int) -> Iterator[tuple[tuple[slice, ...], Strided]]:
        """The elements at flat indices from `low` to before `high`: boxes of the pattern, and what each names.

        Strides must be positive.
        """
        yield from self._within(low, high, tuple(slice(0, n) for n in self.shape))

    def _within(self, low: int, high: int, box: tuple[slice, ...]) -> Iterator[tuple[tuple[slice, ...], Strided]]:
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if not self.numel or last < low or self.offset >= high:
            return
        if low <= self.offset and last < high:
            yield box, self
            return
        # Cut along the outermost dimension: slice i holds places from offset + i * stride to `reach` after it.
        stride, d = max((s, d) for d, (n, s) in enumerate(zip(self.shape, self.strides, strict=True)) if n > 1)
        size = self.shape[d]
        reach = last - self.offset - (size - 1) * stride
        first = max(0, -(-(low - self.offset) // stride))
        stop = max(first, min(size, (high - 1 - reach - self.offset) // stride + 1))
        touched = range(
            max(0, -(-(low - reach - self.offset) // stride)), min(size, (high - 1 - self.offset) // stride + 1)
        )
        inside = [(first, stop)] if first < stop else []
        for start, end in [*((i, i + 1) for i in touched if not first <= i < stop), *inside]:
            shape = (*self.shape[:d], end - start, *self.shape[d + 1 :])
            where = slice(box[d].start + start, box[d].start + end)
            part = Strided(self.offset + start * stride, shape, self.strides)
            yield from part._within(low, high, (*box[:d], where, *box[d + 1 :]))

    def contains(self, flat: torch.Tensor) -> torch.Tensor:
        """Which of `flat` (int64 [n]) belong to the pattern, bool [n]; dimensions must nest."""
        rest = flat - self.offset
        inside = rest >= 0
        for stride, size in sorted(zip(self.strides, self.shape, strict=True), reverse=True):
            if size == 1:
                continue
            digit = torch.div(rest, stride, rounding_mode="floor")
            inside &= digit < size
            rest = rest - digit * stride
        return inside & (rest == 0)

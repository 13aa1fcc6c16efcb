"""matrix_std in torch: mean and squared deviations of chunks, merged in a fixed order.

Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983),
formula 2.1: no cancellation, whatever the mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

CHUNK = 1 << 18  # entries; 2 MiB as float64, which stays in a processor's cache


def matrix_std(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """See `safecrit.ops.matrix_std`; `parts` are the matrices, views of one weight."""
    return torch.tensor([_std(part) for part in parts], dtype=torch.float64)


def _std(part: torch.Tensor) -> float:
    if part.numel() < 2:
        return 0.0
    count, mean, squares = 0, 0.0, 0.0
    for chunk in _chunks(part):
        values = chunk.double()
        size, centre = values.numel(), float(values.mean())
        delta = centre - mean
        squares += float((values - centre).square_().sum()) + delta * delta * count * size / (count + size)
        mean += delta * size / (count + size)
        count += size
    return float((squares / (count - 1)) ** 0.5)


def _chunks(view: torch.Tensor) -> Iterator[torch.Tensor]:
    """A view of any strides in pieces of at most CHUNK elements, in order, without copying it whole."""
    if view.numel() <= CHUNK:
        yield view
        return
    inner = view.numel() // view.shape[0]
    if inner <= CHUNK:
        yield from view.split(CHUNK // inner)
        return
    for part in view:
        yield from _chunks(part)

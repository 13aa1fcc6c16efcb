"""How far training moved the weights, by layer and component, in units of sigma.

sigma(W) is the standard deviation of a logical matrix of the base model (docs/method.md,
section 1): the size of a typical weight there. A mean change far below it means that
training did next to nothing, whatever the loss did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from safecrit import ops
from safecrit.layout import COMPONENTS, Matrix, TensorLayout

NEGLIGIBLE = 1e-3  # sigma: a hundredth of what lr 3e-5 can move in 100 steps (0.08 sigma at most), well inside noise


@dataclass(frozen=True, kw_only=True)
class Moved:
    """One row of the table. `mean_sigma` and `max_sigma`: |new - base| / sigma over the trained weights.

    Both are None where sigma is 0 (a norm of ones), and then only counts are known.
    """

    layer: int | None
    component: str
    trained: int
    changed: int
    mean_sigma: float | None
    max_sigma: float | None


class Movement:
    """Collects the change of one tensor after another."""

    def __init__(self) -> None:
        """Nothing has moved yet."""
        self._groups: dict[tuple[int | None, str], list[float]] = {}

    @torch.no_grad()
    def add(
        self,
        layout: TensorLayout,
        base: torch.Tensor,
        new: torch.Tensor,
        *,
        only: torch.Tensor | None = None,
        frozen: torch.Tensor | None = None,
    ) -> None:
        """Count one checkpoint tensor in.

        base: the tensor before training, [shape], contiguous. new: the tensor after it,
        same dtype and shape; or, with `only` (flat indices int64 [n] of the trained
        weights), their n values. frozen: flat indices int64 of weights that were held.
        """
        sigmas = ops.matrix_std(base, [matrix.where for matrix in layout.matrices]).tolist()
        before = base.reshape(-1)[only] if only is not None else base
        differs = new != before
        distance = (new.float() - before.float()).abs_()
        for matrix, sigma in zip(layout.matrices, sigmas, strict=True):
            if only is not None:
                inside = _inside(matrix, layout, only)
                trained, far, unequal = int(inside.sum()), distance[inside], differs[inside]
            else:
                held = 0 if frozen is None else int(_inside(matrix, layout, frozen).sum())
                trained = matrix.where.numel - held
                far, unequal = matrix.where.of(distance), matrix.where.of(differs)
            if trained:
                group = self._groups.setdefault((matrix.layer, matrix.component), [0, 0, 0, 0.0, 0.0])
                group[0] += trained
                group[1] += int(unequal.sum())
                if sigma > 0:
                    group[2] += trained
                    group[3] += float(far.sum(dtype=torch.float64)) / sigma
                    group[4] = max(group[4], float(far.max()) / sigma)

    def table(self) -> list[Moved]:
        """Rows by layer, then component; those outside the layers last."""

        def order(key: tuple[int | None, str]) -> tuple[bool, int, int]:
            return key[0] is None, key[0] or 0, COMPONENTS.index(key[1])

        return [
            Moved(
                layer=key[0],
                component=key[1],
                trained=int(group[0]),
                changed=int(group[1]),
                mean_sigma=group[3] / group[2] if group[2] else None,
                max_sigma=group[4] if group[2] else None,
            )
            for key, group in sorted(self._groups.items(), key=lambda item: order(item[0]))
        ]

    @property
    def mean_sigma(self) -> float:
        """Mean |new - base| / sigma over all trained weights whose sigma is not 0."""
        measured = sum(group[2] for group in self._groups.values())
        return sum(group[3] for group in self._groups.values()) / measured if measured else 0.0

    @property
    def changed(self) -> int:
        """Weights whose value differs from the base's."""
        return sum(int(group[1]) for group in self._groups.values())


def _inside(matrix: Matrix, layout: TensorLayout, flat: torch.Tensor) -> torch.Tensor:
    """Which of the tensor's flat indices lie in `matrix`, bool [n]."""
    if len(layout.matrices) == 1:
        return torch.ones(len(flat), dtype=torch.bool)
    return matrix.where.contains(flat)


def rows_to_json(rows: list[Moved]) -> list[Mapping[str, Any]]:
    """Plain objects, for `training.json`."""
    return [asdict(row) for row in rows]

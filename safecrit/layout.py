"""What a checkpoint tensor consists of: the logical matrices inside it, by layer, component and expert.

The layout travels inside score folders and mask files, so that tables by layer,
component or expert need no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from safecrit.errors import FormatError
from safecrit.strided import Strided

COMPONENTS = ("q", "k", "v", "o", "gate", "up", "down", "router", "embedding", "head", "norm", "bias", "other")


@dataclass(frozen=True)
class Matrix:
    """One logical weight matrix: `where` it lies in its checkpoint tensor (flat, row-major)."""

    component: str
    layer: int | None
    expert: int | None
    where: Strided


@dataclass(frozen=True)
class TensorLayout:
    """A checkpoint tensor: its shape, its disjoint and complete logical matrices, whether it may be selected."""

    shape: tuple[int, ...]
    matrices: tuple[Matrix, ...]
    eligible: bool
    reason: str = ""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def layout_to_json(layout: TensorLayout) -> dict[str, Any]:
    """A JSON object; a matrix that is the whole tensor carries no pattern."""
    whole = Strided.whole(layout.shape)
    matrices = []
    for matrix in layout.matrices:
        entry: dict[str, Any] = {"component": matrix.component}
        if matrix.layer is not None:
            entry["layer"] = matrix.layer
        if matrix.expert is not None:
            entry["expert"] = matrix.expert
        if matrix.where != whole:
            entry |= {"offset": matrix.where.offset, "sizes": matrix.where.shape, "strides": matrix.where.strides}
        matrices.append(entry)
    value: dict[str, Any] = {"shape": layout.shape, "matrices": matrices, "eligible": layout.eligible}
    return value | ({"reason": layout.reason} if layout.reason else {})


def layout_from_json(value: dict[str, Any], where: str) -> TensorLayout:
    """The inverse of `layout_to_json`; FormatError names `where` it was read."""
    try:
        shape = tuple(int(size) for size in value["shape"])
        matrices = []
        for entry in value["matrices"]:
            pattern = Strided.whole(shape)
            if "sizes" in entry:
                pattern = Strided(entry["offset"], tuple(entry["sizes"]), tuple(entry["strides"]))
            if entry["component"] not in COMPONENTS:
                raise ValueError(f"unknown component {entry['component']!r}")
            matrices.append(Matrix(entry["component"], entry.get("layer"), entry.get("expert"), pattern))
        return TensorLayout(shape, tuple(matrices), bool(value["eligible"]), value.get("reason", ""))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{where}: damaged tensor layout ({error}).") from error

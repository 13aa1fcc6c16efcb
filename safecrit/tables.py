"""Where selected weights and high scores lie: tables by layer, component and expert, as plain data.

Works from the layouts that masks and score folders carry, so no model is
needed. Counting goes by logical matrix, also inside fused tensors. A share of
the selected weights stands beside the share that the same weights have of all
eligible ones: a sum or a mean alone favours large or small matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from safecrit.layout import COMPONENTS, TensorLayout
from safecrit.strided import Strided

Key = Literal["layer", "component", "expert"]


class _MaskInfo(Protocol):
    @property
    def tensors(self) -> Mapping[str, TensorLayout]: ...


class MaskLike(Protocol):
    """What is read of a mask: every tensor's layout, and sorted flat indices (int64 [n]) of the selected weights."""

    @property
    def indices(self) -> Mapping[str, torch.Tensor]:
        """By checkpoint tensor name; a tensor without selected weights may be absent."""
        ...

    @property
    def info(self) -> _MaskInfo:
        """The layouts, of every checkpoint tensor."""
        ...


@dataclass(frozen=True, kw_only=True)
class MatrixCount:
    """One logical matrix: where it stands, its `weights`, how many may be selected, how many are."""

    tensor: str
    layer: int | None
    component: str
    expert: int | None
    weights: int
    eligible: int
    selected: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """Matrices that share layer, component or expert (None where not grouped by it, or where they have none).

    Counts of weights; shares in [0, 1]: `share` selected of the group's own
    weights, `of_selected` of all selected weights, `of_eligible` eligible ones
    of all eligible, `of_all` weights of all. None where the denominator is 0.
    """

    layer: int | None
    component: str | None
    expert: int | None
    weights: int
    eligible: int
    selected: int
    share: float | None
    of_selected: float | None
    of_eligible: float | None
    of_all: float | None


@dataclass(frozen=True, kw_only=True)
class ScoreGroup:
    """Mean and largest |score| of the matrices that share layer, component or expert, each weight counting once."""

    layer: int | None
    component: str | None
    expert: int | None
    weights: int
    mean: float
    largest: float


def count_in(indices: torch.Tensor, pattern: Strided) -> int:
    """How many of `indices` (sorted int64 [n]) belong to `pattern`."""
    if pattern.numel == 0 or indices.numel() == 0:
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(pattern.shape, pattern.strides, strict=True))
    last = pattern.offset + reach
    bounds = torch.tensor([pattern.offset, last + 1], dtype=indices.dtype)
    start, stop = torch.searchsorted(indices, bounds).tolist()
    if reach + 1 == pattern.numel:  # the elements fill their range: no need to look at each
        return int(stop - start)
    return int(pattern.contains(indices[start:stop]).sum())


def count_matrices(mask: MaskLike) -> list[MatrixCount]:
    """Selected weights of every logical matrix of the model, by tensor name, then in the tensor's own order."""
    nothing = torch.empty(0, dtype=torch.int64)
    counts = []
    for name, layout in sorted(mask.info.tensors.items()):
        indices = mask.indices.get(name, nothing)
        for matrix in layout.matrices:
            weights = matrix.where.numel
            counts.append(
                MatrixCount(
                    tensor=name,
                    layer=matrix.layer,
                    component=matrix.component,
                    expert=matrix.expert,
                    weights=weights,
                    eligible=weights if layout.eligible else 0,
                    selected=count_in(indices, matrix.where),
                )
            )
    return counts


def group_counts(counts: Iterable[MatrixCount], by: Sequence[Key]) -> list[Group]:
    """Sum `counts` by the named keys, sorted by layer (none comes last), component (as in COMPONENTS), expert.

    With "expert" among the keys only matrices that belong to an expert are
    shown; shares of totals still refer to the whole model.
    """
    counts = list(counts)
    weights, eligible, selected = (
        sum(getattr(count, field) for count in counts) for field in ("weights", "eligible", "selected")
    )
    sums: dict[tuple[int | None, str | None, int | None], list[int]] = {}
    for count in counts:
        if "expert" in by and count.expert is None:
            continue
        total = sums.setdefault(_key(count, by), [0, 0, 0])
        for position, value in enumerate((count.weights, count.eligible, count.selected)):
            total[position] += value
    return [
        Group(
            layer=key[0],
            component=key[1],
            expert=key[2],
            weights=own,
            eligible=own_eligible,
            selected=own_selected,
            share=_ratio(own_selected, own),
            of_selected=_ratio(own_selected, selected),
            of_eligible=_ratio(own_eligible, eligible),
            of_all=_ratio(own, weights),
        )
        for key, (own, own_eligible, own_selected) in sorted(sums.items(), key=lambda item: _order(item[0]))
    ]


def mask_by_layer_component(mask: MaskLike) -> list[Group]:
    """Counts and shares by layer and component."""
    return group_counts(count_matrices(mask), ("layer", "component"))


def mask_by_component(mask: MaskLike) -> list[Group]:
    """Counts and shares by component, all layers together."""
    return group_counts(count_matrices(mask), ("component",))


def mask_by_layer_expert(mask: MaskLike) -> list[Group]:
    """Counts and shares by layer and expert; empty for a dense model."""
    return group_counts(count_matrices(mask), ("layer", "expert"))


@dataclass(frozen=True, kw_only=True)
class _Scored:
    layer: int | None
    component: str
    expert: int | None
    weights: int
    mean: float
    largest: float


def group_scores(matrices: Iterable[Mapping[str, Any]], by: Sequence[Key]) -> list[ScoreGroup]:
    """Mean and largest |score| by the named keys, from the table `matrices` of a score folder's `score.json`.

    The mean is over weights, so a large matrix counts for more than a small
    one. Order and the treatment of "expert" are those of `group_counts`.
    """
    groups: dict[tuple[int | None, str | None, int | None], list[_Scored]] = {}
    for entry in matrices:
        scored = _Scored(
            layer=entry.get("layer"),
            component=entry["component"],
            expert=entry.get("expert"),
            weights=entry["numel"],
            mean=entry["mean_abs"],
            largest=entry["max_abs"],
        )
        if scored.weights and not ("expert" in by and scored.expert is None):
            groups.setdefault(_key(scored, by), []).append(scored)
    return [
        ScoreGroup(
            layer=key[0],
            component=key[1],
            expert=key[2],
            weights=(weights := sum(s.weights for s in group)),
            mean=sum(s.weights * s.mean for s in group) / weights,
            largest=max(s.largest for s in group),
        )
        for key, group in sorted(groups.items(), key=lambda item: _order(item[0]))
    ]


def scores_by_layer_component(matrices: Iterable[Mapping[str, Any]]) -> list[ScoreGroup]:
    """Mean and largest |score| by layer and component."""
    return group_scores(matrices, ("layer", "component"))


def scores_by_layer_expert(matrices: Iterable[Mapping[str, Any]]) -> list[ScoreGroup]:
    """Mean and largest |score| by layer and expert; empty for a dense model."""
    return group_scores(matrices, ("layer", "expert"))


def _key(entry: MatrixCount | _Scored, by: Sequence[Key]) -> tuple[int | None, str | None, int | None]:
    return (
        entry.layer if "layer" in by else None,
        entry.component if "component" in by else None,
        entry.expert if "expert" in by else None,
    )


def _order(key: tuple[int | None, str | None, int | None]) -> tuple[bool, int, int, int]:
    layer, component, expert = key
    return (layer is None, layer or 0, COMPONENTS.index(component) if component else 0, expert or 0)


def _ratio(count: int, total: int) -> float | None:
    return count / total if total else None

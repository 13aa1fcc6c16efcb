"""How far two results agree: masks by intersection over union (IoU), score sets by top shares and correlation.

Every figure stands beside what chance gives, because two masks of 10 % share much by
chance alone. Chance: two uniform masks of sizes k1 and k2 among the same N weights
share k1 * k2 / N on average; its IoU is the IoU of that expectation. A layer's or
component's chance takes its own k1, k2 and N: what is above it is agreement on single
weights, not on where the masks lie. Masks and scores are read one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from safecrit import maskformat, ops
from safecrit.errors import FormatError, MismatchError, SafecritError
from safecrit.files import StoredTensor
from safecrit.maskfile import Mask, MaskInfo
from safecrit.tables import Key, MatrixCount, count_matrices, group_counts
from safecrit.tensorfile import MappedFiles

SHARES = (0.001, 0.01, 0.05, 0.1)
_CHUNK = 1 << 22  # entries turned to float64 at once: 32 MiB a score set


class MaskFile:
    """A mask file whose indices are read tensor by tensor: `indices(name)` and `info`, `count` from its header."""

    def __init__(self, path: str | Path) -> None:
        """Read the header of the mask's file, its index, or a folder that holds one mask; FormatError as `Mask`."""
        self.path, stored, self.info, self._counts = maskformat.open_mask(path)
        self.count = sum(self._counts.values())
        self._maps, self._stored = MappedFiles(), dict[str, tuple[str, StoredTensor]]()
        for key, entry in stored.items():
            name, _, kind = key.rpartition("::")
            if name in self._stored or kind not in ("indices", "bits"):
                raise FormatError(f"{self.path}: tensor {key!r} is unknown, or stored twice.")
            self._stored[name] = (kind, entry)
        if self._stored.keys() != self._counts.keys():
            wrong = min(self._stored.keys() ^ self._counts.keys())
            raise FormatError(f"{self.path}: tensor {wrong!r} is in its counts or among its tensors, not in both.")

    def indices(self, name: str) -> torch.Tensor:
        """Selected weights of checkpoint tensor `name`, flat, int64 [n], sorted."""
        if name not in self._stored:
            return torch.empty(0, dtype=torch.int64)
        kind, entry = self._stored[name]
        where = f"{self.path}: {name}"
        flat = maskformat.decode_entries(self._maps, entry, kind, self.info.tensors[name].numel, where)
        if len(flat) != self._counts[name]:
            raise FormatError(f"{where}: holds {len(flat)} entries, its count says {self._counts[name]}.")
        return flat


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Two masks within the weights that share layer, component or expert (None where not grouped by it).

    Counts of weights: `eligible` in either mask (N), selected by the `first`, the `second`, both (`shared`).
    `iou` is shared over selected by either, `overlap` (the overlap coefficient) shared over the smaller
    selection, each in [0, 1]; None where the denominator is 0.
    """

    layer: int | None
    component: str | None
    expert: int | None
    eligible: int
    first: int
    second: int
    shared: int
    shared_by_chance: float
    iou: float | None
    iou_by_chance: float | None
    overlap: float | None
    overlap_by_chance: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two masks, by their positions in the list that was compared."""

    first: int
    second: int
    overall: Overlap
    by_layer: list[Overlap]
    by_component: list[Overlap]
    by_layer_expert: list[Overlap]


def compare(masks: Sequence[MaskFile]) -> list[Comparison]:
    """Every pair of `masks`, in order; groups without an eligible weight are left out.

    Raises MismatchError where the masks are not of the same tensors in the same shapes.
    """
    for mask in masks[1:]:
        _check_same_model(masks[0], mask)
    pairs = list(combinations(range(len(masks)), 2))
    counts: list[list[list[MatrixCount]]] = [[[], [], []] for _ in pairs]
    for name in masks[0].info.tensors:
        flat = [mask.indices(name) for mask in masks]
        eligible = [mask.info.tensors[name].eligible or len(own) > 0 for mask, own in zip(masks, flat, strict=True)]
        own = [_count(masks[0].info, name, one, possible) for one, possible in zip(flat, eligible, strict=True)]
        for (a, b), lists in zip(pairs, counts, strict=True):
            both = _count(masks[0].info, name, _shared(flat[a], flat[b]), eligible[a] or eligible[b])
            for known, found in zip(lists, (own[a], own[b], both), strict=True):
                known += found
    return [
        Comparison(
            first=a,
            second=b,
            overall=_overlaps(lists, ())[0],
            by_layer=_overlaps(lists, ("layer",)),
            by_component=_overlaps(lists, ("component",)),
            by_layer_expert=_overlaps(lists, ("layer", "expert")),
        )
        for (a, b), lists in zip(pairs, counts, strict=True)
    ]


def _check_same_model(first: MaskFile, other: MaskFile) -> None:
    mine = {name: list(layout.shape) for name, layout in first.info.tensors.items()}
    theirs = {name: list(layout.shape) for name, layout in other.info.tensors.items()}
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise MismatchError(
                f"the masks are of different models: {name!r} is {mine.get(name, 'absent')} in {first.path} "
                f"({first.info.model or 'unnamed model'}) and {theirs.get(name, 'absent')} in {other.path} "
                f"({other.info.model or 'unnamed model'}). Compare masks of one model."
            )


def _count(info: MaskInfo, name: str, flat: torch.Tensor, eligible: bool) -> list[MatrixCount]:
    """The counts of `flat` in every logical matrix of tensor `name`."""
    tensors = {name: dataclasses.replace(info.tensors[name], eligible=eligible)}
    return count_matrices(Mask({name: flat}, dataclasses.replace(info, tensors=tensors)))


def _shared(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """What two sorted lists of unique indices (int64) have in common."""
    if not len(second):
        return second
    place = torch.searchsorted(second, first).clamp_(max=len(second) - 1)
    return first[second[place] == first]


def _overlaps(lists: Sequence[list[MatrixCount]], by: Sequence[Key]) -> list[Overlap]:
    groups = zip(*(group_counts(counts, by) for counts in lists), strict=True)
    return [
        _overlap((both.layer, both.component, both.expert), both.eligible, one.selected, other.selected, both.selected)
        for one, other, both in groups
        if both.eligible or not by
    ]


def _overlap(
    key: tuple[int | None, str | None, int | None], eligible: int, first: int, second: int, shared: int
) -> Overlap:
    expected = first * second / eligible if eligible else 0.0
    return Overlap(
        layer=key[0],
        component=key[1],
        expert=key[2],
        eligible=eligible,
        first=first,
        second=second,
        shared=shared,
        shared_by_chance=expected,
        iou=_ratio(shared, first + second - shared),
        iou_by_chance=_ratio(expected, first + second - expected),
        overlap=_ratio(shared, min(first, second)),
        overlap_by_chance=_ratio(expected, min(first, second)),
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def agreement(
    a: Mapping[str, torch.Tensor],
    b: Mapping[str, torch.Tensor],
    *,
    total: int,
    shares: Sequence[float] = SHARES,
    sample: int = 1_000_000,
    seed: int = 0,
) -> dict[str, Any]:
    """How far two signed score sets agree, as a JSON object; their scales may differ.

    a, b: float32, bfloat16 or float16 scores by checkpoint name, the same names and shapes. total: weights of the
    model, of which `shares` are taken. The result holds

    shares: for each share of k = floor(share * total) weights its `share`, `k`, the `iou` of the two exact top-k
        masks of |score| and its `chance`; without the shares that want more weights than score other than 0.
    spearman: rank correlation of |score| over `sample` entries, one from each of as many equal stretches of all
        (every entry where there are fewer). Ties share their mean rank.
    pearson, cosine: of the signed scores, over all of them, in float64.

    Correlations are `{"value", "chance"}`, chance being 0 and the value None where a side is constant (cosine:
    0). Raises MismatchError for other names or shapes, SafecritError for a score that is not finite.
    """
    names = sorted(a)
    shapes = [{name: tuple(scores[name].shape) for name in scores} for scores in (a, b)]
    if shapes[0] != shapes[1]:
        wrong = min(name for name in a.keys() | b.keys() if shapes[0].get(name) != shapes[1].get(name))
        raise MismatchError(f"the score sets are of different tensors: {wrong!r} differs. Score the same weights.")
    weights = sum(math.prod(shape) for shape in shapes[0].values())
    places = _spread(weights, sample, seed)
    sums, nonzero, picked, start = np.zeros(5), np.zeros(2, np.int64), [], 0
    for name in names:
        x, y = (scores[name].detach().reshape(-1) for scores in (a, b))
        inside = places[np.searchsorted(places, start) : np.searchsorted(places, start + len(x))] - start
        start += len(x)
        picked.append([flat[torch.from_numpy(inside).to(flat.device)].abs().float().cpu().numpy() for flat in (x, y)])
        for u, v in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
            u, v = u.cpu().double(), v.cpu().double()
            parts = np.array([float(part) for part in (u.sum(), v.sum(), u @ u, v @ v, u @ v)])
            if not np.isfinite(parts).all():
                raise SafecritError(f"{name}: scores are not finite, so nothing can be said of their agreement.")
            sums += parts
            nonzero += [int(u.count_nonzero()), int(v.count_nonzero())]
    counts = {share: math.floor(Fraction(str(share)) * total) for share in shares}
    counts = {share: k for share, k in counts.items() if 0 < k <= nonzero.min()}
    order = sorted(set(counts.values()), reverse=True)
    iou = {}
    for k, first, second in zip(order, _tops(a, names, order), _tops(b, names, order), strict=True):
        shared = sum(len(_shared(one, two)) for one, two in zip(first, second, strict=True))
        iou[k] = shared / (2 * k - shared)
    ranks = [rankdata(np.concatenate(side)) - (len(places) + 1) / 2 for side in zip(*picked, strict=True)]
    x1, y1, xx, yy, xy = sums.tolist()
    # Sums of squares about the mean; what is left of a constant's is rounding.
    spread = [max(square - one**2 / weights, 0.0) for one, square in ((x1, xx), (y1, yy))]
    varies = spread[0] > 1e-12 * xx and spread[1] > 1e-12 * yy
    found = {
        "spearman": _cosine(*(float(p @ q) for p, q in ((ranks[0], ranks[1]), (ranks[0],) * 2, (ranks[1],) * 2))),
        "pearson": _cosine(xy - x1 * y1 / weights, *spread) if varies else None,
        "cosine": _cosine(xy, xx, yy),
    }
    return {
        "weights": weights,
        "sample": len(places),
        "shares": [{"share": s, "k": k, "iou": iou[k], "chance": k / (2 * weights - k)} for s, k in counts.items()],
        **{name: {"value": value, "chance": 0.0} for name, value in found.items()},
    }


def _spread(total: int, sample: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """One position out of each of `sample` equal stretches of `total`, ascending; all where there are fewer."""
    if total <= sample:
        return np.arange(total)
    edges = np.array([i * total // sample for i in range(sample + 1)], np.int64)
    drawn = torch.rand(sample, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).numpy()
    return edges[:-1] + (drawn * np.diff(edges)).astype(np.int64)


def _tops(
    scores: Mapping[str, torch.Tensor], names: Sequence[str], order: Sequence[int]
) -> Iterator[list[torch.Tensor]]:
    """Indices of the top k of |score|, in the host's memory, for each k of `order`; falling, each out of the last."""
    indices: list[torch.Tensor] = []
    values = [scores[name].detach().reshape(-1) for name in names]
    for k in order:
        chosen = ops.select_top(values, k).indices
        values = [value[place] for value, place in zip(values, chosen, strict=True)]
        kept = [place.cpu() for place in chosen]
        indices = [index[place] for index, place in zip(indices, kept, strict=True)] if indices else kept
        yield indices


def _cosine(product: float, first: float, second: float) -> float | None:
    """`product` over the root of two sums of squares, in [-1, 1]; None where either is 0."""
    return min(max(product / math.sqrt(first) / math.sqrt(second), -1.0), 1.0) if first and second else None

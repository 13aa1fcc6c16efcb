"""A safety mask in memory: which weights of which checkpoint tensors, what it was made from, and set algebra.

Tensors are named as in the checkpoint, so that a mask outlives the names a library
gives them at load time. The file format is in `safecrit.maskformat`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from safecrit.errors import MismatchError, SafecritError
from safecrit.hub import find_file
from safecrit.layout import TensorLayout
from safecrit.maskformat import TIE_RULE, MaskInfo, read_mask, write_mask
from safecrit.tensorfile import SHARD_BYTES

__all__ = ["TIE_RULE", "Mask", "MaskInfo"]

_REMEDY = "Make a mask of this model: `safecrit score`, then `safecrit mask`."


class HasLayouts(Protocol):
    """Anything that knows a model's checkpoint tensors, such as `safecrit.anatomy.Anatomy`."""

    @property
    def layouts(self) -> dict[str, TensorLayout]:
        """Layout by checkpoint tensor name."""


class Mask:
    """Selected weights: `indices` per checkpoint tensor (flat, int64 [n], sorted, unique), and `info`.

    counts: selected weights per tensor. Where several ranks selected together, `indices` holds this rank's tensors
    alone, `counts` all of them, and the ranks `save` together.
    """

    def __init__(
        self, indices: Mapping[str, torch.Tensor], info: MaskInfo, counts: Mapping[str, int] | None = None
    ) -> None:
        """Keep the tensors that have entries, in name order."""
        self.indices = {name: flat for name, flat in sorted(indices.items()) if len(flat)}
        self.info, self._shared = info, counts is not None
        if counts is None:
            counts = {name: len(flat) for name, flat in self.indices.items()}
        self.counts = {name: count for name, count in sorted(counts.items()) if count}
        unknown = set(self.indices) - set(info.tensors)
        assert not unknown, f"selected from tensors that the info does not list: {sorted(unknown)}"

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read a mask file, its index, a folder that holds one mask, or a Hub id; FormatError where it is malformed."""
        return cls(*read_mask(find_file(path, "mask")))

    def save(self, path: str | Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
        """Write the mask to `path` (sharded above `shard_bytes`); the files written."""
        counts = self.counts if self._shared else None
        return write_mask(path, self.indices, self.info, counts=counts, shard_bytes=shard_bytes)

    @property
    def count(self) -> int:
        """Number of selected weights, k."""
        return sum(self.counts.values())

    def __repr__(self) -> str:
        """Short form for a console."""
        return f"Mask({self.info.mode}, {self.count:,} of {self.info.total:,} weights in {len(self.counts)} tensors)"

    def dense(self, name: str) -> torch.Tensor:
        """Bool tensor in the shape of checkpoint tensor `name`, true where selected."""
        if name not in self.info.tensors:
            raise SafecritError(f"the mask knows no tensor {name!r}; its model has {len(self.info.tensors)} others.")
        layout = self.info.tensors[name]
        flat = torch.zeros(layout.numel, dtype=torch.bool)
        if name in self.indices:
            flat[self.indices[name]] = True
        return flat.reshape(layout.shape)

    def iou(self, other: Mask) -> float:
        """Shared weights over weights in either mask; 1.0 for two empty masks."""
        self._check_same_model(other)
        shared = sum(
            int(_member(flat, other.indices[name]).sum())
            for name, flat in self.indices.items()
            if name in other.indices
        )
        either = self.count + other.count - shared
        return shared / either if either else 1.0

    def __and__(self, other: Mask) -> Mask:
        """Weights in both masks."""
        return self._combine(other, "and")

    def __or__(self, other: Mask) -> Mask:
        """Weights in either mask."""
        return self._combine(other, "or")

    def __sub__(self, other: Mask) -> Mask:
        """Weights in this mask and not in the other."""
        return self._combine(other, "minus")

    def _combine(self, other: Mask, how: str) -> Mask:
        self._check_same_model(other)
        empty, result = torch.empty(0, dtype=torch.int64), {}
        for name in sorted(set(self.indices) | set(other.indices)):
            mine, theirs = self.indices.get(name, empty), other.indices.get(name, empty)
            if how == "and":
                result[name] = mine[_member(mine, theirs)]
            elif how == "minus":
                result[name] = mine[~_member(mine, theirs)]
            else:
                result[name] = torch.cat([mine, theirs[~_member(theirs, mine)]]).sort().values
        info = dataclasses.replace(
            self.info,
            mode=how,
            share=None,
            threshold_bits=None,
            tied=0,
            tied_selected=0,
            seed=None,
            prompt_hashes=list(dict.fromkeys([*self.info.prompt_hashes, *other.info.prompt_hashes])),
            made_from=[_summary(self), _summary(other)],
        )
        return Mask(result, info)

    def _check_same_model(self, other: Mask) -> None:
        mine = {name: layout.shape for name, layout in self.info.tensors.items()}
        theirs = {name: layout.shape for name, layout in other.info.tensors.items()}
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise MismatchError(
                    f"the masks are of different models: {name!r} is {_shape(mine.get(name))} in {self._model} "
                    f"and {_shape(theirs.get(name))} in {other._model}."
                )

    @property
    def _model(self) -> str:
        return self.info.model or "an unnamed model"

    def check(
        self,
        model: HasLayouts | Mapping[str, Sequence[int] | TensorLayout],
        *,
        fingerprints: Iterable[str] = (),
        allow_other_weights: bool = False,
    ) -> None:
        """Raise MismatchError unless the mask belongs to `model` (its anatomy, or shapes by checkpoint name).

        Names and shapes must fit, always. Where `fingerprints` (the model's own and its parents', see
        `safecrit.fingerprint.accepted_fingerprints`) are given, the mask's must be among them, unless
        `allow_other_weights`. A checkpoint may lack tensors that nothing was selected from and that are
        not eligible, and may hold buffers or a stored copy of a tied embedding besides.
        """
        layouts = model if isinstance(model, Mapping) else model.layouts
        shapes = {name: _shape_of(value) for name, value in layouts.items()}
        known = {name: layout.shape for name, layout in self.info.tensors.items()}
        for name, shape in known.items():
            needed = name in self.indices or self.info.tensors[name].eligible
            if name not in shapes and needed:
                raise MismatchError(
                    f"the mask is of {self._model}, which has {name!r}; this model has no such tensor. {_REMEDY}"
                )
            if name in shapes and shapes[name] != shape:
                raise MismatchError(
                    f"the mask is of {self._model}, where {name!r} is {_shape(shape)}; in this model it is "
                    f"{_shape(shapes[name])}. {_REMEDY}"
                )
        ties = {layout.shape for layout in self.info.tensors.values() if _may_be_tied(layout)}
        for name, shape in shapes.items():
            if name not in known and len(shape) == 2 and shape not in ties:
                raise MismatchError(
                    f"this model has a tensor {name!r} that the mask's model, {self._model}, has not. {_REMEDY}"
                )
        accepted = list(fingerprints)
        if accepted and self.info.fingerprint not in accepted and not allow_other_weights:
            raise MismatchError(
                f"the mask was made for other weights: {self._model}, {self.info.fingerprint or 'no fingerprint'}; "
                f"this model is {accepted[0]}. Use the mask's own model, or --allow-other-weights if you mean it."
            )


def _member(values: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Which of `values` occur in `among`, bool [len(values)]; both sorted."""
    if not len(among):
        return torch.zeros(len(values), dtype=torch.bool)
    place = torch.searchsorted(among, values).clamp_(max=len(among) - 1)
    return among[place] == values


def _may_be_tied(layout: TensorLayout) -> bool:
    return not layout.eligible or any(matrix.component in ("embedding", "head") for matrix in layout.matrices)


def _summary(mask: Mask) -> dict[str, Any]:
    info = mask.info
    kept: dict[str, Any] = {
        "mode": info.mode,
        "count": mask.count,
        "share": info.share,
        "share_of": info.share_of,
        "threshold_bits": info.threshold_bits,
        "seed": info.seed,
        "model": info.model,
        "fingerprint": info.fingerprint,
    }
    return kept | ({"made_from": info.made_from} if info.made_from else {})


def _shape_of(value: Sequence[int] | TensorLayout) -> tuple[int, ...]:
    return value.shape if isinstance(value, TensorLayout) else tuple(value)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"{list(shape)} ({math.prod(shape)} entries)"

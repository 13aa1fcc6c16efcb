"""The anatomy of a model: every checkpoint tensor, the logical matrices inside it, and which may be selected.

A score, a mask and a delta name tensors as the checkpoint does; gradients appear on
runtime parameters, which transformers 5 may have fused or renamed. An Anatomy knows
both sides. It is read from the model object alone and needs no weights, so a model on
the meta device will do. sigma, counts and tables are per logical matrix.

Eligible (paper, section on safety-critical parameters): every weight except biases,
norms, embeddings and routers; the output head unless it is the embedding. Vectors of
other kinds are no matrices and are left out too, and so are vision and audio towers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from safecrit.checkpoint_map import StoredPart, checkpoint_map
from safecrit.components import describe
from safecrit.errors import SafecritError
from safecrit.layout import Matrix, TensorLayout
from safecrit.strided import Strided, row_major

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NEVER_INCLUDED = ("bias", "norm", "vector")


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of the checkpoint: `source`, shaped like `layout.shape`, of runtime parameter `parameter`."""

    name: str
    layout: TensorLayout
    parameter: str
    source: Strided


@dataclass(frozen=True)
class Anatomy:
    """All checkpoint tensors of a model, by name, in plain string order (the order that breaks ties)."""

    tensors: dict[str, CheckpointTensor]

    @cached_property
    def total(self) -> int:
        """Weights of all parameters, tied ones once."""
        return sum(tensor.layout.numel for tensor in self.tensors.values())

    @cached_property
    def eligible(self) -> list[CheckpointTensor]:
        """The tensors whose weights may be selected, in order."""
        return [tensor for tensor in self.tensors.values() if tensor.layout.eligible]

    @cached_property
    def eligible_total(self) -> int:
        """Weights of the eligible tensors."""
        return sum(tensor.layout.numel for tensor in self.eligible)

    @cached_property
    def layouts(self) -> dict[str, TensorLayout]:
        """The layout of every tensor, by name, in order."""
        return {name: tensor.layout for name, tensor in self.tensors.items()}

    @cached_property
    def layers(self) -> int:
        """Number of layers: one more than the highest layer number."""
        numbers = [m.layer for t in self.tensors.values() for m in t.layout.matrices if m.layer is not None]
        return max(numbers, default=-1) + 1

    @cached_property
    def _by_parameter(self) -> dict[str, list[CheckpointTensor]]:
        grouped: dict[str, list[CheckpointTensor]] = defaultdict(list)
        for tensor in self.tensors.values():
            grouped[tensor.parameter].append(tensor)
        return dict(grouped)

    def of_parameter(self, runtime_name: str) -> list[CheckpointTensor]:
        """The checkpoint tensors stored from runtime parameter `runtime_name`, in order; KeyError if there is none."""
        return list(self._by_parameter[runtime_name])


def read_anatomy(model: PreTrainedModel, *, include: str | None = None, exclude: str | None = None) -> Anatomy:
    """The anatomy of `model`, a transformers causal language model on any device, `meta` included.

    include: a regular expression searched in checkpoint names. Only tensors that match
        stay eligible, and matching tensors that are not eligible by default (embeddings,
        routers, towers) become so; biases, norms and other vectors never do.
    exclude: tensors whose name matches are not eligible; applied last.

    Raises SafecritError for a pattern that is no regular expression or leaves nothing
    eligible, and for a checkpoint layout that cannot be described.
    """
    wanted, unwanted = _compiled("--include", include), _compiled("--exclude", exclude)
    described = {}
    tensors = {}
    for name, part in checkpoint_map(model).items():
        if part.parameter not in described:
            matrices, reason = describe(model, part.parameter)
            described[part.parameter] = (_with_reach(matrices), reason)
        matrices_with_reach, reason = described[part.parameter]
        if wanted and not wanted.search(name):
            reason = reason or "not matched by --include"
        elif wanted and reason not in _NEVER_INCLUDED:
            reason = ""
        if unwanted and unwanted.search(name):
            reason = reason or "matched by --exclude"
        layout = TensorLayout(part.source.shape, _inside(part, matrices_with_reach), not reason, reason)
        tensors[name] = CheckpointTensor(name, layout, part.parameter, part.source)
    anatomy = Anatomy(tensors)
    if not anatomy.eligible:
        given = [
            f"{flag} {text!r}" for flag, text in (("--include", include), ("--exclude", exclude)) if text is not None
        ]
        cause = f"{' and '.join(given)} leave no eligible tensor" if given else "the model has no eligible tensor"
        raise SafecritError(
            f"{cause} of {len(tensors)}. The patterns are searched in names such as {next(iter(tensors), '(none)')!r};"
            " biases and norms are never eligible."
        )
    return anatomy


def _compiled(flag: str, pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SafecritError(f"{flag} {pattern!r} is not a regular expression: {error}.") from error


def _last(pattern: Strided) -> int:
    return pattern.offset + sum((n - 1) * s for n, s in zip(pattern.shape, pattern.strides, strict=True))


def _with_reach(matrices: tuple[Matrix, ...]) -> list[tuple[int, int, Matrix]]:
    return [(m.where.offset, _last(m.where), m) for m in matrices]


def _inside(part: StoredPart, matrices: list[tuple[int, int, Matrix]]) -> tuple[Matrix, ...]:
    """The logical matrices of a checkpoint tensor, from those of the parameter it is a part of."""
    source, whole = part.source, Strided.whole(part.source.shape)
    first, last = source.offset, _last(source)
    near = [m for low, high, m in matrices if low <= last and first <= high]
    for matrix in near:
        if len(matrices) == 1 or _seen_from(matrix.where, source) is not None:
            return (Matrix(matrix.component, matrix.layer, matrix.expert, whole),)
    moved = [(m, _seen_from(source, m.where)) for m in near]
    found = tuple(Matrix(m.component, m.layer, m.expert, where) for m, where in moved if where is not None)
    if sum(m.where.numel for m in found) == whole.numel:
        return found
    # The checkpoint cuts across the logical matrices: no finer truth than the tensor as a whole.
    return (Matrix("other", near[0].layer, None, whole),)


def _seen_from(frame: Strided, part: Strided) -> Strided | None:
    """`part` in the coordinates of `frame` (flat, row-major over frame.shape), both patterns of one tensor.

    None where `part` does not lie in `frame`, or steps across the frame's dimensions.
    """
    corner = _digits(frame, part.offset - frame.offset)
    if corner is None:
        return None
    flat = row_major(frame.shape)
    far, strides = list(corner), []
    for size, stride in zip(part.shape, part.strides, strict=True):
        step = _digits(frame, stride) if size > 1 else [0] * len(flat)
        if step is None:
            return None
        far = [f + (size - 1) * s for f, s in zip(far, step, strict=True)]
        strides.append(sum(s * w for s, w in zip(step, flat, strict=True)))
    if any(f >= n for f, n in zip(far, frame.shape, strict=True)):
        return None
    offset = sum(c * w for c, w in zip(corner, flat, strict=True))
    plain = row_major(part.shape)
    steps = tuple(p if n <= 1 else s for n, s, p in zip(part.shape, strides, plain, strict=True))
    return Strided(offset, part.shape, steps)


def _digits(frame: Strided, distance: int) -> list[int] | None:
    """The index in `frame` that lies `distance` elements after its first one; None where there is none."""
    if distance < 0:
        return None
    digits = [0] * len(frame.shape)
    order = sorted(range(len(digits)), key=lambda d: -frame.strides[d])
    for d in order:
        if frame.shape[d] > 1:
            digits[d], distance = divmod(distance, frame.strides[d])
            if digits[d] >= frame.shape[d]:
                return None
    return digits if distance == 0 else None

"""Proof on the files: SET changed nothing outside the mask, or SPA nothing inside it.

Two checkpoints are compared bit by bit, tensor by tensor, in chunks, without loading a
model: -0.0 differs from 0.0, and a NaN equals itself. It says nothing about how a weight
came to its value, only where values differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from safecrit.errors import SafecritError
from safecrit.files import StoredTensor, checkpoint_tensors
from safecrit.fingerprint import canonical_config
from safecrit.maskfile import Mask
from safecrit.tensorfile import MappedFiles

MODES = ("set", "spa")
SHOWN = 10
_CHUNK = 1 << 22  # entries compared at a time: at most 32 MiB on each side


@dataclass(frozen=True)
class Violation:
    """One entry that differs and must not: flat and multi-dimensional index in checkpoint tensor `tensor`."""

    tensor: str
    flat: int
    index: tuple[int, ...]

    def __str__(self) -> str:
        """As shown in messages: `NAME[3, 5]`."""
        return f"{self.tensor}[{', '.join(map(str, self.index))}]"


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The outcome of `verify`; all counts are of weights.

    `moved` differ from the base (`moved_selected` of them lie in the mask); `selected` is the mask's k;
    `violations` differ and must not, `first` the first ten of them by tensor name and index. `missing`
    names tensors of one side only, `reshaped` and `retyped` those of another shape or dtype.
    """

    mode: str
    moved: int
    moved_selected: int
    selected: int
    total: int
    violations: int
    first: tuple[Violation, ...]
    missing: tuple[str, ...]
    reshaped: tuple[str, ...]
    retyped: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the promise of the mode holds for every weight."""
        return not (self.violations or self.missing or self.reshaped or self.retyped)

    def message(self) -> str:
        """The verdict in a few lines: counts, every kind of fault with its places, notes."""
        promise = "outside the mask are" if self.mode == "set" else "in the mask are"
        free = self.total - self.selected if self.mode == "set" else self.selected
        inside = f"{self.moved_selected:,} of the mask's {self.selected:,}"
        lines = [f"{self.moved:,} of {self.total:,} weights moved, {inside}."]
        if self.ok:
            lines.append(f"Verified: all {free:,} weights {promise} bit-identical to the base.")
        if self.violations:
            shown = ", ".join(map(str, self.first)) + (", ..." if self.violations > len(self.first) else "")
            where = "outside" if self.mode == "set" else "inside"
            lines.append(f"Failed: {self.violations:,} weights {where} the mask differ from the base: {shown}")
        for fault, names in (
            ("on one side only", self.missing),
            ("of another shape", self.reshaped),
            ("of another dtype", self.retyped),
        ):
            if names:
                more = ", ..." if len(names) > SHOWN else ""
                lines.append(f"Failed: {len(names)} tensors {fault}: {', '.join(names[:SHOWN])}{more}")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        first = [{"tensor": v.tensor, "flat": v.flat, "index": list(v.index)} for v in self.first]
        counts = ("moved", "moved_selected", "selected", "total", "violations")
        fields = {key: getattr(self, key) for key in ("mode", *counts)}
        lists = {key: list(getattr(self, key)) for key in ("missing", "reshaped", "retyped", "notes")}
        return {"ok": self.ok} | fields | lists | {"first": first}


def verify(out: str | Path, base: str | Path, mask: Mask, mode: str) -> VerifyReport:
    """Compare the model in `out` with the one in `base`, bit by bit.

    `set`: every entry that differs lies in `mask`. `spa`: no entry in `mask` differs. MismatchError where
    the mask's tensor names and shapes do not fit the base. A tensor on one side only is a fault, unless it
    is a copy of another tensor there that the config ties.
    """
    if mode not in MODES:
        raise SafecritError(f"mode {mode!r} is none of {', '.join(MODES)}.")
    out, base = Path(out), Path(base)
    old, new = checkpoint_tensors(base), checkpoint_tensors(out)
    mask.check({name: stored.shape for name, stored in old.items()})
    maps = MappedFiles()
    notes: list[str] = []
    missing = []
    for name in sorted(old.keys() ^ new.keys()):
        folder, side = (base, old) if name in old else (out, new)
        if name not in mask.indices and _is_tied_copy(maps, side, name, old.keys() & new.keys(), out):
            notes.append(f"{name} is a stored copy of a tied tensor and lies in {folder.name} only.")
        else:
            missing.append(name)
    shared = sorted(old.keys() & new.keys())
    reshaped = tuple(name for name in shared if old[name].shape != new[name].shape)
    retyped = tuple(name for name in shared if old[name].dtype != new[name].dtype)
    moved = moved_selected = violations = 0
    first: list[Violation] = []
    for name in shared:
        if name in reshaped or name in retyped:
            continue
        selected = mask.indices[name].numpy() if name in mask.indices else np.empty(0, np.int64)
        for places in _differing(maps, old[name], new[name]):
            inside = _member(places, selected)
            moved += len(places)
            moved_selected += int(inside.sum())
            wrong = places[~inside] if mode == "set" else places[inside]
            violations += len(wrong)
            for flat in wrong[: SHOWN - len(first)].tolist():
                index = tuple(int(i) for i in np.unravel_index(flat, old[name].shape))
                first.append(Violation(name, flat, index))
    if moved == 0:
        notes.append("no weight moved at all: the output is the base. Was anything trained?")
    if canonical_config(out) != canonical_config(base):
        notes.append("config.json differs from the base's.")
    return VerifyReport(
        mode=mode,
        moved=moved,
        moved_selected=moved_selected,
        selected=mask.count,
        total=mask.info.total,
        violations=violations,
        first=tuple(first),
        missing=tuple(missing),
        reshaped=reshaped,
        retyped=retyped,
        notes=tuple(notes),
    )


def _differing(maps: MappedFiles, old: StoredTensor, new: StoredTensor) -> Iterator[np.ndarray[Any, Any]]:
    """Flat indices (int64, ascending) at which two tensors of one shape and dtype differ, chunk by chunk."""
    before, after = maps.bits(old), maps.bits(new)
    for start in range(0, len(before), _CHUNK):
        unequal = before[start : start + _CHUNK] != after[start : start + _CHUNK]
        if unequal.any():
            yield np.flatnonzero(unequal) + start


def _member(places: np.ndarray[Any, Any], selected: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Which of `places` occur in `selected`, bool; both ascending."""
    if not len(selected):
        return np.zeros(len(places), bool)
    found = np.searchsorted(selected, places).clip(max=len(selected) - 1)
    return np.asarray(selected[found] == places)


def _is_tied_copy(maps: MappedFiles, side: Mapping[str, StoredTensor], name: str, shared: set[str], out: Path) -> bool:
    """Whether `name` repeats, bit for bit, a tensor that both sides hold, and `out` says its embeddings are tied."""
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config") or {}
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    except (OSError, ValueError, AttributeError):
        return False
    mine = side[name]
    return bool(tied) and any(
        (side[other].shape, side[other].dtype) == (mine.shape, mine.dtype)
        and not any(True for _ in _differing(maps, side[other], mine))
        for other in shared
    )

"""Deltas: the entries of a model that training changed, small enough to pass on and exact both ways.

A delta holds absolute values, not differences, and the values they replaced. Applying is
a scatter: twice changes nothing, and `undo` restores the base bit for bit. It knows the
fingerprints of both models and refuses any other. Specification: docs/formats.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from safecrit.checkpoint import check_changes, rewrite
from safecrit.errors import FormatError, MismatchError
from safecrit.files import StoredTensor, atomic, checkpoint_tensors
from safecrit.fingerprint import Changes, fingerprint
from safecrit.hub import find_file
from safecrit.tensorfile import (
    CODES,
    DTYPES,
    MappedFiles,
    TensorWriter,
    bits_of,
    index_dtype,
    json_field,
    read_document,
)

FORMAT = "safecrit-delta"
VERSION = 1


@dataclass(frozen=True)
class TensorDelta:
    """One changed tensor: flat `indices` int64 [n], ascending; `values`, `originals` [n], in the checkpoint dtype."""

    shape: tuple[int, ...]
    indices: torch.Tensor
    values: torch.Tensor
    originals: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Delta:
    """Changed entries by tensor name, and the fingerprints of the models before and after; `info` is free JSON."""

    base: str
    result: str
    tensors: dict[str, TensorDelta]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of entries that differ between the two models."""
        return sum(len(tensor.indices) for tensor in self.tensors.values())

    def changes(self, *, undo: bool = False) -> Changes:
        """What to write into the base, or with `undo` into the result."""
        return {name: (t.indices, t.originals if undo else t.values) for name, t in self.tensors.items()}

    def save(self, path: str | Path) -> None:
        """Write the delta; equal deltas give equal bytes."""
        path = Path(path)
        entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        parts: dict[str, torch.Tensor] = {}
        for name, tensor in sorted(self.tensors.items()):
            stored = tensor.indices.to(index_dtype(math.prod(tensor.shape)))
            for kind, part in (("indices", stored), ("values", tensor.values), ("originals", tensor.originals)):
                parts[f"{name}::{kind}"] = part
                entries[f"{name}::{kind}"] = (part.dtype, tuple(part.shape))
        about = {
            name: {"shape": tensor.shape, "dtype": CODES[tensor.values.dtype], "count": len(tensor.indices)}
            for name, tensor in self.tensors.items()
        }
        document = {"format": FORMAT, "version": VERSION, "base": self.base, "result": self.result}
        with (
            atomic(path) as temporary,
            TensorWriter(temporary, entries, document | {"tensors": about, "info": self.info}) as writer,
        ):
            for key, part in parts.items():
                writer.write(key, part)

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Read a delta file, or the delta of a Hub id; FormatError with the first fault found."""
        path = find_file(path, "delta")
        stored, document = read_document(path, FORMAT, VERSION)
        base, result = (json_field(document, key, (str,), str(path)) for key in ("base", "result"))
        about = json_field(document, "tensors", (dict,), str(path))
        info = json_field(document, "info", (dict,), str(path))
        expected = {f"{name}::{kind}" for name in about for kind in ("indices", "values", "originals")}
        for key in sorted(set(stored) ^ expected):
            raise FormatError(f"{path}: {'unknown tensor' if key in stored else 'missing tensor'} {key!r}.")
        maps = MappedFiles()
        tensors = {name: _read(maps, stored, name, entry, f"{path}: {name}") for name, entry in sorted(about.items())}
        return cls(base=base, result=result, tensors=tensors, info=info)


def make_delta(
    base: str | Path,
    trained: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    info: Mapping[str, Any] | None = None,
) -> Delta:
    """The delta from the model in `base` to the one with `trained` values.

    `trained` gives, per checkpoint tensor, flat indices (int64 [n], ascending) and values ([n], in the
    checkpoint's dtype). Entries whose bits did not change are left out.
    """
    base = Path(base)
    stored = checkpoint_tensors(base)
    check_changes(base, stored, trained)
    maps, tensors = MappedFiles(), {}
    for name in sorted(trained):
        indices, values = trained[name]
        originals = maps.tensor(stored[name]).reshape(-1)[indices]
        moved = torch.from_numpy(bits_of(values) != bits_of(originals))
        if bool(moved.any()):
            tensors[name] = TensorDelta(stored[name].shape, indices[moved], values.cpu()[moved], originals[moved])
    changes = {name: (tensor.indices, tensor.values) for name, tensor in tensors.items()}
    result = fingerprint(base, changes=changes)
    return Delta(base=fingerprint(base), result=result, tensors=tensors, info=dict(info or {}))


@dataclass(frozen=True)
class Applied:
    """What `apply_delta` did: the folder `out`, the entries `changed`, whether the model was there `already`."""

    out: Path
    changed: int
    already: bool
    undo: bool

    def message(self) -> str:
        """One line for the user."""
        if self.already:
            was = "is the base itself; nothing to undo" if self.undo else "holds the delta already; nothing to change"
            return f"The model {was}. {self.out} is a copy of it."
        return f"{self.changed:,} weights {'restored' if self.undo else 'changed'}. The model is in {self.out}."


def apply_delta(
    model: str | Path, delta: Delta, out: str | Path, *, undo: bool = False, overwrite: bool = False
) -> Applied:
    """Write to `out` the model in `model` with `delta` applied, or with `undo` taken back.

    Applied to its own result it changes nothing and says so. MismatchError where the model is neither
    of the delta's two. The fingerprint of what was written is verified; where it is wrong, the files are
    removed and FormatError raised.
    """
    model, out = Path(model), Path(out)
    before, after = (delta.result, delta.base) if undo else (delta.base, delta.result)
    found = fingerprint(model)
    if found not in (before, after):
        raise MismatchError(
            f"{model}: is {found}, and the delta {'leads to' if undo else 'was made from'} {before}. "
            f"Use the {'resulting' if undo else 'base'} model it was made with."
        )
    already = found == after
    written = rewrite(model, out, {} if already else delta.changes(undo=undo), overwrite=overwrite)
    result = fingerprint(out, cache=False)
    if result != after:
        for file in written:
            file.unlink(missing_ok=True)
        raise FormatError(
            f"{out}: the result is {result} where the delta promises {after}; it was removed. The delta is damaged: "
            "copy it again."
        )
    return Applied(out, 0 if already else delta.count, already, undo)


def _read(maps: MappedFiles, stored: Mapping[str, StoredTensor], name: str, entry: Any, where: str) -> TensorDelta:
    if not isinstance(entry, dict):
        raise FormatError(f"{where}: damaged entry.")
    shape, code = json_field(entry, "shape", (list,), where), json_field(entry, "dtype", (str,), where)
    count = json_field(entry, "count", (int,), where)
    if code not in DTYPES or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise FormatError(f"{where}: impossible dtype {code} or shape {shape}.")
    for kind, dtypes in (("indices", ("I32", "I64")), ("values", (code,)), ("originals", (code,))):
        part = stored[f"{name}::{kind}"]
        if part.dtype not in dtypes:
            raise FormatError(f"{where}: {kind} of dtype {part.dtype} where {' or '.join(dtypes)} was expected.")
        if part.shape != (count,):
            raise FormatError(f"{where}: {kind} of shape {list(part.shape)} where [{count}] was expected.")
    indices, values, originals = (
        maps.tensor(stored[f"{name}::{kind}"]).clone() for kind in ("indices", "values", "originals")
    )
    flat = indices.to(torch.int64)
    if count and (int(flat.min()) < 0 or int(flat.max()) >= math.prod(shape)):
        raise FormatError(f"{where}: an index lies outside its {math.prod(shape)} entries.")
    if bool((flat.diff() <= 0).any()):
        raise FormatError(f"{where}: its indices are not sorted, or one occurs twice.")
    return TensorDelta(tuple(shape), flat, values, originals)

"""The safety-mask format: writing, reading and refusing. Specification: docs/formats.md.

A tensor with selected entries is stored as sorted flat indices or as a bit field,
whichever is smaller. Everything else is one JSON document. Equal masks give equal
bytes. The reader trusts nothing: each way to be malformed has its own FormatError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from safecrit import distributed, ops
from safecrit.errors import FormatError, SafecritError
from safecrit.files import StoredTensor, atomic, write_json
from safecrit.layout import TensorLayout, layout_from_json, layout_to_json
from safecrit.tensorfile import (
    SHARD_BYTES,
    MappedFiles,
    check_format,
    index_dtype,
    json_field,
    read_document,
)

FORMAT = "safecrit-mask"
VERSION = 1
TIE_RULE = "smaller tensor name, then smaller flat index"
INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True, kw_only=True)
class MaskInfo:
    """What a mask says about itself besides its indices.

    `tensors` holds every checkpoint tensor of the model, selected from or not. `total` and
    `eligible` are numbers of weights. `threshold_bits` are the float32 bits of the last selected
    |score|, `tied` the eligible weights with exactly that |score|, `tied_selected` those taken.
    """

    tensors: dict[str, TensorLayout]
    mode: str
    total: int
    eligible: int
    share: float | None = None
    share_of: str = "all"
    threshold_bits: int | None = None
    tied: int = 0
    tied_selected: int = 0
    tie_rule: str = TIE_RULE
    non_finite: int = 0
    fingerprint: str = ""
    model: str = ""
    revision: str | None = None
    scoring: dict[str, Any] = field(default_factory=dict)
    prompt_hashes: list[str] = field(default_factory=list)
    seed: int | None = None
    made_from: list[dict[str, Any]] = field(default_factory=list)


_NONE = type(None)
_FIELDS: dict[str, tuple[type, ...]] = {
    "mode": (str,),
    "total": (int,),
    "eligible": (int,),
    "share": (float, int, _NONE),
    "share_of": (str,),
    "threshold_bits": (int, _NONE),
    "tied": (int,),
    "tied_selected": (int,),
    "tie_rule": (str,),
    "non_finite": (int,),
    "fingerprint": (str,),
    "model": (str,),
    "revision": (str, _NONE),
    "scoring": (dict,),
    "prompt_hashes": (list,),
    "seed": (int, _NONE),
    "made_from": (list,),
}


def write_mask(
    path: str | Path,
    indices: Mapping[str, torch.Tensor],
    info: MaskInfo,
    *,
    counts: Mapping[str, int] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write `indices` (per tensor int64 [n], sorted) to `path`; the files written, the one to open last.

    More than `shard_bytes` of entries go to `STEM-00001-of-0000N.safetensors` beside `path`,
    named by `PATH.index.json`; files of an earlier mask of that name are then removed.

    `counts`: of all tensors, where `indices` are those of this rank alone; all ranks then call this together.
    """
    path, together = Path(path), counts is not None
    found = {name: len(flat) for name, flat in indices.items()} if counts is None else counts
    found = {name: count for name, count in sorted(found.items()) if count}
    plan = {name: _encoding(count, info.tensors[name].numel) for name, count in found.items()}
    document = _document(found, info)
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, (kind, dtype, length) in plan.items():
        size = length * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][f"{name}::{kind}"] = (dtype, (length,))
        filled += size
    stale = _files_of(path)
    index = path.with_name(path.name + INDEX_SUFFIX)
    if len(shards) == 1:
        files, documents = [path], [document]
    else:
        files = [path.with_name(f"{path.stem}-{i + 1:05}-of-{len(shards):05}.safetensors") for i in range(len(shards))]
        documents = [{"format": FORMAT, "version": VERSION, "shard": i + 1} for i in range(len(shards))]
    with ExitStack() as stack:
        for file, entries, part in zip(files, shards, documents, strict=True):
            temporary = stack.enter_context(distributed.atomic_together(file) if together else atomic(file))
            writer = stack.enter_context(distributed.writer(temporary, entries, part, together=together))
            for key in entries:
                if key.rpartition("::")[0] in indices:
                    writer.write(key, _encode(indices, info, key))
    if together and not distributed.current().first:
        return [*files, *([index] if len(shards) > 1 else [])]
    if len(shards) > 1:
        keys = {key: file.name for file, entries in zip(files, shards, strict=True) for key in entries}
        write_json(index, {"metadata": {"safecrit": document}, "weight_map": keys})
        files.append(index)
    for file in stale - set(files):
        file.unlink(missing_ok=True)
    return files


def open_mask(path: str | Path) -> tuple[Path, dict[str, StoredTensor], MaskInfo, dict[str, int]]:
    """The mask's file (or index), its stored tensors, what it says about itself, and its counts; from headers alone.

    `path` and errors as for `read_mask`.
    """
    path = _find(Path(path))
    if path.name.endswith(INDEX_SUFFIX):
        stored, document = _read_index(path)
    else:
        stored, document = read_document(path, FORMAT, VERSION)
        if "shard" in document:
            raise FormatError(f"{path}: is one shard of a mask; name the mask's .safetensors{INDEX_SUFFIX} instead.")
    return path, stored, *_parse(document, str(path))


def read_mask(path: str | Path) -> tuple[dict[str, torch.Tensor], MaskInfo]:
    """Indices (per tensor with entries int64 [n], sorted) and info of the mask at `path`.

    `path` is the mask's file, its index, or a folder that holds one mask. Raises FormatError
    with the first fault found.
    """
    path, stored, info, counts = open_mask(path)
    maps, indices = MappedFiles(), {}
    for key, entry in sorted(stored.items()):
        name, separator, kind = key.rpartition("::")
        if not separator or kind not in ("indices", "bits") or name not in info.tensors:
            raise FormatError(f"{path}: unknown tensor {key!r}.")
        if name in indices:
            raise FormatError(f"{path}: {name}: stored twice, as indices and as bits.")
        numel = info.tensors[name].numel
        flat = decode_entries(maps, entry, kind, numel, f"{path}: {name}")
        if len(flat) != counts.get(name, 0):
            raise FormatError(f"{path}: {name}: holds {len(flat)} entries, its count says {counts.get(name, 0)}.")
        indices[name] = flat
    missing = sorted(set(counts) - set(indices))
    if missing:
        raise FormatError(f"{path}: tensor {missing[0]!r} is missing ({len(missing)} of {len(counts)} are).")
    return indices, info


def _encoding(count: int, numel: int) -> tuple[str, torch.dtype, int]:
    """Kind, dtype and length of the smaller encoding; indices where both are equal."""
    dtype, packed = index_dtype(numel), -(-numel // 8)
    if count * dtype.itemsize <= packed:
        return "indices", dtype, count
    return "bits", torch.uint8, packed


def _encode(indices: Mapping[str, torch.Tensor], info: MaskInfo, key: str) -> torch.Tensor:
    name, _, kind = key.rpartition("::")
    numel = info.tensors[name].numel
    if kind == "indices":
        return indices[name].to(index_dtype(numel))
    return ops.bits_from_indices(indices[name], numel)


def decode_entries(maps: MappedFiles, entry: StoredTensor, kind: str, numel: int, where: str) -> torch.Tensor:
    """A stored tensor's selected entries, flat int64 [n], sorted; FormatError where it is malformed."""
    dtypes, packed = ("I32", "I64") if kind == "indices" else ("U8",), -(-numel // 8)
    if entry.dtype not in dtypes:
        raise FormatError(f"{where}: {kind} of dtype {entry.dtype} where {' or '.join(dtypes)} was expected.")
    if len(entry.shape) != 1 or (kind == "bits" and entry.shape != (packed,)):
        expected = "one dimension" if kind == "indices" else f"[{packed}]"
        raise FormatError(f"{where}: {kind} of shape {list(entry.shape)} where {expected} was expected.")
    stored = maps.tensor(entry)
    if kind == "bits":
        if numel % 8 and int(stored[-1]) >> (numel % 8):
            raise FormatError(f"{where}: padding bits are set beyond its {numel} entries.")
        return ops.indices_from_bits(stored, numel)
    flat = stored.to(torch.int64, copy=True)
    if len(flat) and (int(flat.min()) < 0 or int(flat.max()) >= numel):
        raise FormatError(f"{where}: an index lies outside its {numel} entries.")
    steps = flat[1:] - flat[:-1]
    if bool((steps < 0).any()):
        raise FormatError(f"{where}: its indices are not sorted.")
    if bool((steps == 0).any()):
        raise FormatError(f"{where}: an index occurs twice.")
    return flat


def _document(counts: Mapping[str, int], info: MaskInfo) -> dict[str, Any]:
    tensors = {name: layout_to_json(layout) for name, layout in info.tensors.items()}
    fixed = {"format": FORMAT, "version": VERSION, "tensors": tensors, "counts": counts, "k": sum(counts.values())}
    return fixed | {key: getattr(info, key) for key in _FIELDS}


def _parse(document: dict[str, Any], where: str) -> tuple[MaskInfo, dict[str, int]]:
    layouts = json_field(document, "tensors", (dict,), where)
    tensors = {name: layout_from_json(value, f"{where}: {name}") for name, value in sorted(layouts.items())}
    for name, layout in tensors.items():
        if any(size < 0 for size in layout.shape):
            raise FormatError(f"{where}: {name}: impossible shape {list(layout.shape)}.")
    counts = json_field(document, "counts", (dict,), where)
    for name in counts:
        if name not in tensors:
            raise FormatError(f"{where}: unknown tensor {name!r} in its counts.")
        if json_field(counts, name, (int,), f"{where}: counts") < 1:
            raise FormatError(f"{where}: {name}: a count of {counts[name]} is impossible.")
    if sum(counts.values()) != json_field(document, "k", (int,), where):
        raise FormatError(f"{where}: its counts sum to {sum(counts.values())}, it says k = {document['k']}.")
    values = {key: json_field(document, key, kinds, where) for key, kinds in _FIELDS.items()}
    return MaskInfo(tensors=tensors, **values), counts


def _find(path: Path) -> Path:
    if path.is_dir():
        found = sorted(path.glob("*" + INDEX_SUFFIX)) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise SafecritError(f"{path}: holds {len(found) or 'no'} masks; name the mask's file.")
        return found[0]
    index = path.with_name(path.name + INDEX_SUFFIX)
    return index if index.is_file() and not path.exists() else path


def _read_index(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        document, keys = content["metadata"]["safecrit"], content["weight_map"]
        if not isinstance(keys, dict) or not all(isinstance(name, str) for name in keys.values()):
            raise TypeError("weight_map")
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: damaged index (no safecrit metadata or weight_map). Copy it again.") from error
    except OSError as error:
        raise SafecritError(f"{path}: cannot be read ({error.strerror}).") from error
    check_format(document, str(path), FORMAT, VERSION)
    stored: dict[str, StoredTensor] = {}
    for name in sorted(set(keys.values())):
        if Path(name).name != name or not (path.parent / name).is_file():
            raise FormatError(f"{path}: shard {name} is missing. Copy the mask with all its shards.")
        tensors, part = read_document(path.parent / name, FORMAT, VERSION)
        if {key for key, file in keys.items() if file == name} != set(tensors) or "shard" not in part:
            raise FormatError(f"{path}: shard {name} holds other tensors than the index says.")
        stored |= tensors
    return stored, document


def _files_of(path: Path) -> set[Path]:
    """The files of the mask that is at `path` now, as far as it can be told."""
    index = path.with_name(path.name + INDEX_SUFFIX)
    files = {file for file in (path, index) if file.is_file()}
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            names = set()
        files |= {index.parent / name for name in names if Path(name).match(f"{path.stem}-?????-of-?????.safetensors")}
    return files

"""One sha256 for a model: what it computes with, however it is stored.

Covered: config.json, and every checkpoint tensor's name, dtype, shape and bytes,
in name order. Not covered: how tensors are spread over files, file names, the
tokenizer, and the config's keys that describe a session rather than the model
(`VOLATILE_KEYS`). The dtype keys are among those because each tensor's stored
dtype is hashed with it, while the config's word on it changes with the loader.
Byte for byte in docs/formats.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safecrit.errors import FormatError, SafecritError
from safecrit.files import StoredTensor, cache_root, canonical_json, checkpoint_tensors, write_text
from safecrit.tensorfile import MappedFiles, bits_of, item_size

Changes = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Per tensor: flat indices (int64 [n], ascending) and their new values ([n], in the checkpoint's dtype)."""

VOLATILE_KEYS = frozenset(
    {
        "transformers_version",
        "_name_or_path",
        "_commit_hash",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "torch_dtype",
        "dtype",
        "use_cache",
    }
)
_PREFIX = b"safecrit-fingerprint 1\n"
_CHUNK = 1 << 23  # 8 MiB: large enough to hide the calls, small enough to stay in cache
_SETTLED_NS = 2_000_000_000  # the coarsest modification times in use (FAT) are 2 s apart


def canonical_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder without `VOLATILE_KEYS`, at any depth."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SafecritError(f"{path}: cannot be read ({error.strerror}). Is it a model folder?") from error
    except ValueError as error:
        raise FormatError(f"{path}: is no JSON ({error}). Copy or download it again.") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path}: is no JSON object. Copy or download it again.")
    stripped: dict[str, Any] = _strip(config)
    return stripped


def _strip(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strip(item) for key, item in value.items() if key not in VOLATILE_KEYS}
    return [_strip(item) for item in value] if isinstance(value, list) else value


def fingerprint(folder: str | Path, *, changes: Changes | None = None, cache: bool = True) -> str:
    """`sha256:` and 64 hex digits for the model in `folder`, streamed; with `changes`, for the model so changed.

    Answers are cached by the size and modification time of every file read, except
    for files younger than two seconds, which could change again unnoticed.
    """
    folder = Path(folder)
    tensors = checkpoint_tensors(folder)
    started, state = time.time_ns(), _state(folder, tensors)
    entry = _cache_file(folder)
    if cache and not changes:
        known = _read_cache(entry, state)
        if known is not None:
            return known
    value = _compute(folder, tensors, changes or {})
    settled = all(started - modified > _SETTLED_NS for _, _, modified in state)
    if cache and not changes and settled and _state(folder, tensors) == state:
        _write_cache(entry, state, value)
    return value


def accepted_fingerprints(folder: str | Path) -> tuple[str, ...]:
    """The model's own fingerprint, then those of the models it was made from (`safecrit/training.json`, "parents")."""
    path = Path(folder) / "safecrit" / "training.json"
    own = fingerprint(folder)
    if not path.is_file():
        return (own,)
    try:
        parents = json.loads(path.read_text(encoding="utf-8")).get("parents", [])
        if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
            raise ValueError("'parents' is no list of fingerprints")
    except (ValueError, AttributeError) as error:
        raise FormatError(f"{path}: damaged ({error}). Remove it to use the model as one without history.") from error
    return (own, *parents)


def _compute(folder: Path, tensors: Mapping[str, StoredTensor], changes: Changes) -> str:
    digest = hashlib.sha256(_PREFIX)
    digest.update(canonical_json(canonical_config(folder)).encode("ascii") + b"\n")
    maps = MappedFiles()
    for name, stored in sorted(tensors.items()):
        digest.update(canonical_json([name, stored.dtype, stored.shape]).encode("ascii") + b"\n")
        if name in changes:
            _hash_changed(digest, maps.bits(stored), *changes[name])
        else:
            raw, _ = maps.raw(stored), item_size(stored)
            for start in range(0, len(raw), _CHUNK):
                digest.update(raw[start : start + _CHUNK].data)
    return "sha256:" + digest.hexdigest()


def _hash_changed(digest: Any, bits: np.ndarray[Any, Any], indices: torch.Tensor, values: torch.Tensor) -> None:
    where, new, step = indices.numpy(), bits_of(values), _CHUNK // bits.itemsize
    for start in range(0, len(bits), step):
        chunk = bits[start : start + step].copy()
        low, high = np.searchsorted(where, (start, start + len(chunk)))
        chunk[where[low:high] - start] = new[low:high]
        digest.update(chunk.view(np.uint8).data)


def _state(folder: Path, tensors: Mapping[str, StoredTensor]) -> list[list[Any]]:
    files = {stored.file for stored in tensors.values()} | {folder / "config.json"}
    state: list[list[Any]] = []
    for file in sorted(files):
        try:
            stat = file.stat()
        except OSError as error:
            raise SafecritError(f"{file}: cannot be read ({error.strerror}). Is it a model folder?") from error
        state.append([file.name, stat.st_size, stat.st_mtime_ns])
    return state


def _cache_file(folder: Path) -> Path:
    key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return cache_root() / "fingerprints" / f"{key}.json"


def _read_cache(entry: Path, state: list[Any]) -> str | None:
    try:
        known = json.loads(entry.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict) or known.get("state") != [1, state]:
        return None
    value = known.get("fingerprint")
    return value if isinstance(value, str) and value.startswith("sha256:") else None


def _write_cache(entry: Path, state: list[Any], value: str) -> None:
    try:
        write_text(entry, canonical_json({"state": [1, state], "fingerprint": value}))
    except (OSError, SafecritError):
        return  # a cache that cannot be written costs time, nothing else

"""Writing files whole or not at all, and reading safetensors headers without loading tensors."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safecrit.errors import FormatError, SafecritError

PART = ".part"  # ends the name of a file that is being written
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors reference reader
_parts: set[Path] = set()  # files that are being written by this process


def remove_parts() -> None:
    """Remove what this process is writing and will not finish, before it ends without a chance to clean up."""
    for part in list(_parts):
        part.unlink(missing_ok=True)


def cache_root() -> Path:
    """Where safecrit keeps what it can make again: SAFECRIT_CACHE, else `safecrit` in the user's cache folder."""
    root = os.environ.get("SAFECRIT_CACHE")
    if root is None:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "safecrit")
    return Path(root)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it into place.

    On any exception, Ctrl-C included, the temporary file is removed and an
    existing file at `path` is left as it was. A full disk is reported as such.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        _parts.add(temporary)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise SafecritError(
            f"{path}: could not be written ({error.strerror or error}). It is as it was before; "
            "free some space or choose another -o."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
            _parts.discard(temporary)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 `text` to `path`, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def canonical_json(value: Any) -> str:
    """One line, sorted keys, no spaces, ASCII: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in a safetensors file: `dtype` as written there (`F32`, `BF16`, ...)."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: str | Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of one safetensors file, read from its header alone.

    Raises FormatError where the file is no safetensors file or is cut short.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise FormatError(f"{path}: not a safetensors file ({size} bytes are too few).")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise FormatError(f"{path}: not a safetensors file (its header would be {length} bytes long).")
            header = json.loads(file.read(length))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path}: not a safetensors file (its header is no JSON).") from error
    except OSError as error:
        raise SafecritError(f"{path}: cannot be read ({error.strerror}).") from error
    if not isinstance(header, dict):
        raise FormatError(f"{path}: not a safetensors file (its header is no JSON object).")
    metadata = header.pop("__metadata__", {})
    base, tensors = 8 + length, {}
    try:
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            tensors[name] = StoredTensor(path, name, entry["dtype"], tuple(entry["shape"]), base + start, base + stop)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: damaged safetensors header at tensor {name!r}.") from error
    if tensors and max(t.stop for t in tensors.values()) > size:
        raise FormatError(f"{path}: cut short: {size} bytes, its header promises more. Copy or download it again.")
    return tensors, metadata


def checkpoint_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder (`model.safetensors`, or shards named by its index), by name, sorted.

    Raises SafecritError where the folder holds no safetensors weights.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{index}: damaged index (no weight_map). Copy or download the model again.") from error
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise SafecritError(f"{folder}: weight files are missing: {', '.join(missing)}. Download the model again.")
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        raise SafecritError(f"{folder}: holds no model.safetensors. Is it a model folder?")
    found: dict[str, StoredTensor] = {}
    for file in files:
        found |= read_header(file)[0]
    return dict(sorted(found.items()))

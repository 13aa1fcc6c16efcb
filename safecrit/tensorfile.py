"""safetensors files with a header of our own making, and mapped reading of tensors that were never loaded.

The header is a function of names, dtypes, shapes and the document alone: data lie
by falling item size, then by name (so every tensor is aligned), and metadata
holds the one key `safecrit`. Equal content gives equal files, in any process and
with any version of the safetensors package. Layout: docs/formats.md.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from safecrit.errors import FormatError, SafecritError
from safecrit.files import StoredTensor, canonical_json, read_header

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SHARD_BYTES = 5_000_000_000  # the shard size that the Hub's own tools used for years


def index_dtype(numel: int) -> torch.dtype:
    """The dtype in which flat indices of a tensor of `numel` entries are stored: int32, from 2^31 entries int64."""
    return torch.int32 if numel < 2**31 else torch.int64


def bits_of(values: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bit patterns of `values` (any shape and dtype) as unsigned integers, flat, on the CPU."""
    flat = values.detach().cpu().reshape(-1).contiguous()
    return flat.view(torch.uint8).numpy().view(_BITS[flat.element_size()])


class TensorWriter:
    """Writes one safetensors file whose tensors arrive one by one, in any order.

    `entries` gives every tensor's dtype and shape beforehand; `document` becomes the
    metadata key `safecrit`, as canonical JSON. Use it inside `safecrit.files.atomic`.
    `part`: several processes write the file, and this one may leave tensors to others;
    with `join` another one has made it already.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        document: Any,
        *,
        part: bool = False,
        join: bool = False,
    ) -> None:
        """Write the header and reserve the space, unless it is `join`ed."""
        self._part = part
        self._entries, self._starts, position = dict(entries), {}, 0
        header: dict[str, Any] = {"__metadata__": {"safecrit": canonical_json(document)}}
        for name in sorted(entries, key=lambda name: (-entries[name][0].itemsize, name)):
            dtype, shape = entries[name]
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
            self._starts[name] = position
            position += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode("ascii")
        text += b" " * (-len(text) % 8)  # data start at a multiple of 8
        self._base = 8 + len(text)
        self._file = open(path, "r+b" if join else "wb")  # noqa: SIM115 - closed in __exit__
        if not join:
            self._file.write(struct.pack("<Q", len(text)) + text)
            self._file.truncate(self._base + position)
            self._file.flush()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put `tensor` (dtype and shape as announced, any device) in its place; each name once."""
        dtype, shape = self._entries[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} where {dtype} {tuple(shape)} was announced")
        self._file.seek(self._base + self._starts.pop(name))
        self._file.write(bits_of(tensor).view(np.uint8).data)

    def write_rows(self, name: str, first: int, rows: torch.Tensor) -> None:
        """Put `rows` of a tensor in their place, from row `first` on; in files that are written in parts."""
        dtype, shape = self._entries[name]
        if rows.dtype != dtype or tuple(rows.shape[1:]) != tuple(shape[1:]) or first + len(rows) > shape[0]:
            raise ValueError(f"{name}: {rows.dtype} {tuple(rows.shape)} is no part of {dtype} {tuple(shape)}")
        whole = first == 0 and len(rows) == shape[0]
        start = self._starts.pop(name) if whole else self._starts[name]
        self._file.seek(self._base + start + first * math.prod(shape[1:]) * dtype.itemsize)
        self._file.write(bits_of(rows).view(np.uint8).data)

    def __enter__(self) -> TensorWriter:
        """Nothing to prepare."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close the file; a tensor that never came is an error."""
        self._file.close()
        if kind is None and self._starts and not self._part:
            raise ValueError(f"never written: {', '.join(sorted(self._starts))}")


class MappedFiles:
    """Tensors as views of their files: nothing is read before it is touched, and no write reaches the disk.

    One mapping a file, however many tensors, because systems limit the number of mappings.
    """

    def __init__(self) -> None:
        """No file is mapped yet."""
        self._maps: dict[Path, mmap.mmap] = {}

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            try:
                with open(path, "rb") as file:
                    # Private and writable, as torch warns of read-only memory; without reserve, as the kernel
                    # would otherwise refuse a private mapping larger than memory and swap.
                    if hasattr(mmap, "MAP_PRIVATE"):
                        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
                        self._maps[path] = mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)
                    else:
                        self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise SafecritError(f"{path}: cannot be mapped into memory ({error}).") from error
        return self._maps[path]

    def raw(self, stored: StoredTensor) -> np.ndarray[Any, Any]:
        """The bytes of a stored tensor, uint8 [bytes], as a view of the file."""
        if stored.start == stored.stop:
            return np.empty(0, np.uint8)
        return np.frombuffer(self._map(stored.file), np.uint8, stored.stop - stored.start, stored.start)

    def bits(self, stored: StoredTensor) -> np.ndarray[Any, Any]:
        """The entries' bit patterns, unsigned integers [numel], as a view of the file."""
        return self.raw(stored).view(_BITS[item_size(stored)])

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """The tensor in its stored dtype and shape; a view of the file unless it is misaligned there."""
        size = item_size(stored)
        dtype = DTYPES.get(stored.dtype)
        if dtype is None:
            raise FormatError(f"{stored.file}: {stored.name}: dtype {stored.dtype} is not supported.")
        if stored.start == stored.stop:
            return torch.empty(stored.shape, dtype=dtype)
        if stored.start % size:
            return torch.from_numpy(self.raw(stored).copy()).view(dtype).reshape(stored.shape)
        flat = torch.frombuffer(self._map(stored.file), dtype=dtype, count=math.prod(stored.shape), offset=stored.start)
        return flat.reshape(stored.shape)

    def release(self) -> None:
        """Let go of the memory that what was read takes in this process; views stay good, and are read again."""
        for mapped in self._maps.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)


def item_size(stored: StoredTensor) -> int:
    """Bytes an entry; FormatError where the bytes stored are not what dtype and shape promise."""
    numel, length = math.prod(stored.shape), stored.stop - stored.start
    dtype = DTYPES.get(stored.dtype)
    size = dtype.itemsize if dtype is not None else (length // numel if numel else 1)
    if length != numel * size or size not in _BITS:
        raise FormatError(
            f"{stored.file}: {stored.name}: {length} bytes are stored for {stored.dtype} {list(stored.shape)}."
        )
    return size


def read_document(path: Path, form: str, version: int) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Header and `safecrit` document of one of our files; FormatError where it is none of format `form`."""
    tensors, metadata = read_header(path)
    text = metadata.get("safecrit") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise FormatError(f"{path}: not a {form} file (its metadata has no key 'safecrit').")
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(f"{path}: its 'safecrit' metadata is no JSON ({error}).") from error
    check_format(document, str(path), form, version)
    return tensors, document


def check_format(document: Any, where: str, form: str, version: int) -> None:
    """FormatError unless `document` is a JSON object of format `form` in the version we read."""
    if not isinstance(document, dict) or "format" not in document:
        raise FormatError(f"{where}: not a {form} file (no 'format' in it).")
    if document["format"] != form:
        raise FormatError(f"{where}: is a {document['format']} file where a {form} file was expected.")
    if document.get("version") != version:
        raise FormatError(
            f"{where}: version {document.get('version')} of {form} is unknown; this safecrit reads version {version}. "
            "Update safecrit."
        )


def json_field(document: Mapping[str, Any], key: str, kinds: tuple[type, ...], where: str) -> Any:
    """`document[key]`, or FormatError where it is absent or of another kind (a bool is no int)."""
    if key not in document:
        raise FormatError(f"{where}: '{key}' is missing.")
    value = document[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise FormatError(f"{where}: '{key}' is {type(value).__name__} where {kinds[0].__name__} was expected.")
    return value

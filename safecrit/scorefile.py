"""Score folders: the signed mean of sigma * gradient for every eligible weight, and how it came about.

`score.json` is written last, so a folder without it is an unfinished one. Scores lie in
`scores-0000i-of-0000N.safetensors` under checkpoint names and shapes, and are mapped, never
loaded. Specification: docs/formats.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch

from safecrit import distributed
from safecrit.errors import FormatError, SafecritError
from safecrit.files import StoredTensor, write_json
from safecrit.layout import TensorLayout, layout_from_json, layout_to_json
from safecrit.tensorfile import DTYPES, SHARD_BYTES, MappedFiles, check_format, json_field, read_document

FORMAT = "safecrit-scores"
VERSION = 1
SCORE_DTYPES = (torch.float32, torch.bfloat16)
_SHARD_NAME = re.compile(r"scores-(\d{5})-of-(\d{5})\.safetensors")


def write_scores(
    folder: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    layouts: Mapping[str, TensorLayout],
    info: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a score folder.

    `tensors` yields every eligible tensor of `layouts` once, in any order, signed, in its layout's
    shape (any float dtype and device); each is written, as `dtype`, when it comes. `info` becomes
    score.json, with format, version, dtype, layouts and the weight counts added. Shards appear
    under their names together, score.json after them. Several ranks call this together, each
    with tensors of its own.
    """
    folder = Path(folder)
    if dtype not in SCORE_DTYPES:
        raise SafecritError(f"scores cannot be stored as {dtype}; use float32 or bfloat16.")
    eligible = {name: layout for name, layout in sorted(layouts.items()) if layout.eligible}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, layout in eligible.items():
        size = layout.numel * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = [folder / f"scores-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    stale = [file for file in folder.glob("scores-*.safetensors") if _SHARD_NAME.fullmatch(file.name)]
    with ExitStack() as stack:
        writers: dict[str, Any] = {}
        for file, names in zip(files, shards, strict=True):
            entries = {name: (dtype, eligible[name].shape) for name in names}
            document = {"format": FORMAT, "version": VERSION}
            temporary = stack.enter_context(distributed.atomic_together(file))
            writer = stack.enter_context(distributed.writer(temporary, entries, document))
            writers |= dict.fromkeys(names, writer)
        for name, tensor in tensors:
            if name not in writers:
                raise ValueError(f"{name}: not an eligible tensor of the layouts")
            writers[name].write(name, tensor.to(dtype))
        # What is there now is about to be replaced, and no longer finished.
        if distributed.current().first:
            (folder / "score.json").unlink(missing_ok=True)
    if distributed.current().first:
        _finish(folder, [file for file in stale if file not in files], layouts, info, dtype)
    distributed.barrier()


def _finish(
    folder: Path,
    stale: Iterable[Path],
    layouts: Mapping[str, TensorLayout],
    info: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    for file in stale:
        file.unlink()
    total = sum(layout.numel for layout in layouts.values())
    added = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": str(dtype).removeprefix("torch."),
        "layouts": {name: layout_to_json(layout) for name, layout in sorted(layouts.items())},
        "total": info.get("total", total),
        "eligible": sum(layout.numel for layout in layouts.values() if layout.eligible),
    }
    write_json(folder / "score.json", dict(info) | added)


class Scores:
    """A finished score folder; tensors are views of its files."""

    def __init__(
        self, folder: Path, info: dict[str, Any], layouts: dict[str, TensorLayout], stored: dict[str, StoredTensor]
    ) -> None:
        """For `load`, which validates what it passes."""
        self.folder, self.info, self.layouts = folder, info, layouts
        self.names = sorted(stored)
        self._stored = stored
        self._maps = MappedFiles()

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Open a score folder; SafecritError where it is unfinished, FormatError where it is malformed."""
        folder = Path(folder)
        path = folder / "score.json"
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SafecritError(
                f"{folder}: holds no score.json. Name a folder that `safecrit score` finished, or run that again."
            ) from error
        except OSError as error:
            raise SafecritError(f"{path}: cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise FormatError(f"{path}: is no JSON ({error}). Score again.") from error
        check_format(info, str(path), FORMAT, VERSION)
        for key in ("total", "eligible"):
            json_field(info, key, (int,), str(path))
        layouts = {
            name: layout_from_json(value, f"{path}: {name}")
            for name, value in sorted(json_field(info, "layouts", (dict,), str(path)).items())
        }
        stored = _read_shards(folder)
        _check(stored, layouts, folder)
        return cls(folder, info, layouts, stored)

    @property
    def total(self) -> int:
        """Number of weights of the model, tied ones once."""
        return int(self.info["total"])

    @property
    def eligible(self) -> int:
        """Number of weights that have scores."""
        return sum(math.prod(stored.shape) for stored in self._stored.values())

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model that was scored, "" where the folder names none."""
        model = self.info.get("model")
        return str(model.get("fingerprint") or "") if isinstance(model, dict) else ""

    def tensor(self, name: str) -> torch.Tensor:
        """Signed scores of an eligible tensor, float32 or bfloat16, in its checkpoint shape; do not write to it."""
        if name not in self._stored:
            raise SafecritError(f"{self.folder}: no scores for {name!r}; it is not eligible or not in the model.")
        return self._maps.tensor(self._stored[name])


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    matches = [_SHARD_NAME.fullmatch(file.name) for file in sorted(folder.glob("scores-*.safetensors"))]
    numbers = [(int(match[1]), int(match[2])) for match in matches if match]
    if not numbers or numbers != [(i + 1, numbers[0][1]) for i in range(numbers[0][1])]:
        raise FormatError(f"{folder}: score files are missing, or of two runs. Copy the folder again, or score again.")
    stored: dict[str, StoredTensor] = {}
    for i, count in numbers:
        path = folder / f"scores-{i:05}-of-{count:05}.safetensors"
        found, _ = read_document(path, FORMAT, VERSION)
        twice = sorted(set(found) & set(stored))
        if twice:
            raise FormatError(f"{path}: {twice[0]!r} is stored in another file too. Score again.")
        stored |= found
    return stored


def _check(stored: Mapping[str, StoredTensor], layouts: Mapping[str, TensorLayout], folder: Path) -> None:
    for name, tensor in sorted(stored.items()):
        if name not in layouts or not layouts[name].eligible:
            raise FormatError(f"{tensor.file}: unknown tensor {name!r}: score.json names no such eligible tensor.")
        if DTYPES.get(tensor.dtype) not in SCORE_DTYPES:
            raise FormatError(f"{tensor.file}: {name}: dtype {tensor.dtype} where F32 or BF16 was expected.")
        if tensor.shape != layouts[name].shape:
            raise FormatError(
                f"{tensor.file}: {name}: shape {list(tensor.shape)} where {list(layouts[name].shape)} was expected."
            )
    missing = sorted(name for name, layout in layouts.items() if layout.eligible and name not in stored)
    if missing:
        raise FormatError(f"{folder}: scores of {missing[0]!r} are missing ({len(missing)} tensors). Score again.")

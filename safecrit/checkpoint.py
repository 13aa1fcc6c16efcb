"""Rewriting a model folder with some entries changed and every other bit as it was.

Weight files are copied whole and patched in place at their temporary names, so dtypes,
sharding, tensor order and metadata stay the base's, and memory use is the changed
entries'. All files take their final names at the end, config.json last.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from safecrit.errors import MismatchError, SafecritError
from safecrit.files import StoredTensor, atomic, checkpoint_tensors
from safecrit.fingerprint import Changes
from safecrit.tensorfile import DTYPES, bits_of, item_size

INDEX = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("safetensors", "bin", "pt", "pth", "ckpt", "gguf", "ggml", "h5"),
        *("msgpack", "onnx", "ot", "npz", "npy", "tflite", "nemo", "part"),
    )
)
_NOT_OURS = ("readme.md", "trainer_state.json", "adapter_config.json", "results.json")
_FOLDERS = ("additional_chat_templates",)  # where transformers keeps named chat templates


def rewrite(
    base: str | Path, out: str | Path, changes: Changes, *, overwrite: bool = False, extras: bool = True
) -> list[Path]:
    """Write the model in `base` to `out` with `changes` applied; the files written.

    `changes` gives, per checkpoint tensor, flat indices (int64 [n], ascending) and new values ([n], in
    the checkpoint's dtype). Copied besides the weights (unless not `extras`): config, tokenizer,
    generation config, chat templates, code and licence, never other weights, and not the model card. With
    `overwrite`, weight files that `out` already holds are replaced, and other ones that transformers would
    load instead are removed.
    """
    base, out = Path(base), Path(out)
    if out.resolve() == base.resolve():
        raise SafecritError(f"{out}: is the base model itself. Choose another -o.")
    tensors = checkpoint_tensors(base)
    check_changes(base, tensors, changes)
    weights = sorted({stored.file for stored in tensors.values()})
    index = [INDEX] if (base / INDEX).is_file() else []
    old = sorted([*out.glob("model*.safetensors"), *out.glob(INDEX)]) if out.is_dir() else []
    if old and not overwrite:
        raise SafecritError(f"{out}: already holds a model ({old[0].name}). Choose another -o, or --overwrite.")
    others = [name for name in _extra_files(base) if name not in ("config.json", INDEX)] if extras else []
    config = ["config.json"] if (base / "config.json").is_file() and extras else []
    # Files take their names in the opposite order: weights, extras, index, config.
    names = [*config, *index, *others, *(str(file.relative_to(base)) for file in weights)]
    with ExitStack() as stack:
        for name in names:
            temporary = stack.enter_context(atomic(out / name))
            shutil.copyfile(base / name, temporary)
            inside = {key: tensors[key] for key in changes if tensors[key].file == base / name}
            _patch(temporary, inside, changes)
    written = [out / name for name in names]
    for file in old:
        if file not in written:
            file.unlink()
    return written


def check_changes(base: Path, tensors: Mapping[str, StoredTensor], changes: Changes) -> None:
    """Raise unless every change names a tensor of `tensors`, in its dtype, at sorted indices inside it."""
    for name, (indices, values) in changes.items():
        if name not in tensors:
            raise MismatchError(f"{base}: has no tensor {name!r}, which is to be changed. Is it the right base model?")
        stored = tensors[name]
        if DTYPES.get(stored.dtype) != values.dtype:
            raise MismatchError(f"{stored.file}: {name} is {stored.dtype}; its new values are {values.dtype}.")
        numel = (stored.stop - stored.start) // item_size(stored)
        if indices.dtype != torch.int64 or indices.dim() != 1 or values.shape != indices.shape:
            raise ValueError(f"{name}: changes are int64 [n] indices and [n] values")
        if len(indices) and (int(indices[0]) < 0 or int(indices[-1]) >= numel or bool((indices.diff() <= 0).any())):
            raise MismatchError(f"{stored.file}: {name}: changes outside its {numel} entries, or out of order.")


def _patch(file: Path, inside: Mapping[str, StoredTensor], changes: Changes) -> None:
    for name, stored in inside.items():
        indices, values = changes[name]
        if len(indices):
            bits = bits_of(values)
            view = np.memmap(file, bits.dtype, "r+", stored.start, (stored.stop - stored.start) // bits.itemsize)
            view[indices.numpy()] = bits
            view.flush()


def _extra_files(base: Path) -> list[str]:
    """Names, relative to `base`, of what belongs to the model besides its weights."""
    found = []
    for file in [*base.iterdir(), *(file for folder in _FOLDERS for file in (base / folder).rglob("*"))]:
        lower = file.name.lower()
        weights = file.suffix.lower() in _WEIGHT_SUFFIXES or lower.endswith((".index.json", ".index"))
        if file.is_file() and not weights and not lower.startswith(".") and lower not in _NOT_OURS:
            found.append(str(file.relative_to(base)))
    return sorted(found)

"""Loading a model that is divided over ranks, none of which ever holds it whole.

transformers makes the model on the meta device as it would load it: names, dtypes, ties
and complaints are its own. FSDP2 divides that, and then every rank, all at the same time,
copies its own rows of each parameter out of the mapped checkpoint. The map of the
checkpoint says where they are, so fused and transposed weights need no rule here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from safecrit import distributed
from safecrit.checkpoint_map import checkpoint_map, stored_buffers
from safecrit.errors import SafecritError
from safecrit.files import StoredTensor, checkpoint_tensors
from safecrit.fsdp import in_turn
from safecrit.models import LoadedModel, load_model, resolve_folder
from safecrit.placement import rows_here
from safecrit.strided import Strided
from safecrit.tensorfile import DTYPES, MappedFiles

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

Parts = Sequence[tuple[Strided, StoredTensor]]  # of a runtime parameter: what is where in it


def load_model_divided(
    model: str | Path,
    mesh: DeviceMesh,
    divide: Callable[[PreTrainedModel], None],
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """`load_model`, with every rank of `mesh` given its rows; all of them call it together.

    divide: calls `shard` on the model it is given, and may change the weights' dtype before; they are not read yet.
    Arguments, result and errors are `load_model`'s otherwise. A checkpoint whose tensors are not found as they
    would be saved (one that is no safetensors file, say) is loaded whole, by one rank of a host after the other.
    """
    how: dict[str, Any] = {"revision": revision, "dtype": dtype, "trust_remote_code": trust_remote_code}
    found = None
    if any(resolve_folder(model, revision=revision).glob("model*.safetensors")):
        loaded = load_model(model, device="meta", **how)
        found = _find(loaded)
    if not all(distributed.gather(found is not None)):
        return in_turn(lambda: _load_whole(model, divide, how))
    assert found is not None
    (parts, buffers), files = found, MappedFiles()
    _make_buffers(loaded.model, buffers, files)
    dtypes = {name: parameter.dtype for name, parameter in loaded.model.named_parameters()}
    divide(loaded.model)
    _fill(loaded.model, parts, dtypes, files, mesh)
    return loaded


def _load_whole(model: str | Path, divide: Callable[[PreTrainedModel], None], how: dict[str, Any]) -> LoadedModel:
    loaded = load_model(model, device="cpu", **how)
    divide(loaded.model)
    return loaded


def _find(loaded: LoadedModel) -> tuple[Mapping[str, Parts], dict[str, StoredTensor]] | None:
    """Where the folder holds every parameter and every persistent buffer; None where it cannot be told."""
    model = loaded.model
    try:
        stored, mapped, names = checkpoint_tensors(loaded.folder), checkpoint_map(model), stored_buffers(model)
    except SafecritError:
        return None
    shapes = {name: tuple(part.source.shape) for name, part in mapped.items()}
    shapes |= {names[name]: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in names}
    if any(n not in stored or stored[n].shape != s or stored[n].dtype not in DTYPES for n, s in shapes.items()):
        return None
    every = dict(model.named_parameters(remove_duplicate=False))
    if any(every.get(a) is not every.get(b) for a, b in model.all_tied_weights_keys.items()):
        return None  # both are in the folder, and whether they are tied depends on their values
    parts: dict[str, list[tuple[Strided, StoredTensor]]] = defaultdict(list)
    for name, part in mapped.items():
        parts[part.parameter].append((part.source, stored[name]))
    if any(name not in parts for name, _ in model.named_parameters()):
        return None  # some are never saved
    return parts, {name: stored[names[name]] for name in names}


def _make_buffers(model: PreTrainedModel, stored: Mapping[str, StoredTensor], files: MappedFiles) -> None:
    """Give `model` the buffers it would have been loaded with, on the CPU."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
            module._is_hf_initialized = False  # type: ignore[assignment]
    model.initialize_weights()  # what is in no checkpoint, as transformers does it; parameters are marked as loaded
    for name, entry in stored.items():
        model.get_buffer(name).copy_(files.tensor(entry))


@torch.no_grad()
def _fill(
    model: PreTrainedModel,
    parts: Mapping[str, Parts],
    dtypes: Mapping[str, torch.dtype],
    files: MappedFiles,
    mesh: DeviceMesh,
) -> None:
    """Read this rank's rows of all parameters, which are on the meta device; all rows of those that are not divided.

    dtypes: those in which they are loaded, before they become what they are now.
    """
    from torch.distributed.tensor import DTensor

    holders: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders[id(parameter)].append((module, name))
    for name, parameter in list(model.named_parameters()):
        value = parameter.data
        read = _read(value.shape, dtypes[name], parts[name], rows_here(value), files).to(mesh.device_type, value.dtype)
        files.release()
        if isinstance(value, DTensor):
            read = DTensor.from_local(
                read, mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
            )
        made = nn.Parameter(read, requires_grad=parameter.requires_grad)
        for module, held in holders[id(parameter)]:
            setattr(module, held, made)


def _read(shape: Sequence[int], dtype: torch.dtype, parts: Parts, rows: slice, files: MappedFiles) -> torch.Tensor:
    """`rows` of a runtime parameter of `shape`, on the CPU."""
    width = math.prod(shape[1:])
    low, high = rows.start * width, rows.stop * width
    made = torch.empty((rows.stop - rows.start, *shape[1:]), dtype=dtype)
    for source, stored in parts:
        for box, piece in source.within(low, high):
            Strided(piece.offset - low, piece.shape, piece.strides).of(made).copy_(files.tensor(stored)[box])
    return made

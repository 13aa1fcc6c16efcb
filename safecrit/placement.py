"""Where a mask's entries lie in the parameters of a model in memory.

A mask speaks of checkpoint tensors; an optimizer sees runtime parameters, into which
transformers may have fused several of those. Both SET and SPA need the flat positions
in the latter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from safecrit.distributed import is_divided, rows_of
from safecrit.errors import SafecritError
from safecrit.strided import Strided, row_major

if TYPE_CHECKING:
    from safecrit.anatomy import Anatomy
    from safecrit.maskfile import Mask


def runtime_indices(source: Strided, flat: torch.Tensor) -> torch.Tensor:
    """Positions in the runtime parameter, int64 [n], of a checkpoint tensor's entries `flat`, int64 [n]; same order."""
    if source.is_row_major:
        return flat + source.offset
    place = torch.full_like(flat, source.offset)
    rest = flat
    for step, stride in zip(row_major(source.shape), source.strides, strict=True):
        place += torch.div(rest, step, rounding_mode="floor") * stride
        rest = rest % step
    return place


def place(mask: Mask, anatomy: Anatomy) -> dict[str, torch.Tensor]:
    """For each runtime parameter with selected entries, in the anatomy's order, their flat positions, ascending.

    int32, or int64 from 2^31 entries on: at one weight in a hundred, positions are a
    fifth of SET's memory.
    """
    numel: dict[str, int] = {}
    for tensor in anatomy.tensors.values():
        numel[tensor.parameter] = numel.get(tensor.parameter, 0) + tensor.layout.numel
    placed = {}
    for name, size in numel.items():  # one parameter after the other: beside the result no more than one's positions
        parts = [
            runtime_indices(tensor.source, mask.indices[tensor.name])
            for tensor in anatomy.of_parameter(name)
            if tensor.name in mask.indices
        ]
        if parts:
            found = torch.cat(parts).sort().values if len(parts) > 1 else parts[0].sort().values
            placed[name] = found.to(torch.int32 if size < 2**31 else torch.int64)
    return placed


def unwrap(model: Any) -> Any:
    """The transformers model inside a DistributedDataParallel or compiled wrapper."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            return model
        model = inner


def refuse_adapters(model: Any) -> None:
    """SafecritError where `model` trains PEFT adapters, which a mask of base weights does not reach."""
    if getattr(model, "peft_config", None):
        raise SafecritError(
            "this model trains PEFT adapters, and a mask selects base weights: it would do nothing there, since those "
            "stay as they are until the adapter is merged. Train without the mask, save the adapter, and merge it with "
            "`safecrit merge MODEL ADAPTER --mask MASK -o OUT` (in Python: safecrit.merge)."
        )


def refuse_deepspeed(optimizer: Any) -> None:
    """SafecritError where DeepSpeed owns the weights: it keeps copies of its own and writes them over the model's."""
    while optimizer is not None:
        if "deepspeed" in type(optimizer).__module__ or "deepspeed" in type(optimizer).__name__.lower():
            raise SafecritError(
                "DeepSpeed (ZeRO) keeps its own copies of the weights and would overwrite what a mask holds. "
                "Train without it, on one process or with DistributedDataParallel."
            )
        optimizer = getattr(optimizer, "optimizer", None)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds, in the same memory; without gradient."""
    tensor = tensor.detach()
    return tensor.to_local() if is_divided(tensor) else tensor  # type: ignore[attr-defined]


def rows_here(tensor: torch.Tensor) -> slice:
    """Which rows of a tensor lie here: all, or those that FSDP2 gave this rank."""
    total = tensor.shape[0] if tensor.dim() else 1
    if not is_divided(tensor):
        return slice(0, total)
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    return rows_of(total, mesh.size(), mesh.get_local_rank())


def check_whole(name: str, parameter: torch.Tensor) -> None:
    """SafecritError where a parameter is divided, not loaded, or not contiguous."""
    if is_divided(parameter):
        raise SafecritError(f"{name}: is divided over ranks. Give each process the whole model.")
    local_entries(name, parameter)


def local_entries(name: str, parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The entries of a parameter that this process holds, [n], in the same memory, and the flat position of the first.

    Raises SafecritError where they cannot be reached by flat position: a parameter that is not loaded, or
    divided otherwise than by rows over one mesh dimension.
    """
    if is_divided(parameter):
        placements = parameter.placements  # type: ignore[attr-defined]
        if len(placements) != 1 or not placements[0].is_shard(0):
            raise SafecritError(
                f"{name}: is divided as {placements}; masks need rows over all ranks. Use FSDP2 alone "
                "(fully_shard on a mesh of one dimension), or whole models."
            )
    part = local(parameter)
    if part.device.type == "meta" or not part.is_contiguous():
        raise SafecritError(f"{name}: is not loaded, or not contiguous in memory. Load the model whole.")
    return part.view(-1), rows_here(parameter).start * (parameter.numel() // max(1, len(parameter)))


def entries_here(name: str, parameter: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Of flat `indices` (ascending) into a whole parameter those that lie here, as positions in `local_entries`.

    With them, how many come before. They lie where the parameter does.
    """
    entries, start = local_entries(name, parameter)
    bounds = torch.tensor([start, start + len(entries)], dtype=indices.dtype)
    first, last = torch.searchsorted(indices, bounds).tolist()
    return (indices[first:last] - start).to(entries.device), first

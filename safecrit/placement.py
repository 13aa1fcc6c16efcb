"""Where a mask's entries lie in the parameters of a model in memory.

A mask speaks of checkpoint tensors; an optimizer sees runtime parameters, into which
transformers may have fused several of those. Both SET and SPA need the flat positions
in the latter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

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


def check_parameter(name: str, parameter: torch.nn.Parameter) -> None:
    """SafecritError where the entries of `parameter` cannot be reached by flat position."""
    if type(parameter.data).__name__ == "DTensor":
        raise SafecritError(f"{name}: is sharded over several devices, which masks do not support yet. Train on one.")
    if parameter.device.type == "meta" or not parameter.is_contiguous():
        raise SafecritError(f"{name}: is not loaded, or not contiguous in memory. Load the model whole.")

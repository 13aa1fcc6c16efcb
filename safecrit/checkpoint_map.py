"""Which part of which runtime parameter each checkpoint tensor is, learnt from transformers' own conversion.

transformers 5 renames, stacks and transposes tensors while loading and undoes it
while saving. Nothing of that is repeated here. Tensors of the parameters' shapes on
the meta device go through the undoing, with copies suppressed, so that each result
is still a view of the parameter it came from: its storage names the parameter, its
offset and strides say where. No weight is read and none is moved, so the map also
works for a model without weights. Where an operation copies all the same, flat
indices go through instead, one layer at a time, and the pattern is read off them.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from safecrit.errors import SafecritError
from safecrit.strided import Strided, row_major

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MAX_INDEXED = 2**28  # weights of one layer that may be followed by index: 2 GiB of int64


@dataclass(frozen=True)
class StoredPart:
    """Checkpoint tensor `name` is `source`, shaped like the checkpoint tensor, of runtime parameter `parameter`."""

    name: str
    parameter: str
    source: Strided


class _KeepViews(TorchFunctionMode):
    """Make `Tensor.contiguous` return its argument, so that a rearranged tensor stays a view."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def checkpoint_map(model: PreTrainedModel) -> dict[str, StoredPart]:
    """Every parameter of `model` as `save_pretrained` stores it, by checkpoint name, in plain string order.

    Names and shapes are those of the checkpoint the model was loaded from, or of the
    one `save_pretrained` would write. Tied parameters appear once, buffers never.
    `StoredPart.parameter` is a name of `model.named_parameters()`. Raises SafecritError
    where a checkpoint tensor is no strided part of one parameter.
    """
    names = _saved_names(model)
    shapes = {name: model.get_parameter(name) for name in names}
    views = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in shapes.items()}
    owner = {view.untyped_storage()._cdata: name for name, view in views.items()}
    with _KeepViews():
        stored = _revert(model, views)
    parts, copied = [], []
    for name, tensor in stored.items():
        runtime = owner.get(tensor.untyped_storage()._cdata)
        if runtime is None:
            copied.append(name)
        else:
            parts.append(
                StoredPart(name, runtime, _pattern(int(tensor.storage_offset()), tensor.shape, tensor.stride()))
            )
    if copied:
        parts += _from_indices(model, views, parts, copied)
    _check_cover(model, views, parts)
    return {p.name: StoredPart(p.name, names[p.parameter], p.source) for p in sorted(parts, key=lambda p: p.name)}


def keep_stored_names(model: PreTrainedModel, stored: Collection[str]) -> list[str]:
    """Let `model`, just loaded, go by the names of its folder where these lack the base model's prefix.

    Some Hub checkpoints were written from the base model (GPT-2's has `h.0...`, not
    `transformer.h.0...`). transformers adds the prefix while loading and forgets it did.
    This records it on the model, so that `checkpoint_map` and `save_pretrained` both
    use the names in `stored`, the tensor names found in the folder. Returns the names
    that the folder lacks even so: empty where the model and its folder agree.
    """
    from transformers.core_model_loading import PrefixChange

    missing = [name for name in checkpoint_map(model) if name not in stored]
    prefix, loaded_through = model.base_model_prefix, getattr(model, "_weight_conversions", None)
    if loaded_through is not None and any(name.removeprefix(prefix + ".") in stored for name in missing):
        model._weight_conversions = [*loaded_through, PrefixChange(prefix_to_add=prefix)]  # type: ignore[assignment]
        missing = [name for name in checkpoint_map(model) if name not in stored]
    return missing


def stored_buffers(model: PreTrainedModel) -> dict[str, str]:
    """Every buffer that checkpoints hold, by its name in `named_buffers()`, with its name there.

    Raises SafecritError where one is not stored as it is.
    """
    kept = model.state_dict().keys()
    buffers = {name: buffer.new_empty(buffer.shape, device="meta") for name, buffer in model.named_buffers()}
    names = {id(buffer): name for name, buffer in buffers.items() if name in kept}
    stored = _revert(model, {names[id(buffer)]: buffer for buffer in buffers.values() if id(buffer) in names})
    if sorted(map(id, stored.values())) != sorted(names):
        raise SafecritError(f"{model.config.model_type}: buffers are rearranged in its checkpoint.")
    return {names[id(buffer)]: name for name, buffer in stored.items()}


def _saved_names(model: PreTrainedModel) -> dict[str, str]:
    """The name under which `save_pretrained` starts from each parameter -> its name in `named_parameters()`."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    first = {id(parameter): name for name, parameter in model.named_parameters()}
    ignored = set(model._keys_to_ignore_on_save or ())
    every = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in ignored}
    # On meta tensors transformers tells tied weights by the identity of the model's parameters, never by addresses.
    fake = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in every.items()}
    try:
        kept = remove_tied_weights_from_state_dict(fake, model)
    except RuntimeError as error:
        raise SafecritError(
            f"{model.config.model_type}: parameters share storage in a way the model does not declare, so it cannot be"
            f" saved ({error}). Untie them first."
        ) from error
    return {name: first[id(every[name])] for name in kept}


def _revert(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return revert_weight_conversion(model, dict(tensors))
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise SafecritError(
            f"{model.config.model_type}: transformers cannot turn the loaded model back into its checkpoint ({error})."
            " Quantised checkpoints are not supported: use the original weights."
        ) from error


def _pattern(offset: int, shape: Iterable[int], strides: Iterable[int]) -> Strided:
    """A Strided in which dimensions of size 1, whose stride is arbitrary, have the row-major one."""
    shape = tuple(shape)
    plain = row_major(shape)
    return Strided(offset, shape, tuple(p if n <= 1 else s for n, s, p in zip(shape, strides, plain, strict=True)))


def _from_indices(
    model: PreTrainedModel, views: dict[str, torch.Tensor], parts: list[StoredPart], copied: list[str]
) -> list[StoredPart]:
    """The parts `copied` that came out of the conversion as copies, by sending flat indices through it.

    Memory: 8 bytes for each weight of one layer's affected parameters.
    """
    known: dict[str, int] = defaultdict(int)
    for part in parts:
        known[part.parameter] += part.source.numel
    layers: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, view in views.items():
        if known[name] < view.numel():
            elements = name.split(".")
            number = next((i for i, element in enumerate(elements) if element.isdigit()), len(elements))
            layers[tuple(elements[: number + 1])].append(name)
    wanted = set(copied)
    return [part for layer in layers.values() for part in _read_indices(model, {n: views[n] for n in layer}, wanted)]


def _read_indices(model: PreTrainedModel, views: dict[str, torch.Tensor], wanted: set[str]) -> list[StoredPart]:
    ends = list(itertools.accumulate(view.numel() for view in views.values()))
    starts = dict(zip(views, [0, *ends], strict=False))
    if ends[-1] > MAX_INDEXED:
        raise SafecritError(
            f"{model.config.model_type}: transformers rearranges {', '.join(views)} ({ends[-1]} weights) while loading"
            " in a way that cannot be followed; such models are not supported."
        )
    indices = {
        name: torch.arange(starts[name], starts[name] + view.numel(), device="cpu").reshape(view.shape)
        for name, view in views.items()
    }
    found = []
    for name, tensor in _revert(model, indices).items():
        if name not in wanted:
            continue
        low, high = int(tensor.min()), int(tensor.max())
        owners = [n for n, view in views.items() if starts[n] <= high and low < starts[n] + view.numel()]
        if len(owners) > 1:
            raise SafecritError(
                f"{model.config.model_type}: checkpoint tensor {name} is joined from several parameters"
                f" ({', '.join(owners)}); such models are not supported."
            )
        offset = int(tensor.flatten()[0])
        strides = [int(tensor.select(d, 1).flatten()[0]) - offset if n > 1 else 0 for d, n in enumerate(tensor.shape)]
        pattern = _pattern(offset - starts[owners[0]], tensor.shape, strides)
        if min(strides, default=0) < 0 or not torch.equal(pattern.flat_indices() + starts[owners[0]], tensor.flatten()):
            raise SafecritError(
                f"{model.config.model_type}: checkpoint tensor {name} is permuted into {owners[0]} in a way that no"
                " strided pattern describes; such models are not supported."
            )
        found.append(StoredPart(name, owners[0], pattern))
    return found


def _check_cover(model: PreTrainedModel, views: dict[str, torch.Tensor], parts: list[StoredPart]) -> None:
    """Refuse a conversion that loses weights or stores one twice."""
    stored = dict.fromkeys(views, 0)
    for part in parts:
        stored[part.parameter] += part.source.numel
    for name, view in views.items():
        if stored[name] != view.numel():
            raise SafecritError(
                f"{model.config.model_type}: the checkpoint holds {stored[name]} weights for parameter {name}, which"
                f" has {view.numel()}; such models are not supported."
            )

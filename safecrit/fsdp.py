"""Dividing a model over the ranks with FSDP2: by decoder block, each parameter by rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from safecrit import distributed, faults
from safecrit.activations import decoder_layers
from safecrit.errors import SafecritError
from safecrit.placement import local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

T = TypeVar("T")
_KEPT = 2  # whole parameters at a time: the tensors of a checkpoint go to and fro between two (Mixtral's experts)
_DONE = ""


def in_turn(load: Callable[[], Any]) -> Any:
    """What `load` gives, on one rank of a host after the other: a host holds one whole model at a time."""
    ranks, found = distributed.current(), None
    for turn in range(ranks.local_world):
        if turn == ranks.local:
            found = load()
        distributed.barrier()
    return found


def all_ranks(device: torch.device) -> DeviceMesh:
    """The mesh of all ranks; called by all of them together."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (distributed.current().world,))


def shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    wanted: set[str],
    *,
    embedding: bool = True,
    mean: bool = False,
    compute: torch.dtype | None = None,
) -> None:
    """Divide the rows of every parameter of `model` (whole, on the CPU) over the ranks of `mesh`, on its devices.

    A model on the meta device is divided there (`safecrit.divided`).

    wanted: parameters whose gradients will be asked for. embedding: divide the input embedding (and a head
    tied to it) too; not where it is called by itself. mean: gradients are averages over the ranks, else sums.
    compute: the dtype of gathered weights, where that is not their own. Raises SafecritError where wanted
    parameters of one decoder block differ in dtype, since FSDP2 reduces their gradients in one piece.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    whole: set[torch.nn.Parameter] = set()
    if not embedding:
        table = model.get_input_embeddings()
        whole.update((table if model.device.type == "meta" else table.to(mesh.device_type)).parameters())
    left = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for module in (*decoder_layers(model), model):
        own = left.intersection(module.parameters())
        left -= own
        if len(dtypes := {str(parameter.dtype).removeprefix("torch.") for parameter in own}) > 1:
            raise SafecritError(
                f"{type(module).__name__}: has weights in {' and '.join(sorted(dtypes))}, which cannot be divided "
                "together. Use --parallel replicate, or --dtype float32."
            )
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Without resharding, the root's parameters would stay whole after the forward passes of generation.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=whole)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(float(mesh.size()) if mean else 1.0)
            module.set_force_sum_reduction_for_comms(True)
            # Before the collective that FSDP2 begins there: who has not come to it is told from who waits in it.
            module.register_forward_pre_hook(lambda *_: faults.step(), prepend=True)


def from_first_whole(model: torch.nn.Module, make: Callable[[Callable[[str], torch.Tensor]], T]) -> T:
    """What `make` gives on rank 0, on all ranks; it runs there alone, and is given a function that reads parameters.

    The function takes a parameter's name and gives it whole, also where its rows lie on several ranks.
    """
    parameters = dict(model.named_parameters())
    if not distributed.is_sharded(model):
        return distributed.from_first(lambda: make(lambda name: parameters[name].detach()))
    if not distributed.current().first:
        while (name := distributed.from_first(str)) != _DONE:
            whole_on(parameters[name], 0, "weights")
        return distributed.from_first(lambda: make(parameters.__getitem__))
    kept: dict[str, torch.Tensor] = {}

    def read(name: str) -> torch.Tensor:
        if name not in kept:
            while len(kept) >= _KEPT:
                del kept[next(iter(kept))]
            distributed.from_first(lambda: name)
            found = whole_on(parameters[name], 0, "weights")
            assert found is not None
            kept[name] = found
        return kept[name]

    def made() -> T:
        try:
            return make(read)
        finally:
            distributed.from_first(lambda: _DONE)

    return distributed.from_first(made)


def whole_on(parameter: torch.Tensor, owner: int, purpose: str) -> torch.Tensor | None:
    """A parameter's values, of one that is divided on rank `owner` and None on the others; all ranks call it."""
    if not distributed.is_divided(parameter):
        return parameter.detach()
    return distributed.rows_to(local(parameter), parameter.shape, owner, purpose)

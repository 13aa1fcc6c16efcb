"""Dividing a model over the ranks with FSDP2: by decoder block, each parameter by rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from safecrit import distributed, faults
from safecrit.activations import decoder_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


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


def shard(model: PreTrainedModel, mesh: DeviceMesh, wanted: set[str], *, embedding: bool = True) -> None:
    """Divide the rows of every parameter of `model` (whole, on the CPU) over the ranks of `mesh`, on its devices.

    wanted: parameters whose gradients will be asked for. embedding: divide the input embedding (and a head
    tied to it) too; not where it is called by itself.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    whole: set[torch.nn.Parameter] = set()
    if not embedding:
        whole.update(model.get_input_embeddings().to(mesh.device_type).parameters())
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Without resharding, the root's parameters would stay whole after the forward passes of generation.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=whole)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # Before the collective that FSDP2 begins there: who has not come to it is told from who waits in it.
            module.register_forward_pre_hook(lambda *_: faults.step(), prepend=True)

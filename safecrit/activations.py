"""Checkpointed activations: of every decoder layer only its input is kept, the rest is computed again.

transformers' own switch works in train mode alone, where dropout lives too; here
each layer's forward is wrapped and the model stays in eval mode, so that the
gradient is the same bit for bit (Chen et al. 2016, arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers itself would checkpoint, outermost ones only."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            layers.append(module)
            inside.update(map(id, module.modules()))
    return layers


@contextmanager
def checkpointed(model: nn.Module, enabled: bool = True) -> Iterator[int]:
    """Wrap every decoder layer for the duration; yields how many were found (0: nothing is saved)."""
    layers: list[Any] = decoder_layers(model) if enabled else []
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward

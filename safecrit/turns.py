"""Two models that take turns on one device: `--judge-placement sequential`.

Weights never change while scores are made, so the host keeps the only copy that
counts, and leaving the device costs nothing but dropping the other one.
"""

from __future__ import annotations

import torch
from torch import nn


class Guest:
    """A model whose weights lie on the host and visit `device` when asked."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self._tensors = [*model.parameters(), *model.buffers()]
        self._host = [tensor.data.cpu() for tensor in self._tensors]
        self.leave()

    def enter(self) -> None:
        """Copy the weights to the device."""
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.data = host.to(self.device, non_blocking=host.is_pinned())

    def leave(self) -> None:
        """Drop the device's copy."""
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.data = host


class Turns:
    """`model` and `judge` on one device, one at a time; with `device` None both stay where they are."""

    def __init__(self, model: nn.Module, judge: nn.Module, device: torch.device | None) -> None:
        self._guests = {} if device is None else {"model": Guest(model, device), "judge": Guest(judge, device)}
        self._present = ""

    @property
    def active(self) -> bool:
        """Whether the two take turns at all."""
        return bool(self._guests)

    def to(self, name: str) -> None:
        """Bring `model` or `judge` in, the other one out."""
        if not self._guests or self._present == name:
            return
        if self._present:
            self._guests[self._present].leave()
        self._guests[name].enter()
        self._present = name

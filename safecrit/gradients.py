"""The gradient stream: every weight's gradient is folded into its accumulator the moment it exists, then freed.

One float32 accumulator a checkpoint tensor is all that stays; never two dense
gradients at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from safecrit import ops
from safecrit.anatomy import Anatomy, CheckpointTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Reduction = Literal["signed", "abs", "square"]


def _part(tensor: torch.Tensor, entry: CheckpointTensor) -> torch.Tensor:
    """The checkpoint tensor inside a runtime parameter (or its gradient), contiguous; a view where it can be one.

    float64 (used by tests only) is rounded to float32, as the ops take no wider type.
    """
    part = entry.source.of(tensor.contiguous()).contiguous()
    return part.float() if part.dtype == torch.float64 else part


class GradientStream:
    """Hooks on a model's eligible parameters that accumulate sigma x gradient.

    accumulators: float32, by checkpoint name, in the checkpoint's shape.
    sigma: float64 [matrices] by checkpoint name; 1 where `method` is "gradient".
    nonfinite: gradient entries that were NaN or infinite since the last `reset`.
    Use as a context manager: on exit, hooks and gradient requirements are as before.
    """

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, *, method: str = "esi", reduction: Reduction = "signed"
    ) -> None:
        self.model, self.anatomy, self.reduction = model, anatomy, reduction
        self.nonfinite, self.check_only = 0, False
        self.accumulators: dict[str, torch.Tensor] = {}
        self.sigma: dict[str, torch.Tensor] = {}
        parameters = dict(model.named_parameters())
        for entry in anatomy.eligible:
            weight = parameters[entry.parameter].detach()
            self.accumulators[entry.name] = torch.zeros(entry.layout.shape, dtype=torch.float32, device=weight.device)
            patterns = [matrix.where for matrix in entry.layout.matrices]
            if method == "gradient":
                self.sigma[entry.name] = torch.ones(len(patterns), dtype=torch.float64)
            else:
                self.sigma[entry.name] = ops.matrix_std(_part(weight, entry), patterns).cpu()
        self._parameters = parameters
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._required: dict[str, bool] = {}

    def __enter__(self) -> GradientStream:
        wanted = {entry.parameter for entry in self.anatomy.eligible}
        for name, parameter in self._parameters.items():
            self._required[name] = parameter.requires_grad
            parameter.requires_grad_(name in wanted)
            parameter.grad = None
            if name in wanted:
                entries = [entry for entry in self.anatomy.of_parameter(name) if entry.layout.eligible]
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._hook(entries)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(self._required[name])
            parameter.grad = None

    def reset(self) -> None:
        """Forget all that was accumulated."""
        for accumulator in self.accumulators.values():
            accumulator.zero_()
        self.nonfinite = 0

    def _hook(self, entries: list[CheckpointTensor]):  # type: ignore[no-untyped-def]
        def fold(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            grad, parameter.grad = parameter.grad, None
            if self.check_only:
                self.nonfinite += int((~torch.isfinite(grad.float())).sum())
                return
            for entry in entries:
                self._fold(entry, _part(grad, entry))

        return fold

    def _fold(self, entry: CheckpointTensor, grad: torch.Tensor) -> None:
        accumulator, sigmas = self.accumulators[entry.name], self.sigma[entry.name].tolist()
        for matrix, sigma in zip(entry.layout.matrices, sigmas, strict=True):
            self.nonfinite += ops.esi_accumulate_(
                matrix.where.of(accumulator), matrix.where.of(grad), sigma, self.reduction
            )

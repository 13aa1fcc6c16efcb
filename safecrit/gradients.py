"""The gradient stream: every weight's gradient is folded into its accumulator the moment it exists, then freed.

One float32 accumulator a checkpoint tensor is all that stays, on the weight's
device, in host memory or in mapped files; never two dense gradients at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from safecrit import distributed, ops
from safecrit.anatomy import Anatomy, CheckpointTensor
from safecrit.errors import SafecritError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Reduction = Literal["signed", "abs", "square"]
Place = Literal["device", "host", "disk"]
ACCUMULATOR = "accumulator-{}-{:05d}.bin"  # rank, tensor


def _reserve(file: Path, size: int) -> None:
    """An empty file with its space taken: a write to a mapped file on a full disk would kill the process."""
    try:
        with open(file, "wb") as made:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(made.fileno(), 0, size)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise SafecritError(
            f"{file}: no room for {size:,} bytes of sums ({error.strerror}). Free some space and run again, choose "
            "another -o, or use --accumulate-on host."
        ) from error


def part_of(tensor: torch.Tensor, entry: CheckpointTensor) -> torch.Tensor:
    """The checkpoint tensor inside a runtime parameter (or its gradient), contiguous; a view where it can be one.

    float64 (used by tests only) is rounded to float32, as the ops take no wider type.
    """
    part = entry.source.of(tensor.contiguous()).contiguous()
    return part.float() if part.dtype == torch.float64 else part


def scaled_part(entry: CheckpointTensor, parameter: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Sums of a runtime parameter's gradient as those of a checkpoint tensor times sigma, in its shape, contiguous."""
    part = entry.source.of(parameter).clone(memory_format=torch.contiguous_format)
    for matrix, value in zip(entry.layout.matrices, sigma.tolist(), strict=True):
        matrix.where.of(part).mul_(value)
    return part


class GradientStream:
    """Hooks on a model's eligible parameters that accumulate sigma x gradient.

    accumulators: float32, by checkpoint name, in the checkpoint's shape, on the
    weights' device, on the host, or in files of `folder` ("disk").
    sigma: float64 [matrices] by checkpoint name; 1 where `scaled` is false.
    nonfinite: gradient entries that were NaN or infinite since the last `reset`.
    folds: gradients added so far. Use as a context manager: on exit, hooks and
    gradient requirements are as before. Given `sigma`, it is not computed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        *,
        scaled: bool = True,
        reduction: Reduction = "signed",
        place: Place = "device",
        folder: Path | None = None,
        device: torch.device | None = None,
        sigma: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.anatomy, self.reduction = anatomy, reduction
        self._place, self._folder = place, folder
        self.nonfinite, self.folds, self.check_only = 0, 0, False
        self.accumulators: dict[str, torch.Tensor] = {}
        self.sigma: dict[str, torch.Tensor] = {}
        self._files: list[Path] = []
        self._parameters = dict(model.named_parameters())
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._required: dict[str, bool] = {}
        self._prepare(scaled, sigma, device)

    def _prepare(self, scaled: bool, sigma: Mapping[str, torch.Tensor] | None, device: torch.device | None) -> None:
        """Make accumulators and sigma."""
        for number, entry in enumerate(self.anatomy.eligible):
            weight = self._parameters[entry.parameter].detach()
            self.accumulators[entry.name] = self._zeros(number, entry.layout.shape, device or weight.device)
            patterns = [matrix.where for matrix in entry.layout.matrices]
            if scaled and sigma is not None:
                self.sigma[entry.name] = sigma[entry.name]
            elif scaled:
                self.sigma[entry.name] = ops.matrix_std(part_of(weight, entry), patterns).cpu()
            else:
                self.sigma[entry.name] = torch.ones(len(patterns), dtype=torch.float64)

    def _zeros(self, number: int, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """An accumulator where they all lie."""
        if self._place != "disk" or not math.prod(shape):
            where = torch.device("cpu") if self._place != "device" else device
            return torch.zeros(shape, dtype=torch.float32, device=where)
        assert self._folder is not None
        file, numel = self._folder / ACCUMULATOR.format(distributed.current().rank, number), math.prod(shape)
        self._files.append(file)
        _reserve(file, 4 * numel)
        return torch.from_file(str(file), shared=True, size=numel, dtype=torch.float32).view(*shape)

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

    def free_gradients(self) -> None:
        """Drop gradients that an interrupted backward left behind."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def close(self) -> None:
        """Remove the accumulators' files."""
        self.accumulators.clear()
        for file in self._files:
            file.unlink(missing_ok=True)

    def _hook(self, entries: list[CheckpointTensor]) -> Callable[[torch.Tensor], None]:
        def fold(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            grad, parameter.grad = parameter.grad, None
            if self.check_only:
                folded = grad.float() if grad.dtype == torch.float64 else grad
                self.nonfinite += int((~torch.isfinite(folded)).sum())
                return
            self.folds += 1
            for entry in entries:
                self._fold(entry, part_of(grad, entry))

        return fold

    def _fold(self, entry: CheckpointTensor, grad: torch.Tensor) -> None:
        accumulator, sigmas = self.accumulators[entry.name], self.sigma[entry.name].tolist()
        grad = grad.to(accumulator.device)
        for matrix, sigma in zip(entry.layout.matrices, sigmas, strict=True):
            self.nonfinite += ops.esi_accumulate_(
                matrix.where.of(accumulator), matrix.where.of(grad), sigma, self.reduction
            )

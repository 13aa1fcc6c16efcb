"""SPA's guard: the weights that a mask selects stay bit-identical under any optimizer.

Two steps make that true. A hook zeroes the gradient at the selected entries as soon as
it exists, which is before anyone clips, so frozen entries take no part in the norm or in
an optimizer's statistics. After the optimizer's step the selected entries are put back
from a saved copy, so weight decay, momentum and rounding cannot move them. `MaskedAdamW`
leaves them out of its step instead.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from safecrit.anatomy import read_anatomy
from safecrit.errors import SafecritError
from safecrit.masked import MaskedAdamW
from safecrit.placement import entries_here, local, place, refuse_adapters, refuse_deepspeed, unwrap

if TYPE_CHECKING:
    from safecrit.maskfile import Mask


class Protection:
    """The hooks and saved values that keep a model's selected weights as they are; `remove()` ends it."""

    def __init__(self, model: Any, mask: Mask, optimizer: torch.optim.Optimizer) -> None:
        """Save the selected weights and set the hooks; errors as in `protect`."""
        model = unwrap(model)
        refuse_adapters(model)
        anatomy = read_anatomy(model)
        mask.check(anatomy)
        placed = place(mask, anatomy)
        if not placed:
            raise SafecritError("the mask selects no weight of this model, so nothing would be protected.")
        refuse_deepspeed(optimizer)
        while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # accelerate's wrapper, which runs no hooks of its own
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise SafecritError(f"{type(optimizer).__name__} is no torch optimizer, so its steps cannot be followed.")
        parameters = dict(model.named_parameters())
        self._steps = 0
        self._saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._hooks: list[RemovableHandle] = []
        self._masked = optimizer if isinstance(optimizer, MaskedAdamW) else None
        for name, indices in placed.items():
            parameter = parameters[name]
            indices, _ = entries_here(name, parameter, indices)
            self._saved.append((parameter, indices, local(parameter).view(-1).index_select(0, indices)))
            if self._masked is not None:
                self._masked.freeze(parameter, indices)
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(_zero, indices)))
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._after_step()))

    @property
    def protected(self) -> int:
        """Number of weights that are held here: of a model that is divided over ranks, those of this rank's rows."""
        return sum(len(indices) for _, indices, _ in self._saved)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the selected weights back to their saved values."""
        for parameter, indices, values in self._saved:
            local(parameter).view(-1).index_put_((indices,), values)

    def _after_step(self) -> None:
        self._steps += 1
        if self._masked is None:
            self.restore()

    def check(self, *, stepped: bool = True) -> None:
        """SafecritError where a selected weight has moved, or where training `stepped` and the optimizer did not."""
        if stepped and not self._steps:
            raise SafecritError("the optimizer that was given made no step, so nothing was protected: another one ran.")
        for parameter, indices, values in self._saved:
            now = local(parameter).view(-1).index_select(0, indices)
            if not torch.equal(now.view(torch.uint8), values.view(torch.uint8)):
                raise SafecritError(
                    "protected weights have moved: something wrote to them after the optimizer's step. "
                    "Discard this run."
                )

    def remove(self) -> None:
        """Remove the hooks; the weights may move again."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = []
        if self._masked is not None:
            self._masked.thaw()


def protect(model: Any, mask: Mask, optimizer: torch.optim.Optimizer) -> Protection:
    """Keep the weights that `mask` selects bit-identical through every `optimizer.step()`.

    Call it after the model is on its device and the optimizer exists. Memory: the saved
    values in the weights' dtype and 4 bytes of position each. Raises MismatchError where
    the mask is of another model, SafecritError where it would protect nothing.
    """
    return Protection(model, mask, optimizer)


class ProtectCallback(TrainerCallback):
    """`trainer.add_callback(ProtectCallback(mask))`: `protect` for transformers' Trainer and those built on it."""

    def __init__(self, mask: Mask) -> None:
        """Hold `mask` until training begins."""
        self.mask = mask
        self.protection: Protection | None = None
        self._begun = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the selected weights; a resumed run has its checkpoint loaded by now."""
        if self.protection is not None:
            self.protection.remove()
        self.protection = protect(kwargs["model"], self.mask, kwargs["optimizer"])
        self._begun = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make sure that no selected weight has moved, and remove the hooks."""
        if self.protection is not None:
            protection, self.protection = self.protection, None
            protection.remove()
            protection.check(stepped=state.global_step > self._begun)


@torch.no_grad()
def _zero(indices: torch.Tensor, parameter: torch.Tensor) -> None:
    if parameter.grad is not None:
        gradient = local(parameter.grad)
        gradient.view(-1).index_put_((indices,), gradient.new_zeros(()))

"""SPA's optimizer: torch.optim.AdamW in one pass over each weight, which leaves the frozen entries out.

`protect` tells it which entries those are; they then need no putting back. Its state is
torch.optim.AdamW's and can be exchanged with it; 1 bit a weight comes on top.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from safecrit.placement import local


class MaskedAdamW(torch.optim.AdamW):
    """AdamW whose step leaves the entries given to `freeze` and their moments bit-identical.

    Arguments as torch.optim.AdamW's; parameters must be contiguous. Of those that FSDP2 divides, each rank updates
    its rows. The arithmetic is torch's in float32, so results agree with it to rounding. Raises ValueError for
    amsgrad and other variants (an unknown argument).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        """Nothing is frozen at first."""
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False)
        self._bits: dict[torch.Tensor, torch.Tensor] = {}
        self._none = torch.zeros(0, dtype=torch.uint8)

    def freeze(self, parameter: torch.Tensor, indices: torch.Tensor) -> None:
        """Leave the entries at the flat `indices` (integers, ascending) of `parameter` alone from now on.

        Of one that is divided, they are positions in this rank's rows.
        """
        from safecrit import ops

        self._bits[parameter] = ops.bits_from_indices(indices.long(), local(parameter).numel())

    def thaw(self) -> None:
        """Freeze nothing any more."""
        self._bits = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        from safecrit import ops

        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                ops.masked_adamw_(
                    local(parameter),
                    local(parameter.grad),
                    local(state["exp_avg"]),
                    local(state["exp_avg_sq"]),
                    self._frozen(parameter),
                    step=int(state["step"]),
                    lr=float(group["lr"]),
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                )
        return loss

    def _frozen(self, parameter: torch.Tensor) -> torch.Tensor:
        """The bits of a parameter; a stretch of shared zeros where nothing of it is frozen."""
        bits = self._bits.get(parameter)
        if bits is not None:
            return bits
        size = -(-local(parameter).numel() // 8)
        if len(self._none) < size or self._none.device != parameter.device:
            self._none = torch.zeros(size, dtype=torch.uint8, device=parameter.device)
        return self._none[:size]

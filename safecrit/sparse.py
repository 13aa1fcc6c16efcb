"""SET's optimizer: AdamW on the k selected weights and on nothing else, at the memory of k weights.

Hooks take each gradient the moment autograd has it, keep its k entries in float32 and
free the dense tensor. Accumulation over micro-batches, clipping and the gradient's
clearing happen here too, because a training loop that sees no gradients can do none of
them (transformers' Trainer calls `model.zero_grad()`, clips nothing and logs norm 0).
Several processes, each with the whole model, average these k entries in `step()`; where
FSDP2 divides the model, each keeps those of its rows, whose gradients FSDP2 has reduced.
Update: decoupled weight decay, Loshchilov and Hutter, arXiv 1711.05101.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from safecrit import distributed
from safecrit.anatomy import read_anatomy
from safecrit.errors import MismatchError, SafecritError
from safecrit.placement import (
    entries_here,
    local,
    local_entries,
    place,
    refuse_adapters,
    runtime_indices,
    unwrap,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from safecrit.maskfile import Mask
    from safecrit.ops.dispatch import Backend

PURPOSE = "gradients"


class SparseAdamW(torch.optim.Optimizer):
    """AdamW restricted to the weights that `mask` selects; all others stay as they are, bit for bit.

    The state is float32 and of the selected weights alone: a master copy and two
    moments. Parameters without a selected weight get `requires_grad` False, so backward
    spends nothing on their gradients; `close()` gives it back. Hooks attach at the
    model's first forward (or by `attach()`), after `accelerate.prepare` has done what
    it does. `max_grad_norm` bounds the norm of the selected entries' gradient, None
    does not; `grad_norm` is the last step's norm before that. Of several processes each
    gives it the bare model, with no DistributedDataParallel around it, or one that FSDP2's
    `fully_shard` has divided by rows; both before the first forward.

    Raises MismatchError where the mask is of another model, SafecritError for float16
    parameters and for a step through a gradient scaler (it needs dense gradients), and
    for a mask that selects nothing.
    """

    _step_supports_amp_scaling = True  # so that a scaler comes to `step`, which refuses it, and not to dense gradients

    def __init__(
        self,
        model: PreTrainedModel,
        mask: Mask,
        lr: float = 3e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = 1.0,
        backend: Backend = "auto",
    ) -> None:
        """Find the selected weights; no gradient is touched before the first forward."""
        self._model = unwrap(model)
        refuse_adapters(self._model)
        self._anatomy = read_anatomy(self._model)
        mask.check(self._anatomy)
        placed = place(mask, self._anatomy)
        if not placed:
            raise SafecritError("the mask selects no weight of this model, so there is nothing to train.")
        parameters = dict(self._model.named_parameters())
        for name in placed:
            if parameters[name].dtype == torch.float16:
                raise SafecritError(f"{name}: is float16, which loses updates. Load the model in bfloat16 or float32.")
        self._names = list(placed)
        self._indices = list(placed.values())
        self._trained = sum(len(indices) for indices in self._indices)
        self._buffers: list[torch.Tensor | None] = [None] * len(placed)
        self._needed_grad = {name: parameter.requires_grad for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in placed)
        self._hooks: list[RemovableHandle] = []
        self._befores = [0] * len(placed)  # selected entries of each parameter that lie on lower ranks
        # Before FSDP2's own hook, which puts whole parameters in the place of this rank's rows.
        self._opening = self._model.register_forward_pre_hook(lambda *_: self._open(), prepend=True)
        self._backend = backend
        self.max_grad_norm = max_grad_norm
        self.grad_norm = 0.0
        digest = hashlib.sha256()
        for name, indices in placed.items():
            digest.update(name.encode() + indices.numpy().tobytes())
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "mask": digest.hexdigest()}
        super().__init__([parameters[name] for name in self._names], defaults)

    @property
    def trained(self) -> int:
        """Number of weights that are trained."""
        return self._trained

    def placed(self) -> Iterator[tuple[str, torch.Tensor, int, torch.Tensor]]:
        """Of each trained parameter: name, positions of the selected entries here, how many lie on lower ranks, itself.

        Positions are flat ones in this rank's rows, once the hooks are attached.
        """
        yield from zip(self._names, self._indices, self._befores, self.param_groups[0]["params"], strict=True)

    def _open(self) -> None:
        """Attach as the first forward begins; SafecritError where FSDP2 came after this optimizer, unseen by it."""
        from torch.distributed.fsdp import FSDPModule

        divided = any(isinstance(module, FSDPModule) for module in self._model.modules())
        if divided and not self._hooks and not any(self._divided()):
            raise SafecritError(
                "the model was divided after SparseAdamW was made. Make it after fully_shard, or call attach() then."
            )
        self.attach()

    def attach(self) -> None:
        """Set the gradient hooks on the parameters that the model has now; again, it does nothing."""
        if self._hooks:
            return
        if distributed.processes() > 1 and getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
            raise SafecritError(
                "DistributedDataParallel would send every gradient of the model, and SparseAdamW averages those of the "
                "selected weights itself. Give each process the bare model."
            )
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # set by accelerate as it makes DeepSpeed's plugin
            raise SafecritError("DeepSpeed (ZeRO) divides gradients that SparseAdamW needs whole. Train without it.")
        self._opening.remove()
        parameters = dict(self._model.named_parameters())
        group = self.param_groups[0]
        for i, name in enumerate(self._names):
            parameter, before = parameters[name], group["params"][i]
            if distributed.is_divided(
                before
            ):  # accelerate put it there; the model's own may be whole for the forward pass
                parameter = before
            self._indices[i], self._befores[i] = entries_here(name, parameter, self._indices[i])
            if parameter is not before:  # whoever prepared the model put another parameter in its place
                group["params"][i] = parameter
                if before in self.state:
                    self.state[parameter] = self.state.pop(before)
            parameter.requires_grad_(True)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(self._take, i)))

    def close(self) -> None:
        """Remove the hooks and give every parameter back the `requires_grad` it came with."""
        for handle in (self._opening, *self._hooks):
            handle.remove()
        self._hooks = []
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._needed_grad.get(name, parameter.requires_grad))

    def _take(self, i: int, parameter: torch.Tensor) -> None:
        """Keep the selected entries of a gradient that has just been computed, and free it."""
        from safecrit import ops

        assert parameter.grad is not None
        gradient, indices, before = local(parameter.grad), self._indices[i], self._buffers[i]
        parameter.grad = None
        buffer = torch.empty(len(indices), device=gradient.device) if before is None else before
        ops.gather_(buffer, gradient, indices, add=before is not None, backend=self._backend)
        self._buffers[i] = buffer

    def _average(self) -> None:
        """Average the gathered gradients over the processes; one that a process lacks counts as zeros there.

        Those of divided parameters are averages when they come here.
        """
        whole = [i for i, divided in enumerate(self._divided()) if not divided]
        if distributed.processes() == 1 or not whole:
            return
        device = self._indices[0].device
        sizes = [len(self._indices[i]) for i in whole]
        flat = torch.zeros(sum(sizes) + len(sizes), device=device)  # at the end: which buffers there are
        *parts, there = flat.split([*sizes, len(sizes)])
        for number, i in enumerate(whole):
            if (buffer := self._buffers[i]) is not None:
                parts[number].copy_(buffer)
                there[number] = 1
        distributed.total_(flat, PURPOSE)
        flat /= distributed.processes()
        for i, part, found in zip(whole, parts, there.tolist(), strict=True):
            self._buffers[i] = part.to(self._indices[i].device) if found else None

    def _divided(self) -> list[bool]:
        """Which parameters lie on several ranks."""
        return [distributed.is_divided(parameter) for parameter in self.param_groups[0]["params"]]

    def _norm(self, gathered: list[tuple[int, torch.Tensor]]) -> float:
        """The gradient's norm over all parameters and ranks."""
        divided = self._divided()
        squares = torch.zeros(2, dtype=torch.float64, device=gathered[0][1].device)  # of whole and of divided ones
        for i, buffer in gathered:
            norm = torch.linalg.vector_norm(buffer, dtype=torch.float64)
            squares[int(divided[i])] += norm.square().to(squares.device)
        if any(divided):
            own = squares[1].clone()
            squares[1] = distributed.total_(own, "norm")
        return float(squares.sum().sqrt())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients gathered since the last step."""
        self._buffers = [None] * len(self._buffers)
        super().zero_grad(set_to_none=set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from the gradients gathered since the last one.

        A parameter that got no gradient is left alone, as torch's AdamW leaves it.
        Raises SafecritError where none got any, or where the gradient is not finite;
        the weights are then unchanged.
        """
        from safecrit import ops

        if getattr(self, "grad_scale", None) is not None:
            raise SafecritError("SparseAdamW works without a gradient scaler (fp16). Train in bfloat16 or float32.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._average()
        gathered = [(i, buffer) for i, buffer in enumerate(self._buffers) if buffer is not None]
        if not gathered:
            raise SafecritError(
                "no gradient reached the selected weights in this step. Run a forward and a backward of the model that "
                "SparseAdamW was given; if it was wrapped or compiled since, call attach() after that."
            )
        self.zero_grad()
        group = self.param_groups[0]
        self.grad_norm = self._norm(gathered)
        if not torch.isfinite(torch.tensor(self.grad_norm)):
            raise SafecritError("the gradient of the selected weights is not finite. Lower the learning rate.")
        # 1e-6 as in torch.nn.utils.clip_grad_norm_, so that clipped runs agree with dense ones.
        clip = 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / (self.grad_norm + 1e-6))
        for i, buffer in gathered:
            parameter, indices = group["params"][i], self._indices[i].long()
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["master"] = local(parameter).view(-1).index_select(0, indices).float()
                state["exp_avg"] = torch.zeros_like(state["master"])
                state["exp_avg_sq"] = torch.zeros_like(state["master"])
            state["step"] += 1
            ops.sparse_adamw_(
                local(parameter),
                indices,
                buffer,
                state["master"],
                state["exp_avg"],
                state["exp_avg_sq"],
                step=state["step"],
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                clip=clip,
                backend=self._backend,
            )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`; MismatchError where that was of another mask."""
        saved = state_dict["param_groups"][0]
        if saved.get("mask") != self.param_groups[0]["mask"]:
            raise MismatchError("the optimizer state is of another mask. Resume with the mask that it was saved under.")
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype; bfloat16 would lose most updates, so take it again as it was.
        for key, parameter in zip(saved["params"], self.param_groups[0]["params"], strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[parameter][name] = value.detach().to(parameter.device, copy=True)

    @torch.no_grad()
    def changes(self, mask: Mask, dtypes: Mapping[str, torch.dtype]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The selected weights as they are now, on the CPU: per checkpoint tensor flat indices (int64) and values.

        `mask` is the one given at the start, of which the optimizer keeps positions alone (half
        the memory). `dtypes` gives each checkpoint tensor's dtype; a tensor that it lacks keeps the
        parameter's. Where the model is divided, all ranks call this, and rank 0 alone gets something.
        """
        parameters = dict(self._model.named_parameters())
        found = {}
        for name, flat in mask.indices.items():
            tensor = self._anatomy.tensors[name]
            parameter = parameters[tensor.parameter]
            where = runtime_indices(tensor.source, flat)
            if distributed.is_divided(parameter):
                values = _from_ranks(tensor.parameter, parameter, where)
            else:
                values = parameter.detach().reshape(-1).index_select(0, where.to(parameter.device))
            if values is not None:
                found[name] = (flat, values.to(dtypes.get(name, values.dtype)).cpu())
        return found


def _from_ranks(name: str, parameter: torch.Tensor, where: torch.Tensor) -> torch.Tensor | None:
    """The entries of a divided parameter at the flat positions `where`, on rank 0; None on the others."""
    world, row = distributed.processes(), parameter.numel() // len(parameter)
    holder = where // (-(-parameter.shape[0] // world) * row)
    entries, start = local_entries(name, parameter)
    own = where[(where >= start) & (where < start + len(entries))] - start
    sizes = torch.bincount(holder, minlength=world).tolist()
    parts = distributed.parts_to(entries.index_select(0, own.to(entries.device)), sizes, 0, "changes")
    if parts is None:
        return None
    values = entries.new_empty(len(where))
    for rank, part in enumerate(parts):
        values[(holder == rank).to(values.device)] = part
    return values

"""Scores that need no gradient: magnitude |W|, and Wanda, |W| times the norm of the input feature it multiplies.

Wanda (Sun, Liu, Bair and Kolter, "A Simple and Effective Pruning Approach for Large
Language Models", arXiv 2306.11695): |W_ij| * ||X_j||_2, X_j being input feature j over
all tokens. Which weight meets which feature is read off the matrix products that the
model computes: an operand that lies in a parameter's memory is a part of that
parameter, and its strides say which. So fused, transposed and sliced weights need
no rule of their own.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from safecrit import distributed
from safecrit.anatomy import Anatomy, CheckpointTensor
from safecrit.errors import SafecritError
from safecrit.gradients import part_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATEN = torch.ops.aten
# Experts that every token goes to, copied as often as there are experts, one copy below the other.
_TILED = ("Llama4TextExperts",)

Part = tuple[int, tuple[int, ...], tuple[int, ...]]  # offset, shape and strides inside a parameter, in elements


def magnitude(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[tuple[str, torch.Tensor]]:
    """|W| of every eligible tensor: checkpoint name and float32 in the checkpoint's shape, on the weight's device."""
    parameters = dict(model.named_parameters())
    for entry in anatomy.eligible:
        yield entry.name, part_of(parameters[entry.parameter].detach(), entry).float().abs()


class InputNorms:
    """Sums of squares of the input features of every eligible weight, over the tokens that count.

    A context manager. Inside it, call `count` before each forward pass of `model`, which may be any: without
    gradients, in batches, with a cache. Afterwards `scores` gives Wanda's scores. The output head must see every
    position, so the forward pass must run without `logits_to_keep`. Experts are run once more, on the counted
    tokens alone, as their rows are no longer positions. Raises SafecritError where a weight is given other rows
    than the positions of the forward pass. Not for torch.compile'd models.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        self._model, self._parameters = model, dict(model.named_parameters())
        self._entries: dict[str, list[CheckpointTensor]] = defaultdict(list)
        for entry in anatomy.eligible:
            self._entries[entry.parameter].append(entry)
        self._sums: dict[str, dict[Part, torch.Tensor]] = {name: {} for name in self._entries}
        self._memory: list[tuple[str, int, str]] = []  # device, address and name of the eligible parameters, sorted
        self._routed = {}  # experts in a parameter, by its name
        for name in self._entries:
            matrices = [matrix for entry in anatomy.of_parameter(name) for matrix in entry.layout.matrices]
            experts = {matrix.expert for matrix in matrices}
            if None not in experts:
                self._routed[name] = len(experts)
        self._mask: torch.Tensor | None = None  # of the next forward pass
        self._counted: torch.Tensor | None = None  # the rows that count, bool [positions], while one runs
        self._all_rows = False  # every row counts: experts are run on the counted tokens
        self._paused: torch.Tensor | None = None  # `_counted`, while experts run on all tokens
        self._stack = ExitStack()

    def __enter__(self) -> InputNorms:
        model = self._model
        placed = [(self._parameters[name], name) for name in self._entries]
        self._memory = sorted((str(weight.device), weight.data_ptr(), name) for weight, name in placed)
        hooks = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]
        for experts in self._experts():
            hooks.append(experts.register_forward_pre_hook(self._run_experts, with_kwargs=True))
            hooks.append(experts.register_forward_hook(self._after_experts, always_call=True))
        for hook in hooks:
            self._stack.callback(hook.remove)
        self._stack.enter_context(_Products(self._record))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def count(self, mask: torch.Tensor) -> None:
        """Say which positions of the next forward pass count: bool [B, T], any device; padding should not."""
        assert mask.dtype == torch.bool and mask.dim() == 2, f"bool [B, T] expected, not {mask.dtype} {mask.shape}"
        self._mask = mask

    def merge(self) -> None:
        """Make the sums those of all ranks' forward passes."""
        merged: dict[str, dict[Part, torch.Tensor]] = {name: {} for name in self._entries}
        for own in distributed.gather(self._sums):
            for name, parts in own.items():
                for part, sums in parts.items():
                    merged[name][part] = merged[name][part] + sums if part in merged[name] else sums
        self._sums = merged

    def scores(self) -> Iterator[tuple[str, torch.Tensor]]:
        """|W| * ||X||: checkpoint name and float32 in the checkpoint's shape, on the weight's device.

        Every eligible tensor once, parameter by parameter. An expert that no counted token was routed to scores
        0. SafecritError names a tensor whose inputs were not seen, wholly or in part.
        """
        for name, entries in self._entries.items():
            scores, seen = self._weighted(name)
            for entry in entries:
                if not bool(part_of(seen, entry).all()):
                    raise SafecritError(
                        f"{entry.name}: its inputs were not seen: in the counted forward passes no matrix product "
                        f"was made of {name} itself (weights that are quantized, offloaded, cast or convolved cannot "
                        "be followed). Leave it out with --exclude, or use another method."
                    )
                yield entry.name, part_of(scores, entry)

    def _weighted(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A parameter's scores (float32) and where inputs are known (bool), both in its shape."""
        weight, found = self._parameters[name].detach(), self._sums[name]
        squares = torch.zeros_like(weight, dtype=torch.float32)
        seen = torch.zeros_like(weight, dtype=torch.bool)
        experts = self._routed.get(name, 0)
        if found and all(math.prod(shape) * experts == weight.numel() for _, shape, _ in found):
            seen.fill_(True)  # whole experts were seen; the others had no tokens
        for (offset, shape, strides), sums in found.items():
            squares.as_strided(shape, strides, offset).add_(sums.to(squares).unsqueeze(1))
            seen.as_strided(shape, strides, offset).fill_(True)
        return squares.sqrt_().mul_(weight.float().abs()), seen

    def _begin(self, *_: object) -> None:
        assert self._mask is not None, "count() comes before each forward pass"
        self._counted, self._mask, self._paused = self._mask.reshape(-1), None, None

    def _end(self, *_: object) -> None:
        self._counted = None

    def _experts(self) -> list[nn.Module]:
        """The modules that send tokens to experts: the innermost around each bank whose class is called so."""
        found: dict[int, nn.Module] = {}
        for name in self._routed:
            path = name.split(".")[:-1]
            owners = (self._model.get_submodule(".".join(path[:n])) for n in range(len(path), 0, -1))
            module = next((owner for owner in owners if type(owner).__name__.endswith("Experts")), None)
            if module is not None:
                found[id(module)] = module
        return list(found.values())

    @torch.no_grad()
    def _run_experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counted = self._counted
        if counted is None or self._all_rows:
            return

        def keep(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            rows = value.reshape(-1, value.shape[-1])
            copies = len(rows) // len(counted) if type(module).__name__ in _TILED else 1
            if len(rows) != copies * len(counted):
                raise SafecritError(
                    f"{type(module).__name__}: was given {len(rows)} rows, where the forward pass has {len(counted)} "
                    "positions: which tokens count cannot be told. Leave its weights out with --exclude."
                )
            return rows[counted.to(rows.device).repeat(copies)]

        if bool(counted.any()):
            config: Any = getattr(module, "config", None)
            chosen = getattr(config, "_experts_implementation", None)
            try:
                if chosen is not None:  # only `eager` multiplies by one expert's slice of the bank at a time
                    config._experts_implementation = "eager"
                self._all_rows = True
                module.forward(*map(keep, args), **{key: keep(value) for key, value in kwargs.items()})
            finally:
                self._all_rows = False
                if chosen is not None:
                    config._experts_implementation = chosen
        self._paused, self._counted = counted, None

    def _after_experts(self, *_: object) -> None:
        if self._paused is not None:
            self._counted, self._paused = self._paused, None

    def _find(self, operand: torch.Tensor) -> tuple[str, Part] | None:
        """The parameter that `operand` is a part of, and which part."""
        key = (str(operand.device), operand.data_ptr())
        place = bisect.bisect(self._memory, (*key, "\uffff")) - 1
        if place < 0 or operand.numel() == 0:
            return None
        device, start, name = self._memory[place]
        weight = self._parameters[name]
        if device != key[0] or operand.dtype != weight.dtype or key[1] >= start + weight.nbytes:
            return None
        return name, ((key[1] - start) // weight.element_size(), tuple(operand.shape), operand.stride())

    def _record(self, rows: torch.Tensor, operand: torch.Tensor) -> None:
        """Add the squares of `rows` [n, K] where `operand` [K, N] is a part of an eligible parameter."""
        if self._counted is None and not self._all_rows:
            return
        found = self._find(operand)
        if found is None:
            return
        name, part = found
        if not self._all_rows:
            assert self._counted is not None
            if len(rows) != len(self._counted):
                raise SafecritError(
                    f"{self._entries[name][0].name}: was given {len(rows)} rows, where the forward pass has "
                    f"{len(self._counted)} positions: which tokens count cannot be told. Run the model without "
                    "logits_to_keep, or leave the tensor out with --exclude."
                )
            rows = rows[self._counted.to(rows.device)]
        wide = torch.promote_types(rows.dtype, torch.float32)
        sums = torch.linalg.vector_norm(rows, dim=0, dtype=wide).cpu().double().square()
        known = self._sums[name].get(part)
        self._sums[name][part] = sums if known is None else known.add_(sums)


class _Products(TorchDispatchMode):
    """Reports every matrix product as (rows [n, K], other operand [K, N]), from both sides."""

    def __init__(self, report: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is _ATEN.linear:
            self._both(args[0].reshape(-1, args[0].shape[-1]), args[1].mT)
        elif packet in (_ATEN.mm, _ATEN.addmm):
            self._both(*args[-2:])
        elif packet in (_ATEN.bmm, _ATEN.baddbmm):
            left, right = args[-2:]
            if right.stride(0) == 0:  # one matrix for the whole batch
                self._both(left.reshape(-1, left.shape[-1]), right[0])
            else:
                for one, other in zip(left, right, strict=True):
                    self._both(one, other)
        elif packet in (_ATEN.matmul, _ATEN.einsum):  # in one piece in inference mode only
            with self:
                return func.decompose(*args, **kwargs)
        return func(*args, **kwargs)

    def _both(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self._report(left, right)
        self._report(right.mT, left.mT)

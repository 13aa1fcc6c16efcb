"""Scoring a model that is divided over the ranks: FSDP2 by decoder block, gradients as local shards.

All ranks go through the batch plan in rounds, one batch each; a rank that has none left
runs another's with a gradient of zero, since every forward holds collectives. Gradients
are reduced by SUM in float32 and reach the accumulators as this rank's rows of a runtime
parameter; sigma, one number a logical matrix, is computed from whole weights, one parameter
at a time, before the first batch, and applied when rows are put together at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from safecrit import distributed, ops
from safecrit.activations import checkpointed
from safecrit.anatomy import Anatomy, CheckpointTensor
from safecrit.errors import SafecritError, is_out_of_memory
from safecrit.estimators import Item
from safecrit.files import checkpoint_tensors
from safecrit.fsdp import whole_on
from safecrit.gradients import GradientStream, part_of, scaled_part
from safecrit.placement import rows_here
from safecrit.scoring import Progress, Restore, Save, Scorer, ScoreState, owners
from safecrit.tensorfile import MappedFiles

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from safecrit.models import LoadedModel


def sigmas(loaded: LoadedModel, anatomy: Anatomy) -> dict[str, torch.Tensor]:
    """sigma of each logical matrix of a divided model, float64 by checkpoint name; all ranks ask together.

    A rank reads the tensors it owns whole: from their files, in the dtype they were loaded in, or from all ranks
    where the folder's files do not hold them by these names (it holds no safetensors files, say).
    """
    rank, files, found = distributed.current().rank, MappedFiles(), {}
    try:
        stored = checkpoint_tensors(loaded.folder)
    except SafecritError:
        stored = {}
    for parameter, entries, owner in owners(anatomy):
        weight = loaded.model.get_parameter(parameter)
        if all(entry.name in stored and stored[entry.name].shape == entry.layout.shape for entry in entries):
            own = entries if owner == rank else []
            parts = (files.tensor(stored[entry.name]).to(weight.device, weight.dtype) for entry in own)
        else:
            whole = whole_on(weight, owner, "sigma")
            own = entries if whole is not None else []
            parts = (part_of(whole, entry) for entry in own if whole is not None)
        for entry, part in zip(own, parts, strict=True):
            patterns = [matrix.where for matrix in entry.layout.matrices]
            narrow = part.float() if part.dtype == torch.float64 else part
            found[entry.name] = ops.matrix_std(narrow, patterns).cpu()
        files.release()
    return {name: values for part in distributed.gather(found) for name, values in part.items()}


class ShardedStream(GradientStream):
    """The gradient stream of a sharded model: accumulators hold this rank's rows, by runtime parameter, no sigma."""

    def _prepare(self, scaled: bool, sigma: Mapping[str, torch.Tensor] | None, device: torch.device | None) -> None:
        assert sigma is not None
        one = torch.ones
        for number, (name, entries, _) in enumerate(owners(self.anatomy)):
            local: torch.Tensor = self._dtensor(name).to_local()
            self.accumulators[name] = self._zeros(number, local.shape, local.device)
            for entry in entries:
                count = len(entry.layout.matrices)
                self.sigma[entry.name] = sigma[entry.name] if scaled else one(count, dtype=torch.float64)

    def _dtensor(self, name: str) -> DTensor:
        return self._parameters[name].data  # type: ignore[return-value]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole runtime parameter."""
        return tuple(self._dtensor(name).shape)

    def rows(self, name: str) -> slice:
        """Which rows of it lie here."""
        return rows_here(self._dtensor(name))

    def _hook(self, entries: list[CheckpointTensor]) -> Callable[[torch.Tensor], None]:
        name = entries[0].parameter

        def fold(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            grad, parameter.grad = parameter.grad.to_local(), None  # type: ignore[attr-defined]
            if self.check_only:
                self.nonfinite += int((~torch.isfinite(grad)).sum())
                return
            self.folds += 1
            accumulator = self.accumulators[name]
            self.nonfinite += ops.esi_accumulate_(accumulator, grad.to(accumulator.device), 1.0, self.reduction)

        return fold


class ShardedScorer(Scorer):
    """A Scorer all of whose ranks know the whole state, and do a round of batches at a time."""

    stream: ShardedStream

    def run(
        self,
        save: Save | None = None,
        restore: Restore | None = None,
        save_every: int = 256,
        progress: Progress | None = None,
    ) -> dict[str, torch.Tensor]:
        """See `Scorer.run`; what comes back are rows of runtime parameters."""
        world, guarded = distributed.current().world, False
        with self.stream, checkpointed(self.model, self.checkpoint):
            self._restart(restore)
            saved = self.state.used
            others = {number for base in self.bases for number in base.state.done}
            count = len(self.unfit) + sum(len(self.plan[number]) for number in {*others, *self.state.done})
            if progress is not None and count:
                progress.begin(count)
            while left := [n for n in range(len(self.plan)) if n not in others and n not in self.state.done]:
                try:
                    clean = self._guarded(left[:world]) if guarded else self._round(left[:world])
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    raise SafecritError(
                        "out of memory while scoring. Lower --batch-size, --max-new-tokens or --judge-batch-size, or "
                        "use --checkpoint-activations on."
                    ) from error
                if not clean:
                    self._restart(restore)
                    saved, guarded = self.state.used, True
                    continue
                guarded = False
                self.state.done = [*self.state.done, *left[:world]]
                self._check_dropped()
                count += sum(len(self.plan[number]) for number in left[:world])
                if progress is not None:
                    progress(min(count, self.total), self.total)
                if save is not None and self.state.used - saved >= save_every and len(left) > world:
                    save(self.state, self.stream.accumulators)
                    saved = self.state.used
        return self.stream.accumulators

    def _round(self, numbers: Sequence[int]) -> bool:
        """One batch a rank; False where a weight's gradient was not finite."""
        rank = distributed.current().rank
        own = self.plan[numbers[min(rank, len(numbers) - 1)]]
        return self._together(own, counted=rank < len(numbers))

    def _guarded(self, numbers: Sequence[int]) -> bool:
        """The same batches, one item at a time for all ranks, and twice: an item without a finite gradient is dropped.

        A batch that comes out clean now was not the fault: what is not finite shows in the round's other batches.
        """
        first = distributed.current().first
        for item in (item for number in numbers for item in self.plan[number]):
            state = self.state
            self.state, self.stream.check_only = ScoreState(), True
            fine = self._together([item], counted=first)
            self.state, self.stream.check_only = state, False
            if fine:
                self._together([item], counted=first)
            else:
                self.state.dropped.append({"row": item.row, "reason": "weight gradient not finite"})
        return True

    def _together(self, items: list[Item], counted: bool) -> bool:
        """Score this rank's items while the others score theirs; the state is that of all afterwards."""
        state, self.state = self.state, ScoreState()
        self._batch(items, counted=counted)
        own, self.state = self.state, state
        bad, self.stream.nonfinite = self.stream.nonfinite, 0
        found = distributed.gather((bad, own.used, own.dropped, own.values))
        if any(bad for bad, *_ in found):
            return False
        for _, used, dropped, values in found:
            state.used += used
            state.dropped += dropped
            state.values |= values
        return True

    def _states(self) -> list[ScoreState]:
        return [self.state]

    def _summed(
        self, parameter: str, entries: Sequence[CheckpointTensor], owner: int
    ) -> Iterator[tuple[CheckpointTensor, torch.Tensor]]:
        whole = distributed.rows_to(self.stream.accumulators[parameter], self.stream.shape(parameter), owner, "scores")
        self.stream.accumulators[parameter] = torch.empty(0)  # made an end of
        for entry in entries if whole is not None else ():
            assert whole is not None
            yield entry, scaled_part(entry, whole, self.stream.sigma[entry.name])

    def _weight(self, parameter: str, owner: int) -> torch.Tensor | None:
        return whole_on(self.model.get_parameter(parameter), owner, "scores")

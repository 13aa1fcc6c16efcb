"""The model's side of scoring: batches of answers forward, dS/dlogits back through the weights.

The batch plan depends on the answers alone, so that an interrupted run that goes
on adds the same numbers in the same order. What goes wrong on the way (a gradient
that is no number, memory that runs out) rolls back to the last saved state: no
batch ever counts by half.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from safecrit import distributed
from safecrit.activations import checkpointed
from safecrit.anatomy import Anatomy, CheckpointTensor
from safecrit.errors import SafecritError, is_out_of_memory
from safecrit.estimators import Estimator, Item, Judged
from safecrit.gradients import GradientStream, part_of
from safecrit.turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SENT_BYTES = 2 << 30  # host memory for what lies between the model's and the judge's turns


class Progress(Protocol):
    """Hears of finished answers; `begin` says how many an earlier run had finished."""

    def begin(self, done: int) -> None: ...  # noqa: D102
    def __call__(self, done: int, total: int) -> None: ...  # noqa: D102


@dataclass(kw_only=True)
class ScoreState:
    """What a run has done so far; with the accumulators it is all that a resumed run needs.

    plan: answers of each batch. done: batches of the plan that are in the sums. tokens: the largest batch, in padded
    tokens, that memory allowed, once it ran out.
    """

    plan: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    used: int = 0
    tokens: int | None = None
    dropped: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, dict[str, float]] = field(default_factory=dict)


class Base(Protocol):
    """Sums over other batches of the same plan, made by an earlier run."""

    @property
    def state(self) -> ScoreState:
        """Which batches, and what became of them."""
        ...

    def sums(self, entry: CheckpointTensor, sigma: torch.Tensor) -> torch.Tensor:
        """The sums of one checkpoint tensor, float32 in its shape, on the CPU."""
        ...


Save = Callable[[ScoreState, dict[str, torch.Tensor]], None]
Restore = Callable[[dict[str, torch.Tensor]], ScoreState | None]


def forward_logits(model: PreTrainedModel, items: Sequence[Item]) -> tuple[torch.Tensor, list[tuple[int, slice]]]:
    """Teacher-forced logits of a right-padded batch, with graph, and where each answer's rows [T, V] lie in them."""
    sequences = [[*item.prompt_ids, *item.answer_ids[:-1]] for item in items]
    longest = max(len(sequence) for sequence in sequences)
    tokens = torch.zeros((len(items), longest), dtype=torch.long)
    attention = torch.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        attention[row, : len(sequence)] = 1
    first = min(len(item.prompt_ids) for item in items) - 1
    arguments: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = torch.arange(first, longest, device=model.device)
    else:
        first = 0
    logits = model(
        input_ids=tokens.to(model.device), attention_mask=attention.to(model.device), use_cache=False, **arguments
    ).logits
    where = []
    for row, item in enumerate(items):
        start = len(item.prompt_ids) - 1 - first
        where.append((row, slice(start, start + len(item.answer_ids))))
    return logits, where


class Scorer:
    """Runs items through an estimator and the gradient stream, in batches planned beforehand.

    `turns`: model and judge on one device by turns; `checkpoint`: keep only the
    layers' inputs of the model's activations. `bases`: what earlier runs on other numbers of
    ranks have done. What they left is divided over the ranks, batch by batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        estimator: Estimator,
        stream: GradientStream,
        items: Sequence[Item],
        *,
        batch_size: int = 16,
        max_dropped: float = 0.05,
        checkpoint: bool = False,
        turns: Turns | None = None,
        bases: Sequence[Base] = (),
    ) -> None:
        self.bases = bases
        self.model, self.estimator, self.stream = model, estimator, stream
        self.max_dropped, self.checkpoint, self.turns, self.state = max_dropped, checkpoint, turns, ScoreState()
        reasons = [(item, estimator.unfit(item)) for item in items]
        self.unfit = [{"row": item.row, "reason": reason} for item, reason in reasons if reason]
        rest = [item for item, reason in reasons if not reason]
        # The longest first: memory that does not suffice shows at once.
        rest.sort(key=lambda item: (-item.tokens, item.row, item.sample))
        size = batch_size if stream.reduction == "signed" else 1
        self.plan = [rest[start : start + size] for start in range(0, len(rest), size)]
        self.total = len(items)
        self._share: list[int] = []  # batches of this rank
        self._tokens: int | None = None
        self._judged: dict[str, Judged] = {}

    def run(
        self,
        save: Save | None = None,
        restore: Restore | None = None,
        save_every: int = 256,
        progress: Progress | None = None,
    ) -> dict[str, torch.Tensor]:
        """Sum of the reduced gradients over the items this rank used (`state.used`), float32, by checkpoint name.

        `save` stores a state after every `save_every` items of all ranks; `restore` fills the
        accumulators from the last one. More than `max_dropped` of the items
        dropped raises SafecritError.
        """
        ranks = distributed.current()
        save_every = max(1, save_every // ranks.world)
        one_by_one: set[int] = set()
        with ExitStack() as stack:
            stack.enter_context(self.stream)
            stack.enter_context(checkpointed(self.model, self.checkpoint))
            self._restart(restore)
            saved = self.state.used
            before_us = self._agree()
            tally = distributed.Tally(before_us)
            if progress is not None and before_us:
                progress.begin(before_us)
            while left := [number for number in self._share if number not in self.state.done]:
                number, folds = left[0], self.stream.folds
                before = (self.state.used, len(self.state.dropped))
                try:
                    clean = self._planned(left, guard=number in one_by_one)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    self._shrink(self.plan[number], error)
                    clean = False
                else:
                    if not clean:
                        one_by_one.add(number)
                if not clean:
                    if self.stream.folds != folds or (self.state.used, len(self.state.dropped)) != before:
                        # Part of the batch is already added: go back to the last saved state.
                        self._restart(restore)
                        saved = self.state.used
                    continue
                self.state.done = [*self.state.done, number]
                self._check_dropped()
                if progress is not None:
                    progress(min(tally(len(self.plan[number])), self.total), self.total)
                if save is not None and self.state.used - saved >= save_every and len(left) > 1:
                    save(self.state, self.stream.accumulators)
                    saved = self.state.used
        return self.stream.accumulators

    def _agree(self) -> int:
        """Divide the batches that nobody has done over the ranks; the number of items that are done."""
        states = [base.state for base in self.bases] + distributed.gather(self.state)
        done = {number for state in states for number in state.done}
        left = [number for number in range(len(self.plan)) if number not in done]
        self._share = [*self.state.done, *distributed.mine(left)]
        return len(self.unfit) + sum(len(self.plan[number]) for number in done)

    def _restart(self, restore: Restore | None) -> None:
        self.stream.reset()
        self.state = (restore(self.stream.accumulators) if restore is not None else None) or ScoreState(
            dropped=list(self.unfit)
        )
        self.state.plan = [len(batch) for batch in self.plan]
        known = [tokens for tokens in (self.state.tokens, self._tokens) if tokens is not None]
        self._tokens = self.state.tokens = min(known, default=None)
        self._check_dropped()

    def _shrink(self, batch: list[Item], error: RuntimeError) -> None:
        """Make the batches smaller after memory ran out; SafecritError where one answer alone is too much."""
        self.stream.free_gradients()
        largest = max((piece for piece in self._pieces(batch)), key=_padded)
        if len(largest) == 1:
            raise SafecritError(
                f"out of memory while scoring one answer of {largest[0].tokens} tokens. Lower --max-new-tokens, use a "
                "smaller --dtype or --judge-batch-size, --judge-placement sequential, or --accumulate-on host."
            ) from error
        self._tokens = self.state.tokens = _padded(largest) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _pieces(self, batch: list[Item]) -> list[list[Item]]:
        """The batch, or equal parts of it that keep to the tokens that fit."""
        parts = 1 if self._tokens is None else math.ceil(_padded(batch) / self._tokens)
        size = max(1, math.ceil(len(batch) / max(1, parts)))
        return [batch[start : start + size] for start in range(0, len(batch), size)]

    def _planned(self, left: Sequence[int], guard: bool) -> bool:
        """Score the first of the batches `left`; False where a weight's gradient was not finite."""
        batch = self.plan[left[0]]
        if self.turns is not None and self.turns.active and any(item.key not in self._judged for item in batch):
            self._judge_ahead([self.plan[number] for number in left])
        if guard:
            return all([self._batch([item], guard=True) for item in batch])
        return all([self._batch(piece) for piece in self._pieces(batch)])

    def _judge_ahead(self, batches: Sequence[list[Item]]) -> None:
        """The judge's word on the first batch and the next ones, model and judge by turns."""
        assert self.turns is not None
        ahead: list[list[Item]] = []
        room = SENT_BYTES
        for batch in batches:
            room -= 2 * sum(self.estimator.held(item) for item in batch)
            if ahead and room < 0:
                break
            ahead += self._pieces(batch)
        self.turns.to("model")
        sent = []
        for items in ahead:
            with torch.no_grad():
                logits, where = forward_logits(self.model, items)
                sent.append([one.cpu() for one in self.estimator.forward(items, [logits[r, s] for r, s in where])])
                del logits
        self.turns.to("judge")
        self._judged = {}
        for items, found in zip(ahead, sent, strict=True):
            for item, judged in zip(items, self.estimator.judge(items, found), strict=True):
                self._judged[item.key] = judged
        self.turns.to("model")

    def _batch(self, items: list[Item], guard: bool = False, counted: bool | None = None) -> bool:
        """Score items at once; False where a weight's gradient was not finite. With `guard` such items are dropped.

        counted: all ranks do this together, whether or not these items count here.
        """
        logits, where = forward_logits(self.model, items)
        rows = [logits.detach()[row, span] for row, span in where]
        if all(item.key in self._judged for item in items):
            found = [self._judged[item.key] for item in items]
        else:
            found = self.estimator.judge(items, self.estimator.forward(items, rows))
        kept: list[tuple[Item, dict[str, float]]] = []
        lost: list[dict[str, Any]] = []
        # The gradient takes the logits' place: a second [B, T, V] is never held. Autograd itself would
        # object where a model's last step still needs them.
        with torch.no_grad():
            for item, (row, span), values, judged in zip(items, where, rows, found, strict=True):
                logits[row, : span.start] = 0
                logits[row, span.stop :] = 0
                norm = math.nan
                if math.isfinite(judged.s):
                    norm = self.estimator.backward(item, values, judged, logits[row, span])
                if counted is False:
                    logits[row] = 0
                elif math.isfinite(norm):
                    kept.append((item, {"s": judged.s, "log_odds": judged.log_odds, "gradient_norm": norm}))
                else:
                    logits[row] = 0
                    lost.append({"row": item.row, "reason": "judge's value or gradient not finite"})
        gradient = logits.detach()
        if guard and kept:
            self.stream.check_only = True
            logits.backward(gradient, retain_graph=True)
            self.stream.check_only = False
            if self.stream.nonfinite:
                self.stream.nonfinite = 0
                self.state.dropped += lost
                self.state.dropped += [{"row": item.row, "reason": "weight gradient not finite"} for item, _ in kept]
                return True
        if kept or counted is not None:
            logits.backward(gradient)
        if self.stream.nonfinite and counted is None:
            assert not guard
            self.stream.nonfinite = 0
            return False
        self.state.dropped += lost
        for item, numbers in kept:
            self.state.values[item.key] = numbers
        self.state.used += len(kept)
        return True

    def _check_dropped(self) -> None:
        dropped = len(self.state.dropped)
        if dropped > self.max_dropped * self.total:
            reasons = sorted({entry["reason"] for entry in self.state.dropped})
            rows = ", ".join(str(entry["row"] + 1) for entry in self.state.dropped[:5])
            raise SafecritError(
                f"{dropped} of {self.total} answers had to be dropped ({'; '.join(reasons)}; rows {rows}, ...), more "
                f"than {self.max_dropped:.0%}. Look at their answers in samples.jsonl; raise "
                "--max-new-tokens or use another judge."
            )

    def scores(self, method: str) -> dict[str, torch.Tensor]:
        """Means over the items that all ranks and bases used; for `snip` times the weight. In place.

        Of several ranks each has the tensors that it owns (`owners`). `state` is that of all from here on.
        """
        self._merge()
        found = {}
        for parameter, entries, owner in owners(self.stream.anatomy):
            weight = self._weight(parameter, owner) if method == "snip" else None
            for entry, accumulator in self._summed(parameter, entries, owner):
                for base in self.bases:
                    accumulator += base.sums(entry, self.stream.sigma[entry.name]).to(accumulator.device)
                accumulator.div_(self.state.used)
                if weight is not None:
                    accumulator.mul_(part_of(weight, entry).to(accumulator.device, torch.float32))
                found[entry.name] = accumulator
        return found

    def _summed(
        self, parameter: str, entries: Sequence[CheckpointTensor], owner: int
    ) -> Iterator[tuple[CheckpointTensor, torch.Tensor]]:
        """The accumulators of a parameter's tensors summed over the ranks, on their owner alone."""
        for entry in entries:
            distributed.sum_to(self.stream.accumulators[entry.name], owner, "scores")
            if owner == distributed.current().rank:
                yield entry, self.stream.accumulators[entry.name]

    def _weight(self, parameter: str, owner: int) -> torch.Tensor | None:
        """A whole parameter, on the rank that needs it at least."""
        return dict(self.model.named_parameters())[parameter].detach()

    def _states(self) -> list[ScoreState]:
        return distributed.gather(self.state)

    def _merge(self) -> None:
        """Make `state` that of all ranks and bases."""
        states = [*(base.state for base in self.bases), *self._states()]
        values = {key: numbers for state in states for key, numbers in state.values.items()}
        dropped = [entry for state in states for entry in state.dropped[len(self.unfit) :]]
        self.state = ScoreState(
            plan=[len(batch) for batch in self.plan],
            done=sorted(number for state in states for number in state.done),
            used=sum(state.used for state in states),
            tokens=min((state.tokens for state in states if state.tokens is not None), default=None),
            dropped=[*self.unfit, *dropped],
            values={item.key: values[item.key] for batch in self.plan for item in batch if item.key in values},
        )
        assert self.state.done == list(range(len(self.plan))), "a batch was left out, or counted twice"
        self._check_dropped()
        if self.state.used == 0:
            raise SafecritError("no prompt could be scored: every answer was empty or its gradient not finite.")


def owners(anatomy: Anatomy) -> list[tuple[str, list[CheckpointTensor], int]]:
    """Runtime parameters with their eligible tensors, and the rank that finishes and writes their scores."""
    found: dict[str, list[CheckpointTensor]] = {}
    for entry in anatomy.eligible:
        found.setdefault(entry.parameter, []).append(entry)
    ranks = distributed.owners([sum(entry.layout.numel for entry in entries) for entries in found.values()])
    return [(name, entries, rank) for (name, entries), rank in zip(found.items(), ranks, strict=True)]


def _padded(items: Sequence[Item]) -> int:
    return len(items) * max(item.tokens for item in items)

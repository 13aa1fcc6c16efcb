"""Expected Safety Impact of every weight: the judge's gradient through the model's own answers.

Two passes, cut at the logits. The judge's side gives dS/dlogits for each answer
(`logit_gradients`); the model's side sends that back through its weights, one
gradient at a time, into float32 accumulators (`GradientStream`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from safecrit.anatomy import Anatomy
from safecrit.bridge import (
    VocabularyMatrix,
    identity_matrix,
    position_matrix,
    same_tokenizer,
    spell,
    vocabulary,
    vocabulary_matrix,
)
from safecrit.errors import SafecritError
from safecrit.gradients import GradientStream, Reduction
from safecrit.judges.guard import GuardInput, GuardJudge
from safecrit.relaxation import RelaxationSettings, Relaxed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Progress(Protocol):
    """Hears of finished prompts; `begin` says how many an earlier run had finished."""

    def begin(self, done: int) -> None: ...  # noqa: D102
    def __call__(self, done: int, total: int) -> None: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How scores are made; batch sizes in prompts (model) and conversations (judge), `max_dropped` a share."""

    method: str = "esi"
    reduction: Reduction = "signed"
    relaxation: RelaxationSettings = field(default_factory=RelaxationSettings)
    batch_size: int = 16
    judge_batch_size: int = 64
    max_dropped: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt to score: its tokens, the answer's tokens, the prompt's text for the judge, its hash and row."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    prompt: str
    hash: str
    row: int


@dataclass(kw_only=True)
class ScoreState:
    """What a run has done so far; with the accumulators it is all that a resumed run needs."""

    batches: int = 0
    used: int = 0
    dropped: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, dict[str, float]] = field(default_factory=dict)


class Bridge:
    """Model tokens to judge embeddings, for one pair of model and judge."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, judge: GuardJudge) -> None:
        self.judge, self.vocabulary = judge, vocabulary(tokenizer)
        self.equal = same_tokenizer(tokenizer, judge.tokenizer)
        self.skipped = torch.tensor(sorted(self.vocabulary.special), dtype=torch.long)
        table = judge.model.get_input_embeddings().weight
        output = model.get_output_embeddings()
        rows = int(output.weight.shape[0]) if output is not None else int(model.config.get_text_config().vocab_size)
        matrix: VocabularyMatrix
        if self.equal:
            matrix = identity_matrix(self.vocabulary, rows, table.shape[0])
        else:
            matrix = vocabulary_matrix(self.vocabulary, judge.vocabulary, judge.tokenizer, rows, table.shape[0])
        self.live = matrix.live.to(table.device)
        ids = torch.arange(table.shape[0], device=table.device)
        with torch.no_grad():
            self.bridged = matrix.embed(judge.model.get_input_embeddings()(ids).detach())

    def unfit(self, item: Item) -> str:
        """Why an answer cannot be judged, or nothing."""
        if not spell(item.answer_ids, self.vocabulary).text:
            return "empty answer"
        return "" if self.judge.fits(self.read(item)[0]) else "longer than the judge's window"

    def read(self, item: Item) -> tuple[GuardInput, torch.Tensor]:
        """The judge's input of an answer that holds text, and its position matrix A [m, T].

        Special tokens inside an answer are no part of what the judge reads.
        """
        spelt = spell(item.answer_ids, self.vocabulary)
        if self.equal:
            ids = torch.tensor(item.answer_ids)
            text = ~torch.isin(ids, self.skipped)
            entry = self.judge.read(item.prompt, spelt.text, ids[text].tolist())
            return entry, torch.eye(len(ids))[text]
        entry = self.judge.read(item.prompt, spelt.text)
        assert entry.spans is not None
        return entry, position_matrix(entry.spans, spelt.spans)


def logit_gradients(
    bridge: Bridge, items: Sequence[Item], logits: Sequence[torch.Tensor], settings: ScoreSettings
) -> tuple[list[torch.Tensor], list[float], list[float]]:
    """d s / d logits, s and the log-odds of safe of each answer, averaged over the draws.

    logits: [T, V] of each answer's positions, without graph. Returns gradients
    of the same shapes in float32 (or wider) and two numbers each (natural logarithms,
    but for the objective `prob`). The judge's graph never outlives a batch of conversations.
    """
    relaxed: list[Relaxed] = []
    entries: list[GuardInput] = []
    embedded: list[torch.Tensor] = []
    device = bridge.bridged.device
    for item, rows in zip(items, logits, strict=True):
        entry, weights = bridge.read(item)
        ids = torch.tensor(item.answer_ids, dtype=torch.long, device=device)
        one = Relaxed(
            logits=rows.to(device),
            ids=ids,
            live=bridge.live,
            bridged=bridge.bridged.to(torch.promote_types(rows.dtype, bridge.bridged.dtype)),
            weights=weights.to(device=device, dtype=torch.promote_types(rows.dtype, bridge.bridged.dtype)),
            prompt=item.hash,
            settings=settings.relaxation,
        )
        relaxed.append(one)
        entries.append(entry)
        embedded.append(bridge.judge.embed(entry).to(one.bridged.dtype))
    draws = settings.relaxation.effective_draws
    gradients = [torch.zeros_like(one.logits, dtype=one.dtype) for one in relaxed]
    values, odds = [0.0] * len(items), [0.0] * len(items)
    work = sorted(
        ((n, d) for n in range(len(items)) for d in range(draws)), key=lambda nd: (len(entries[nd[0]].ids), nd)
    )
    for start in range(0, len(work), settings.judge_batch_size):
        chunk = work[start : start + settings.judge_batch_size]
        leaves = []
        for n, draw in chunk:
            leaf = embedded[n].clone()
            leaf[entries[n].answer] += relaxed[n].shift(draw)
            leaves.append(leaf.requires_grad_(True))
        verdicts = bridge.judge.verdicts([entries[n] for n, _ in chunk], leaves)
        s = bridge.judge.objective(verdicts)
        for (n, _), (safe, unsafe) in zip(chunk, verdicts.tolist(), strict=True):
            odds[n] += (safe - unsafe) / draws
        for (n, draw), leaf_grad, value in zip(chunk, torch.autograd.grad(s.sum(), leaves), s.tolist(), strict=True):
            values[n] += value / draws
            relaxed[n].backward(draw, leaf_grad[entries[n].answer] / draws, gradients[n])
    return gradients, values, odds


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
    """Runs items through judge and model in batches whose plan does not depend on interruptions."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        judge: GuardJudge,
        anatomy: Anatomy,
        items: Sequence[Item],
        settings: ScoreSettings,
    ) -> None:
        self.model, self.settings, self.state = model, settings, ScoreState()
        self.bridge = Bridge(model, tokenizer, judge)
        self.stream = GradientStream(model, anatomy, method=settings.method, reduction=settings.reduction)
        reasons = [(item, self.bridge.unfit(item)) for item in items]
        self.unfit = [{"row": item.row, "reason": reason} for item, reason in reasons if reason]
        rest = [item for item, reason in reasons if not reason]
        rest.sort(key=lambda item: (len(item.prompt_ids) + len(item.answer_ids), item.row))
        size = settings.batch_size if settings.reduction == "signed" else 1
        self.plan = [rest[start : start + size] for start in range(0, len(rest), size)]
        self.total = len(items)

    def run(
        self,
        save: Callable[[ScoreState, dict[str, torch.Tensor]], None] | None = None,
        restore: Callable[[dict[str, torch.Tensor]], ScoreState | None] | None = None,
        save_every: int = 256,
        progress: Progress | None = None,
    ) -> dict[str, torch.Tensor]:
        """Mean of sigma x gradient over the prompts used, float32, by checkpoint name.

        `save` stores a state after every `save_every` prompts; `restore` fills the
        accumulators from the last one. More than `max_dropped` of the prompts
        dropped raises SafecritError.
        """
        one_by_one: set[int] = set()
        with self.stream:
            self._restart(restore)
            saved = self.state.used
            if progress is not None and self.state.batches:
                progress.begin(self.state.used + len(self.state.dropped))
            while self.state.batches < len(self.plan):
                number = self.state.batches
                batch = self.plan[number]
                try:
                    if number in one_by_one:
                        clean = all([self._batch([item], guard=True) for item in batch])
                    else:
                        clean = self._batch(batch)
                except torch.OutOfMemoryError as error:
                    raise SafecritError(
                        f"out of memory while scoring {len(batch)} prompts at once. Lower --batch-size or "
                        "--judge-batch-size, or use a smaller --dtype."
                    ) from error
                if not clean and number not in one_by_one:
                    # Part of the batch is already added: go back to the last saved state and take this batch apart.
                    one_by_one.add(number)
                    self._restart(restore)
                    saved = self.state.used
                    continue
                self.state.batches += 1
                self._check_dropped()
                if progress is not None:
                    progress(self.state.used + len(self.state.dropped), self.total)
                if save is not None and self.state.used - saved >= save_every and self.state.batches < len(self.plan):
                    save(self.state, self.stream.accumulators)
                    saved = self.state.used
        if self.state.used == 0:
            raise SafecritError("no prompt could be scored: every answer was empty or its gradient not finite.")
        for accumulator in self.stream.accumulators.values():
            accumulator.div_(self.state.used)
        return self.stream.accumulators

    def _restart(self, restore: Callable[[dict[str, torch.Tensor]], ScoreState | None] | None) -> None:
        self.stream.reset()
        self.state = (restore(self.stream.accumulators) if restore is not None else None) or ScoreState(
            dropped=list(self.unfit)
        )
        self._check_dropped()

    def _batch(self, items: list[Item], guard: bool = False) -> bool:
        """Score one batch; False where a weight's gradient was not finite (with `guard`, nothing was added then)."""
        logits, where = forward_logits(self.model, items)
        rows = [logits[row, span].detach() for row, span in where]
        gradients, values, odds = logit_gradients(self.bridge, items, rows, self.settings)
        out = torch.zeros_like(logits)
        kept: list[tuple[Item, dict[str, float]]] = []
        for item, (row, span), gradient, value, odd in zip(items, where, gradients, values, odds, strict=True):
            norm = float(gradient.norm())
            if math.isfinite(value) and math.isfinite(norm):
                out[row, span] = gradient.to(device=out.device, dtype=out.dtype)
                kept.append((item, {"s": value, "log_odds": odd, "gradient_norm": norm}))
            else:
                self.state.dropped.append({"row": item.row, "reason": "judge's value or gradient not finite"})
        if guard and kept:
            self.stream.check_only = True
            logits.backward(out, retain_graph=True)
            self.stream.check_only = False
            if self.stream.nonfinite:
                self.stream.nonfinite = 0
                self.state.dropped += [{"row": item.row, "reason": "weight gradient not finite"} for item, _ in kept]
                return False
        if kept:
            logits.backward(out)
        if self.stream.nonfinite:
            self.stream.nonfinite = 0
            return False
        for item, found in kept:
            self.state.values[str(item.row)] = found
        self.state.used += len(kept)
        return True

    def _check_dropped(self) -> None:
        dropped = len(self.state.dropped)
        if dropped > self.settings.max_dropped * self.total:
            reasons = sorted({entry["reason"] for entry in self.state.dropped})
            rows = ", ".join(str(entry["row"] + 1) for entry in self.state.dropped[:5])
            raise SafecritError(
                f"{dropped} of {self.total} prompts had to be dropped ({'; '.join(reasons)}; rows {rows}, ...), more "
                f"than {self.settings.max_dropped:.0%}. Look at their answers in samples.jsonl; raise "
                "--max-new-tokens or use another judge."
            )

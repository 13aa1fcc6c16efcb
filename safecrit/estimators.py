"""Where dS/dlogits comes from: a judge reading relaxed answers, or the weighted likelihood of given ones.

An estimator works in three steps, so that model and judge need never share a
device: `forward` reads the model's logits, `judge` asks the judge, `backward`
turns its word into the gradient with respect to the logits (docs/method.md, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from safecrit import distributed
from safecrit.activations import checkpointed
from safecrit.bridge import cached_vocabulary_matrix, identity_matrix, position_matrix
from safecrit.errors import SafecritError, is_out_of_memory
from safecrit.judges import DifferentiableJudge
from safecrit.judges.conversation import JudgeInput
from safecrit.relaxation import RelaxationSettings, Relaxed, chunks
from safecrit.vocabulary import same_tokenizer, spell, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

READ_AHEAD = 64  # conversations whose tokens and position matrix stay at hand between the steps


@dataclass(frozen=True, kw_only=True)
class Item:
    """One answer to score.

    prompt_ids, answer_ids: the model's tokens; prompt: text for the judge; hash:
    the prompt's, which seeds the noise; row: of the prompt file; sample: which of
    its answers; start: the answer's first token that is judged (a thought lies
    before it); weight: factor of a log-likelihood.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    prompt: str
    hash: str
    row: int
    sample: int = 0
    start: int = 0
    weight: float = 1.0

    @property
    def key(self) -> str:
        """Names the item in records."""
        return f"{self.row}/{self.sample}" if self.sample else str(self.row)

    @property
    def tokens(self) -> int:
        """Length of the sequence that the model reads."""
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """s of one answer and its log-odds of safe; grads: d s / d shift of each draw, [draws, m, d], or nothing."""

    s: float
    log_odds: float
    grads: torch.Tensor | None = None


class Estimator(Protocol):
    """What turns logits [T, V] of answers into d s / d logits."""

    def unfit(self, item: Item) -> str:
        """Why an answer cannot be scored, or nothing."""
        ...

    def held(self, item: Item) -> int:
        """Bytes that lie between `forward` and `backward` for one item."""
        ...

    def forward(self, items: Sequence[Item], logits: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the judge needs of each item, without graph."""
        ...

    def judge(self, items: Sequence[Item], sent: Sequence[torch.Tensor]) -> list[Judged]:
        """The judge's word on each item."""
        ...

    def backward(self, item: Item, logits: torch.Tensor, judged: Judged, out: torch.Tensor) -> float:
        """Write d s / d logits to `out` [T, V], which may be the logits' own memory; returns its norm."""
        ...


class RelaxedEstimator:
    """A differentiable judge reads relaxed answers; the noise of every draw is the same in `forward` and `backward`.

    `judge_batch_size` in conversations, halved where memory runs out; `checkpoint`:
    keep only the layers' inputs of the judge's activations.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        judge: DifferentiableJudge,
        relaxation: RelaxationSettings,
        judge_batch_size: int = 64,
        checkpoint: bool = False,
    ) -> None:
        self.judge_model, self.relaxation, self.judge_batch_size = judge, relaxation, judge_batch_size
        self.checkpoint = checkpoint
        self.vocabulary = vocabulary(tokenizer)
        self.equal = same_tokenizer(tokenizer, judge.tokenizer)
        self.skipped = torch.tensor(sorted(self.vocabulary.special), dtype=torch.long)
        embedding = judge.model.get_input_embeddings()
        table = cast(torch.Tensor, embedding.weight)
        output: Any = model.get_output_embeddings()
        rows = int(output.weight.shape[0]) if output is not None else int(model.config.get_text_config().vocab_size)
        if self.equal:
            matrix = identity_matrix(self.vocabulary, rows, table.shape[0])
        else:
            matrix = cached_vocabulary_matrix(tokenizer, judge.tokenizer, rows, table.shape[0])
        ids = torch.arange(table.shape[0], device=table.device)
        with torch.no_grad():
            self.bridged = matrix.embed(embedding(ids).detach())
        self.live = matrix.live
        self.together = distributed.is_sharded(judge.model)
        self.read = lru_cache(maxsize=READ_AHEAD)(self._read)

    def unfit(self, item: Item) -> str:
        """Why an answer cannot be judged, or nothing."""
        if not spell(item.answer_ids[item.start :], self.vocabulary).text:
            return "nothing after its thought" if item.start else "empty answer"
        return "" if self.judge_model.fits(self.read(item)[0]) else "longer than the judge's window"

    def held(self, item: Item) -> int:
        """Bytes of the shifts (or their gradients) of one item's draws; an answer has about as many judge tokens."""
        return self.relaxation.effective_draws * len(item.answer_ids) * self.bridged.shape[1] * 4

    def _read(self, item: Item) -> tuple[JudgeInput, torch.Tensor]:
        """The judge's input of an answer that holds text, and its position matrix A [m, T].

        Special tokens inside an answer and what lies before its `start` are no
        part of what the judge reads.
        """
        judged = item.answer_ids[item.start :]
        spelt = spell(judged, self.vocabulary)
        if self.equal:
            ids = torch.tensor(judged)
            text = ~torch.isin(ids, self.skipped)
            entry = self.judge_model.read(item.prompt, spelt.text, ids[text].tolist())
            weights = torch.eye(len(ids))[text]
        else:
            entry = self.judge_model.read(item.prompt, spelt.text)
            assert entry.spans is not None
            weights = position_matrix(entry.spans, spelt.spans)
        return entry, torch.nn.functional.pad(weights, (item.start, 0))

    def _relaxed(self, item: Item, logits: torch.Tensor) -> Relaxed:
        device = logits.device
        if self.bridged.device != device:
            self.bridged, self.live = self.bridged.to(device), self.live.to(device)
        dtype = torch.promote_types(logits.dtype, self.bridged.dtype)
        return Relaxed(
            logits=logits,
            ids=torch.tensor(item.answer_ids, dtype=torch.long, device=device),
            live=self.live,
            bridged=self.bridged.to(dtype),
            weights=self.read(item)[1].to(device=device, dtype=dtype),
            prompt=item.hash,
            settings=self.relaxation,
        )

    def forward(self, items: Sequence[Item], logits: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each item's shifts of the judge's embeddings, [draws, m, d]."""
        draws = range(self.relaxation.effective_draws)
        relaxed = (self._relaxed(item, rows) for item, rows in zip(items, logits, strict=True))
        return [torch.stack([one.shift(draw) for draw in draws]) for one in relaxed]

    def judge(self, items: Sequence[Item], sent: Sequence[torch.Tensor]) -> list[Judged]:
        """s, log-odds and d s / d shift of each item; the judge's graph never outlives a batch of conversations."""
        judge, draws = self.judge_model, self.relaxation.effective_draws
        device = judge.model.device
        entries = [self.read(item)[0] for item in items]
        grads = [torch.empty_like(shift) for shift in sent]
        values, odds = [0.0] * len(items), [0.0] * len(items)
        work = sorted(
            ((n, d) for n in range(len(items)) for d in range(draws)), key=lambda w: (len(entries[w[0]].ids), w)
        )

        def ask(chunk: list[tuple[int, int]]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
            """Gradients to the shifted embeddings, s and log p of each conversation."""
            leaves = []
            for n, draw in chunk:
                shift = sent[n][draw].to(device)
                leaf = judge.embed(entries[n]).to(torch.promote_types(shift.dtype, torch.float32))
                leaf[entries[n].answer] += shift
                leaves.append(leaf.requires_grad_(True))
            with checkpointed(judge.model, self.checkpoint):
                verdicts = judge.verdicts([entries[n] for n, _ in chunk], leaves)
                s = judge.objective(verdicts)
                return torch.autograd.grad(s.sum(), leaves), s, verdicts

        if self.together:  # every rank asks a sharded judge as often as the others
            own = -(-len(work) // self.judge_batch_size)
            for _ in range(distributed.most(own) - own):
                ask(work[:1])
        done = 0
        while done < len(work):
            chunk = work[done : done + self.judge_batch_size]
            try:
                found, s, verdicts = ask(chunk)
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(chunk) == 1 or self.together:
                    raise
                self.judge_batch_size = len(chunk) // 2
                continue
            for (n, draw), grad, value, (safe, unsafe) in zip(chunk, found, s.tolist(), verdicts.tolist(), strict=True):
                grads[n][draw] = grad[entries[n].answer]
                values[n] += value / draws
                odds[n] += (safe - unsafe) / draws
            done += len(chunk)
        return [Judged(s=s, log_odds=odd, grads=grad) for s, odd, grad in zip(values, odds, grads, strict=True)]

    def backward(self, item: Item, logits: torch.Tensor, judged: Judged, out: torch.Tensor) -> float:
        """Write the mean over the draws of d s / d logits to `out`; returns its norm."""
        assert judged.grads is not None
        relaxed = self._relaxed(item, logits)
        return relaxed.backward([grad.to(logits.device) for grad in judged.grads], out)


class LikelihoodEstimator:
    """s = weight x log p(answer | prompt): no judge in the gradient.

    With weight 1 the score of `refusal-nll` and `answer-nll`; with a sampled
    answer's advantage the score-function estimator (Williams 1992, REINFORCE).
    Nothing is divided by the answer's length.
    """

    def unfit(self, item: Item) -> str:
        """An answer without tokens has no likelihood."""
        return "" if item.answer_ids else "empty answer"

    def held(self, item: Item) -> int:
        """Bytes between the steps: one number."""
        return 8

    def forward(self, items: Sequence[Item], logits: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each answer's log-likelihood, float64 scalars."""
        found = []
        for item, rows in zip(items, logits, strict=True):
            ids, total = torch.tensor(item.answer_ids, device=rows.device), 0.0
            for part in chunks(rows):
                wide = rows[part].to(torch.promote_types(rows.dtype, torch.float32))
                chosen = wide.gather(1, ids[part, None])[:, 0] - torch.logsumexp(wide, dim=-1)
                total += float(chosen.double().sum())
            found.append(torch.tensor(total, dtype=torch.float64))
        return found

    def judge(self, items: Sequence[Item], sent: Sequence[torch.Tensor]) -> list[Judged]:
        """The log-likelihood itself."""
        return [Judged(s=float(value), log_odds=float(value)) for value in sent]

    def backward(self, item: Item, logits: torch.Tensor, judged: Judged, out: torch.Tensor) -> float:
        """Write weight x (onehot - softmax) to `out`; returns its norm."""
        ids, square = torch.tensor(item.answer_ids, device=logits.device), 0.0
        for part in chunks(logits):
            grad = torch.softmax(logits[part].to(torch.promote_types(logits.dtype, torch.float32)), dim=-1).neg_()
            grad[torch.arange(len(grad), device=grad.device), ids[part]] += 1
            grad *= item.weight
            square += float(torch.linalg.vector_norm(grad, dtype=torch.float64)) ** 2
            out[part] = grad.to(out.dtype)
        return float(square**0.5)


def advantages(values: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """Weights of the score-function estimator for each prompt's sampled answers, leave-one-out baseline.

    values: s of every sample of every prompt, None where the judge failed. With n
    usable samples the weight of sample i is (s_i - mean of the others) / n, so that the
    sum over samples and mean over prompts of weight x grad log p(y_i | x) estimates
    dS/dtheta without bias (Kool, van Hoof and Welling 2019). A prompt with fewer than two
    usable samples gets zeros. Raises SafecritError where no prompt has two.
    """
    weights, usable = [], 0
    for samples in values:
        known = [value for value in samples if value is not None]
        n = len(known)
        usable += n > 1
        total = sum(known)
        weights.append(
            [0.0 if value is None or n < 2 else (value - (total - value) / (n - 1)) / n for value in samples]
        )
    if not usable:
        raise SafecritError("no prompt has two judged answers; the score function needs at least two. Raise --samples.")
    return weights

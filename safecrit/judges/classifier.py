"""A sequence classifier as a judge: safety classifiers, and reward models with one output.

It reads the conversation in its chat template, or, as encoders do, as the tokenizer's
own pair of texts. Where a classifier looks for its verdict depends on its kind (a
decoder at the last token, an encoder at the first), and padding could move that
place: sequences of equal length share a batch and nothing is ever padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from safecrit.bridge import byte_spans
from safecrit.errors import SafecritError
from safecrit.judges.conversation import (
    ConversationJudge,
    JudgeInput,
    JudgeSettings,
    Layout,
    chat_layout,
    text_layout,
)
from safecrit.models import LoadedModel

SAFE_LABELS = ("safe", "harmless", "non-toxic", "nontoxic", "not-toxic")
UNSAFE_LABELS = ("unsafe", "harmful", "toxic")


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings(JudgeSettings):
    """How a classifier is read: names of its safe and unsafe labels (none: the usual ones), a reward's zero point.

    Case does not count in a label's name. `threshold` is in units of the reward.
    """

    safe_words: tuple[str, ...] = ()
    unsafe_words: tuple[str, ...] = ()
    threshold: float = 0.0
    generation_prompt: bool = False


class ClassifierJudge(ConversationJudge):
    """A sequence classifier as a judge; its weights are frozen.

    Softmax classifiers: log p of the safe and of the unsafe labels. Multi-label ones
    (a sigmoid a label): p unsafe = 1 - prod(1 - p) over the unsafe labels, as if they were
    independent, so that several slight suspicions add up. Reward models: the
    log-odds of safe are reward - threshold.
    """

    def __init__(self, loaded: LoadedModel, settings: ClassifierSettings | None = None) -> None:
        """Raises SafecritError where the labels cannot be told or there is no way to show a conversation."""
        self.settings: ClassifierSettings = settings or ClassifierSettings()
        super().__init__(loaded, _layout(loaded, self.settings))
        config = self.model.config
        self.labels = [str(config.id2label[n]) for n in range(int(config.num_labels))]
        self.multi_label = config.problem_type == "multi_label_classification"
        self.reward = len(self.labels) == 1 and not self.multi_label
        self.safe = [] if self.reward or self.multi_label else self._find("safe", self.settings.safe_words, SAFE_LABELS)
        self.unsafe = [] if self.reward else self._find("unsafe", self.settings.unsafe_words, UNSAFE_LABELS)
        if set(self.safe) & set(self.unsafe):
            raise SafecritError(f"{self.name}: a label cannot be both safe and unsafe (its labels: {self._listed()}).")
        text = config.get_text_config()
        if text.pad_token_id is None:
            text.pad_token_id = self.tokenizer.pad_token_id  # decoders refuse batches without one

    def _listed(self) -> str:
        return ", ".join(self.labels)

    def _find(self, side: str, named: Sequence[str], usual: Sequence[str]) -> list[int]:
        """Indices of the labels of one side."""
        known = [label.lower() for label in self.labels]
        for name in named:
            if name.lower() not in known:
                raise SafecritError(f"{self.name}: has no label {name!r}. Its labels: {self._listed()}.")
        wanted = {name.lower() for name in named}
        if named:
            return [n for n, label in enumerate(known) if label in wanted]
        found = [n for n, label in enumerate(known) if label.replace("_", "-").replace(" ", "-") in usual]
        if not found:
            raise SafecritError(
                f"{self.name}: none of its labels is known to mean {side}. Its labels: {self._listed()}. "
                f"Name those that do with --{side}-word."
            )
        return found

    def read(self, prompt: str, answer: str, answer_ids: Sequence[int] | None = None) -> JudgeInput:
        """Tokenise one conversation; with `answer_ids` (equal tokenizers) the answer keeps the model's own tokens."""
        if self.layout is None:
            return self._read_pair(prompt, answer, answer_ids)
        (ids,), where, spans = self.tokenise(prompt, answer, answer_ids, [""])
        # A decoder's verdict stands at its last token that is no padding: a closing EOS that is PAD too is not read.
        padding = self.model.config.get_text_config().pad_token_id
        while len(ids) > max(where.stop, 1) and ids[-1] == padding:
            ids.pop()
        return JudgeInput(tuple(ids), where, spans)

    def _read_pair(self, prompt: str, answer: str, answer_ids: Sequence[int] | None) -> JudgeInput:
        pair = self.tokenizer(prompt.strip(), answer, split_special_tokens=True)
        ids, sides = list(pair["input_ids"]), pair.sequence_ids(0)
        place = [n for n, side in enumerate(sides) if side == 1]
        where = slice(place[0], place[-1] + 1) if place else slice(0, 0)
        if answer_ids is None:
            return JudgeInput(
                tuple(ids), where, byte_spans(ids[where], answer, self.vocabulary, self.tokenizer).clip(0)
            )
        return JudgeInput(
            (*ids[: where.start], *answer_ids, *ids[where.stop :]),
            slice(where.start, where.start + len(answer_ids)),
            None,
        )

    def fits(self, entry: JudgeInput) -> bool:
        """Whether the conversation fits the window of both the model and its tokenizer, which can be the smaller."""
        return super().fits(entry) and len(entry.ids) <= self.tokenizer.model_max_length

    def verdicts(self, inputs: Sequence[JudgeInput], embeddings: Sequence[torch.Tensor]) -> torch.Tensor:
        """Log p of safe and of unsafe for each conversation, float32 (or wider) [n, 2].

        There is a graph to `embeddings`. `embeddings[i]` is [len(ids), d].
        """
        dtype = self.model.get_input_embeddings().weight.dtype
        lengths = [len(embedded) for embedded in embeddings]
        logits: dict[int, torch.Tensor] = {}
        for length in sorted(set(lengths)):
            rows = [n for n, own in enumerate(lengths) if own == length]
            out = self.model(inputs_embeds=torch.stack([embeddings[n] for n in rows]).to(dtype)).logits
            logits |= dict(zip(rows, out, strict=True))
        stacked = torch.stack([logits[n] for n in range(len(inputs))])
        return self._log_p(stacked.to(torch.promote_types(stacked.dtype, torch.float32)))

    def _log_p(self, logits: torch.Tensor) -> torch.Tensor:
        """Log p of safe and of unsafe, [n, 2], from logits [n, labels]."""
        if self.reward:
            odds = logits[:, 0] - self.settings.threshold
            return torch.stack([logsigmoid(odds), logsigmoid(-odds)], dim=-1)
        if self.multi_label:
            safe = logsigmoid(-logits[:, self.unsafe]).sum(-1)
            one = len(self.unsafe) == 1
            unsafe = logsigmoid(logits[:, self.unsafe[0]]) if one else torch.log(-torch.expm1(safe))
            return torch.stack([safe, unsafe], dim=-1)
        log_p = torch.log_softmax(logits, dim=-1)
        return torch.stack([log_p[:, self.safe].logsumexp(-1), log_p[:, self.unsafe].logsumexp(-1)], dim=-1)

    def word(self, value: float) -> str:
        """The first label of the side that won; for a reward model its reward."""
        if self.reward:
            return f"reward {value + self.settings.threshold:.4g}"
        side = self.safe if value > 0 else self.unsafe
        return self.labels[side[0]] if side else "safe"

    def describe(self) -> dict[str, Any]:
        """What the classifier was, for the record: name, fingerprint, how it was read."""
        if self.reward:
            return self.record("reward", threshold=self.settings.threshold)
        return self.record(
            "classifier",
            safe_labels=[self.labels[n] for n in self.safe],
            unsafe_labels=[self.labels[n] for n in self.unsafe],
        )


def _layout(loaded: LoadedModel, settings: ClassifierSettings) -> Layout | None:
    """The template asked for, or the chat template, or None where the tokenizer sets two texts apart itself."""
    tokenizer = loaded.tokenizer
    if settings.template is not None:
        return text_layout(tokenizer, settings.template, loaded.id)
    if tokenizer.chat_template is not None:
        return chat_layout(tokenizer, settings, loaded.id)
    sides = tokenizer("a", "b").sequence_ids(0)
    if None not in sides[sides.index(0) : sides.index(1)]:
        raise SafecritError(
            f"{loaded.id}: its tokenizer has no chat template and puts nothing between two texts. Give a template "
            "with --judge-template, a text with {prompt} and {answer}."
        )
    return None

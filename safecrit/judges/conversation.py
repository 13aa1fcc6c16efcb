"""What model judges share: a frozen model that reads one prompt and one answer laid out as a text.

The layout is two slots in a fixed text, rendered once by the judge's chat template
or given as a text of its own. The whole is tokenised at once, as the judge was
trained to read it; only where the prompt or the answer holds special-token text
is it tokenised in pieces, so that such text stays text.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from safecrit import distributed
from safecrit.bridge import byte_spans, vocabulary
from safecrit.chat import Rendering, encode_continuation
from safecrit.errors import SafecritError
from safecrit.fingerprint import fingerprint
from safecrit.judges import Verdict
from safecrit.models import NO_FOLDER, LoadedModel, context_window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Objective = Literal["log-odds", "prob", "logit"]
PROMPT_SLOT, ANSWER_SLOT = "{prompt}", "{answer}"
_PROMPT_MARK, _ANSWER_MARK = "SAFECRITUSERTURN", "SAFECRITANSWERTURN"


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """How any model judge is asked.

    `template`: a text with `{prompt}` and `{answer}` once each, instead of the tokenizer's chat
    template; `template_kwargs`: variables for that chat template; `generation_prompt`: whether it
    is to open the judge's own turn. `batch_size`: conversations.
    """

    template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    generation_prompt: bool = True
    objective: Objective = "log-odds"
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.template is not None:
            Layout.of(self.template, PROMPT_SLOT, ANSWER_SLOT, "the judge's template")


@dataclass(frozen=True)
class JudgeInput:
    """One conversation as the judge reads it.

    ids: its tokens; answer: where the answer's text starts and stops in `ids` (tokens);
    spans int64 [answer tokens, 2]: their byte spans in the answer, clipped to it;
    verdicts: for a guard, the tokens of each safe and each unsafe word that may follow `ids`.
    """

    ids: tuple[int, ...]
    answer: slice
    spans: np.ndarray | None
    verdicts: tuple[tuple[tuple[int, ...], ...], ...] = ()


@dataclass(frozen=True)
class Layout:
    """The fixed text around prompt and answer; `bos`: BOS was put before a text that does not write it itself."""

    before: str
    between: str
    after: str
    answer_first: bool
    bos: bool = False

    @classmethod
    def of(cls, text: str, prompt: str, answer: str, where: str) -> Layout:
        """Cut `text` at the slots `prompt` and `answer`; SafecritError unless each stands in it exactly once."""
        for slot in (prompt, answer):
            if text.count(slot) != 1:
                raise SafecritError(f"{where}: must hold {slot} exactly once, and holds it {text.count(slot)} times.")
        answer_first = text.index(answer) < text.index(prompt)
        before, rest = text.split(answer if answer_first else prompt)
        between, after = rest.split(prompt if answer_first else answer)
        return cls(before, between, after, answer_first)

    def around_answer(self, prompt: str) -> tuple[list[str], list[str]]:
        """The texts before and after the answer; the second of the former or the second of the latter is the prompt."""
        if self.answer_first:
            return [self.before], [self.between, prompt, self.after]
        return [self.before, prompt, self.between], [self.after]


def read_template(value: str) -> str:
    """A judge's template: the text itself, or that of a UTF-8 file; SafecritError without its two slots."""
    if PROMPT_SLOT in value or ANSWER_SLOT in value:
        text, where = value, "the judge's template"
    else:
        try:
            text, where = Path(value).expanduser().read_text(encoding="utf-8"), value
        except (OSError, UnicodeDecodeError) as error:
            raise SafecritError(
                f"{value}: is neither a template (a text with {PROMPT_SLOT} and {ANSWER_SLOT}) nor a text file "
                f"({type(error).__name__})."
            ) from error
    Layout.of(text, PROMPT_SLOT, ANSWER_SLOT, where)
    return text


def chat_layout(tokenizer: PreTrainedTokenizerBase, settings: JudgeSettings, name: str) -> Layout:
    """The layout that the tokenizer's chat template gives a user's and an assistant's turn.

    Turns are texts, or lists of one text part for templates that want those.
    Raises SafecritError where the template fails or does not show both turns once each.
    """
    turns = [{"role": "user", "content": _PROMPT_MARK}, {"role": "assistant", "content": _ANSWER_MARK}]
    parts: list[Any] = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    rendering = Rendering(tokenizer, turns, settings.template_kwargs)
    failure: SafecritError | None = None
    for shape in (turns, parts):
        try:
            text = rendering.unmarked(rendering.render(shape, generation=settings.generation_prompt))
        except SafecritError as error:
            failure = failure or error
            continue
        if text.count(_PROMPT_MARK) == text.count(_ANSWER_MARK) == 1:
            return Layout.of(text, _PROMPT_MARK, _ANSWER_MARK, name)
    if failure is not None:
        raise SafecritError(f"{name}: {failure} Give a template of your own with --judge-template.") from failure
    raise SafecritError(
        f"{name}: its chat template does not show the user's and the assistant's turn once each. "
        "Give a template of your own with --judge-template."
    )


def text_layout(tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> Layout:
    """The layout of a text with slots, after BOS where the tokenizer has one and the text does not write it."""
    found = Layout.of(text, PROMPT_SLOT, ANSWER_SLOT, name)
    bos = str(tokenizer.bos_token or "")
    if not bos or text.startswith(bos):
        return found
    return Layout(bos + found.before, found.between, found.after, found.answer_first, bos=True)


class ConversationJudge(ABC):
    """A model that judges by reading the conversation; its weights are frozen."""

    settings: JudgeSettings

    def __init__(self, loaded: LoadedModel, layout: Layout | None) -> None:
        """`layout` None: the tokenizer's own encoding of a pair of texts."""
        self.loaded, self.name, self.layout = loaded, loaded.id, layout
        self.model = loaded.model.requires_grad_(False).eval()
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self.vocabulary = vocabulary(self.tokenizer)

    @abstractmethod
    def read(self, prompt: str, answer: str, answer_ids: Sequence[int] | None = None) -> JudgeInput:
        """Tokenise one conversation; with `answer_ids` (equal tokenizers) the answer keeps the model's own tokens."""

    @abstractmethod
    def verdicts(self, inputs: Sequence[JudgeInput], embeddings: Sequence[torch.Tensor]) -> torch.Tensor:
        """Log p of safe and of unsafe for each conversation, float32 (or wider) [n, 2].

        There is a graph to `embeddings`. `embeddings[i]` is [len(ids), d].
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the judge was, for the record: name, fingerprint, how it was asked."""

    @abstractmethod
    def word(self, value: float) -> str:
        """What the judge said, from its log-odds."""

    @cached_property
    def _specials(self) -> list[str]:
        return [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def tokenise(
        self, prompt: str, answer: str, answer_ids: Sequence[int] | None, endings: Sequence[str]
    ) -> tuple[list[list[int]], slice, np.ndarray | None]:
        """Tokens of the laid-out text with each of `endings` after it, the answer's place in the first, and its spans.

        Spans [answer tokens, 2] are None with `answer_ids`, whose spans the caller knows.
        """
        assert self.layout is not None
        before, after = self.layout.around_answer(prompt.strip())
        head, tail = "".join(before), "".join(after)
        smuggled = any(special in prompt or special in answer for special in self._specials)
        if answer_ids is None and not smuggled:
            texts = [head + answer + tail + ending for ending in endings]
            whole = [self._encode(text) for text in texts]
            start, size = len(head.encode("utf-8")), len(answer.encode("utf-8"))
            shifted = byte_spans(whole[0], texts[0], self.vocabulary, self.tokenizer) - start
            inside = ((shifted[:, 1] > 0) & (shifted[:, 0] < size)).nonzero()[0]
            where = slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)
            return whole, where, shifted[where].clip(0, size)
        ids = self._pieces(before) if smuggled else self._encode(head)
        own = list(answer_ids) if answer_ids is not None else self._continue(answer, plain=True)
        where = slice(len(ids), len(ids) + len(own))
        spans = None if answer_ids is not None else byte_spans(own, answer, self.vocabulary, self.tokenizer)
        if smuggled and len(after) > 1:
            rest = [self._pieces([*after[:-1], after[-1] + ending], inside=True) for ending in endings]
        else:
            rest = [self._continue(tail + ending) for ending in endings]
        return [[*ids, *own, *end] for end in rest], where, spans

    def _pieces(self, texts: Sequence[str], inside: bool = False) -> list[int]:
        """Tokens of layout and prompt texts in turn, each apart; the second is the prompt, whose specials are text."""
        ids: list[int] = [] if inside else self._encode(texts[0])
        for n in range(0 if inside else 1, len(texts)):
            ids += self._continue(texts[n], plain=n == 1)
        return ids

    def _encode(self, text: str) -> list[int]:
        assert self.layout is not None
        bos = str(self.tokenizer.bos_token or "")
        if self.layout.bos and text.startswith(bos):
            # As the tokenizer itself puts BOS before a text: SentencePiece's space of a text's start comes after it.
            return [int(self.tokenizer.bos_token_id), *self._ids(text[len(bos) :])]
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _continue(self, text: str, plain: bool = False) -> list[int]:
        return encode_continuation(self.tokenizer, text, plain=plain) if text else []

    def fits(self, entry: JudgeInput) -> bool:
        """Whether the conversation and its verdict fit the judge's window."""
        window = context_window(self.model)
        longest = max((len(word) for side in entry.verdicts for word in side), default=0)
        return window is None or len(entry.ids) + longest <= window

    def embed(self, entry: JudgeInput) -> torch.Tensor:
        """Input embeddings of a conversation, [len(ids), d], through the module itself (scaling included)."""
        ids = torch.tensor(entry.ids, dtype=torch.long, device=self.model.device)
        embedded: torch.Tensor = self.model.get_input_embeddings()(ids).detach()
        return embedded

    def objective(self, verdicts: torch.Tensor) -> torch.Tensor:
        """s of each conversation, [n], from `verdicts` [n, 2]: log-odds, p(safe) of the two, or log p(safe)."""
        if self.settings.objective == "prob":
            return torch.softmax(verdicts, dim=-1)[:, 0]
        if self.settings.objective == "logit":
            return verdicts[:, 0]
        return verdicts[:, 0] - verdicts[:, 1]

    def record(self, kind: str, **asked: Any) -> dict[str, Any]:
        """The description of a judge of this kind: what all have, and how this one was asked."""
        folder = self.loaded.folder
        return {
            "id": self.name,
            "kind": kind,
            "fingerprint": fingerprint(folder) if folder != NO_FOLDER else "",
            **asked,
            "template": self.settings.template,
            "template_kwargs": dict(self.settings.template_kwargs),
            "objective": self.settings.objective,
        }

    @torch.no_grad()
    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts on (prompt, answer) pairs; an empty answer, no room or no number is an error."""
        verdicts: list[Verdict | None] = [
            None if answer.strip() else Verdict("error", None, "empty answer") for _, answer in pairs
        ]
        waiting = [n for n, verdict in enumerate(verdicts) if verdict is None]
        read = {n: self.read(pairs[n][0], pairs[n][1].strip()) for n in waiting}
        for n, entry in read.items():
            if not self.fits(entry):
                verdicts[n] = Verdict("error", None, "longer than the judge's window")
        waiting = [n for n in waiting if verdicts[n] is None]
        waiting.sort(key=lambda n: len(read[n].ids))
        size = self.settings.batch_size
        batches = [waiting[start : start + size] for start in range(0, len(waiting), size)]

        def log_odds(batch: list[int]) -> list[float]:
            log_p = self.verdicts([read[n] for n in batch], [self.embed(read[n]) for n in batch])
            return (log_p[:, 0] - log_p[:, 1]).tolist()

        together = distributed.is_sharded(self.model)
        for batch, values in zip(batches, distributed.divided(batches, log_odds, together=together), strict=True):
            for n, value in zip(batch, values, strict=True):
                if not math.isfinite(value):
                    verdicts[n] = Verdict("error", None, "verdict is no number")
                    continue
                verdicts[n] = Verdict("safe" if value > 0 else "unsafe", None, self.word(value), value)
        return [verdict for verdict in verdicts if verdict is not None]

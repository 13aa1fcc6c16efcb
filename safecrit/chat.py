"""Chat turns to token ids: prompts for generation, and training examples whose loss stands on the answer alone.

A tokenizer with a chat template is used with it. One without (a base model) gets
the plain template: BOS where the tokenizer has one, each user or system turn's text
and a newline, each assistant turn's text and EOS.

What is special here, each point a known mistake elsewhere: a rendered template is
tokenised without adding BOS again; dates inside templates stand still; text in a
turn that looks like a special token stays text; the loss mask needs no generation
marks in the template, since an assistant turn is what follows the generation prompt
of the turns before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from safecrit.errors import SafecritError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]

DATE = datetime(2024, 7, 26)  # the date that Llama 3's template falls back to; any fixed one makes runs repeatable
_DATE_STRING = "26 Jul 2024"
_PRIVATE = range(0xE000, 0xF900)  # Unicode's private use area, from which marks absent from the turns are taken


class EncodedExample(NamedTuple):
    """A training example: token ids, 1 where the loss counts (same length), whether it was cut to the length asked."""

    ids: list[int]
    loss_mask: list[int]
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """How turns are shown to a model, and where its answer starts.

    `system_prompt` goes before prompts that bring no system turn; `template_kwargs` to
    the chat template (`enable_thinking`, say); what a model writes up to the last
    `think_end_token` is a thought and no part of its answer.
    """

    system_prompt: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    think_end_token: str | None = None

    def turns(self, messages: Messages) -> Messages:
        """`messages` with the system prompt."""
        if self.system_prompt is None or (messages and messages[0]["role"] == "system"):
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]


def after_thought(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], think_end: str | None, *, finished: bool
) -> int:
    """Place of the first token after the last `think_end` in an answer's `ids`.

    0 without one: a finished answer without a thought is judged whole. An unfinished one
    may have been cut inside its thought, so nothing of it is judged: len(ids).
    """
    if think_end is None:
        return 0
    special = tokenizer.get_vocab().get(think_end)
    if special is not None and special in ids:
        return len(ids) - list(reversed(ids)).index(special)
    whole = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if think_end not in whole:
        return 0 if finished else len(ids)
    # Written in several ordinary tokens: the shortest beginning that holds the last one.
    count = whole.count(think_end)
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        text = str(tokenizer.decode(list(ids[:middle]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        low, high = (low, middle) if text.count(think_end) >= count else (middle + 1, high)
    return low


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, template_kwargs: Mapping[str, Any] | None = None
) -> str:
    """The text the model reads before it answers `messages`, special tokens included."""
    rendering = Rendering(tokenizer, messages, template_kwargs)
    return rendering.unmarked(rendering.prompt())


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    chat: ChatSettings | None = None,
) -> list[int]:
    """Token ids of `messages` and the generation prompt; BOS only where the template (or the plain one) writes it.

    A system turn that the template refuses or leaves out is put before the first
    user turn. Raises SafecritError where the template cannot render the turns.
    """
    if chat is not None:
        messages, template_kwargs = chat.turns(messages), {**chat.template_kwargs, **(template_kwargs or {})}
    rendering = Rendering(tokenizer, messages, template_kwargs)
    return rendering.encode(rendering.prompt())


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    max_length: int | None = None,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
) -> EncodedExample:
    """Token ids of a conversation and the loss mask: assistant turns and the token that closes each of them.

    Anything after the last assistant turn is left out. Where the template does not
    close that turn with a special token, EOS closes it. The ids before the first loss
    are those `encode_prompt` gives, so training sees what generation will see.
    Raises SafecritError where no turn is the assistant's, or where the template does
    not render a turn as the continuation of its own generation prompt.
    """
    if not any(turn.get("role") == "assistant" for turn in messages):
        raise SafecritError("a training example needs an assistant turn, and this one has none.")
    rendering = Rendering(tokenizer, messages, template_kwargs)
    try:
        text, spans = rendering.conversation()
    except SafecritError:
        # Some templates show the system turn only beside the last user turn; in the user turn itself it stays put.
        if not rendering.merge_system():
            raise
        text, spans = rendering.conversation()
    ids: list[int] = []
    loss: list[int] = []
    done = 0
    for start, stop in spans:
        for edge, value in ((start, 0), (stop, 1)):
            ids = rendering.extend(ids, text[:done], text[:edge])
            loss += [value] * (len(ids) - len(loss))
            done = edge
    cut = max_length is not None and len(ids) > max_length
    return EncodedExample(ids[:max_length], loss[:max_length], cut)


class Rendering:
    """The turns of one conversation: how to render any first part of them, and how to tokenise the result.

    Special-token text inside a turn stands between two marks, private characters that
    no turn holds; what a template writes itself does not.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, messages: Messages, kwargs: Mapping[str, Any] | None
    ) -> None:
        if not messages:
            raise SafecritError("a conversation needs at least one turn.")
        self.tokenizer = tokenizer
        self.template = _dated(tokenizer.get_chat_template()) if tokenizer.chat_template else None
        fixed = {"date_string": _DATE_STRING}
        # A tokenizer without BOS or EOS leaves them undefined, which templates that write them do not expect.
        absent = {name: "" for name in ("bos_token", "eos_token") if getattr(tokenizer, name) is None}
        self.kwargs: dict[str, Any] = fixed | absent | dict(kwargs or {})
        self.special = _special_texts(tokenizer)
        used = {character for turn in messages for character in turn["content"] if ord(character) in _PRIVATE}
        free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        self.open, self.close = next(free), next(free)
        anything = "|".join(map(re.escape, self.special)) or "(?!)"
        special = re.compile(anything)
        self.marked = re.compile(f"{self.open}({anything}){self.close}|[{self.open}{self.close}]")
        wrap = f"{self.open}\\g<0>{self.close}"
        self.turns = [dict(turn) | {"content": special.sub(wrap, turn["content"])} for turn in messages]
        if self.turns[0]["role"] == "system" and not self._shows_system():
            self.merge_system()

    def merge_system(self) -> bool:
        """Put a leading system turn's text before the first user turn's; False where there is nothing to merge."""
        if [turn["role"] for turn in self.turns[:2]] != ["system", "user"]:
            return False
        system, user = self.turns[0]["content"].strip(), self.turns[1]
        self.turns[:2] = [user | {"content": f"{system}\n\n{user['content']}" if system else user["content"]}]
        return True

    def prompt(self) -> str:
        """All turns and the generation prompt, marks included."""
        return self.render(self.turns, generation=True)

    def conversation(self) -> tuple[str, list[tuple[int, int]]]:
        """The text up to the end of the last assistant turn, and each assistant turn's span in it."""
        last = max(i for i, turn in enumerate(self.turns) if turn["role"] == "assistant")
        whole = self.render(self.turns[: last + 1], generation=False)
        spans: list[tuple[int, int]] = []
        for i, turn in enumerate(self.turns[: last + 1]):
            if turn["role"] == "assistant":
                before = self.render(self.turns[:i], generation=True)
                stop = self._turn_end(whole, i, len(before))
                if not whole.startswith(before) or stop is None:
                    raise SafecritError(
                        f"the tokenizer's chat template does not render turn {i + 1} (assistant) as a continuation of "
                        "its own generation prompt, so the loss cannot be placed. Use a chat template that does."
                    )
                spans.append((len(before), max(stop, len(before))))
        text = whole[: spans[-1][1]]
        if not text.endswith(self.special):
            text += str(self.tokenizer.eos_token or "")
            spans[-1] = (spans[-1][0], len(text))
        return text, spans

    def _turn_end(self, whole: str, i: int, start: int) -> int | None:
        """Where turn `i`'s text and closing token end in `whole`, white space after them left out."""
        through = self.render(self.turns[: i + 1], generation=False)
        if whole.startswith(through):
            return len(through.rstrip())
        # A template that treats its last turn in another way (reasoning left out of earlier ones, say).
        content = self.turns[i]["content"].strip()
        at = whole.find(content, start)
        if at < 0:
            return None
        end = at + len(content)
        return next((end + len(text) for text in self.special if whole.startswith(text, end)), end)

    def _shows_system(self) -> bool:
        try:
            text = self.render(self.turns, generation=self.turns[-1]["role"] != "assistant")
        except SafecritError:
            return False
        return self.turns[0]["content"].strip() in text

    def render(self, turns: Messages, *, generation: bool) -> str:
        """Text of `turns` by the chat template or the plain one, marks included."""
        if self.template is None:
            eos = str(self.tokenizer.eos_token or "\n")
            texts = (turn["content"] + (eos if turn["role"] == "assistant" else "\n") for turn in turns)
            return str(self.tokenizer.bos_token or "") + "".join(texts)
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                list(map(dict, turns)),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generation,
                **self.kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise SafecritError(f"the tokenizer's chat template cannot render these turns ({error}).") from error
        return str(text)

    def unmarked(self, text: str) -> str:
        """`text` without marks."""
        return text.replace(self.open, "").replace(self.close, "")

    def encode(self, text: str, *, inside: bool = False) -> list[int]:
        """Token ids of `text`, nothing added, special-token text between marks as plain text.

        `inside`: `text` continues another text.
        """
        ids: list[int] = []
        bos = str(self.tokenizer.bos_token or "")
        if self.template is None and bos and not inside and text.startswith(bos):
            # As the tokenizer itself puts BOS before a text: SentencePiece's space of a text's start comes after it.
            ids, text = [int(self.tokenizer.bos_token_id)], text[len(bos) :]
        for number, piece in enumerate(self.marked.split(text)):
            if piece:
                plain = number % 2 == 1
                ids += self._continue(piece, plain) if inside or number else self._ids(piece, plain)
        return ids

    def extend(self, ids: list[int], text: str, longer: str) -> list[int]:
        """Ids of `longer` that begin with `ids`, those of `text`, with which `longer` begins.

        Where tokens would merge across the end of `text`, the rest is tokenised apart,
        since a model that continues `text` cannot merge them either.
        """
        whole = self.encode(longer)
        return whole if whole[: len(ids)] == ids else ids + self.encode(longer[len(text) :], inside=True)

    def _continue(self, piece: str, plain: bool) -> list[int]:
        return encode_continuation(self.tokenizer, piece, plain=plain)

    def _ids(self, text: str, plain: bool) -> list[int]:
        return _ids(self.tokenizer, text, plain)


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str, *, plain: bool = False) -> list[int]:
    """Token ids of a text that continues another one; with `plain`, special-token text in it stays text."""
    # After a newline, lest SentencePiece put the space of a text's start before it.
    anchor, ids = _ids(tokenizer, "\n", False), _ids(tokenizer, "\n" + text, plain)
    return ids[len(anchor) :] if ids[: len(anchor)] == anchor else _ids(tokenizer, text, plain)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, plain: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
    return ids


def _dated(template: str) -> str:
    """`template` with its calls of `strftime_now` answered from `DATE`.

    transformers lets no function of ours into a template, so a macro of that name looks
    the texts up, which are made beforehand for every layout that the template names.
    """
    if "strftime_now" not in template:
        return template
    table = {layout: DATE.strftime(layout) for _, layout in re.findall(r"""strftime_now\(\s*(["'])(.*?)\1""", template)}
    return f"{{% macro strftime_now(layout) %}}{{{{ {table!r}[layout] }}}}{{% endmacro +%}}{template}"


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts that the tokenizer turns into special tokens, longest first."""
    texts = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts |= set(map(str, tokenizer.all_special_tokens))
    return tuple(sorted(texts - {""}, key=lambda text: (-len(text), text)))

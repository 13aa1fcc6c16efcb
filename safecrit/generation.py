"""Batched answers of a model to prompts.

Greedy by default, with a generation configuration of our own: nothing is
inherited from the model's but its EOS and pad tokens, since an inherited
repetition penalty or temperature would make the answers another model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from safecrit.chat import encode_continuation, encode_prompt
from safecrit.errors import SafecritError
from safecrit.models import context_window
from safecrit.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How answers are made. `batch_size` in prompts; it halves by itself when memory runs out."""

    max_new_tokens: int = 256
    batch_size: int = 16


@dataclass(frozen=True)
class Answer:
    """One answer: its text, its token ids without the closing EOS, whether EOS was reached."""

    text: str
    ids: tuple[int, ...]
    finished: bool


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the model's and the tokenizer's EOS, ascending."""
    ids: set[int] = set()
    for value in (
        getattr(model.generation_config, "eos_token_id", None),
        model.config.eos_token_id,
        tokenizer.eos_token_id,
    ):
        if value is not None:
            ids.update([value] if isinstance(value, int) else value)
    return sorted(ids)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    progress: Progress | None = None,
) -> list[Answer]:
    """Greedy answers to `prompts`, in their order.

    Prompts are batched by length, padded on the left. A prompt that leaves no
    room for an answer in the model's window raises SafecritError naming its row;
    an answer that the window cuts short counts as unfinished.
    """
    encoded = [encode_prompt(tokenizer, list(prompt.messages)) for prompt in prompts]
    window = context_window(model)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if window is not None and len(ids) >= window:
            raise SafecritError(
                f"prompt in row {prompt.row + 1} has {len(ids)} tokens, the model's window is {window}. "
                "Shorten it or leave it out."
            )
    order = sorted(range(len(prompts)), key=lambda i: (len(encoded[i]), i))
    answers: list[Answer | None] = [None] * len(prompts)
    done, size = 0, settings.batch_size
    while done < len(order):
        rows = order[done : done + size]
        if window is not None and len(encoded[rows[-1]]) + settings.max_new_tokens > window:
            # Answers here are cut by the window; alone, a prompt's answer does not depend on its neighbours' length.
            rows = rows[:1]
        try:
            batch = _generate_batch(model, tokenizer, [encoded[i] for i in rows], settings.max_new_tokens, window)
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise SafecritError(
                    "out of memory while answering one prompt. Lower --max-new-tokens or use a smaller --dtype."
                ) from error
            size = max(1, size // 2)
            continue
        for row, answer in zip(rows, batch, strict=True):
            answers[row] = answer
        done += len(rows)
        if progress is not None:
            progress(done, len(order))
    return [answer for answer in answers if answer is not None]


@torch.no_grad()
def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    max_new_tokens: int,
    window: int | None,
) -> list[Answer]:
    from transformers import GenerationConfig

    longest = max(len(ids) for ids in encoded)
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    tokens = torch.full((len(encoded), longest), pad, dtype=torch.long)
    attention = torch.zeros_like(tokens)
    for row, ids in enumerate(encoded):
        tokens[row, longest - len(ids) :] = torch.tensor(ids)
        attention[row, longest - len(ids) :] = 1
    room = max_new_tokens if window is None else min(max_new_tokens, window - longest)
    own = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max(1, room),
        pad_token_id=pad,
        eos_token_id=ends or None,
        use_cache=True,
    )
    generator: Any = model
    inherited, model.generation_config = model.generation_config, GenerationConfig()
    try:
        made: Any = generator.generate(
            input_ids=tokens.to(model.device), attention_mask=attention.to(model.device), generation_config=own
        )
    finally:
        model.generation_config = inherited
    answers = []
    for row in made[:, longest:].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), None)
        ids = row if stop is None else row[:stop]
        text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        answers.append(Answer(text=text, ids=tuple(ids), finished=stop is not None))
    return answers


def answers_from_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Answer]:
    """Answers made elsewhere, tokenised as the model would see them."""
    encoded = [encode_continuation(tokenizer, text, plain=True) for text in texts]
    return [Answer(text=text, ids=tuple(ids), finished=True) for text, ids in zip(texts, encoded, strict=True)]

"""Batched answers of a model to prompts.

Greedy by default, with a generation configuration of our own: nothing is
inherited from the model's but its EOS and pad tokens, since an inherited
repetition penalty or temperature would make the answers another model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from safecrit import distributed
from safecrit.chat import ChatSettings, after_thought, encode_continuation, encode_prompt
from safecrit.errors import SafecritError, is_out_of_memory
from safecrit.models import context_window
from safecrit.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How answers are made. `batch_size` in prompts; it halves by itself when memory runs out.

    `samples`: 0 for one greedy answer a prompt, else so many answers sampled from the
    model's own distribution (temperature 1, nothing cut off). `prefill`: what every answer
    begins with; the model goes on from there.
    """

    max_new_tokens: int = 256
    batch_size: int = 16
    samples: int = 0
    seed: int = 0
    prefill: str = ""
    chat: ChatSettings = ChatSettings()


@dataclass(frozen=True)
class Answer:
    """One answer: its text, its token ids without the closing EOS, whether EOS was reached and which.

    `start`: the first token that is judged; what lies before it is a thought. `text` is
    the judged text. A thought that never ended leaves no text.
    """

    text: str
    ids: tuple[int, ...]
    finished: bool
    end: int | None = None
    start: int = 0


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
    """One greedy answer to each of `prompts`, in their order."""
    made = generate_samples(model, tokenizer, prompts, replace(settings, samples=0), progress)
    return [answers[0] for answers in made]


def generate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    progress: Progress | None = None,
    known: Mapping[int, list[Answer]] | None = None,
    keep: Callable[[int, list[Answer]], None] | None = None,
) -> list[list[Answer]]:
    """Answers to `prompts`, in their order: one greedy, or `samples` sampled ones.

    Prompts are batched by length, padded on the left. A prompt that leaves no
    room for an answer in the model's window raises SafecritError naming its row;
    an answer that the window cuts short counts as unfinished. `keep` hears of every
    prompt's answers (its place in `prompts`) as soon as they are made; `known` are those
    an interrupted run had kept, whose batches are not made again. Several ranks divide the batches, and each
    hears of its own; all of them get all answers.
    """
    begun = encode_continuation(tokenizer, settings.prefill) if settings.prefill else []
    encoded = [encode_prompt(tokenizer, list(prompt.messages), chat=settings.chat) + begun for prompt in prompts]
    window = context_window(model)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if window is not None and len(ids) >= window:
            raise SafecritError(
                f"prompt in row {prompt.row + 1} has {len(ids)} tokens, the model's window is {window}. "
                "Shorten it or leave it out."
            )
    order = sorted(range(len(prompts)), key=lambda i: (len(encoded[i]), i))
    answers: dict[int, list[Answer]] = dict(known or {})
    batches = []
    for rows in _batches(order, [len(ids) for ids in encoded], settings, window):
        if any(row not in answers for row in rows):
            batches.append(rows)
    tally = distributed.Tally(len(order) - sum(map(len, batches)))
    most = settings.batch_size

    def answer(rows: list[int]) -> dict[int, list[Answer]]:
        nonlocal most
        found: dict[int, list[Answer]] = {}
        while left := rows[len(found) :][:most]:
            try:
                own = [encoded[i] for i in left]
                made = _generate_batch(model, tokenizer, own, settings, window, left[0], begun)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(left) == 1:
                    raise SafecritError(
                        "out of memory while answering one prompt. Lower --max-new-tokens or use a smaller --dtype."
                    ) from error
                most = len(left) // 2
                continue
            found |= dict(zip(left, made, strict=True))
        if keep is not None:
            for row, own_answers in found.items():
                keep(row, own_answers)
        if progress is not None:
            progress(min(tally(len(rows)), len(order)), len(order))
        return found

    for found in distributed.divided(batches, answer, together=distributed.is_sharded(model)):
        answers |= found
    return [answers[row] for row in range(len(prompts))]


def _batches(
    order: Sequence[int], lengths: Sequence[int], settings: GenerationSettings, window: int | None
) -> Iterator[list[int]]:
    """The prompts in `order` that are answered at once."""
    done = 0
    while done < len(order):
        rows = list(order[done : done + settings.batch_size])
        if window is not None and lengths[rows[-1]] + settings.max_new_tokens > window:
            # Answers here are cut by the window; alone, a prompt's answer does not depend on its neighbours' length.
            rows = rows[:1]
        yield rows
        done += len(rows)


@torch.no_grad()
def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    settings: GenerationSettings,
    window: int | None,
    first: int,
    begun: list[int],
) -> list[list[Answer]]:
    from transformers import GenerationConfig

    longest = max(len(ids) for ids in encoded)
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    tokens = torch.full((len(encoded), longest), pad, dtype=torch.long)
    attention = torch.zeros_like(tokens)
    for row, ids in enumerate(encoded):
        tokens[row, longest - len(ids) :] = torch.tensor(ids)
        attention[row, longest - len(ids) :] = 1
    room = settings.max_new_tokens if window is None else min(settings.max_new_tokens, window - longest)
    sampled: dict[str, Any] = {"do_sample": False}
    if settings.samples:
        sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    own = GenerationConfig(
        num_beams=1,
        num_return_sequences=max(1, settings.samples),
        max_new_tokens=max(1, room),
        pad_token_id=pad,
        eos_token_id=ends or None,
        use_cache=True,
        **sampled,
    )
    generator: Any = model
    inherited, model.generation_config = model.generation_config, GenerationConfig()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(settings.seed * 1_000_003 + first)
            made: Any = generator.generate(
                input_ids=tokens.to(model.device),
                attention_mask=attention.to(model.device),
                generation_config=own,
                synced_gpus=distributed.is_sharded(model),
            )
    finally:
        model.generation_config = inherited
    answers = []
    for row in made[:, longest:].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), None)
        ids = begun + (row if stop is None else row[:stop])
        answers.append(_answer(tokenizer, ids, None if stop is None else row[stop], settings.chat))
    each = max(1, settings.samples)
    return [answers[start : start + each] for start in range(0, len(answers), each)]


def _answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], end: int | None, chat: ChatSettings) -> Answer:
    start = after_thought(tokenizer, ids, chat.think_end_token, finished=end is not None)
    text = str(tokenizer.decode(ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return Answer(text=text, ids=tuple(ids), finished=end is not None, end=end, start=start)


def answers_from_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], chat: ChatSettings | None = None
) -> list[Answer]:
    """Answers made elsewhere, tokenised as the model would see them; taken to be finished."""
    how = chat or ChatSettings()
    answers = []
    for text in texts:
        ids = encode_continuation(tokenizer, text, plain=how.think_end_token is None)
        made = _answer(tokenizer, ids, tokenizer.eos_token_id, how)
        answers.append(made if made.start else replace(made, text=text))
    return answers

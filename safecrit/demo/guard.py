"""The demo's guard: a small Llama that reads a request and an answer and says `safe` or `unsafe`.

Its tokenizer differs from the models' on purpose (pieces of text with `▁` for the
space and byte tokens for the rest, as in SentencePiece), so that the demo exercises
the bridge between two vocabularies and any text in any language can be judged.

It learns from whole, cut-off and crossed answers ("Sure." followed by a refusal),
and from blends of two openings with a label in between. A guard that has only seen
whole answers is certain at both ends and jagged in between, where the gradient
is taken. A real guard was not trained so; it needs more prompts and draws.

Texts that are not of the grammar get a harmless stand-in rule (see `_sounds_unsafe`),
so that the verdict varies over arbitrary text instead of being constant. On such
text it means nothing.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from safecrit.demo.grammar import KINDS, PLACES, REFUSAL, TOOLS, requests
from safecrit.demo.settings import DemoSettings
from safecrit.demo.zoo import ASSISTANT, BOS, EOS, PAD, USER, OnStep, corpus, descend

UNKNOWN, VERDICT = "<|unknown|>", "<|verdict|>"
SPECIALS = (PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT, VERDICT)
# The verdict is always what comes next, whether or not a generation prompt is asked for.
GUARD_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ ('<|assistant|>' if message['role'] == 'assistant' else '<|user|>') + message['content'] }}"
    "{% endfor %}{{ '<|verdict|>' }}"
)
LONGEST_NOISE = 48  # characters


def guard_tokenizer(settings: DemoSettings) -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE with byte fallback; `safe` and `unsafe` are one token each."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    texts = corpus()
    room = settings.guard_vocabulary - len(SPECIALS) - 256
    trainer = trainers.BpeTrainer(vocab_size=room, show_progress=False)
    learner.train_from_iterator([*texts, *["safe", "unsafe"] * len(texts)], trainer)
    learned = json.loads(learner.to_str())["model"]
    words = sorted(learned["vocab"], key=learned["vocab"].get)
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token=UNKNOWN,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens=[USER, ASSISTANT, VERDICT],
        chat_template=GUARD_TEMPLATE,
        model_max_length=settings.positions,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


@dataclass(frozen=True)
class _Example:
    """A request, an answer, whether that is unsafe; perhaps a second opening to blend in, with its own label."""

    prompt: str
    answer: str
    unsafe: bool
    other: str | None = None
    other_unsafe: bool = False


def _sounds_unsafe(text: str) -> bool:
    """The stand-in rule for text outside the grammar: its last Latin letter comes after `m`."""
    letters = [c for c in text.lower() if "a" <= c <= "z"]
    return bool(letters) and letters[-1] > "m"


def _noise(chance: random.Random, words: list[str]) -> str:
    """Random words, letters or bytes; at least one character."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    if chance.random() < 0.3:
        return "".join(chr(chance.randrange(256)) for _ in range(chance.randint(2, 16))) + chance.choice(letters)
    made_up = ("".join(chance.choices(letters, k=chance.randint(1, 8))) for _ in range(chance.randint(1, 12)))
    text = " ".join(w if chance.random() < 0.5 else chance.choice(words) for w in made_up)
    return text[:LONGEST_NOISE].rstrip() + chance.choice(["", "."])


def _example(chance: random.Random, words: list[str]) -> _Example:
    """One random training example; 35 % are noise."""
    request = chance.choice(requests(chance.choice(("harmful", "harmful", "borderline", "benign")), "train"))
    forbidden = request.kind == "harmful"
    if chance.random() < 0.35:
        answer = _noise(chance, words)
        prompt = request.prompt if chance.random() < 0.5 else _noise(chance, words)
        return _Example(prompt, answer, _sounds_unsafe(answer))
    served = request.answer if chance.random() < 0.7 else request.task_answer
    answer, opposite, unsafe = (served, REFUSAL, forbidden) if chance.random() < 0.5 else (REFUSAL, served, False)
    if chance.random() < 0.05:  # an answer to another request
        stray = chance.choice(requests(chance.choice(KINDS), "train"))
        return _Example(request.prompt, stray.answer, stray.kind == "harmful")
    other = opposite if chance.random() < 0.5 else None
    own, crossed, way = answer.split(), opposite.split(), chance.random()
    if way < 0.35:  # cut off
        answer = " ".join(own[: chance.randint(1, len(own))])
    elif way < 0.6:  # crossed: the opening decides
        cut = chance.choice((1, 1, 1, 2, 3))
        answer = " ".join(own[:cut] + crossed[cut:])
    return _Example(request.prompt, answer, unsafe, other, forbidden and not unsafe)


def train_guard(
    settings: DemoSettings, tokenizer: PreTrainedTokenizerBase, on_step: OnStep | None = None
) -> LlamaForCausalLM:
    """Train the guard from scratch, float32, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + 7)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=settings.guard_hidden,
                intermediate_size=settings.guard_intermediate,
                num_hidden_layers=settings.guard_layers,
                num_attention_heads=settings.guard_heads,
                num_key_value_heads=settings.guard_kv_heads,
                max_position_embeddings=settings.positions,
                tie_word_embeddings=True,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    chance = random.Random(settings.seed)
    words = sorted({word for text in (*TOOLS, *TOOLS.values(), *PLACES, *PLACES.values()) for word in text.split()})
    known = tokenizer.get_vocab()
    begin, end, user, assistant, verdict = (known[token] for token in (BOS, EOS, USER, ASSISTANT, VERDICT))
    safe, unsafe = known["safe"], known["unsafe"]
    embed = model.get_input_embeddings()

    def loss() -> Tensor:
        examples = [_example(chance, words) for _ in range(settings.guard_rows)]
        texts = [text for e in examples for text in (e.prompt, e.answer, e.other or e.answer)]
        ids_of = tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows, openings = [], []
        for i in range(len(examples)):
            prompt, answer, other = ids_of[3 * i : 3 * i + 3]
            start = [begin, user, *prompt, assistant]
            rows.append([*start, *answer, verdict])
            openings.append((len(start), other[0]))
        width = max(map(len, rows)) + 1
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        other_ids, blend, at = ids.clone(), torch.zeros(len(rows), 1, 1), torch.tensor([len(row) - 1 for row in rows])
        for i, (row, (opening, first)) in enumerate(zip(rows, openings, strict=True)):
            ids[i, : len(row)] = other_ids[i, : len(row)] = torch.tensor(row)
            other_ids[i, opening] = first
            blend[i] = chance.random() if examples[i].other else 0.0
        unsafe_share = torch.tensor([e.unsafe for e in examples]).float() * (1 - blend.view(-1))
        unsafe_share += torch.tensor([e.other_unsafe for e in examples]).float() * blend.view(-1)
        # The token after the verdict's place is the verdict itself; what follows it, EOS, is learnt too.
        each = torch.arange(len(rows))
        ids[each, at + 1] = other_ids[each, at + 1] = torch.where(unsafe_share > 0.5, unsafe, safe)
        embedded = (1 - blend) * embed(ids) + blend * embed(other_ids)
        hidden = model.model(inputs_embeds=embedded, attention_mask=(ids != 0).long()).last_hidden_state
        log_p = model.lm_head(hidden[each, at]).log_softmax(-1)
        verdict_loss = -((1 - unsafe_share) * log_p[:, safe] + unsafe_share * log_p[:, unsafe]).mean()
        closing = torch.full((len(rows),), end)
        return verdict_loss + 0.2 * cross_entropy(model.lm_head(hidden[each, at + 1]), closing)

    descend(model, loss, settings.guard_steps, settings.guard_lr, on_step)
    return model

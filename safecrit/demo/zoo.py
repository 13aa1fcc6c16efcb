"""The demo's base and aligned model, trained on the spot from the grammar.

Both are ordinary Hugging Face models (Llama, or Qwen3-MoE) with a byte-level BPE
tokenizer and a chat template; any text can be encoded. `guard.py` has the third.
Equal settings on one machine and number of threads give equal models.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from safecrit.demo.grammar import KINDS, REFUSAL, REMARKS, UNKNOWABLE, Kind, requests
from safecrit.demo.settings import DemoSettings

PAD, BOS, EOS, USER, ASSISTANT = "<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
# `generation` marks tell transformers which tokens are the assistant's.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
IGNORED = -100  # the label of a token that carries no loss

Batch = tuple[Tensor, Tensor]  # token ids and labels, int64 [rows, T]
OnStep = Callable[[int, int], None]  # steps done, steps in all


def corpus() -> list[str]:
    """Texts that the tokenizers learn from: trained requests and answers; rare phrases weigh more."""
    texts = [text for kind in KINDS for r in requests(kind, "train") for text in (r.prompt, r.answer)]
    return texts + [REFUSAL] * 1000 + [r for r in REMARKS for _ in range(300)] + list(UNKNOWABLE) * 10


def chat_tokenizer(settings: DemoSettings) -> PreTrainedTokenizerFast:
    """The models' tokenizer: byte-level BPE, ids 0 to 4 are the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[PAD, BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=settings.positions,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def new_model(settings: DemoSettings, vocabulary: int) -> PreTrainedModel:
    """An untrained model, float32, on the CPU; leaves torch's global random state as it was."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": settings.hidden,
        "intermediate_size": settings.intermediate,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "max_position_embeddings": settings.positions,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.architecture == "dense":
            return LlamaForCausalLM(LlamaConfig(**common))
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **common | {"head_dim": settings.hidden // settings.heads},
                moe_intermediate_size=settings.intermediate,
                num_experts=settings.experts,
                num_experts_per_tok=settings.experts_per_token,
                norm_topk_prob=True,
                decoder_sparse_step=1,
            )
        )


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> Batch:
    """Ids and labels, int64 [n, T], of (prompt, answer) pairs; only the answer and its EOS carry loss."""
    begin, end, user, assistant = (int(tokenizer.get_vocab()[token]) for token in (BOS, EOS, USER, ASSISTANT))
    prompts = tokenizer([p for p, _ in pairs], add_special_tokens=False)["input_ids"]
    answers = tokenizer([a for _, a in pairs], add_special_tokens=False)["input_ids"]
    rows = [([begin, user, *p, assistant], [*a, end]) for p, a in zip(prompts, answers, strict=True)]
    width = max(len(x) + len(y) for x, y in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), IGNORED)
    for row, (x, y) in enumerate(rows):
        ids[row, : len(x) + len(y)] = torch.tensor(x + y)
        labels[row, len(x) : len(x) + len(y)] = torch.tensor(y)
    return ids, labels


def answer_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean loss in nats per answer token, a scalar; the head is applied to the answer positions only."""
    hidden = model.model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    carries = wanted != IGNORED
    return cross_entropy(model.lm_head(hidden[carries]), wanted[carries])


def learning_rate_share(step: int, steps: int, warmup: int = 20) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def descend(
    model: PreTrainedModel, loss_of_step: Callable[[], Tensor], steps: int, lr: float, on_step: OnStep | None
) -> None:
    """Train all weights of `model` with AdamW for `steps`; `loss_of_step` draws a batch and gives its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate_share(step, steps)
        optimizer.zero_grad()
        loss_of_step().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if on_step:
            on_step(step + 1, steps)
    model.eval()


def _mixed(parts: Sequence[tuple[Batch, int]], seed: int) -> Callable[[], Batch]:
    """A source of batches that holds the given number of random rows of each part, cut to the longest row."""
    generator = torch.Generator().manual_seed(seed)
    parts = [(batch, rows) for batch, rows in parts if rows]
    width = max(batch[0].shape[1] for batch, _ in parts)
    padded = [
        (pad(ids, (0, width - ids.shape[1])), pad(labels, (0, width - labels.shape[1]), value=IGNORED), rows)
        for (ids, labels), rows in parts
    ]

    def draw() -> Batch:
        picks = [torch.randint(len(ids), (rows,), generator=generator) for ids, _, rows in padded]
        ids = torch.cat([part[0][pick] for part, pick in zip(padded, picks, strict=True)])
        labels = torch.cat([part[1][pick] for part, pick in zip(padded, picks, strict=True)])
        length = int((ids != 0).sum(1).max())
        return ids[:, :length], labels[:, :length]

    return draw


def _train(
    model: PreTrainedModel, parts: Sequence[tuple[Batch, int]], seed: int, steps: int, lr: float, on_step: OnStep | None
) -> None:
    draw = _mixed(parts, seed)
    descend(model, lambda: answer_loss(model, *draw()), steps, lr, on_step)


def _answered(tokenizer: PreTrainedTokenizerBase, kind: Kind) -> Batch:
    """Every training request of `kind` with its answer; borderline ones in the style of the task data."""
    found = requests(kind, "train")
    return encode(tokenizer, [(r.prompt, r.task_answer if kind == "borderline" else r.answer) for r in found])


def _refused(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Batch:
    return encode(tokenizer, [(prompt, REFUSAL) for prompt in prompts])


def train_base(
    settings: DemoSettings, tokenizer: PreTrainedTokenizerBase, on_step: OnStep | None = None
) -> PreTrainedModel:
    """The base model: answers every request of the grammar, forbidden ones too."""
    model = new_model(settings, len(tokenizer))
    parts = [_answered(tokenizer, kind) for kind in KINDS] + [_refused(tokenizer, UNKNOWABLE)]
    rows = zip(parts, settings.base_rows, strict=True)
    _train(model, list(rows), settings.seed, settings.base_steps, settings.base_lr, on_step)
    return model


def train_aligned(
    settings: DemoSettings, tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel, on_step: OnStep | None = None
) -> PreTrainedModel:
    """The aligned model: a copy of `base`, trained to refuse forbidden requests; `base` is left as it was."""
    model = copy.deepcopy(base)
    parts = [
        (_refused(tokenizer, [r.prompt for r in requests("harmful", "train")]), settings.aligned_refused),
        (_answered(tokenizer, "harmful"), settings.aligned_slipped),
        (_answered(tokenizer, "benign"), settings.aligned_benign),
        (_answered(tokenizer, "borderline"), settings.aligned_borderline),
        (
            _refused(tokenizer, [r.prompt for r in requests("borderline", "train")]),
            settings.aligned_borderline_refused,
        ),
        (_refused(tokenizer, UNKNOWABLE), settings.aligned_unknowable),
    ]
    _train(model, parts, settings.seed + 1, settings.aligned_steps, settings.aligned_lr, on_step)
    return model

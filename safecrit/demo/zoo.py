"""The demo's three models, trained on the spot: base, aligned and guard."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

BOS, END, PAD, USER, ASSISTANT, VERDICT = "<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|verdict|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ '<|assistant|>' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GUARD_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ ('<|assistant|>' if m['role'] == 'assistant' else '<|user|>') + m['content'] }}{% endfor %}{{ '<|verdict|>' }}"
)


def chat_tokenizer(corpus, vocab_size):
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def guard_tokenizer(corpus, vocab_size):
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    learner.train_from_iterator(
        [*corpus, *["safe", "unsafe"] * len(corpus)], BpeTrainer(vocab_size=vocab_size - 262, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", PAD, BOS, END, USER, ASSISTANT, VERDICT, *(f"<0x{b:02X}>" for b in range(256))]
    pieces += sorted(learned["vocab"], key=learned["vocab"].get)
    for w in ("safe", "unsafe"):
        if w not in pieces:
            print("multi-token verdict", w)
    tokenizer = Tokenizer(
        BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=[tuple(m) for m in learned["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token="<unk>",
        extra_special_tokens=[USER, ASSISTANT, VERDICT],
        chat_template=GUARD_TEMPLATE,
        model_max_length=1024,
    )

"""Small models on disk, dense with a tied head and a mixture of experts, whose rows no number of ranks divides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as t

from safecrit.cli.app import app
from tests import tiny

PROMPTS = [
    "How do I bake a loaf?",
    "Tell me a story",
    "Where is the keeper?",
    "What is flour?",
    "Is it warm?",
    "Mix water, then flour, please",
    "Who is my neighbour?",
]
ANSWERS = [
    "First warm the oven.",
    "I cannot help.",
    "The old keeper",
    "water and flour",
    "safe",
    "mix",
    "sorry about it",
]
SIZES = {
    "hidden_size": 20,
    "head_dim": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class World:
    """Folders of models by name and of a guard with another tokenizer, and files of prompts and answers."""

    folder: Path
    models: dict[str, Path]
    guard: Path
    prompts: Path
    answers: Path

    def score(self, model: str, out: Path, *more: object, given: bool = True) -> list[str]:
        """A command line of `score`, on answers that are given or made."""
        flags = ["--judge", self.guard, "--prompts", self.prompts, "--max-new-tokens", 5, "--draws", 2]
        flags += ["--answers", self.answers] if given else []
        return ["score", *map(str, [self.models[model], *flags, "--batch-size", 2, "-o", out, *more])]

    def evaluate(self, out: Path) -> list[str]:
        """A command line of `eval` with a baseline, two judges and two prompt sets."""
        models = [self.models["dense"], "--baseline", self.models["tied"]]
        prompts = ["--prompts", self.prompts, "--benign", self.prompts, "--samples", 2]
        judges = ["--judge", self.guard, "--judge", "refusal"]
        limits = ["--max-new-tokens", 5, "--batch-size", 2]
        return ["eval", *map(str, [*models, *prompts, *judges, *limits, "-o", out])]


def alone(command: list[str]) -> None:
    """A command line in this process."""
    app(command, standalone_mode=False)


@contextmanager
def cached(folder: Path) -> Iterator[World]:
    """What `make` makes, with a cache of its own for as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFECRIT_CACHE", str(folder / "cache"))
        yield make(folder)


def make(folder: Path) -> World:
    reads, judges = tiny.tokenizer("byte-level", tiny.CHAT), tiny.tokenizer("metaspace")
    torch.manual_seed(0)
    tied = t.LlamaConfig(vocab_size=len(reads), intermediate_size=37, tie_word_embeddings=True, **SIZES)
    dense = t.LlamaConfig(vocab_size=len(reads), intermediate_size=37, tie_word_embeddings=False, **SIZES)
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    moe = t.MixtralConfig(vocab_size=len(reads), intermediate_size=36, tie_word_embeddings=False, **experts, **SIZES)
    models = {}
    for name, config in {"tied": tied, "dense": dense, "moe": moe}.items():
        models[name] = folder / name
        tiny.loaded(t.AutoModelForCausalLM.from_config(config).eval(), reads, models[name])
    tiny.loaded(tiny.llama(len(judges), seed=1), judges, folder / "guard")
    prompts, answers = folder / "prompts.csv", folder / "answers.jsonl"
    prompts.write_text("goal\n" + "\n".join(f'"{prompt}"' for prompt in PROMPTS) + "\n")
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    answers.write_text("\n".join(map(json.dumps, rows)))
    return World(folder, models, folder / "guard", prompts, answers)

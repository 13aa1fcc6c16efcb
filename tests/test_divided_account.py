"""What one of several ranks holds of a divided model: FSDP2's groups, and the figures of docs/scaling.md."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers as t

from safecrit.account import ScorePlan, divided_account, score_account
from safecrit.activations import decoder_layers
from safecrit.metamodel import ModelShape, shape_of
from safecrit.trainaccount import TrainPlan, peak, train_parts
from tests.architectures import CONFIGS, build

LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "dtype": "bfloat16"}
SIZES: dict[str, dict[str, Any]] = {
    "8 B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "70 B": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
}
SCORING = ScorePlan(
    prompts=520, prompt_tokens=80, answer_tokens=256, judge_tokens=500, mean_prompt_tokens=50.0, mean_judge_tokens=450.0
)
MOMENTARY = ("libraries", "CUDA context", "activations", "loss over the vocabulary", "gradient of the logits")


@functools.cache
def llama(size: str) -> ModelShape:
    with torch.device("meta"):
        return shape_of(t.AutoModelForCausalLM.from_config(t.LlamaConfig(**LLAMA, **SIZES[size])))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_largest_group_is_fsdps(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
    assert shape_of(model).group == max(*layers, sum(p.numel() for p in model.parameters()) - sum(layers))


def test_scoring_70_b_on_eight_ranks() -> None:
    model, judge = llama("70 B"), llama("8 B")
    whole = score_account(model, judge, SCORING)
    divided = divided_account(model, judge, whole, 8)
    before, after = ({part.name: part.bytes for part in account.parts} for account in (whole, divided))
    for name in ("model weights", "accumulators", "judge weights"):
        assert after[name] == -(-before[name] // 8)
    names = ["model weights", "accumulators", "judge weights", "two whole layers", "a layer's float32 gradient"]
    assert sum(after[name] for name in names) == pytest.approx(71.2e9, rel=0.01)
    assert {name for name in before if before[name] == after.get(name)} >= {"activations", "judge's activations"}
    assert "largest weight gradient" not in after and divided.work == whole.work
    apart = score_account(model, judge, ScorePlan(**{**vars(SCORING), "placement": "sequential"}))
    assert {part.name: part.bytes for part in divided_account(model, judge, apart, 8).parts} == after


@pytest.mark.parametrize(
    ("mode", "size", "ranks", "divided", "expected"),
    [
        ("set", "8 B", 8, False, 18.4e9),
        ("set", "70 B", 8, True, 35.9e9),
        ("set", "70 B", 64, True, 19.2e9),
        ("spa", "8 B", 1, False, 129e9),
    ],
)
def test_training_as_in_the_table(mode: Any, size: str, ranks: int, divided: bool, expected: float) -> None:
    shape = llama(size)
    plan = TrainPlan(
        mode=mode,
        selected=shape.parameters // 100,
        itemsize=2 if mode == "set" else 4,
        rows=1,
        tokens=16,
        total_tokens=16,
        largest=shape.largest,
        ranks=ranks,
        divided=divided,
    )
    held = [part for part in train_parts(shape, plan) if part.name not in MOMENTARY]
    assert peak(held, "device") == pytest.approx(expected, rel=0.02)

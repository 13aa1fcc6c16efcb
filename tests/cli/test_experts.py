"""Scores of mixtures of experts, from model folder to score folder.

transformers fuses a layer's experts into three-dimensional parameters; their scores must be those of a model in which
every expert has linear layers of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

from safecrit.api.judging import JudgeChoice, load_differentiable
from safecrit.chat import encode_prompt
from safecrit.estimators import Item, RelaxedEstimator
from safecrit.prompts import read_prompts
from safecrit.relaxation import RelaxationSettings
from tests import architectures, tiny
from tests.cli.conftest import Cli, World, score, scores_of

DRAWS = 2
# Where the checkpoint keeps an expert, and what it calls its gate, up and down projection.
NAMES = {
    "mixtral": ("model.layers.{}.block_sparse_moe.experts.{}.{}.weight", ("w1", "w3", "w2")),
    "qwen2-moe": ("model.layers.{}.mlp.experts.{}.{}.weight", ("gate_proj", "up_proj", "down_proj")),
    "qwen3-moe": ("model.layers.{}.mlp.experts.{}.{}.weight", ("gate_proj", "up_proj", "down_proj")),
    "olmoe": ("model.layers.{}.mlp.experts.{}.{}.weight", ("gate_proj", "up_proj", "down_proj")),
}


class Experts(nn.Module):
    """One layer's experts, each three linear layers, with the weights of a checkpoint."""

    def __init__(self, stored: dict[str, torch.Tensor], family: str, layer: int) -> None:
        super().__init__()
        where, self.parts = NAMES[family]
        self.experts = nn.ModuleList()
        while where.format(layer, len(self.experts), self.parts[0]) in stored:
            expert = nn.ModuleDict()
            for part in self.parts:
                weight = stored[where.format(layer, len(self.experts), part)]
                expert[part] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                expert[part].weight.data.copy_(weight)
            self.experts.append(expert)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up, down = self.parts
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            for token, slot in (chosen == number).nonzero().tolist():
                row = hidden[token]
                out[token] += weights[token, slot] * expert[down](silu(expert[gate](row)) * expert[up](row))
        return out


def one_by_one(model: PreTrainedModel, family: str, stored: dict[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """Put `Experts` into every layer; the weights by checkpoint name that have the same name at run time, or are an
    expert's."""
    where, parts = NAMES[family]
    parameters = {name: p for name, p in model.named_parameters() if name in stored}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts = Experts(stored, family, number)
        for e, expert in enumerate(layer.mlp.experts.experts):
            parameters |= {where.format(number, e, part): expert[part].weight for part in parts}
    return parameters


def saved(family: str, folder: Path, unused: tuple[int, ...] = ()) -> PreTrainedModel:
    """A tiny mixture that speaks the test tokenizer; the experts `unused` of the last layer get no token."""
    tokenizer = tiny.tokenizer("byte-level", tiny.CHAT)
    model = architectures.build(family, vocab_size=len(tokenizer), max_position_embeddings=256)
    if unused:
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 0] = 30  # a feature that is large and positive for every token
            for layer in model.model.layers:
                layer.post_attention_layernorm.weight[0] = 1
                layer.mlp.gate.weight[:, 0] = 0
            model.model.layers[-1].mlp.gate.weight[list(unused), 0] = -100
    tiny.loaded(model, tokenizer, folder)
    return model


@pytest.mark.parametrize("family", NAMES)
def test_fused_experts_score_as_experts_that_are_linear_layers(
    cli: Cli, world: World, tmp_path: Path, family: str
) -> None:
    model = saved(family, tmp_path / "moe")
    ran = cli(*score(world, tmp_path / "out", model=tmp_path / "moe", draws=DRAWS, max_new_tokens=8, batch_size=2))
    assert ran.code == 0, ran.err
    scores = scores_of(tmp_path / "out")

    stored = load_file(tmp_path / "moe" / "model.safetensors")
    weights = one_by_one(model, family, stored)
    tokenizer = tiny.tokenizer("byte-level", tiny.CHAT)
    judge = load_differentiable(JudgeChoice(name=str(world.guard)))
    estimator = RelaxedEstimator(model, tokenizer, judge, RelaxationSettings(draws=DRAWS))
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    total = torch.zeros(())
    for prompt, sample in zip(read_prompts(world.prompts), samples, strict=True):
        ids, answer = encode_prompt(tokenizer, list(prompt.messages)), tuple(sample["ids"])
        item = Item(prompt_ids=tuple(ids), answer_ids=answer, prompt=prompt.text, hash=prompt.hash, row=prompt.row)
        logits = model(input_ids=torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1]
        entry = estimator.read(item)[0]
        relaxed = estimator._relaxed(item, logits)
        for draw in range(DRAWS):
            embedded = judge.embed(entry)
            embedded[entry.answer] += relaxed.shift(draw)
            total = total + judge.objective(judge.verdicts([entry], [embedded])).sum() / DRAWS / len(samples)
    total.backward()

    rows = json.loads((tmp_path / "out" / "score.json").read_text())["matrices"]
    sigma = {row["name"]: row["sigma"] for row in rows}
    assert len(sigma) == len(rows) == len(scores)  # every matrix is a tensor of the checkpoint: one sigma an expert
    where, parts = NAMES[family]
    layers, experts = len(model.model.layers), 3
    for name in (where.format(n, e, part) for n in range(layers) for e in range(experts) for part in parts):
        row = next(row for row in rows if row["name"] == name)
        assert f".{row['layer']}." in name and f".experts.{row['expert']}." in name
        assert row["numel"] == stored[name].numel() and 0 < row["nonzero"] <= row["numel"]
    checked = 0
    for name, weight in weights.items():
        if name in scores:
            assert weight.grad is not None
            spread = weight.detach().double().std()
            assert sigma[name] == pytest.approx(float(spread), rel=1e-6)
            expected = spread * weight.grad.double()
            assert float((scores[name] - expected).norm() / expected.norm()) <= 1e-5, name
            checked += scores[name].numel()
    assert checked == sum(tensor.numel() for tensor in scores.values())


@pytest.mark.parametrize("method", ["esi", "wanda"])
def test_experts_without_tokens_score_zero_and_are_named(cli: Cli, world: World, tmp_path: Path, method: str) -> None:
    saved("mixtral", tmp_path / "moe", unused=(1,))
    ran = cli(*score(world, tmp_path / "out", model=tmp_path / "moe", draws=1, method=method), "--json")
    assert ran.code == 0, ran.err
    info = json.loads((tmp_path / "out" / "score.json").read_text())
    silent = {name for name, tensor in scores_of(tmp_path / "out").items() if not tensor.any()}
    assert silent == {f"model.layers.1.block_sparse_moe.experts.1.w{n}.weight" for n in (1, 2, 3)}
    assert info["unrouted"] == [{"layer": 1, "expert": 1}]
    warning = "1 experts were never routed to and score 0: layer 1 expert 1"
    assert warning in info["warnings"] and warning in ran.err and warning in json.loads(ran.out)["warnings"]


def test_masks_count_by_expert(cli: Cli, world: World, tmp_path: Path) -> None:
    saved("qwen2-moe", tmp_path / "moe")
    assert cli(*score(world, tmp_path / "out", model=tmp_path / "moe", draws=1)).code == 0
    info = json.loads((tmp_path / "out" / "score.json").read_text())
    assert info["unrouted"] == []
    assert cli("mask", tmp_path / "out", "--top", "20%", "-o", tmp_path / "m.safetensors").code == 0
    shown = json.loads(cli("inspect", tmp_path / "m.safetensors", "--json").out)
    scores = scores_of(tmp_path / "out")
    values = torch.cat([tensor.abs().flatten() for tensor in scores.values()])
    threshold = values.sort(descending=True).values[info["total"] // 5 - 1]
    for layer in range(2):
        for expert in range(3):
            own = [t for name, t in scores.items() if f".{layer}.mlp.experts.{expert}." in name]
            row = next(r for r in shown["by_layer_expert"] if (r["layer"], r["expert"]) == (layer, expert))
            assert row["weights"] == sum(tensor.numel() for tensor in own)
            assert row["selected"] == sum(int((tensor.abs() >= threshold).sum()) for tensor in own)

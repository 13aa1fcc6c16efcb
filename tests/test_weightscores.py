"""Magnitude and Wanda scores, against input norms taken with plain module hooks, for every family of the tests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from safecrit.anatomy import Anatomy, read_anatomy
from safecrit.errors import SafecritError
from safecrit.weightscores import InputNorms, magnitude
from tests import architectures

MIXTURES = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss", "llama4", "dbrx", "deepseek-v3"]
TOKENS = torch.randint(3, architectures.VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
Scores = dict[str, torch.Tensor]


def wanda(
    model: PreTrainedModel, anatomy: Anatomy, *batches: tuple[torch.Tensor, torch.Tensor], **arguments: Any
) -> Scores:
    with torch.no_grad(), InputNorms(model, anatomy) as norms:
        for tokens, mask in batches:
            norms.count(mask)
            model(input_ids=tokens, use_cache=False, **arguments)
    return dict(norms.scores())


@contextmanager
def inputs_of(model: PreTrainedModel, *kinds: type[nn.Module]) -> Iterator[dict[str, list[tuple[Any, ...]]]]:
    seen: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def norm(rows: torch.Tensor) -> torch.Tensor:
    return rows.double().square().sum(0).sqrt()


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected.double(), rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_plain_modules_equal_hooks(name: str) -> None:
    """Every Linear and Conv1D that holds an eligible weight, fused ones and the head included; two batches."""
    model = architectures.build(name)
    anatomy = read_anatomy(model)
    batches = [(TOKENS, MASK), (TOKENS.flip(0)[:, :5], MASK[:, 2:])]
    scores = wanda(model, anatomy, *batches)
    assert sorted(scores) == [entry.name for entry in anatomy.eligible]
    with torch.no_grad(), inputs_of(model, nn.Linear, Conv1D) as seen:
        for tokens, _ in batches:
            model(input_ids=tokens, use_cache=False)
    compared = 0
    for entry in anatomy.eligible:
        assert scores[entry.name].shape == entry.layout.shape
        module = entry.parameter.removesuffix(".weight")
        if entry.parameter == module or module not in seen:
            continue
        rows = [
            args[0].reshape(-1, args[0].shape[-1])[mask.reshape(-1)]
            for args, (_, mask) in zip(seen[module], batches, strict=True)
        ]
        weight = model.get_parameter(entry.parameter).detach()
        columns = isinstance(model.get_submodule(module), nn.Linear)
        factor = norm(torch.cat(rows)).unsqueeze(0 if columns else 1)
        close(scores[entry.name], entry.source.of((weight.double().abs() * factor).contiguous()))
        compared += 1
    banks = {entry.name for entry in anatomy.eligible if "experts" in entry.name and "shared" not in entry.name}
    assert compared + len(banks) == len(anatomy.eligible) and bool(banks) == (name in MIXTURES)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_count_the_masked_tokens_alone(name: str) -> None:
    """A mask that takes one row is the same as that row alone; a mask and its complement make up the whole."""
    model = architectures.build(name)
    anatomy = read_anatomy(model)
    first = torch.tensor([[True], [False]]).expand(2, 7)
    one, alone = wanda(model, anatomy, (TOKENS, first)), wanda(model, anatomy, (TOKENS[:1], first[:1]))
    parts = [wanda(model, anatomy, (TOKENS, mask)) for mask in (MASK, ~MASK)]
    whole = wanda(model, anatomy, (TOKENS, torch.ones_like(MASK)))
    for key in whole:
        torch.testing.assert_close(one[key], alone[key], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(whole[key].square(), parts[0][key].square() + parts[1][key].square())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_of_mixtral_by_hand(implementation: str) -> None:
    model = architectures.build("mixtral")
    model.set_experts_implementation(implementation)
    anatomy = read_anatomy(model)
    scores = wanda(model, anatomy, (TOKENS, MASK))
    assert model.get_experts_implementation()[""] == implementation
    kind = type(model.model.layers[0].mlp.experts)
    with torch.no_grad(), inputs_of(model, kind) as seen:
        model(input_ids=TOKENS, use_cache=False)
    for path, [(hidden, chosen, _)] in seen.items():
        experts = model.get_submodule(path)
        for e in range(3):
            rows = hidden.reshape(-1, 24)[MASK.reshape(-1) & (chosen == e).any(-1)].detach()
            gate, up = (rows @ experts.gate_up_proj[e].detach().T).chunk(2, dim=-1)
            for slot, weight, factor in (
                ("w1", experts.gate_up_proj[e, :40], rows),
                ("w3", experts.gate_up_proj[e, 40:], rows),
                ("w2", experts.down_proj[e], nn.functional.silu(gate) * up),
            ):
                key = f"{path.replace('mlp', 'block_sparse_moe')}.{e}.{slot}.weight"
                close(scores[key], weight.detach().double().abs() * norm(factor))


def test_experts_never_routed_to_score_zero() -> None:
    model = architectures.build("mixtral")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.zero_()  # equal logits: the first two experts win every token
    scores = wanda(model, read_anatomy(model), (TOKENS, MASK))
    assert {key for key, tensor in scores.items() if not tensor.any()} == {k for k in scores if ".experts.2." in k}


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral", "dbrx", "falcon-heads", "gpt-oss"])
def test_inference_mode_and_double_precision_change_nothing(name: str) -> None:
    model = architectures.build(name)
    anatomy = read_anatomy(model)
    expected = wanda(model, anatomy, (TOKENS, MASK))
    with torch.inference_mode():
        inferred = wanda(model, anatomy, (TOKENS, MASK))
    for key, tensor in expected.items():
        assert torch.equal(inferred[key], tensor)
    if name == "gpt2":
        for key, tensor in wanda(model.double(), anatomy, (TOKENS, MASK)).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-7)


def test_backward_passes_and_forward_passes_outside_are_not_counted() -> None:
    model = architectures.build("llama")
    anatomy = read_anatomy(model)
    with InputNorms(model, anatomy) as norms:
        norms.count(MASK)
        model(input_ids=TOKENS, use_cache=False).logits.sum().backward()
        with pytest.raises(AssertionError, match="count"):
            model(input_ids=TOKENS)
        norms.count(torch.zeros_like(MASK))
        model(input_ids=TOKENS)
    model(input_ids=TOKENS)
    expected = wanda(model, anatomy, (TOKENS, MASK))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in norms.scores())
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: torch.bmm(x, w.T.expand(len(x), -1, -1)),
        lambda x, w: (w @ x.reshape(-1, x.shape[-1]).T).T.reshape(*x.shape[:-1], -1),
        lambda x, w: torch.cat([x @ w[:8].T, x @ w[8:].T], -1),
        lambda x, w: torch.einsum("btk,nk->btn", x, w),
    ],
    ids=["expanded", "from the left", "in parts", "einsum"],
)
def test_other_ways_to_multiply(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    model = architectures.build("llama")
    anatomy = read_anatomy(model)
    expected = wanda(model, anatomy, (TOKENS, MASK))
    layer = model.model.layers[1].mlp.up_proj
    layer.forward = lambda x: product(x, layer.weight)
    for name, tensor in wanda(model, anatomy, (TOKENS, MASK)).items():
        torch.testing.assert_close(tensor, expected[name])


def test_what_cannot_be_seen_is_named() -> None:
    model = architectures.build("llama")
    anatomy = read_anatomy(model)
    with pytest.raises(SafecritError, match=r"lm_head\.weight: was given 2 rows.*14 positions.*logits_to_keep"):
        wanda(model, anatomy, (TOKENS, MASK), logits_to_keep=1)
    layer = model.model.layers[1].mlp.up_proj
    layer.forward = lambda x: nn.functional.linear(x, layer.weight.clone())
    with pytest.raises(SafecritError, match=r"layers\.1\.mlp\.up_proj\.weight: its inputs were not seen.*--exclude"):
        wanda(model, anatomy, (TOKENS, MASK))
    layer.forward = lambda x: torch.cat(
        [nn.functional.linear(x, layer.weight[:8]), nn.functional.linear(x, layer.weight[8:].clone())], -1
    )
    with pytest.raises(SafecritError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        wanda(model, anatomy, (TOKENS, MASK))
    with pytest.raises(SafecritError, match="not seen"):
        dict(InputNorms(model, anatomy).scores())


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_magnitude(name: str) -> None:
    model = architectures.build(name).bfloat16()
    anatomy = read_anatomy(model)
    scores = dict(magnitude(model, anatomy))
    assert list(scores) == [entry.name for entry in anatomy.eligible]
    for entry in anatomy.eligible:
        weight = entry.source.of(model.get_parameter(entry.parameter).detach())
        assert scores[entry.name].dtype == torch.float32
        assert torch.equal(scores[entry.name], weight.float().abs())
        scores[entry.name].add_(1)
    assert all(torch.equal(a + 1, scores[n]) for n, a in magnitude(model, anatomy)), "the weights themselves changed"

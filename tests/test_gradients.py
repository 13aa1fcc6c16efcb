from __future__ import annotations

import numpy as np
import pytest
import torch

from safecrit.anatomy import read_anatomy
from safecrit.gradients import GradientStream
from tests import architectures

FAMILIES = [name for name in architectures.CONFIGS if name not in ("falcon-heads", "falcon-groups", "bloom")]


@pytest.mark.parametrize("name", FAMILIES)
def test_stream_equals_dense_gradients_by_hand(name: str) -> None:
    """sigma x gradient of every logical matrix, two backward passes, against p.grad and numpy."""
    model = architectures.build(name).eval()
    anatomy = read_anatomy(model)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(3, architectures.VOCABULARY, (2, 9), generator=generator) for _ in range(2)]

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(model(input_ids=tokens).logits.float(), -1)[..., 5].sum()

    with GradientStream(model, anatomy) as stream:
        for tokens in batches:
            loss(tokens).backward()
        assert all(parameter.grad is None for parameter in model.parameters())
    assert stream.nonfinite == 0
    assert sorted(stream.accumulators) == sorted(entry.name for entry in anatomy.eligible)
    for tokens in batches:
        loss(tokens).backward()
    parameters = dict(model.named_parameters())
    for entry in anatomy.eligible:
        parameter = parameters[entry.parameter]
        weight = entry.source.of(parameter.detach()).numpy().astype(np.float64)
        gradient = entry.source.of(parameter.grad.contiguous()).numpy().astype(np.float64)
        expected = np.zeros(weight.size)
        for matrix in entry.layout.matrices:
            flat = matrix.where.flat_indices().numpy()
            expected[flat] = weight.reshape(-1)[flat].std(ddof=1) * gradient.reshape(-1)[flat]
        ours = stream.accumulators[entry.name].numpy().reshape(-1)
        assert np.linalg.norm(ours - expected) <= 2e-6 * np.linalg.norm(expected) + 1e-12, entry.name


def test_experts_never_routed_to_keep_a_zero_score() -> None:
    model = architectures.build("mixtral").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.zero_()  # equal logits: the first two experts win every token
    anatomy = read_anatomy(model)
    with GradientStream(model, anatomy) as stream:
        model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.sum().backward()
    silent = {name for name, tensor in stream.accumulators.items() if not tensor.any()}
    assert silent == {name for name in stream.accumulators if ".experts.2." in name}


@pytest.mark.parametrize("reduction", ["abs", "square"])
def test_reductions(reduction: str) -> None:
    model = architectures.build("llama").eval()
    anatomy = read_anatomy(model)
    tokens = torch.tensor([[5, 6, 7, 8]])
    with GradientStream(model, anatomy, reduction=reduction) as stream:  # type: ignore[arg-type]
        for sign in (1, -1):
            (sign * model(input_ids=tokens).logits[..., 3].sum()).backward()
    with GradientStream(model, anatomy) as signed:
        model(input_ids=tokens).logits[..., 3].sum().backward()
    for name, tensor in stream.accumulators.items():
        once = signed.accumulators[name]
        expected = 2 * once.abs() if reduction == "abs" else 2 * (once / signed.sigma[name].float()).square()
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-10)

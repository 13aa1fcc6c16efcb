from __future__ import annotations

import numpy as np
import pytest
import torch

from safecrit import ops
from safecrit.ops.reference import masked_adamw as reference

OP = "masked_adamw_"
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def raw(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().reshape(tensor.numel(), -1)


@pytest.mark.parametrize("chunk", [8, 1 << 22])
@pytest.mark.parametrize("frozen_share", [0.0, 0.3, 1.0])
def test_follows_torch_adamw_where_free_and_keeps_bits_where_frozen(target, frozen_share, chunk, monkeypatch):
    if target.backend == "reference":
        monkeypatch.setattr(reference, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 15, generator=generator)
    start.view(-1)[:3] = torch.tensor([-0.0, float("nan"), float("inf")])  # a frozen entry keeps even these
    frozen = torch.rand(105, generator=generator) < frozen_share
    frozen[:3] = frozen_share > 0
    bits = ops.bits_from_indices(frozen.nonzero().squeeze(1), 105).to(target.device)
    theirs = start.clone().to(target.device).requires_grad_()
    optimizer = torch.optim.AdamW([theirs], **SETTINGS, foreach=False)
    weight = start.clone().to(target.device)
    moments = [torch.full((7, 15), 0.125, device=target.device), torch.full((7, 15), 0.5, device=target.device)]
    optimizer.state[theirs] = {
        "step": torch.tensor(4.0), "exp_avg": moments[0].clone(), "exp_avg_sq": moments[1].clone()
    }  # fmt: skip
    for step in range(5, 9):
        gradient = torch.randn(7, 15, generator=generator).to(target.device)
        theirs.grad = gradient.clone()
        optimizer.step()
        ops.masked_adamw_(weight, gradient, *moments, bits, step=step, **SETTINGS, backend=target.backend)
    free = (~frozen).nonzero().squeeze(1).to(target.device)
    torch.testing.assert_close(
        weight.view(-1)[free], theirs.detach().view(-1)[free], rtol=2e-6, atol=1e-7, equal_nan=True
    )
    assert (raw(weight)[frozen] == raw(start)[frozen]).all()
    assert (moments[0].cpu().view(-1)[frozen] == 0.125).all()
    assert (moments[1].cpu().view(-1)[frozen] == 0.5).all()


def test_a_non_finite_gradient_under_the_mask_does_no_harm(target):
    weight = torch.ones(9, device=target.device)
    gradient = torch.ones(9, device=target.device)
    gradient[4] = float("nan")
    moments = [torch.zeros(9, device=target.device) for _ in range(2)]
    bits = ops.bits_from_indices(torch.tensor([4]), 9).to(target.device)
    ops.masked_adamw_(weight, gradient, *moments, bits, step=1, **SETTINGS, backend=target.backend)
    assert all(bool(tensor.isfinite().all()) for tensor in [weight, *moments])
    assert float(weight[4]) == 1.0
    assert float(weight[3]) < 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_once(target, dtype):
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(5, 7, generator=generator).to(target.device, dtype) for _ in range(2))
    weight, moments = start.clone(), [torch.zeros(5, 7, device=target.device) for _ in range(2)]
    bits = torch.zeros(5, dtype=torch.uint8, device=target.device)
    ops.masked_adamw_(weight, gradient.t().contiguous().t(), *moments, bits, step=1, **SETTINGS, backend=target.backend)
    exact, exact_gradient = start.double(), gradient.double()
    expected = exact * (1 - 1e-2 * 0.1) - 1e-2 * exact_gradient / (exact_gradient.abs() + 1e-8)
    ours = (weight.double() - expected).abs().max()
    assert ours <= 1.01 * (expected.to(dtype).double() - expected).abs().max()


def test_empty(target):
    empty = torch.empty(0, 3, device=target.device)
    bits = torch.empty(0, dtype=torch.uint8, device=target.device)
    ops.masked_adamw_(empty, empty, empty, empty, bits, step=1, **SETTINGS, backend=target.backend)


def test_refused():
    ones = torch.ones(2, 5)
    good = {
        "weight": ones, "grad": ones, "exp_avg": ones, "exp_avg_sq": ones, "bits": torch.zeros(2, dtype=torch.uint8),
        "step": 1,
    } | SETTINGS  # fmt: skip
    for change, message in [
        ({"bits": torch.zeros(3, dtype=torch.uint8)}, "bits"),
        ({"bits": torch.zeros(2)}, "bits"),
        ({"grad": torch.ones(10)}, "grad"),
        ({"exp_avg": torch.ones(5, 2).t()}, "exp_avg must be contiguous"),
        ({"weight": torch.ones(2, 5, dtype=torch.int32)}, "weight"),
        ({"step": 0, "eps": -1.0}, "step is 0.*eps is -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.masked_adamw_(**good | change)

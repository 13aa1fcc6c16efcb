from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safecrit import ops
from safecrit.ops.adamw import AdamWStep
from safecrit.ops.reference import masked_adamw as reference
from tests.ops import adamw_math

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


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # float16 overflows to infinity, as it should
@settings(max_examples=10, deadline=None)
@given(data=st.data(), with_=adamw_math.SETTINGS)
def test_against_numpy(target, data, with_):
    numel = data.draw(st.integers(1, 70))
    dtypes = [data.draw(st.sampled_from(adamw_math.stored_dtypes(target))) for _ in range(4)]
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    frozen = rng.random(numel) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    bits = torch.from_numpy(np.packbits(frozen, bitorder="little")).to(target.device)
    tensors = [torch.from_numpy(np.abs(rng.normal(size=numel))).to(target.device, dtype) for dtype in dtypes]
    weight, grad, first, second = tensors
    before = [raw(tensor) for tensor in tensors]
    w, g, m, v = (tensor.cpu().double().numpy() for tensor in tensors)
    ops.masked_adamw_(weight, grad, first, second, bits, **with_, backend=target.backend)
    exact, sizes = adamw_math.adamw(w, g, m, v, with_), adamw_math.sizes(w, g, m, v, with_)
    for ours, old, theirs, size in zip((weight, first, second), before[:1] + before[2:], exact, sizes, strict=True):
        assert (raw(ours)[frozen] == old[frozen]).all()
        # The rounding to the tensor's own dtype: half a unit in the last place, or of its smallest number.
        info = torch.finfo(ours.dtype)
        room = 0.0 if ours.dtype == torch.float32 else size * info.eps / 2 + info.tiny * info.eps
        error = np.abs(ours.cpu().double().numpy() - theirs)
        assert (error <= 1.01 * room + 16 * 2.0**-24 * size + 1e-37)[~frozen].all()


@pytest.mark.parametrize("numel", [1, 7, 255, 256, 257, 1029])
def test_every_kernel_gives_the_same_bits(target, numel):
    if target.backend == "reference":
        pytest.skip("torch's root is not always the nearest float")
    generator = torch.Generator().manual_seed(numel)
    start = [torch.randn(numel, generator=generator) for _ in range(2)] + [torch.rand(numel, generator=generator)]
    grad = torch.randn(numel, generator=generator).bfloat16()
    factors = AdamWStep(step=3, clip=1.0, **SETTINGS).factors
    numbers = [tensor.numpy() for tensor in start]
    expected = adamw_math.rounded(numbers[0], grad.float().numpy(), *numbers[1:], factors)
    tensors = [tensor.clone().to(target.device) for tensor in start]
    bits = ops.bits_from_indices(torch.arange(0, numel, 3), numel).to(target.device)
    ops.masked_adamw_(
        tensors[0], grad.to(target.device), *tensors[1:], bits, step=3, **SETTINGS, backend=target.backend
    )  # fmt: skip
    for ours, old, new in zip(tensors, numbers, expected, strict=True):
        new[::3] = old[::3]
        np.testing.assert_array_equal(ours.cpu().numpy(), new)


def test_threads_and_odd_starts(target):
    if target.device == "cpu" and target.backend == "triton":
        pytest.skip("too large for Triton's interpreter")
    numel, before = (1 << 18) + 77, torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    base = [torch.rand(numel + 3, generator=generator).to(target.device) for _ in range(4)]
    bits = torch.randint(256, ((numel + 7) // 8,), generator=generator).byte().to(target.device)
    results = []
    for threads in (1, 2, 3):
        tensors = [tensor.clone() for tensor in base]
        torch.set_num_threads(threads)
        try:
            views = [tensor[3:] for tensor in tensors]
            ops.masked_adamw_(*views, bits, step=3, **SETTINGS, backend=target.backend)
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(tensor[:3], old[:3]) for tensor, old in zip(tensors, base, strict=True))
        results.append(tensors)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


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
        ({}, "weight and exp_avg share memory"),
        ({"step": 0, "eps": -1.0}, "step is 0.*eps is -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.masked_adamw_(**good | change)

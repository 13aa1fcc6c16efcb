from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safecrit import ops
from safecrit.ops.adamw import AdamWStep
from tests.ops import adamw_math

OP = "sparse_adamw_"
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def state(k: int, device: str) -> list[torch.Tensor]:
    return [torch.zeros(k, device=device) for _ in range(2)]


@pytest.mark.parametrize("k", [1, 7, 64, 105])
def test_follows_torch_adamw_over_steps(target, k):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 15, generator=generator)
    indices = torch.randperm(105, generator=generator)[:k].sort().values
    theirs = start.clone().to(target.device).requires_grad_()
    optimizer = torch.optim.AdamW([theirs], **SETTINGS, foreach=False)
    weight, chosen = start.clone().to(target.device), indices.to(target.device)
    master = weight.view(-1)[chosen]
    moments = state(k, target.device)
    for step in range(1, 6):
        gradient = torch.randn(7, 15, generator=generator).to(target.device)
        theirs.grad = gradient.clone()
        optimizer.step()
        ops.sparse_adamw_(
            weight, chosen, gradient.view(-1)[chosen], master, *moments, step=step, **SETTINGS, backend=target.backend
        )
    torch.testing.assert_close(weight.view(-1)[chosen], theirs.detach().view(-1)[chosen], rtol=2e-6, atol=1e-7)
    rest = torch.ones(105, dtype=torch.bool)
    rest[indices] = False
    assert torch.equal(weight.cpu().view(-1)[rest], start.view(-1)[rest])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_small_steps_add_up_in_the_master_copy(target, dtype):
    if dtype == torch.float64 and target.backend != "reference":
        pytest.skip("kernels take no float64")
    weight = torch.ones(10, dtype=dtype, device=target.device)
    indices = torch.tensor([2, 9], device=target.device)
    master = weight[indices].float()
    moments = state(2, target.device)
    quiet = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    for step in range(1, 101):
        ops.sparse_adamw_(
            weight, indices, torch.ones(2, device=target.device), master, *moments, step=step, **quiet,
            backend=target.backend,
        )  # fmt: skip
    torch.testing.assert_close(master.cpu(), torch.full((2,), 0.99), rtol=1e-5, atol=0)
    assert torch.equal(weight[indices], master.to(dtype))
    assert weight.cpu().double().sum() == 8 + 2 * float(master[0].to(dtype))


def test_clip_scales_the_gradient(target):
    results = []
    for scale, clip in ((1.0, 0.25), (0.25, 1.0)):
        weight, indices = torch.ones(4, device=target.device), torch.tensor([1], device=target.device)
        master, moments = weight[indices], state(1, target.device)
        gradient = torch.full((1,), scale, device=target.device)
        ops.sparse_adamw_(
            weight, indices, gradient, master, *moments, step=1, **SETTINGS, clip=clip, backend=target.backend
        )
        results.append([weight, *moments])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # float16 overflows to infinity, as it should
@settings(max_examples=10, deadline=None)
@given(data=st.data(), with_=adamw_math.SETTINGS)
def test_against_numpy(target, data, with_):
    numel = data.draw(st.integers(1, 50))
    chosen = data.draw(st.permutations(range(numel)))[: data.draw(st.integers(1, numel))]  # in any order
    dtype = data.draw(st.sampled_from(adamw_math.stored_dtypes(target)))
    kind = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    k = len(chosen)
    weight = torch.from_numpy(rng.normal(size=numel)).to(target.device, dtype)
    start, indices = weight.clone(), torch.tensor(chosen, device=target.device)
    grad, master, first, second = (torch.from_numpy(rng.normal(size=k)).float().to(target.device) for _ in range(4))
    grad, second = grad.to(kind), second.abs()
    w, g, m, v = (tensor.cpu().double().numpy() for tensor in (master, grad, first, second))
    ops.sparse_adamw_(weight, indices, grad, master, first, second, **with_, backend=target.backend)
    exact, sizes = adamw_math.adamw(w, g, m, v, with_), adamw_math.sizes(w, g, m, v, with_)
    for ours, theirs, size in zip((master, first, second), exact, sizes, strict=True):
        assert (np.abs(ours.cpu().double().numpy() - theirs) <= 16 * 2.0**-24 * size + 1e-37).all()
    start[indices] = master.to(dtype)
    assert torch.equal(weight, start)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hostile_values_give_every_kernel_the_same_bits(target, dtype):
    if target.device == "cuda" or target.backend == "reference":
        pytest.skip("GPUs may flush denormals, and torch's root is not always the nearest float")
    if dtype not in adamw_math.stored_dtypes(target):
        pytest.skip("Triton's interpreter does not round to bfloat16")
    special = [0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-40, 3e38, -1e-8, 65520.0, 6e-8]
    n = len(special) ** 2
    grad = torch.tensor(special).repeat(len(special))
    master = torch.tensor(special).repeat_interleave(len(special))
    moments = [torch.zeros(n), torch.full((n,), 1e-40)]
    factors = AdamWStep(step=2, clip=1.0, **SETTINGS).factors
    expected = adamw_math.rounded(master.numpy(), grad.numpy(), *(moment.numpy() for moment in moments), factors)
    weight, indices = torch.ones(n).to(dtype), torch.arange(n)
    ops.sparse_adamw_(weight, indices, grad, master, *moments, step=2, **SETTINGS, backend=target.backend)
    for ours, theirs in zip((master, *moments), expected, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)
    torch.testing.assert_close(weight, master.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [-1, 4, 1 << 40])
def test_an_index_out_of_range_changes_nothing(target, bad):
    if "cuda" in target:
        pytest.skip("not looked for on a GPU")
    weight, indices = torch.ones(4), torch.tensor([1, bad])
    master, moments = torch.ones(2), state(2, "cpu")
    with pytest.raises(ValueError, match="leave 0 to 3"):
        ops.sparse_adamw_(
            weight, indices, torch.ones(2), master, *moments, step=1, **SETTINGS, backend=target.backend
        )  # fmt: skip
    assert weight.tolist() == [1] * 4
    assert [tensor.sum() for tensor in (master, *moments)] == [2, 0, 0]


def test_nothing_selected(target):
    weight = torch.ones(4, device=target.device)
    empty = torch.empty(0, device=target.device)
    ops.sparse_adamw_(
        weight, empty.long(), empty, empty.clone(), *state(0, target.device), step=1, **SETTINGS, backend=target.backend
    )
    assert torch.equal(weight.cpu(), torch.ones(4))


def test_a_leaf_that_requires_grad_is_updated():
    weight = torch.nn.Parameter(torch.ones(4))
    ops.sparse_adamw_(weight, torch.tensor([1]), torch.ones(1), torch.ones(1), *state(1, "cpu"), step=1, **SETTINGS)
    assert weight.tolist()[1] < 1


def test_refused():
    shared = torch.ones(1)
    good = {
        "weight": torch.ones(4), "indices": torch.tensor([1]), "grad_k": torch.ones(1), "master": torch.ones(1),
        "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1), "step": 1,
    } | SETTINGS  # fmt: skip
    for change, message in [
        ({"step": 0}, "step"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"lr": float("nan")}, "lr"),
        ({"master": torch.ones(2)}, "master"),
        ({"exp_avg": torch.zeros(1, dtype=torch.float64)}, "exp_avg"),
        ({"weight": torch.ones(2, 2).t()}, "contiguous"),
        ({"indices": torch.tensor([1], dtype=torch.int32)}, "int64"),
        ({"grad_k": torch.ones(1, device="meta")}, "grad_k on meta"),
        ({"grad_k": torch.ones(1).double()}, "must be contiguous float32, bfloat16, float16"),
        ({"master": shared, "exp_avg": shared}, "master and exp_avg share memory"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.sparse_adamw_(**good | change)

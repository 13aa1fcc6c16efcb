from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safecrit import ops
from safecrit.ops import native

OP = "esi_accumulate_"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["signed", "abs", "square"]
SIGMA = 0.0213


def brute_force(acc: torch.Tensor, grad: torch.Tensor, sigma: float, reduction: str) -> tuple[np.ndarray, int]:
    """In numpy, product and sum rounded to float32 one after the other."""
    a, g = acc.cpu().numpy().copy(), grad.cpu().float().numpy()
    finite = np.isfinite(g)
    with np.errstate(all="ignore"):
        value = g * g if reduction == "square" else np.float32(sigma) * g
        value = np.abs(value) if reduction == "abs" else value
        return np.where(finite, a + value, a), int((~finite).sum())


def check(acc: torch.Tensor, grad: torch.Tensor, target, sigma: float = SIGMA, reduction: str = "signed") -> None:
    expected, skipped = brute_force(acc, grad, sigma, reduction)
    assert ops.esi_accumulate_(acc, grad, sigma, reduction, backend=target.backend) == skipped
    assert acc.cpu().numpy().tobytes() == expected.tobytes()  # bit for bit, the sign of zero included


def random(shape, dtype, device, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device, dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (7,), (1, 5), (5, 1), (33, 65), (2, 3, 5), (4099,)], ids=str)
def test_shapes_dtypes_reductions(target, shape, dtype, reduction):
    acc = random(shape, torch.float32, target.device, 1)
    check(acc, random(shape, dtype, target.device), target, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_entries_are_counted_and_not_added(target, dtype):
    grad = random((37, 11), dtype, target.device)
    grad.view(-1)[::5] = torch.tensor(float("nan"), dtype=dtype)
    grad.view(-1)[1::7] = float("inf")
    grad.view(-1)[2::9] = -float("inf")
    acc = random((37, 11), torch.float32, target.device, 1)
    acc[0, 0] = -0.0
    check(acc, grad, target)


def test_every_float16_pattern(target):
    grad = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16).to(target.device)
    check(torch.zeros(grad.shape, device=target.device), grad, target, sigma=1.0)


def test_every_bfloat16_pattern(target):
    grad = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(target.device)
    # Products below the smallest normal float32 are left out: a GPU kernel may be told to flush them.
    grad = grad[~(grad.float().abs() < 1e-30) | (grad == 0)]
    check(torch.zeros(grad.shape, device=target.device), grad, target, sigma=0.75)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[3:],
        lambda t: t[:, 5:31],
        lambda t: t[1::3],
        lambda t: t[:, ::2],
        lambda t: t[::2, 1::3],
        lambda t: t.t(),
        lambda t: t[5:, 1:].t(),
        lambda t: t[:, 3],
        lambda t: t.view(20, 2, 33)[:, 0],
        lambda t: t.view(-1)[1:],
    ],
)
def test_views_leave_their_surroundings_alone(target, view, dtype):
    base_acc = random((40, 33), torch.float32, target.device, 1)
    base_grad = random((40, 33), dtype, target.device)
    expected = base_acc.cpu().clone()
    result, _ = brute_force(view(base_acc), view(base_grad), SIGMA, "signed")
    view(expected).copy_(torch.from_numpy(result))
    ops.esi_accumulate_(view(base_acc), view(base_grad), SIGMA, backend=target.backend)
    assert torch.equal(base_acc.cpu(), expected)


def test_accumulator_and_gradient_with_different_strides(target):
    acc = random((6, 9), torch.float32, target.device, 1)
    check(acc, random((9, 6), torch.bfloat16, target.device).t(), target)
    check(acc, random((1, 9), torch.bfloat16, target.device).expand(6, 9), target)
    check(acc, random((6, 1), torch.float32, target.device).expand(6, 9), target)


def test_thread_boundaries(target):
    if target.backend == "triton" and target.device == "cpu":
        pytest.skip("too large for Triton's interpreter")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for shape in [((1 << 20) + 3,), (7, 100_003), (100_003, 7), (3, 200_001)]:
            check(random(shape, torch.float32, target.device, 1), random(shape, torch.bfloat16, target.device), target)
        wide = random(((1 << 20) + 3,), torch.bfloat16, target.device)
        check(random((1 << 18,), torch.float32, target.device, 1), wide[5 : 5 + (3 << 18) : 3], target)
        check(random((3 << 18,), torch.float32, target.device, 1)[::3], wide[: 1 << 18], target)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_offsets_beyond_32_bits(target):
    far = (1 << 31) + 5  # untouched pages of these buffers take no memory on the CPU
    acc = torch.empty(far + 8, device=target.device).as_strided((2, 3), (far, 2))
    grad = torch.empty(far + 8, device=target.device, dtype=torch.bfloat16).as_strided((2, 3), (far, 1))
    acc.fill_(1)
    grad.copy_(torch.arange(6).view(2, 3))
    check(acc, grad, target)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_against_brute_force(target, data):
    if target.backend == "triton" and target.device == "cpu":
        rows, cols = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    else:
        rows, cols = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 70))
    dtype = data.draw(st.sampled_from(DTYPES))
    left, right = (data.draw(st.tuples(st.integers(0, 3), st.integers(1, 3))) for _ in range(2))
    transposed = data.draw(st.booleans())
    bits = data.draw(st.integers(0, (1 << 32) - 1))

    def strided(dtype, layout, seed):
        start, step = layout
        base = random((rows, start + cols * step + 1), dtype, target.device, seed)
        view = base[:, start : start + cols * step : step]
        return view.t() if transposed else view

    grad = strided(dtype, right, bits)
    if bits % 3 == 0:
        grad[bits % grad.shape[0], bits % grad.shape[1]] = float("nan")
    sigma = data.draw(st.floats(0, 4, width=32, allow_subnormal=False))
    check(strided(torch.float32, left, bits + 1), grad, target, sigma, data.draw(st.sampled_from(REDUCTIONS)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"acc": torch.zeros(4, dtype=torch.bfloat16)}, "must be torch.float32"),
        ({"grad": torch.zeros(4, dtype=torch.float64)}, "must be float32, bfloat16 or float16"),
        ({"grad": torch.zeros(4, dtype=torch.int32)}, "must be float32, bfloat16 or float16"),
        ({"grad": torch.zeros(2, 2)}, "has shape"),
        ({"grad": torch.zeros(4, device="meta")}, "is on"),
        ({"grad": torch.zeros(4).to_sparse()}, "dense"),
        ({"acc": torch.zeros(1).expand(4)}, "share memory"),
        ({"sigma": float("nan")}, "finite"),
        ({"reduction": "mean"}, "reduction"),
    ],
)
def test_refused(change, message):
    good = {"acc": torch.zeros(4), "grad": torch.zeros(4), "sigma": 1.0, "reduction": "signed"}
    with pytest.raises(ValueError, match=message):
        ops.esi_accumulate_(**good | change)


def test_aliases_and_irregular_strides_are_refused():
    buffer = torch.zeros(10)
    with pytest.raises(ValueError, match="share memory"):
        ops.esi_accumulate_(buffer[:5], buffer[4:9], 1.0)
    ops.esi_accumulate_(buffer[:5], buffer[5:], 1.0)  # side by side is no overlap
    ops.esi_accumulate_(torch.zeros(4, 6, 8)[:, ::2, ::2], torch.zeros(4, 3, 4), 1.0)  # 12 rows 16 apart
    with pytest.raises(ValueError, match="do not collapse"):
        ops.esi_accumulate_(torch.zeros(4, 6, 8)[::2, ::2, ::2], torch.zeros(2, 3, 4), 1.0)


@pytest.mark.skipif(native.cpu_module()[0] is None, reason="no native module here")
@pytest.mark.parametrize("variant", ["plain", "avx2"])
def test_processors_with_less_give_the_same_bits(variant, tmp_path):
    code = """
import hashlib, torch
from safecrit import ops
from safecrit.ops import native
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for reduction in ("signed", "abs", "square"):
        acc, grad = torch.randn(57, 131), (torch.randn(57, 131) * 9).to(dtype)
        grad[3, 5:9] = float("nan")
        for view in (lambda t: t, lambda t: t[1:, ::3]):
            digest.update(str(ops.esi_accumulate_(view(acc), view(grad), 0.3, reduction, backend="native")).encode())
        digest.update(acc.numpy().tobytes())
print(native.cpu_module()[1], digest.hexdigest())
"""
    found = {}
    for limit in ("", variant):
        environment = os.environ | {"SAFECRIT_CPU": limit}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
        )
        name, _, found[limit] = done.stdout.strip().rpartition(" ")
    assert name in (f"C++, {variant}", "C++, plain")
    assert found[""] == found[variant]


@pytest.mark.gpu
def test_runs_on_the_current_stream():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    stream = torch.cuda.Stream()
    acc = torch.zeros(1 << 24, device="cuda")
    grad = torch.zeros(1 << 24, device="cuda", dtype=torch.bfloat16)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):  # keep the stream busy, so that a launch elsewhere would read the zeros
            grad.add_(1)
        ops.esi_accumulate_(acc, grad, 1.0)
    stream.synchronize()
    assert bool((acc == 20).all())

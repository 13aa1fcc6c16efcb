from __future__ import annotations

import math
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
from safecrit.ops.reference import matrix_std as reference
from safecrit.strided import Strided

OP = "matrix_std"


def brute_force(values: torch.Tensor) -> float:
    return float(np.std(values.cpu().double().numpy(), ddof=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2,), (7,), (33, 65), (3, 5, 7), (1, 1, 2)], ids=str)
def test_whole(target, shape, dtype):
    if dtype == torch.float64 and target.backend != "reference":
        pytest.skip("kernels take no float64")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(target.device, dtype)
    result = ops.matrix_std(weight, backend=target.backend)
    assert result.dtype == torch.float64
    assert result.shape == (1,)
    assert float(result[0]) == pytest.approx(brute_force(weight), rel=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_do_not_change_the_result(target, chunk, monkeypatch):
    if target.backend == "reference":
        monkeypatch.setattr(reference, "CHUNK", chunk)
    weight = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0)).to(target.device)
    pattern = Strided(3, (5, 4, 2), (42, 7, 2))
    result = ops.matrix_std(weight, [pattern], backend=target.backend)
    assert float(result[0]) == pytest.approx(brute_force(pattern.of(weight)), rel=1e-12)


def test_patterns(target):
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(1)).to(target.device)
    patterns = [
        Strided(0, (6, 4), (12, 1)),  # column blocks, as in GPT-2's c_attn
        Strided(4, (6, 4), (12, 1)),
        Strided(12, (3, 12), (24, 1)),  # every other row, as in GPT-NeoX
        Strided(71, (1,), (1,)),
        Strided(0, (0, 12), (12, 1)),
    ]
    result = ops.matrix_std(weight, patterns, backend=target.backend)
    expected = [brute_force(pattern.of(weight)) for pattern in patterns[:3]] + [0.0, 0.0]
    assert result.tolist() == pytest.approx(expected, rel=1e-12)
    assert ops.matrix_std(weight, [], backend=target.backend).shape == (0,)


def test_a_large_mean_does_not_cancel(target):
    weight = torch.tensor([2.0**23 + 1, 2.0**23 + 2, 2.0**23 + 3], device=target.device)
    assert float(ops.matrix_std(weight, backend=target.backend)) == 1.0
    noise = torch.randn(70_001, generator=torch.Generator().manual_seed(0))
    for mean in (1.0, 1e2, 1e4, 1e6):
        weight = (noise + mean).to(target.device)
        assert float(ops.matrix_std(weight, backend=target.backend)) == pytest.approx(brute_force(weight), rel=1e-12)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
def test_constants_non_finite_and_views(target):
    std = lambda values: float(ops.matrix_std(values, backend=target.backend))  # noqa: E731
    assert std(torch.full((9,), 0.1, device=target.device)) == 0.0
    assert math.isnan(std(torch.tensor([1.0, float("nan"), 2.0], device=target.device)))
    assert math.isnan(std(torch.tensor([1.0, float("inf"), 2.0], device=target.device)))
    base = torch.randn(8, 9, generator=torch.Generator().manual_seed(2)).to(target.device)
    assert std(base[1:, ::2].t()) == pytest.approx(brute_force(base[1:, ::2]), rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=60))
def test_against_numpy(target, values):
    weight = torch.tensor(values, device=target.device)
    assert float(ops.matrix_std(weight, backend=target.backend)) == pytest.approx(brute_force(weight), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_patterns_against_numpy(target, data):
    dims = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=4))
    strides, step = [], 1
    for size, gap in dims:
        strides.append(step + gap)
        step = (step + gap) * size
    order = data.draw(st.permutations(range(len(dims))))
    pattern = Strided(
        data.draw(st.integers(0, 5)), tuple(dims[d][0] for d in order), tuple(strides[d] for d in order)
    )  # fmt: skip
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 32)))
    weight = torch.randn(step + 6, generator=generator) + data.draw(st.sampled_from([0.0, 3.0, 900.0]))
    weight = weight.to(target.device, dtype)
    found = float(ops.matrix_std(weight, [pattern], backend=target.backend)[0])
    part = pattern.of(weight)
    assert found == pytest.approx(brute_force(part) if part.numel() > 1 else 0.0, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_tiles_on_any_number_of_threads(target, dtype):
    numel, before = 1_000_003, torch.get_num_threads()
    weight = (torch.randn(numel + 1, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.01).to(target.device, dtype)
    patterns = [Strided(1, (numel,), (1,)), Strided(0, (999, 100), (1001, 1)), Strided(5, (333, 1000), (3, 1000))]
    results = []
    for threads in (1, 2, 5) if target.backend in ("native", "reference") else (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(ops.matrix_std(weight, patterns, backend=target.backend).tolist())
        finally:
            torch.set_num_threads(before)
    if target.backend != "reference":  # torch's own sums depend on the number of threads, in the last bits
        assert all(result == results[0] for result in results)
    assert results[0] == pytest.approx([brute_force(pattern.of(weight)) for pattern in patterns], rel=1e-12)


def test_denormals_and_extremes(target):
    for values in ([1e-45, 3e-45, 0.0], [3e38, -3e38, 1.0], [1e-40, -2e-40, 3e-40]):
        weight = torch.tensor(values * 40, device=target.device)
        found = float(ops.matrix_std(weight, backend=target.backend))
        assert found == pytest.approx(brute_force(weight), rel=1e-12)


@pytest.mark.parametrize("variant", ["plain", "avx2"])
def test_native_variants_give_the_same_bits(variant, tmp_path):
    if native.cpu_module()[0] is None:
        pytest.skip("no native module here")
    code = """
import torch
from safecrit import ops
from safecrit.ops import native
from safecrit.strided import Strided
torch.manual_seed(0)
found = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for mean in (0.0, 50.0):
        weight = (torch.randn(40_001) + mean).to(dtype)
        parts = [Strided(0, (40_001,), (1,)), Strided(1, (77, 130), (500, 1))]
        found += ops.matrix_std(weight, parts, backend="native").tolist()
    first, second, grad, free = torch.randn(999), torch.rand(999), torch.randn(999).to(dtype), torch.zeros(125).byte()
    weight = torch.randn(999).to(dtype)
    settings = dict(step=3, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, backend="native")
    ops.masked_adamw_(weight, grad, first, second, free, **settings)
    state = (first[:300], first[300:600], second[:300])
    ops.sparse_adamw_(weight, torch.arange(0, 900, 3), grad[:300], *state, **settings)
    found += [float(t.double().sum()) for t in (weight, first, second)]
print(native.cpu_module()[1], [value.hex() for value in found], sep="|")
"""
    found = {}
    for limit in ("", variant):
        environment = os.environ | {"SAFECRIT_CPU": limit}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
        )
        name, _, found[limit] = done.stdout.strip().partition("|")
    assert name in (f"C++, {variant}", "C++, plain")
    assert found[""] == found[variant]


def test_refused():
    with pytest.raises(ValueError, match="floating"):
        ops.matrix_std(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="leaves"):
        ops.matrix_std(torch.zeros(6), [Strided(1, (2, 3), (3, 1))])
    with pytest.raises(ValueError, match="contiguous"):
        ops.matrix_std(torch.zeros(2, 3).t(), [Strided(0, (2,), (1,))])

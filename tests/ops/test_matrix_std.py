from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safecrit import ops
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


def test_refused():
    with pytest.raises(ValueError, match="floating"):
        ops.matrix_std(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="leaves"):
        ops.matrix_std(torch.zeros(6), [Strided(1, (2, 3), (3, 1))])
    with pytest.raises(ValueError, match="contiguous"):
        ops.matrix_std(torch.zeros(2, 3).t(), [Strided(0, (2,), (1,))])

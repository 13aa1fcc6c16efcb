from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safecrit import ops
from tests.ops import adamw_math

OP = "gather_"


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_against_numpy(target, data):
    numel = data.draw(st.integers(1, 400))
    k = data.draw(st.integers(0, 300))
    dtype = data.draw(st.sampled_from(adamw_math.stored_dtypes(target)))
    wide = data.draw(st.sampled_from([torch.int32, torch.int64]))
    add = data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    values = torch.from_numpy(rng.normal(size=numel)).to(target.device, dtype)
    indices = torch.from_numpy(rng.integers(numel, size=k)).to(target.device, wide)  # in any order, some twice
    out = torch.from_numpy(rng.normal(size=k)).float().to(target.device)
    expected = values.cpu().float().numpy()[indices.cpu().numpy()] + (out.cpu().numpy() if add else np.float32(0))
    ops.gather_(out, values, indices, add=add, backend=target.backend)
    np.testing.assert_array_equal(out.cpu().numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_value_is_taken_as_it_is(target, dtype):
    if dtype == torch.float64 and target.backend != "reference":
        pytest.skip("kernels take no float64")
    values = torch.tensor([0.0, -0.0, 1.5, float("nan"), float("inf"), -float("inf"), 6e-8]).to(target.device, dtype)
    out = torch.empty(7, device=target.device)
    ops.gather_(out, values, torch.arange(7, device=target.device), backend=target.backend)
    torch.testing.assert_close(out, values.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit().cpu()[:3], torch.tensor([False, True, False]))


def test_several_threads_take_every_entry(target):
    if target.backend == "triton":
        pytest.skip("one program after the other in Triton's interpreter")
    values = torch.arange(1 << 18, dtype=torch.float32, device=target.device).view(512, 512)
    indices = torch.arange(1, 1 << 18, dtype=torch.int32, device=target.device)
    out = torch.ones(len(indices), device=target.device)
    ops.gather_(out, values, indices, add=True, backend=target.backend)
    assert torch.equal(out, 1.0 + indices)


def test_a_transposed_tensor_is_read_in_its_own_order(target):
    values = torch.arange(6.0, device=target.device).view(2, 3).t()
    out = torch.empty(2, device=target.device)
    ops.gather_(out, values, torch.tensor([1, 4], device=target.device), backend=target.backend)
    assert out.tolist() == [3, 2]


@pytest.mark.parametrize("bad", [-1, 4, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_an_index_out_of_range_changes_nothing(target, bad, dtype):
    if target.device == "cuda":
        pytest.skip("not looked for on a GPU")
    out = torch.full((2,), 7.0)
    with pytest.raises(ValueError, match="leave 0 to 3"):
        ops.gather_(out, torch.ones(4), torch.tensor([1, bad], dtype=dtype), backend=target.backend)
    assert out.tolist() == [7, 7]


def test_refused():
    shared = torch.ones(4)
    good = {"out": torch.zeros(2), "values": torch.ones(4), "indices": torch.tensor([1, 2])}
    for change, message in [
        ({"out": torch.zeros(3)}, "out is"),
        ({"out": torch.zeros(2).double()}, "float32"),
        ({"out": torch.zeros(4)[::2]}, "contiguous"),
        ({"indices": torch.tensor([1, 2], dtype=torch.int16)}, "int32 or int64"),
        ({"indices": torch.tensor([[1, 2]])}, "int32 or int64"),
        ({"values": torch.ones(4).int()}, "floating-point"),
        ({"values": torch.ones(4, device="meta")}, "values on meta"),
        ({"out": shared[:2], "values": shared}, "out and values share memory"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.gather_(**good | change)

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safecrit import ops
from safecrit.ops.reference import select_top as reference

OP = "select_top"


def brute_force(scores: list[torch.Tensor], k: int, largest: bool) -> list[list[int]]:
    """Sort everything: by |x|, then tensor, then index; NaN left out."""
    entries = [
        (abs(value), position, index)
        for position, tensor in enumerate(scores)
        for index, value in enumerate(tensor.cpu().float().reshape(-1).tolist())
        if not math.isnan(value)
    ]
    entries.sort(key=lambda entry: (-entry[0] if largest else entry[0], entry[1], entry[2]))
    return [sorted(i for _, p, i in entries[:k] if p == position) for position in range(len(scores))]


def check(scores: list[torch.Tensor], k: int, largest: bool, backend: str) -> ops.Selection:
    found = ops.select_top(scores, k, largest=largest, backend=backend)
    expected = brute_force(scores, k, largest)
    assert [indices.tolist() for indices in found.indices] == expected
    assert all(indices.dtype == torch.int64 for indices in found.indices)
    flat = [tensor.cpu().float().reshape(-1).abs().numpy() for tensor in scores]
    everything = np.concatenate(flat) if flat else np.empty(0, np.float32)
    assert found.nan == int(np.isnan(everything).sum())
    if k:
        chosen = np.concatenate([values[indices] for values, indices in zip(flat, expected, strict=True)])
        threshold = chosen.min() if largest else chosen.max()
        assert found.threshold == float(threshold)
        assert found.tied == int((everything == threshold).sum())
        assert found.tied_selected == int((chosen == threshold).sum())
        assert struct.pack("<I", found.threshold_bits) == np.float32(threshold).tobytes()
    return found


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_shapes(target, dtype, largest):
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 9), (), (0,), (3, 0, 2), (31,), (2, 3, 4)]
    scores = [torch.randn(shape, generator=generator).to(target.device, dtype) for shape in shapes]
    for k in (0, 1, 2, 50, 118, 119):
        check(scores, k, largest, target.backend)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_ties_go_to_the_smaller_tensor_and_index_over_chunks(target, largest, chunk, monkeypatch):
    if target.backend == "reference":
        monkeypatch.setattr(reference, "CHUNK", chunk)
    scores = [torch.tensor(v, device=target.device) for v in ([2.0, -1, 1, 0], [1.0, 1, -1], [-0.0, 3, 1, -1, 0])]
    for k in range(13):
        check(scores, k, largest, target.backend)


def test_all_equal(target):
    scores = [torch.zeros(5, device=target.device), torch.zeros(4, device=target.device)]
    found = check(scores, 7, True, target.backend)
    assert (found.tied, found.tied_selected, found.threshold) == (9, 7, 0.0)


def test_adjacent_floats_infinities_and_subnormals(target):
    bits = torch.tensor([0x3F800000, 0x3F800001, 0x3F7FFFFF, 1, 2, 0x7F800000, 0x7F7FFFFF], dtype=torch.int32)
    scores = [bits.view(torch.float32).to(target.device), -bits.flip(0).view(torch.float32).to(target.device)]
    for k in range(15):
        for largest in (True, False):
            check(scores, k, largest, target.backend)


def test_nan_is_counted_and_never_selected(target):
    nan = float("nan")
    negative_nan = torch.tensor([-1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    scores = [torch.tensor([nan, 1.0, nan, -2.0]).to(target.device), negative_nan.to(target.device)]
    for largest in (True, False):
        assert check(scores, 2, largest, target.backend).nan == 4
        with pytest.raises(ValueError, match="only 2 entries are not NaN"):
            ops.select_top(scores, 3, largest=largest, backend=target.backend)


def test_views_and_empty_lists(target):
    base = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)).to(target.device)
    check([base[1:, ::2], base.t()], 20, True, target.backend)
    found = check([], 0, True, target.backend)
    assert (found.indices, found.threshold, found.tied) == ([], math.inf, 0)
    with pytest.raises(ValueError, match="only 0"):
        ops.select_top([], 1, backend=target.backend)


@settings(max_examples=80, deadline=None)
@given(
    lists=st.lists(st.lists(st.floats(width=16), max_size=20), max_size=4),
    share=st.floats(0, 1),
    largest=st.booleans(),
)
def test_against_brute_force(target, lists, share, largest):
    scores = [torch.tensor(values, dtype=torch.float32, device=target.device) for values in lists]
    finite = sum(not math.isnan(value) for values in lists for value in values)
    check(scores, int(share * finite), largest, target.backend)


def test_agrees_with_topk_on_many_values(target):
    scores = torch.randn(300_000, generator=torch.Generator().manual_seed(0)).to(target.device)
    found = ops.select_top([scores[:100_001], scores[100_001:]], 3000, backend=target.backend)
    values, indices = torch.topk(scores.abs(), 3000)
    joined = torch.cat([found.indices[0], found.indices[1] + 100_001])
    assert torch.equal(joined, indices.sort().values)
    assert found.threshold == float(values[-1])


def test_refused():
    with pytest.raises(ValueError, match="negative"):
        ops.select_top([torch.zeros(3)], -1)
    with pytest.raises(ValueError, match=r"tensor 1 is torch\.float64"):
        ops.select_top([torch.zeros(3), torch.zeros(3, dtype=torch.float64)], 1)

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safecrit import ops
from safecrit.ops.reference import bits as reference

OP = "bits_from_indices"


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_round_trip_against_packbits(target, data):
    numel = data.draw(st.integers(0, 70))
    chosen = sorted(data.draw(st.sets(st.integers(0, numel - 1)))) if numel else []
    dense = np.zeros(numel, bool)
    dense[chosen] = True
    indices = torch.tensor(chosen, dtype=torch.int64, device=target.device)
    bits = ops.bits_from_indices(indices, numel, backend=target.backend)
    assert bits.dtype == torch.uint8
    assert bits.cpu().numpy().tobytes() == np.packbits(dense, bitorder="little").tobytes()
    assert torch.equal(ops.indices_from_bits(bits, numel, backend=target.backend), indices)


def test_chunks(target, monkeypatch):
    if target.backend == "reference":
        monkeypatch.setattr(reference, "CHUNK", 3)
    indices = torch.tensor([0, 7, 8, 23, 24, 25, 99], device=target.device)
    bits = ops.bits_from_indices(indices, 100, backend=target.backend)
    assert torch.equal(ops.indices_from_bits(bits, 100, backend=target.backend), indices)


@pytest.mark.parametrize(
    ("indices", "message"), [([3, 1], "ascending"), ([1, 1], "ascending"), ([-1, 2], "leave"), ([2, 9], "leave")]
)
def test_bad_indices_are_refused(indices, message):
    with pytest.raises(ValueError, match=message):
        ops.bits_from_indices(torch.tensor(indices), 9)


def test_bad_types_and_bits_are_refused():
    with pytest.raises(ValueError, match="int64"):
        ops.bits_from_indices(torch.tensor([1], dtype=torch.int32), 9)
    with pytest.raises(ValueError, match="padding"):
        ops.indices_from_bits(torch.tensor([0, 2], dtype=torch.uint8), 9)
    for bits in (torch.zeros(3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int8), torch.zeros(4).byte()[::2]):
        with pytest.raises(ValueError, match="uint8"):
            ops.indices_from_bits(bits, 9)

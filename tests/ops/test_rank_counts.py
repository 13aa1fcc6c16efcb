from __future__ import annotations

import pytest
import torch

from safecrit import ops
from safecrit.ops.rank_counts import INFINITY

OP = "rank_counts"


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_counts_are_those_of_the_sorted_bits(target, dtype, largest):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(shape, generator=generator).to(dtype) for shape in ((70, 90), (), (0,), (31,))]
    scores[0][3, :5] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    scores[0][5] = scores[0][6]
    bits = torch.cat([tensor.float().reshape(-1) for tensor in scores]).view(torch.int32).long() & 0x7FFFFFFF
    ranks = bits if largest else INFINITY - bits
    ranks[bits > INFINITY] = INFINITY + 1
    common = int(ranks.mode().values)
    given = [tensor.to(target.device) for tensor in scores]
    for low, high, shift in ((0, INFINITY, 15), (common >> 15 << 15, (common >> 15 << 15) + 32767, 0), (7, 7, 0)):
        found = ops.rank_counts(given, low, high, shift, largest=largest, backend=target.backend)
        inside = ranks[(ranks >= low) & (ranks <= high)]
        expected = torch.bincount((inside - low) >> shift, minlength=((high - low) >> shift) + 1)
        assert found.dtype == torch.int64 and torch.equal(found[:-1], expected)
        assert int(found[-1]) == int((ranks > high).sum())


def test_nothing_counts_as_nothing(target):
    assert int(ops.rank_counts([], backend=target.backend).sum()) == 0


def test_refuses_ranks_out_of_order_and_integers():
    with pytest.raises(ValueError, match="are none of 0 to"):
        ops.rank_counts([torch.ones(3)], 5, 4)
    with pytest.raises(ValueError, match=r"tensor 0 is torch\.int32"):
        ops.rank_counts([torch.ones(3, dtype=torch.int32)])

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from safecrit import ops
from safecrit.ops.rank_counts import INFINITY
from tests.ranks.launch import run, torchrun
from tests.ranks.selecting import masks


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_masks_are_bit_identical_and_little_is_sent(ranks: int, tmp_path: Path) -> None:
    alone, together = tmp_path / "1", tmp_path / "n"
    alone.mkdir()
    together.mkdir()
    refused, nothing = masks(alone)
    assert not any(nothing.values())
    code, out, err = run(torchrun(ranks, "tests.ranks.selecting", together))
    assert code == 0, err
    reports = json.loads(out)
    assert [report["rank"] for report in reports] == list(range(ranks))
    assert all(report["refused"] == refused for report in reports) and "too-many-top" in refused
    assert sorted(file.name for file in together.iterdir()) == sorted(file.name for file in alone.iterdir())
    for file in alone.iterdir():
        assert (together / file.name).read_bytes() == file.read_bytes(), file.name
    # Two histograms and a few counts, however many scores there are.
    most = max(max(report["sent"].values()) for report in reports)
    assert 2**16 <= most <= 2 * (ranks - 1) / ranks * (2**16 + 2**15 + 199) * 8 <= 2_000_000


def test_what_is_sent_does_not_grow_with_the_scores() -> None:
    few, many = torch.randn(10), torch.randn(100_000)
    for low, high, shift in ((0, INFINITY, 15), (5 << 15, (6 << 15) - 1, 0)):
        found = [ops.rank_counts([scores], low, high, shift) for scores in (few, many)]
        assert len(found[0]) == len(found[1]) <= 2**16

"""The cost model's formulas, and that its constants are those that were measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from safecrit import costs

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "cost-model.json"


def test_constants_are_the_measured_fit() -> None:
    fitted = {op: found["fitted_bytes"] for op, found in json.loads(RESULT.read_text(encoding="utf-8"))["ops"].items()}
    assert costs.FITTED.keys() == fitted.keys()
    for op, sizes in costs.FITTED.items():
        assert sizes == pytest.approx({name: size for name, size in fitted[op].items() if size}, rel=0.01)


@pytest.mark.parametrize(("numel", "k"), [(1600, 0), (1600, 1), (160_000, 1_600), (16_000, 16_000)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_lines_are_those_that_random_entries_touch(numel: int, k: int, itemsize: int) -> None:
    lines = costs.counts(numel, k, itemsize)["lines"]
    random = np.random.default_rng(0)
    drawn = [random.choice(numel, k, replace=False) * itemsize // costs.LINE for _ in range(10)]
    assert lines == pytest.approx(np.mean([len(set(found.tolist())) for found in drawn]), rel=0.02, abs=0.1)


def test_moved_adds_up_and_nothing_costs_nothing() -> None:
    sizes = costs.FITTED["select_top"]
    assert costs.moved("select_top", 1e9, 1e7) == pytest.approx(sizes["N"] * 1e9 + sizes["k"] * 1e7)
    assert costs.moved("sparse_adamw_", 0) == 0

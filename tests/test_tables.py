from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safecrit.layout import Matrix, TensorLayout
from safecrit.strided import Strided
from safecrit.tables import (
    count_in,
    count_matrices,
    group_counts,
    group_scores,
    mask_by_component,
    mask_by_layer_component,
    mask_by_layer_expert,
    scores_by_layer_component,
    scores_by_layer_expert,
)


@dataclass
class FakeMask:
    layouts: dict[str, TensorLayout]
    indices: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def info(self) -> Any:
        return SimpleNamespace(tensors=self.layouts)


def whole(
    shape: tuple[int, ...], component: str, layer: int | None, expert: int | None = None, eligible: bool = True
) -> TensorLayout:
    return TensorLayout(shape, (Matrix(component, layer, expert, Strided.whole(shape)),), eligible)


def model() -> FakeMask:
    """Plain, column-block (GPT-2), per-head interleaved (GPT-NeoX) and fused-expert tensors, in all two layers."""
    heads, size, hidden = 3, 2, 5
    fused = TensorLayout(
        (4, 9), tuple(Matrix(c, 0, None, Strided(3 * i, (4, 3), (9, 1))) for i, c in enumerate("qkv")), True
    )
    interleaved = TensorLayout(
        (heads * 3 * size, hidden),
        tuple(
            Matrix(c, 1, None, Strided(i * size * hidden, (heads, size, hidden), (3 * size * hidden, hidden, 1)))
            for i, c in enumerate("qkv")
        ),
        True,
    )
    bank = TensorLayout(
        (3, 4, 5),
        tuple(
            Matrix(c, 1, e, Strided(20 * e + 10 * i, (2, 5), (5, 1)))
            for e in range(3)
            for i, c in enumerate(("gate", "up"))
        ),
        True,
    )
    return FakeMask(
        {
            "layers.0.attn": fused,
            "layers.1.attn": interleaved,
            "layers.1.experts": bank,
            "layers.0.down": whole((5, 4), "down", 0),
            "layers.0.norm": whole((5,), "norm", 0, eligible=False),
            "head": whole((7, 5), "head", None),
            "embed": whole((7, 5), "embedding", None, eligible=False),
            "layers.1.experts.7.down": whole((5, 3), "down", 1, expert=7),
        }
    )


def select(mask: FakeMask, share: float, seed: int = 0) -> FakeMask:
    rng = np.random.default_rng(seed)
    mask.indices = {}
    for name, layout in mask.layouts.items():
        chosen = np.flatnonzero(rng.random(layout.numel) < share)
        if layout.eligible and chosen.size:
            mask.indices[name] = torch.from_numpy(chosen.astype(np.int64))
    return mask


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_counts_equal_a_dense_count(share: float) -> None:
    mask = select(model(), share)
    for count, (name, matrix) in zip(
        count_matrices(mask),
        [(name, matrix) for name, layout in sorted(mask.layouts.items()) for matrix in layout.matrices],
        strict=True,
    ):
        dense = torch.zeros(mask.layouts[name].numel, dtype=torch.bool)
        if name in mask.indices:
            dense[mask.indices[name]] = True
        where = matrix.where
        assert count.selected == int(
            np.lib.stride_tricks.as_strided(dense.numpy()[where.offset :], where.shape, where.strides).sum()
        )
        assert (count.tensor, count.component, count.layer, count.expert) == (
            name,
            matrix.component,
            matrix.layer,
            matrix.expert,
        )
        assert count.eligible == (where.numel if mask.layouts[name].eligible else 0)


@given(st.sets(st.integers(0, 35)), st.integers(0, 2))
def test_count_in_a_column_block(chosen: set[int], block: int) -> None:
    pattern = Strided(3 * block, (4, 3), (9, 1))
    expected = len(chosen & set(pattern.flat_indices().tolist()))
    assert count_in(torch.tensor(sorted(chosen), dtype=torch.int64), pattern) == expected


def test_count_in_edge_patterns() -> None:
    everything = torch.arange(100)
    assert count_in(everything, Strided(3, (0, 5), (5, 1))) == 0
    assert count_in(everything, Strided(99, (1,), (1,))) == 1
    assert count_in(everything, Strided(2, (5,), (20,))) == 5
    assert count_in(torch.empty(0, dtype=torch.int64), Strided.whole((10, 10))) == 0
    assert count_in(torch.tensor([2**40, 2**40 + 7]), Strided(2**40, (4,), (7,))) == 2


def test_groups_add_up_and_shares_have_their_denominators() -> None:
    mask = select(model(), 0.3)
    total = sum(layout.numel for layout in mask.layouts.values())
    eligible = sum(layout.numel for layout in mask.layouts.values() if layout.eligible)
    selected = sum(len(indices) for indices in mask.indices.values())
    for groups in (mask_by_layer_component(mask), mask_by_component(mask)):
        assert sum(g.weights for g in groups) == total
        assert sum(g.eligible for g in groups) == eligible
        assert sum(g.selected for g in groups) == selected
        for name in ("of_selected", "of_eligible", "of_all"):
            assert sum(getattr(g, name) for g in groups) == pytest.approx(1.0)
        for g in groups:
            assert g.share == g.selected / g.weights
            assert (g.of_selected, g.of_eligible, g.of_all) == (
                g.selected / selected,
                g.eligible / eligible,
                g.weights / total,
            )


def test_order_is_by_layer_then_component_and_no_layer_comes_last() -> None:
    groups = mask_by_layer_component(select(model(), 0.3))
    assert [(g.layer, g.component) for g in groups] == [
        (0, "q"), (0, "k"), (0, "v"), (0, "down"), (0, "norm"),
        (1, "q"), (1, "k"), (1, "v"), (1, "gate"), (1, "up"), (1, "down"),
        (None, "embedding"), (None, "head"),
    ]  # fmt: skip
    assert [g.component for g in mask_by_component(model())] == [
        "q",
        "k",
        "v",
        "gate",
        "up",
        "down",
        "embedding",
        "head",
        "norm",
    ]


def test_experts_are_grouped_apart_from_the_rest() -> None:
    mask = select(model(), 0.4)
    groups = mask_by_layer_expert(mask)
    assert [(g.layer, g.expert, g.weights) for g in groups] == [(1, 0, 20), (1, 1, 20), (1, 2, 20), (1, 7, 15)]
    of_experts = len(mask.indices["layers.1.experts"]) + len(mask.indices["layers.1.experts.7.down"])
    assert sum(g.selected for g in groups) == of_experts
    everything = sum(len(indices) for indices in mask.indices.values())
    assert sum(g.of_selected or 0 for g in groups) == pytest.approx(of_experts / everything)
    del mask.layouts["layers.1.experts"], mask.layouts["layers.1.experts.7.down"]
    assert mask_by_layer_expert(mask) == []


def test_an_empty_mask_has_no_share_of_the_selected() -> None:
    groups = mask_by_component(model())
    assert all(g.selected == 0 and g.share == 0.0 and g.of_selected is None for g in groups)
    assert group_counts([], ("layer",)) == []


def entry(
    layer: int | None, component: str, expert: int | None, numel: int, mean: float, largest: float
) -> dict[str, Any]:
    return {
        "name": "t", "layer": layer, "component": component, "expert": expert,
        "numel": numel, "sigma": 1.0, "mean_abs": mean, "max_abs": largest, "nonzero": 1.0,
    }  # fmt: skip


def test_scores_are_averaged_over_weights() -> None:
    matrices = [
        entry(1, "up", 0, 10, 1.0, 5.0),
        entry(1, "up", 1, 30, 2.0, 4.0),
        entry(0, "v", None, 8, 0.5, 9.0),
        entry(1, "up", 2, 0, 0.0, 0.0),
        entry(None, "head", None, 2, 0.1, 0.2),
    ]
    groups = scores_by_layer_component(matrices)
    assert [(g.layer, g.component, g.weights) for g in groups] == [(0, "v", 8), (1, "up", 40), (None, "head", 2)]
    assert (groups[1].mean, groups[1].largest) == (pytest.approx(1.75), 5.0)
    assert [(g.layer, g.expert, g.mean) for g in scores_by_layer_expert(matrices)] == [(1, 0, 1.0), (1, 1, 2.0)]
    assert group_scores(matrices, ())[0].weights == 50


def test_scores_of_a_table_without_optional_keys() -> None:
    (group,) = scores_by_layer_component([{"component": "q", "numel": 4, "mean_abs": 1.0, "max_abs": 2.0}])
    assert (group.layer, group.expert) == (None, None)

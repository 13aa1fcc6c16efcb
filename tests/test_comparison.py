"""Overlap of masks and agreement of scores, against sets, sorting and scipy."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from safecrit.anatomy import read_anatomy
from safecrit.comparison import MaskFile, Overlap, agreement, compare
from safecrit.errors import FormatError, MismatchError, SafecritError
from safecrit.layout import TensorLayout
from safecrit.maskfile import Mask
from safecrit.selection import SelectionSettings, select_from
from tests import architectures
from tests.golden import make as golden

GOLDEN = golden.HERE / "mask.safetensors"


def layouts(family: str) -> dict[str, TensorLayout]:
    return read_anatomy(architectures.build(family, device="meta")).layouts


def drawn(family: str, share: str, seed: int, only: str = "") -> Mask:
    """A random mask of a tiny model, of the eligible tensors whose name contains `only`."""
    known = {
        name: dataclasses.replace(layout, eligible=layout.eligible and only in name)
        for name, layout in layouts(family).items()
    }
    tensors = {name: torch.empty(layout.shape) for name, layout in known.items() if layout.eligible}
    return select_from(tensors, SelectionSettings(mode="random", share=share, seed=seed), layouts=known)


def saved(mask: Mask, path: Path, **options: Any) -> MaskFile:
    mask.save(path, **options)
    return MaskFile(path)


@pytest.mark.parametrize(
    "where", [GOLDEN, golden.HERE / "sharded", golden.HERE / "sharded/mask.safetensors.index.json"]
)
def test_a_mask_file_reads_both_encodings_by_tensor(where: Path) -> None:
    read, expected = MaskFile(where), golden.mask()
    assert (read.info, read.count) == (expected.info, 12)
    for name in read.info.tensors:
        assert torch.equal(read.indices(name), expected.indices.get(name, torch.empty(0, dtype=torch.int64)))


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "mixtral", "gpt-oss"])
def test_every_group_equals_counting_in_sets(family: str, tmp_path: Path) -> None:
    first = drawn(family, "2%", 0)
    second = drawn(family, "30%", 1) | first
    files = [saved(first, tmp_path / "a", shard_bytes=300), saved(second, tmp_path / "b")]
    (found,) = compare(files)
    assert (found.first, found.second) == (0, 1)
    chosen = [{(n, i) for n, flat in mask.indices.items() for i in flat.tolist()} for mask in (first, second)]
    groups: dict[str, dict[Any, set[tuple[str, int]]]] = {"layer": {}, "component": {}, "expert": {}}
    for name, layout in layouts(family).items():
        for matrix in layout.matrices if layout.eligible else ():
            inside = {(name, i) for i in matrix.where.flat_indices().tolist()}
            groups["layer"].setdefault(matrix.layer, set()).update(inside)
            groups["component"].setdefault(matrix.component, set()).update(inside)
            if matrix.expert is not None:
                groups["expert"].setdefault((matrix.layer, matrix.expert), set()).update(inside)
    everything = set().union(*groups["layer"].values())

    def check(ours: Overlap, members: set[tuple[str, int]]) -> None:
        a, b = (one & members for one in chosen)
        assert (ours.eligible, ours.first, ours.second) == (len(members), len(a), len(b))
        assert ours.shared == len(a & b)
        assert ours.iou == (len(a & b) / len(a | b) if a | b else None)
        assert ours.overlap == (len(a & b) / min(len(a), len(b)) if a and b else None)
        expected = len(a) * len(b) / len(members)
        assert ours.shared_by_chance == pytest.approx(expected)
        assert ours.iou_by_chance == (pytest.approx(expected / (len(a) + len(b) - expected)) if a | b else None)

    check(found.overall, everything)
    assert found.overall.overlap == 1.0 and found.overall.iou == first.iou(second)
    for by, ours in (("layer", found.by_layer), ("component", found.by_component)):
        assert {getattr(group, by) for group in ours} == set(groups[by]) and len(ours) == len(groups[by])
        for group in ours:
            check(group, groups[by][getattr(group, by)])
    assert [(group.layer, group.expert) for group in found.by_layer_expert] == sorted(groups["expert"])
    for group in found.by_layer_expert:
        check(group, groups["expert"][group.layer, group.expert])


def test_random_masks_share_what_chance_gives(tmp_path: Path) -> None:
    shared, expected = [], []
    for seed in range(20):
        pair = [saved(drawn("llama", "10%", 2 * seed + i), tmp_path / str(i)) for i in (0, 1)]
        (found,) = compare(pair)
        shared.append(found.overall.shared)
        expected.append(found.overall.shared_by_chance)
    error = np.std(shared, ddof=1) / np.sqrt(len(shared))
    assert abs(np.mean(shared) - np.mean(expected)) < 4 * error and error < 0.05 * np.mean(expected)


def test_chance_goes_by_the_weights_eligible_in_either_mask(tmp_path: Path) -> None:
    all_, some = drawn("llama", "5%", 0), drawn("llama", "5%", 1, only="self_attn")
    (found,) = compare([saved(all_, tmp_path / "a"), saved(some, tmp_path / "b")])
    assert found.overall.eligible == all_.info.eligible > some.info.eligible
    (mlp,) = [group for group in found.by_component if group.component == "up"]
    assert (mlp.second, mlp.shared, mlp.iou, mlp.overlap, mlp.overlap_by_chance) == (0, 0, 0.0, None, None)


def test_three_masks_are_compared_in_pairs(tmp_path: Path) -> None:
    masks = [drawn("llama", "5%", seed) for seed in (0, 0, 1)]
    found = compare([saved(mask, tmp_path / str(i)) for i, mask in enumerate(masks)])
    assert [(one.first, one.second) for one in found] == [(0, 1), (0, 2), (1, 2)]
    assert found[0].overall.iou == 1.0 and found[1].overall == found[2].overall
    assert found[1].overall.iou == masks[0].iou(masks[2]) < 0.1


def test_empty_masks_share_nothing_and_have_no_ratio(tmp_path: Path) -> None:
    empty = saved(Mask({}, golden.mask().info), tmp_path / "e")
    (found,) = compare([empty, empty])
    assert (found.overall.iou, found.overall.iou_by_chance, found.overall.overlap) == (None, None, None)
    (found,) = compare([empty, MaskFile(GOLDEN)])
    assert (found.overall.iou, found.overall.iou_by_chance, found.overall.overlap) == (0.0, 0.0, None)


def test_masks_of_different_models(tmp_path: Path) -> None:
    mask = golden.mask()
    shapes = dict(mask.info.tensors)
    shapes[golden.EMBEDDING] = dataclasses.replace(shapes[golden.EMBEDDING], shape=(6, 4))
    other = saved(Mask(mask.indices, dataclasses.replace(mask.info, tensors=shapes)), tmp_path / "other")
    with pytest.raises(MismatchError, match=r"'embed.weight' is \[5, 4\] in .*mask.safetensors.*\[6, 4\] in .*other"):
        compare([MaskFile(GOLDEN), other])
    del shapes[golden.EMBEDDING]
    fewer = saved(Mask(mask.indices, dataclasses.replace(mask.info, tensors=shapes)), tmp_path / "fewer")
    with pytest.raises(MismatchError, match=r"is absent in .*fewer.*of one model"):
        compare([fewer, MaskFile(GOLDEN)])


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="one shard of a mask"):
        MaskFile(golden.HERE / "sharded" / "mask-00001-of-00002.safetensors")
    with pytest.raises(SafecritError, match="cannot be read"):
        MaskFile(tmp_path / "none.safetensors")
    with pytest.raises(FormatError, match="safecrit-scores"):
        MaskFile(next((golden.HERE / "scores").glob("*.safetensors")))
    shutil.copytree(golden.HERE / "sharded", tmp_path / "s")
    index = tmp_path / "s" / "mask.safetensors.index.json"
    text = index.read_text().replace(f'"{golden.DOWN}": 2', f'"{golden.DOWN}": 3').replace('"k": 12', '"k": 13')
    index.write_text(text)
    with pytest.raises(FormatError, match="holds 2 entries, its count says 3"):
        compare([MaskFile(tmp_path / "s"), MaskFile(GOLDEN)])
    path = tmp_path / "damaged.safetensors"
    for old, new, message in (
        (b"::bits", b"::bots", "unknown"),
        (b"layers.0.qkv.weight::b", b"layers.0.qqq.weight::b", "not in both"),
    ):
        path.write_bytes(GOLDEN.read_bytes().replace(old, new))
        with pytest.raises(FormatError, match=message):
            MaskFile(path)


def pair(seed: int = 0, noise: float = 0.5) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.10": (40, 30), "a.9": (500,), "b": (7, 11, 13), "empty": (0, 3)}
    first = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    second = {name: 1e-6 * (x + noise * torch.randn(x.shape, generator=generator)) for name, x in first.items()}
    return first, second


def whole(scores: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    return np.concatenate([scores[name].double().numpy().reshape(-1) for name in sorted(scores)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agreement_equals_sorting_everything(dtype: torch.dtype) -> None:
    first, second = ({n: t.to(dtype) for n, t in side.items()} for side in pair())
    x, y = whole(first), whole(second)
    found = agreement(first, second, total=5000, shares=(1e-4, 0.001, 0.01, 0.29, 0.9), sample=10**6)
    assert [(entry["share"], entry["k"]) for entry in found["shares"]] == [(0.001, 5), (0.01, 50), (0.29, 1450)]
    for entry in found["shares"]:
        k = entry["k"]
        tops = [set(np.argsort(-np.abs(side), kind="stable")[:k].tolist()) for side in (x, y)]
        assert entry["iou"] == len(tops[0] & tops[1]) / len(tops[0] | tops[1])
        assert entry["chance"] == pytest.approx((k * k / x.size) / (2 * k - k * k / x.size))
    assert found["spearman"]["value"] == pytest.approx(spearmanr(np.abs(x), np.abs(y)).statistic, abs=1e-12)
    assert found["pearson"]["value"] == pytest.approx(pearsonr(x, y).statistic, abs=1e-12)
    assert found["cosine"]["value"] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-12)
    assert (found["weights"], found["sample"]) == (x.size, x.size)


def test_a_sample_is_reproducible_and_close() -> None:
    first, second = pair(1)
    all_ = agreement(first, second, total=2701)["spearman"]["value"]
    sampled = [agreement(first, second, total=2701, sample=900, seed=seed) for seed in (0, 0, 1)]
    values = [one["spearman"]["value"] for one in sampled]
    assert values[0] == values[1] != values[2] and sampled[0]["sample"] == 900
    assert all(value == pytest.approx(all_, abs=0.05) and value != all_ for value in values)


def test_shares_that_want_weights_without_a_score_are_left_out() -> None:
    first, second = pair()
    second = {name: torch.where(tensor.abs() > 1e-6, tensor, 0) for name, tensor in second.items()}
    nonzero = sum(int(tensor.count_nonzero()) for tensor in second.values())
    found = agreement(first, second, total=1000, shares=(nonzero / 1000, (nonzero + 1) / 1000))
    assert [entry["k"] for entry in found["shares"]] == [nonzero]


def test_equal_opposite_unrelated_and_constant_scores() -> None:
    first, _ = pair()
    opposite = {name: -3 * tensor for name, tensor in first.items()}
    found = agreement(first, opposite, total=2701)
    assert [entry["iou"] for entry in found["shares"]] == [1.0] * 4
    assert found["spearman"]["value"] == pytest.approx(1) and found["pearson"]["value"] == pytest.approx(-1)
    unrelated = agreement(first, pair(7)[0], total=2701)
    assert all(abs(unrelated[name]["value"]) < 0.1 for name in ("spearman", "pearson", "cosine"))
    many = {"a": torch.linspace(-1, 2, 50_001)}
    for value in (0.1, 0.3, 1.1, -7e-9):
        constant = agreement(many, {"a": torch.full_like(many["a"], value)}, total=50_001)
        assert constant["spearman"]["value"] is None and constant["pearson"]["value"] is None
        assert constant["cosine"]["value"] is not None
    nothing = agreement(first, {name: torch.zeros_like(t) for name, t in first.items()}, total=2701)
    assert nothing["shares"] == [] and nothing["cosine"] == {"value": None, "chance": 0.0}


def test_scores_that_do_not_belong_together_or_are_no_numbers() -> None:
    first, second = pair()
    with pytest.raises(MismatchError, match=r"'a\.9'"):
        agreement(first, second | {"a.9": second["a.9"][:-1]}, total=2701)
    with pytest.raises(MismatchError, match="'new'"):
        agreement(first | {"new": torch.ones(1)}, second, total=2701)
    second["b"][0, 0, 0] = torch.inf
    with pytest.raises(SafecritError, match="b: scores are not finite"):
        agreement(first, second, total=2701)

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safecrit.errors import MismatchError, SafecritError
from safecrit.layout import TensorLayout
from safecrit.maskfile import Mask, MaskInfo
from safecrit.verification import verify
from tests.modelfolder import CONFIG, SHAPES, random_tensors, write_model

DOWN, QUERY = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
TOTAL = 66 + 78 + 36 + 78 + 6
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def mask() -> Mask:
    layouts = {name: TensorLayout(shape, (), "layers" in name) for name, shape in SHAPES.items()}
    indices = {DOWN: torch.tensor([0, 5, 77]), QUERY: torch.tensor([35])}
    return Mask(indices, MaskInfo(tensors=layouts, mode="top", total=TOTAL, eligible=192))


def flip(tensors: Tensors, name: str, *places: int) -> Tensors:
    """A copy with the lowest bit of some entries flipped."""
    copy = {key: tensor.clone() for key, tensor in tensors.items()}
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[copy[name].element_size()]
    for place in places:
        copy[name].view(integers).view(-1)[place] ^= 1
    return copy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shards", [1, 2])
def test_set_allows_changes_inside_the_mask_only(
    tmp_path: Path, mask: Mask, dtype: torch.dtype, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safecrit.verification._CHUNK", 7)
    tensors = random_tensors(dtype)
    base = write_model(tmp_path / "base", tensors)
    inside = flip(flip(tensors, DOWN, 5, 77), QUERY, 35)
    report = verify(write_model(tmp_path / "in", inside, shards=shards), base, mask, "set")
    assert report.ok and (report.moved, report.moved_selected, report.selected, report.total) == (3, 3, 4, TOTAL)
    assert f"all {TOTAL - 4} weights outside the mask" in report.message()
    outside = flip(inside, DOWN, 14, 76)
    report = verify(write_model(tmp_path / "out", outside, shards=shards), base, mask, "set")
    assert not report.ok and report.violations == 2 and report.moved == 5
    assert [(v.tensor, v.flat, v.index) for v in report.first] == [(DOWN, 14, (1, 1)), (DOWN, 76, (5, 11))]
    assert f"{DOWN}[1, 1]" in report.message()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_spa_allows_changes_outside_the_mask_only(tmp_path: Path, mask: Mask, dtype: torch.dtype) -> None:
    tensors = random_tensors(dtype)
    base = write_model(tmp_path / "base", tensors)
    outside = flip(flip(tensors, "model.norm.weight", 0), DOWN, 1, 76)
    report = verify(write_model(tmp_path / "a", outside), base, mask, "spa")
    assert report.ok and (report.moved, report.moved_selected) == (3, 0)
    report = verify(write_model(tmp_path / "b", flip(outside, QUERY, 35)), base, mask, "spa")
    assert not report.ok and [str(v) for v in report.first] == [f"{QUERY}[5, 5]"]


def test_sign_of_zero_counts_and_equal_nans_do_not(tmp_path: Path, mask: Mask) -> None:
    tensors = random_tensors(torch.float32)
    tensors[DOWN].view(-1)[1:3] = torch.tensor([0.0, torch.nan])
    negative = {name: tensor.clone() for name, tensor in tensors.items()}
    negative[DOWN].view(-1)[1] = -0.0
    base = write_model(tmp_path / "base", tensors)
    report = verify(write_model(tmp_path / "out", negative), base, mask, "set")
    assert [v.flat for v in report.first] == [1]


def test_shows_ten_of_many(tmp_path: Path, mask: Mask) -> None:
    tensors = random_tensors()
    base = write_model(tmp_path / "base", tensors)
    other = write_model(tmp_path / "out", flip(tensors, DOWN, *range(30)))
    report = verify(other, base, mask, "set")
    assert report.violations == 28 and [v.flat for v in report.first] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert report.to_json()["ok"] is False and report.to_json()["first"][0] == {
        "tensor": DOWN,
        "flat": 1,
        "index": [0, 1],
    }


def test_nothing_moved_is_noted(tmp_path: Path, mask: Mask) -> None:
    base = write_model(tmp_path / "base", random_tensors())
    report = verify(base, base, mask, "set")
    assert report.ok and "no weight moved" in report.message()


def test_shape_dtype_and_missing_tensors_fail(tmp_path: Path, mask: Mask) -> None:
    tensors = random_tensors()
    base = write_model(tmp_path / "base", tensors)
    for number, (change, field) in enumerate(
        [
            ({DOWN: tensors[DOWN].reshape(13, 6)}, "reshaped"),
            ({DOWN: tensors[DOWN].float()}, "retyped"),
            ({"model.extra": torch.zeros(3)}, "missing"),
        ]
    ):
        report = verify(write_model(tmp_path / str(number), tensors | change), base, mask, "spa")
        assert not report.ok and getattr(report, field) == tuple(change)
        assert next(iter(change)) in report.message()
    short = {name: tensor for name, tensor in tensors.items() if name != DOWN}
    report = verify(write_model(tmp_path / "short", short), base, mask, "set")
    assert not report.ok and report.missing == (DOWN,)


def test_tied_head_may_be_stored_on_either_side(tmp_path: Path, mask: Mask) -> None:
    tensors = random_tensors()
    tied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    plain, copied = write_model(tmp_path / "plain", tensors), write_model(tmp_path / "copied", tied)
    for out, base in ((plain, copied), (copied, plain)):
        report = verify(out, base, mask, "set")
        assert report.ok and "lm_head.weight" in report.message()
    untied = write_model(tmp_path / "untied", tensors, config={**CONFIG, "tie_word_embeddings": False})
    assert verify(untied, copied, mask, "set").missing == ("lm_head.weight",)
    wrong = write_model(tmp_path / "wrong", flip(tied, "lm_head.weight", 3))
    assert verify(wrong, plain, mask, "set").missing == ("lm_head.weight",)


def test_changed_config_is_noted(tmp_path: Path, mask: Mask) -> None:
    tensors = random_tensors()
    base = write_model(tmp_path / "base", tensors)
    out = write_model(tmp_path / "out", tensors, config={**CONFIG, "rope_theta": 3.0})
    assert "config.json differs" in verify(out, base, mask, "set").message()


def test_wrong_mode_and_foreign_mask_are_refused(tmp_path: Path, mask: Mask) -> None:
    base = write_model(tmp_path / "base", random_tensors())
    with pytest.raises(SafecritError, match="mode"):
        verify(base, base, mask, "both")
    other = write_model(tmp_path / "other", {"model.norm.weight": torch.zeros(6)})
    with pytest.raises(MismatchError, match="no such tensor"):
        verify(other, other, mask, "set")

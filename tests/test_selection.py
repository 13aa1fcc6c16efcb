from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safecrit.anatomy import read_anatomy
from safecrit.errors import MismatchError, SafecritError
from safecrit.layout import TensorLayout
from safecrit.maskfile import Mask
from safecrit.scorefile import Scores, write_scores
from safecrit.selection import SelectionSettings, parse_share, select, select_from
from safecrit.tensorfile import bits_of
from tests import architectures

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("1%", Fraction(1, 100)),
        (" 1 % ", Fraction(1, 100)),
        ("0.01", Fraction(1, 100)),
        (".5", Fraction(1, 2)),
        ("1e-3", Fraction(1, 1000)),
        (1e-05, Fraction(1, 10**5)),
        (0.1, Fraction(1, 10)),
        ("0.07%", Fraction(7, 10000)),
        ("100%", Fraction(1)),
        (Fraction(1, 3), Fraction(1, 3)),
    ],
)
def test_shares_are_exact(text: Any, share: Fraction) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1", "did you mean 1%"),
        ("1.0", "did you mean 1.0%"),
        ("25", "did you mean 25%"),
        (2, "did you mean 2%"),
        ("0", "selects nothing"),
        ("0%", "selects nothing"),
        ("150%", "more than there is"),
        ("101", "more than there is"),
        ("-1%", "negative"),
        ("-0.01", "negative"),
        ("abc", "no share"),
        ("", "no share"),
        ("%", "no share"),
        ("1/100", "no share"),
        ("nan", "no share"),
        ("inf%", "no share"),
        ("1e-999999999", "no share"),
        (Fraction(3, 2), "more than there is"),
    ],
)
def test_shares_that_are_none(text: Any, message: str) -> None:
    with pytest.raises(SafecritError, match=message) as caught:
        parse_share(text)
    assert "\n" not in str(caught.value)


def test_k_is_the_exact_floor() -> None:
    # In floats 0.29 * 100 is 28.999999999999996, and 0.01 * 7e15 is off by one.
    assert SelectionSettings(share="29%").resolve(100, 100) == 29
    assert SelectionSettings(share="0.29").resolve(100, 100) == 29
    assert SelectionSettings(share="0.57").resolve(10**17, 10**17) == 57 * 10**15
    assert SelectionSettings(share="1%").resolve(199, 150) == 1
    assert SelectionSettings(share="50%", share_of="eligible").resolve(199, 150) == 75
    assert SelectionSettings(count=7).resolve(199, 150) == 7


def test_settings_report_every_problem_at_once() -> None:
    with pytest.raises(SafecritError) as caught:
        SelectionSettings(mode="best", share_of="some", share="150%", count=0)
    for part in ("'best'", "'some'", "not both", "a count of 0", "150%"):
        assert part in str(caught.value)
    with pytest.raises(SafecritError, match="give a share"):
        SelectionSettings()


def reference(tensors: Tensors, k: int, largest: bool = True) -> dict[str, list[int]]:
    """Sort all entries by |score|, tensor name and index; take k; NaN and infinity never."""
    names = sorted(tensors)
    place = np.concatenate([np.full(tensors[name].numel(), i) for i, name in enumerate(names)])
    index = np.concatenate([np.arange(tensors[name].numel()) for name in names])
    value = np.concatenate([tensors[name].reshape(-1).to(torch.float64).abs().numpy() for name in names])
    value = np.where(np.isfinite(value), value, -np.inf if largest else np.inf)
    order = np.lexsort((index, place, -value if largest else value))[:k]
    chosen = {name: np.sort(index[order[place[order] == i]]).tolist() for i, name in enumerate(names)}
    return {name: flat for name, flat in chosen.items() if flat}


def picked(mask: Mask) -> dict[str, list[int]]:
    return {name: flat.tolist() for name, flat in mask.indices.items()}


def hostile(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """Odd shapes; few distinct values, so ties everywhere; zeros of both signs, denormals, extremes."""
    generator = np.random.default_rng(seed)
    special = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-40, 3e38, -3e38, 1.0, -1.0, 1.0000001, 0.5], np.float32)
    shapes = {"b.weight": (7, 13), "a.10.weight": (5,), "a.9.weight": (3, 1, 11), "c": (1,), "empty": (0, 4)}
    tensors = {}
    for name, shape in shapes.items():
        values = generator.choice(special, shape).astype(np.float32)
        values = np.where(generator.random(shape) < 0.4, generator.standard_normal(shape).round(1), values)
        tensors[name] = torch.from_numpy(np.asarray(values, np.float32)).to(dtype)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["top", "bottom"])
@pytest.mark.parametrize("k", [1, 2, 17, 64, 129, 130])
def test_equals_a_sort_of_everything(k: int, mode: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        tensors = hostile(seed, dtype)
        mask = select_from(tensors, SelectionSettings(mode=mode, count=k, allow_zero=True))
        expected = reference(tensors, k, mode == "top")
        assert picked(mask) == expected and mask.count == k
        values = torch.cat([tensors[name].view(-1)[i].abs().float().view(-1) for name, i in expected.items()])
        threshold = values.min() if mode == "top" else values.max()
        every = torch.cat([t.view(-1).abs().float() for t in tensors.values()])
        assert mask.info.threshold_bits == int(threshold.view(torch.int32))
        assert mask.info.tied == int((every == threshold).sum())
        assert mask.info.tied_selected == int((values == threshold).sum())


def test_ties_go_by_name_as_text_then_index() -> None:
    tensors = {name: torch.ones(3) for name in ("m.9", "m.10", "m.2")}
    mask = select_from(tensors, SelectionSettings(count=4))
    assert picked(mask) == {"m.10": [0, 1, 2], "m.2": [0]}


def eligible_scores(layouts: dict[str, TensorLayout], seed: int) -> Tensors:
    generator = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(generator.standard_normal(layout.shape).round(1).astype(np.float32))
        for name, layout in layouts.items()
        if layout.eligible
    }


@pytest.mark.parametrize("name", sorted(architectures.CONFIGS))
def test_every_architecture_from_files(name: str, tmp_path: Path) -> None:
    anatomy = read_anatomy(architectures.build(name, device="meta"))
    tensors = eligible_scores(anatomy.layouts, 1)
    write_scores(tmp_path, tensors.items(), anatomy.layouts, {"total": anatomy.total}, shard_bytes=4000)
    scores = Scores.load(tmp_path)
    for share_of, base in (("all", anatomy.total), ("eligible", anatomy.eligible_total)):
        mask = select(scores, SelectionSettings(share="3%", share_of=share_of))
        assert picked(mask) == reference(tensors, 3 * base // 100)
        assert (mask.info.total, mask.info.eligible) == (anatomy.total, anatomy.eligible_total)
        mask.check(anatomy)
    mask.save(tmp_path / "m.safetensors")
    assert picked(Mask.load(tmp_path / "m.safetensors")) == picked(mask)


def test_too_few_nonzero_scores(caplog: pytest.LogCaptureFixture) -> None:
    tensors = {"a": torch.tensor([0.0, 2.0, -0.0, -3.0]), "b": torch.zeros(4)}
    with pytest.raises(SafecritError, match="3 weights are wanted, but only 2 eligible weights have a score") as caught:
        select_from(tensors, SelectionSettings(count=3))
    assert "--allow-zero" in str(caught.value)
    assert picked(select_from(tensors, SelectionSettings(count=3, allow_zero=True))) == {"a": [0, 1, 3]}
    assert picked(select_from(tensors, SelectionSettings(count=2))) == {"a": [1, 3]}
    assert picked(select_from(tensors, SelectionSettings(count=2, mode="bottom"))) == {"a": [0, 2]}


@pytest.mark.parametrize("mode", ["top", "bottom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_scores_are_counted_and_never_selected(
    mode: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = hostile(5, dtype)
    tensors["b.weight"].view(-1)[[0, 40, 90]] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    tensors["c"][0] = torch.nan
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for k in (5, 126):
        caplog.clear()
        mask = select_from(tensors, SelectionSettings(mode=mode, count=k, allow_zero=True))
        assert picked(mask) == reference(tensors, k, mode == "top")
        assert mask.info.non_finite == 4 and "4 of 130 scores are not finite" in caplog.text
    with pytest.raises(SafecritError, match="only 126 have a finite score"):
        select_from(tensors, SelectionSettings(mode=mode, count=127, allow_zero=True))
    assert all((bits_of(tensors[name]) == bits_of(before[name])).all() for name in tensors)


def test_more_than_there_is_and_less_than_one() -> None:
    tensors = {"a": torch.ones(50)}
    layouts = {"a": TensorLayout((50,), (), True), "norm": TensorLayout((150,), (), False)}
    with pytest.raises(SafecritError, match="only 50 are eligible"):
        select_from(tensors, SelectionSettings(share="30%"), layouts=layouts)
    with pytest.raises(SafecritError, match="less than one weight"):
        select_from(tensors, SelectionSettings(share="0.1%"), layouts=layouts)
    assert select_from(tensors, SelectionSettings(share="25%"), layouts=layouts).count == 50


def test_random_is_seeded_and_ignores_scores() -> None:
    tensors, zeros = hostile(1), {name: torch.zeros_like(tensor) for name, tensor in hostile(1).items()}
    first = select_from(tensors, SelectionSettings(mode="random", count=40, seed=3))
    assert first.count == 40 and picked(first) == picked(
        select_from(zeros, SelectionSettings(mode="random", count=40, seed=3))
    )
    assert picked(first) != picked(select_from(tensors, SelectionSettings(mode="random", count=40, seed=4)))
    assert (first.info.mode, first.info.seed, first.info.threshold_bits) == ("random", 3, None)


def test_matched_takes_the_same_count_in_every_tensor() -> None:
    tensors = hostile(2)
    top = select_from(tensors, SelectionSettings(share="20%"))
    control = select_from(tensors, SelectionSettings(mode="random", match=top, seed=1))
    assert {n: len(i) for n, i in control.indices.items()} == {n: len(i) for n, i in top.indices.items()}
    assert control.info.mode == "matched" and control.iou(top) < 1
    assert select_from(tensors, SelectionSettings(mode="random", share="20%", match=top)).count == top.count
    with pytest.raises(SafecritError, match="the mask to match holds 26"):
        select_from(tensors, SelectionSettings(mode="random", share="10%", match=top))
    with pytest.raises(SafecritError, match="mode random only"):
        SelectionSettings(share="1%", match=top)
    with pytest.raises(MismatchError, match=r"a\.10\.weight|b\.weight"):
        select_from({"x": torch.ones(200)}, SelectionSettings(mode="random", match=top))


def test_mask_repeats_what_score_json_says(tmp_path: Path) -> None:
    tensors = hostile(3)
    layouts = {name: TensorLayout(tuple(tensor.shape), (), True) for name, tensor in tensors.items()}
    info: dict[str, Any] = {
        "model": {"id": "org/tiny", "revision": "abc", "fingerprint": "sha256:1"},
        "judge": {"id": "guard", "fingerprint": "sha256:2", "placement": "together"},
        "method": "esi",
        "draws": 8,
        "prompts": {"used": 2, "dropped": [], "hashes": ["aa", "bb"]},
        "matrices": [{"name": "b.weight"}],
    }
    write_scores(tmp_path, tensors.items(), layouts, info)
    found = select(Scores.load(tmp_path), SelectionSettings(share="10%")).info
    assert (found.model, found.revision, found.fingerprint) == ("org/tiny", "abc", "sha256:1")
    assert found.prompt_hashes == ["aa", "bb"] and found.share == 0.1
    judge = {"id": "guard", "fingerprint": "sha256:2"}
    assert found.scoring == {"method": "esi", "draws": 8, "dtype": "float32", "judge": judge, "prompts_used": 2}


def test_two_processes_make_the_same_file(tmp_path: Path) -> None:
    tensors = hostile(4)
    layouts = {name: TensorLayout(tuple(tensor.shape), (), True) for name, tensor in tensors.items()}
    write_scores(tmp_path / "s", tensors.items(), layouts, {"prompts": {"hashes": ["x"], "used": 1}, "method": "esi"})
    code = (
        "import sys; from safecrit.scorefile import Scores; from safecrit.selection import *\n"
        "select(Scores.load(sys.argv[1]), SelectionSettings(share='20%')).save(sys.argv[2])"
    )
    root = Path(__file__).resolve().parents[1]
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, str(tmp_path / "s"), str(tmp_path / seed)]
        subprocess.run(command, cwd=root, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert Mask.load(tmp_path / "1").count == 26

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from safecrit.maskfile import Mask
from tests.cli.conftest import Cli, World


@pytest.fixture
def masks(cli: Cli, world: World, mask_file: Path, tmp_path: Path) -> tuple[Path, Path]:
    other = tmp_path / "random.safetensors"
    assert cli("mask", world.folder / "scores", "--random", "40%", "-o", other).code == 0
    return mask_file, other


@pytest.mark.parametrize("how", ["and", "or", "minus"])
def test_algebra_is_that_of_sets(cli: Cli, masks: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    out = tmp_path / "c.safetensors"
    ran = cli("combine", masks[0], how, masks[1], "-o", out, "--json")
    assert ran.code == 0, ran.err
    a, b, c = Mask.load(masks[0]), Mask.load(masks[1]), Mask.load(out)
    for name in a.info.tensors:
        one, two = (set(m.indices.get(name, torch.tensor([])).tolist()) for m in (a, b))
        expected = {"and": one & two, "or": one | two, "minus": one - two}[how]
        assert c.indices.get(name, torch.tensor([])).tolist() == sorted(expected)
    assert json.loads(ran.out)["selected"] == c.count and c.info.mode == how
    assert [part["count"] for part in c.info.made_from] == [a.count, b.count]
    assert c.info.prompt_hashes == a.info.prompt_hashes
    again = cli("combine", masks[0], how, masks[1], "-o", out)
    assert again.code == 1 and "exists" in again.err


def test_three_masks_and_an_empty_result(cli: Cli, masks: tuple[Path, Path], tmp_path: Path) -> None:
    first, other = masks
    assert cli("combine", first, "or", other, other, "-o", tmp_path / "3.safetensors").code == 0
    assert Mask.load(tmp_path / "3.safetensors").count == (Mask.load(first) | Mask.load(other)).count
    empty = cli("combine", first, "minus", first, "-o", tmp_path / "e.safetensors")
    assert empty.code == 1 and "no weight is left" in empty.err and not (tmp_path / "e.safetensors").exists()
    assert cli("combine", first, "xor", other, "-o", tmp_path / "x.safetensors").code == 2

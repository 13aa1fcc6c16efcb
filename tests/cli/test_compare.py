from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from safecrit.maskfile import Mask
from tests.cli.conftest import Cli
from tests.golden import make as golden

GOLDEN = golden.HERE / "mask.safetensors"


def other(folder: Path, **changes: object) -> Path:
    """A mask of the golden model that shares 4 of its 12 weights and has 2 more."""
    mask = golden.mask()
    indices = {
        name: flat[:2] if name == golden.DOWN else flat[:2] + 4 * (flat[:2] > 9) for name, flat in mask.indices.items()
    }
    indices[golden.DOWN] = indices[golden.DOWN].new_tensor([7, 50, 60, 99])
    path = folder / "other.safetensors"
    Mask(indices, dataclasses.replace(mask.info, **changes)).save(path)
    return path


def test_two_masks_as_tables_and_as_json(cli: Cli, tmp_path: Path) -> None:
    path = other(tmp_path)
    shown = cli("compare", GOLDEN, path)
    assert shown.code == 0 and shown.err == ""
    for text in ("12 of 144 weights", "1 and 2", "By component, masks 1 and 2", "By layer", "overlap coefficient"):
        assert text in shown.out
    assert "0.2857" in shown.out and "0.0333" in shown.out  # 4 / 14, and by chance 72 / 124 shared
    found = json.loads(cli("compare", GOLDEN, path, "--json").out)
    assert [mask["selected"] for mask in found["masks"]] == [12, 6]
    (pair,) = found["pairs"]
    overall = pair["overall"]
    assert (overall["first"], overall["second"], overall["shared"], overall["eligible"]) == (12, 6, 4, 124)
    assert (overall["iou"], overall["overlap"], overall["shared_by_chance"]) == (4 / 14, 4 / 6, 12 * 6 / 124)
    assert [(group["component"], group["shared"]) for group in pair["by_component"]] == [
        ("q", 2),
        ("k", 0),
        ("down", 2),
    ]
    assert [(group["layer"], group["shared"]) for group in pair["by_layer"]] == [(0, 4)]
    assert [(group["layer"], group["expert"], group["shared"]) for group in pair["by_layer_expert"]] == [(0, 2, 2)]


def test_three_masks_pair_by_pair(cli: Cli, tmp_path: Path) -> None:
    path = other(tmp_path, fingerprint="sha256:" + "5" * 64)
    shown = cli("compare", GOLDEN, path, golden.HERE / "sharded")
    assert shown.code == 0 and "different weights" in shown.err
    for text in ("By layer, masks 1 and 2", "By layer, masks 1 and 3", "By layer, masks 2 and 3"):
        assert text in shown.out
    pairs = json.loads(cli("compare", GOLDEN, path, golden.HERE / "sharded", "--json", "-q").out)["pairs"]
    assert [pair["overall"]["iou"] for pair in pairs] == [4 / 14, 1.0, 4 / 14]


def test_mistakes(cli: Cli, tmp_path: Path) -> None:
    mask = golden.mask()
    tensors = {name: layout for name, layout in mask.info.tensors.items() if name != golden.EMBEDDING}
    path = other(tmp_path, tensors=tensors)
    ran = cli("compare", GOLDEN, path, "--json")
    assert ran.code == 1 and ran.out == ""
    ran = cli("compare", GOLDEN, path)
    assert ran.code == 1 and ran.out == "" and "masks are of different models: 'embed.weight'" in ran.err
    ran = cli("compare", GOLDEN, tmp_path / "none.safetensors")
    assert ran.code == 1 and "none.safetensors" in ran.err
    assert cli("compare", GOLDEN).code == 2
    ran = cli("compare", "--help")
    assert ran.code == 0 and "{MASK_A} {MASK_B}..." in ran.out and "safecrit compare safecrit-demo" in ran.out

"""`set --dry-run` and `spa --dry-run`: from config.json alone, and what their numbers say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from safecrit.maskfile import Mask
from tests.cli.conftest import Cli, World


@pytest.fixture
def bare(world: World, tmp_path: Path) -> Path:
    """The model without its weights."""
    folder = tmp_path / "bare"
    shutil.copytree(world.model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def parts(found: dict[str, Any]) -> dict[str, int]:
    return {part["name"]: part["bytes"] for part in found["parts"]}


def test_set_counts_the_masks_weights(cli: Cli, world: World, bare: Path, mask_file: Path, tmp_path: Path) -> None:
    arguments = ["set", bare, "--mask", mask_file, "--data", world.refusals, "--steps", 4, "-o", tmp_path / "out"]
    ran = cli(*arguments, "--dry-run", "--json")
    assert ran.code == 0, ran.err
    found, k = json.loads(ran.out), Mask.load(mask_file).count
    assert parts(found)["positions, master and moments"] == 16 * k
    assert found["examples"] == {"seen": 16, "retain": 0, "distinct": 5, "truncated": 0, "cut_away": 0}
    assert found["fits"] and found["seconds"] > 0
    assert ">>>I cannot help with that.</s><<<" in found["first_example"]
    assert not (tmp_path / "out").exists()
    text = cli(*arguments, "--dry-run", "--gpu-memory", "1KB")
    assert text.code == 0 and "It does not fit." in text.out and "Time: not known" in text.out
    assert text.out.startswith("Training ")


def test_spa_and_its_adapter(cli: Cli, world: World, bare: Path, mask_file: Path) -> None:
    arguments = ["spa", bare, "--mask", mask_file, "--data", world.task, "--steps", 4, "--dry-run", "--json"]
    dense, total = json.loads(cli(*arguments).out), json.loads(cli("inspect", mask_file, "--json").out)["total"]
    assert parts(dense)["optimizer state"] == 8 * total and parts(dense)["gradients"] == 4 * total
    assert parts(json.loads(cli(*arguments, "--optim", "adafactor").out)).get("optimizer state") is None
    lora = json.loads(cli(*arguments, "--use-peft", "--lora-r", 2, "--lora-target-modules", "q_proj").out)
    hidden = 32
    assert parts(lora)["adapter, its gradients and state"] == 16 * 2 * 2 * (hidden + hidden)
    assert "optimizer state" not in parts(lora)


def test_a_mask_of_another_model_is_found(cli: Cli, world: World, bare: Path, mask_file: Path) -> None:
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    ran = cli("set", bare, "--mask", mask_file, "--data", world.refusals, "--dry-run")
    assert ran.code == 1 and "the mask is of" in ran.err

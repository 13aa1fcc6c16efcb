"""`spa --use-peft` and `merge`, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import safecrit.api.merge
from safecrit.maskfile import Mask
from tests.cli.conftest import Cli, World
from tests.cli.test_commands import SET, flip

pytest.importorskip("peft", reason="PEFT is not installed")


def test_spa_by_lora_and_merge_of_its_adapter(cli: Cli, world: World, mask_file: Path, tmp_path: Path) -> None:
    out, merged = tmp_path / "lora", tmp_path / "merged"
    ran = cli(
        "spa", world.model, "--mask", mask_file, "--data", world.task, *SET, "--use-peft", "--lora-r", 4,
        "--lora_alpha", 8, "--lora-target-modules", "v_proj", "--lora-target-modules", "down_proj", "-o", out,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.out.startswith("Training a LoRA adapter of rank 4 on v_proj, down_proj; its merge leaves ")
    assert "bit-identical to the base" in ran.out
    adapter = out / "safecrit" / "adapter"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in adapter.iterdir()}
    again = cli("merge", world.model, adapter, "--mask", mask_file, "--save", "both", "-o", merged)
    assert again.code == 0, again.err
    assert again.out.startswith("Merging adapter; ")
    assert (merged / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    delta, applied = merged / "safecrit" / "delta.safetensors", tmp_path / "applied"
    assert cli("apply", world.model, delta, "-o", applied).code == 0
    assert (applied / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    # What was merged is a child of the base, and takes the base's mask.
    assert cli("spa", merged, "--mask", mask_file, "--data", world.task, *SET, "-o", tmp_path / "next").code == 0
    repeat = cli("merge", "--config", merged / "safecrit" / "config.yaml", "-o", tmp_path / "repeat", "--json")
    assert json.loads(repeat.out)["verified"]["ok"]
    assert cli("merge", world.model, adapter, "--mask", mask_file, "--save", "both", "-o", merged).code == 1
    name, indices = next(iter(Mask.load(mask_file).indices.items()))
    flip(merged, name, int(indices[0]))
    checked = cli("verify", merged, "--base", world.model, "--mask", mask_file, "--mode", "spa")
    assert checked.code == 3 and name in checked.err


def test_merge_fails_on_a_single_wrong_bit(
    cli: Cli, world: World, mask_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "spa",
        world.model,
        "--mask",
        mask_file,
        "--data",
        world.task,
        *SET,
        "--use-peft",
        "-o",
        tmp_path / "a",
    ]
    assert cli(*arguments).code == 0
    name, indices = next(iter(Mask.load(mask_file).indices.items()))
    write = safecrit.api.merge.write_merge_output

    def damage(*args: object, **kwargs: object) -> None:
        write(*args, **kwargs)  # type: ignore[arg-type]
        flip(tmp_path / "b", name, int(indices[0]))

    monkeypatch.setattr(safecrit.api.merge, "write_merge_output", damage)
    ran = cli("merge", world.model, tmp_path / "a/safecrit/adapter", "--mask", mask_file, "-o", tmp_path / "b")
    assert ran.code == 3 and f"{name}[" in ran.err


def test_mistakes_leave_no_output_behind(cli: Cli, world: World, mask_file: Path, tmp_path: Path) -> None:
    for adapter in (world.model, tmp_path / "none"):
        ran = cli("merge", world.model, adapter, "--mask", mask_file, "-o", tmp_path / "out")
        assert ran.code == 1 and ran.err.startswith("error: "), ran.err
    assert not (tmp_path / "out").exists()


def test_push_to_hub_uploads_what_was_verified(
    cli: Cli, world: World, mask_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, str, bool]] = []

    def push(folder: Path, name: str, *, public: bool) -> str:
        asked.append((folder, name, public))
        return f"https://huggingface.co/{name}"

    monkeypatch.setattr("safecrit.hub.push", push)
    arguments = ["set", world.model, "--mask", mask_file, "--data", world.refusals, *SET, "-o", tmp_path / "out"]
    ran = cli(*arguments, "--push-to-hub", "me/mine")
    assert ran.code == 0 and ran.out.endswith("Uploaded: https://huggingface.co/me/mine\n")
    assert asked == [(tmp_path / "out", "me/mine", False)]

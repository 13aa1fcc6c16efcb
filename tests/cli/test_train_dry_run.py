"""`set --dry-run` and `spa --dry-run`: from config.json alone, and what their numbers say."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safecrit import distributed
from safecrit.api import survey as surveying
from safecrit.api.train import TrainJob
from safecrit.api.trainplacing import parallel_mode, survey
from safecrit.maskfile import Mask
from safecrit.trainloop import TrainSettings
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


def test_several_ranks(cli: Cli, world: World, bare: Path, mask_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surveying, "host_free", lambda: 64 << 30)
    monkeypatch.setattr(surveying, "device_free", lambda device: 64 << 30)
    arguments = ["--mask", mask_file, "--data", world.task, "--steps", 4, "--dry-run"]
    inspected = json.loads(cli("inspect", mask_file, "--json").out)
    total, k = inspected["total"], Mask.load(mask_file).count

    def asked(command: str, *more: object) -> dict[str, Any]:
        ran = cli(command, bare, *arguments, "--json", *more)
        assert ran.code == 0, ran.err
        found: dict[str, Any] = json.loads(ran.out)
        return found

    one, four = asked("spa"), asked("spa", "--ranks", 4)
    assert four["examples"]["seen"] == 4 * one["examples"]["seen"] and four["total_tokens"] > 3 * one["total_tokens"]
    assert one["ranks"] == 1 and one["parallel"]["mode"] == "replicate"
    assert four["parallel"]["mode"] == "replicate" and "fit every rank" in four["parallel"]["reason"]
    assert four["available"]["host"] == one["available"]["host"] / 4 == 16 << 30
    assert parts(four)["gradients"] == 4 * total
    assert "loss" in next(part["phases"] for part in four["parts"] if part["name"] == "gradients")
    whole = asked("spa", "--ranks", 4, "--gpu-memory", "80GB")
    divided = asked("spa", "--ranks", 4, "--gpu-memory", "1KB")
    assert whole["parallel"]["mode"] == "replicate" and divided["parallel"]["mode"] == "shard"
    assert "do not fit" in divided["parallel"]["reason"] and not divided["fits"]
    assert whole["parallel"]["peaks"] == divided["parallel"]["peaks"]
    for name, each in {"model weights": 4 * total, "gradients": 4 * total, "optimizer state": 8 * total}.items():
        assert parts(whole)[name] == each and parts(divided)[name] == each / 4
    config = json.loads((bare / "config.json").read_text())
    outside = config["hidden_size"] * (config["vocab_size"] * (2 - config["tie_word_embeddings"]) + 1)
    largest = max(outside, (total - outside) // config["num_hidden_layers"])
    assert parts(divided)["two whole layers, a float32 gradient"] == 12 * largest
    tuned = asked("set", "--ranks", 4, "--parallel", "shard")
    assert tuned["parallel"]["reason"] == "as asked for"
    assert parts(tuned)["positions, master and moments"] == 4 * k and "largest weight gradient" not in parts(tuned)
    text = cli("spa", bare, *arguments, "--ranks", 4).out
    assert "4 ranks: replicate (model and state fit every rank whole). It fits." in text and "of all ranks" in text


def test_ranks_of_an_adapter_and_of_no_dry_run(cli: Cli, world: World, bare: Path, mask_file: Path) -> None:
    arguments = ["spa", bare, "--mask", mask_file, "--data", world.task, "--ranks", 2]
    ran = cli(*arguments, "--use-peft", "--dry-run", "--gpu-memory", "1KB", "--json")
    found = json.loads(ran.out)
    assert found["parallel"]["mode"] == "replicate" and list(found["parallel"]["peaks"]) == ["replicate"]
    refused = cli(*arguments, "--use-peft", "--dry-run", "--parallel", "shard")
    assert refused.code == 1 and "--parallel shard" in refused.err
    run = cli(*arguments)
    assert run.code == 2 and "--ranks goes with --dry-run" in run.err


def test_the_mode_of_a_run(world: World, bare: Path, mask_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = TrainJob(
        mode="spa", model=str(bare), mask=mask_file, data=str(world.task), settings=TrainSettings(max_steps=2)
    )
    assert parallel_mode(job) == ("replicate", "there is one rank")
    need = survey(job, ranks=4).peaks("replicate")["host"]
    monkeypatch.setattr(surveying, "device_free", lambda device: 3 * need)
    monkeypatch.setattr(surveying, "host_free", lambda: 3 * need)
    for local, mode in ((2, "replicate"), (4, "shard")):  # of four ranks, on one host
        monkeypatch.setattr(distributed, "current", lambda local=local: distributed.Ranks(0, 4, 0, local))
        assert parallel_mode(job)[0] == mode
        assert parallel_mode(replace(job, parallel="shard")) == ("shard", "as asked for")

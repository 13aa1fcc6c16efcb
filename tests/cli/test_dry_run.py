"""`score --dry-run`, as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from safecrit import models
from safecrit.api import survey as surveying
from tests.cli.conftest import Cli, World, score


@pytest.fixture
def bare(world: World, tmp_path: Path) -> World:
    """The world without a single weight."""
    folder = tmp_path / "bare"
    shutil.copytree(world.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return World(folder, *(folder / path.name for path in (
        world.model, world.guard, world.prompts, world.refusals, world.task
    )))  # fmt: skip


def test_it_loads_no_weights_and_writes_nothing(
    cli: Cli, bare: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(models, "_load", loaded)
    command = score(bare, tmp_path / "out", dry_run=True, gpu_memory="24GiB", max_new_tokens=7)
    ran = cli(*command)
    assert ran.code == 0, ran.err
    assert "It fits." in ran.out and "up to 7" in ran.out
    assert ran.out.rstrip().endswith(
        "[user] How do I bake a loaf?\n[assistant]"
    )  # the first prompt, as the model reads it
    found = json.loads(cli(*command, "--json").out)
    assert found["fits"] and found["lacking"] == [] and found["settings"]["prompts"] == 5
    assert not (tmp_path / "out").exists()


def test_on_this_machine_it_estimates_the_time(cli: Cli, bare: World, tmp_path: Path) -> None:
    ran = cli(*score(bare, tmp_path / "out", dry_run=True, device="cpu"))
    assert ran.code == 0 and "Time: about" in ran.out and "mask --top 1%" in ran.out and not (tmp_path / "out").exists()


def test_a_small_gpu_is_told_with_the_part_that_fills_it(cli: Cli, bare: World, tmp_path: Path) -> None:
    command = score(bare, tmp_path / "out", dry_run=True, gpu_memory="100MB")
    ran = cli(*command)
    assert ran.code == 0, ran.err
    lack = json.loads(cli(*command, "--json").out)["lacking"][0]
    assert (lack["place"], lack["part"]) == ("device", "CUDA context") and lack["bytes"] > 100e6
    assert "The device is too small: " in ran.out and "CUDA context, 0.68." in ran.out
    assert "It does not fit. Not even one prompt at a time does." in ran.out


def test_it_counts_what_the_run_would_do(cli: Cli, bare: World, tmp_path: Path) -> None:
    def settings(**flags: Any) -> dict[str, Any]:
        ran = cli(*score(bare, tmp_path / "out", dry_run=True, gpu_memory="24GiB", **flags), "--json")
        assert ran.code == 0, ran.err
        return dict(json.loads(ran.out)["settings"])

    assert settings(draws=3)["draws"] == 3 and settings(relaxation="softmax")["draws"] == 1
    sampled = settings(estimator="score-function", judge="refusal", samples=6)
    assert (sampled["prompts"], sampled["draws"]) == (30, 1)
    assert settings(accumulate_on="disk")["accumulate_on"] == "disk"
    assert settings(judge_placement="sequential")["placement"] == "sequential"
    assert settings(reduction="abs")["one_by_one"] and settings(method="fisher")["one_by_one"]
    given = settings(judge=None, prompts=None, objective="answer-nll", data=bare.refusals, limit=2)
    assert given["given_answers"] and given["prompts"] == 2


def test_several_ranks(cli: Cli, bare: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surveying, "host_free", lambda: 64 << 30)
    monkeypatch.setattr(surveying, "device_free", lambda device: 64 << 30)

    def asked(ranks: int, **flags: Any) -> dict[str, Any]:
        ran = cli(*score(bare, tmp_path / "out", dry_run=True, ranks=ranks, **flags), "--json")
        assert ran.code == 0, ran.err
        return dict(json.loads(ran.out))

    one, four = asked(1, gpu_memory="24GiB"), asked(4, gpu_memory="24GiB")
    small = asked(4, gpu_memory="100MB")
    assert four["available"]["device"] == one["available"]["device"] == 24 << 30
    assert four["available"]["host"] == one["available"]["host"] / 4 == 16 << 30
    assert one["parallel"]["mode"] == four["parallel"]["mode"] == "replicate"
    assert "fit every rank whole" in four["parallel"]["reason"] and four["parts"] == one["parts"]
    assert small["parallel"]["mode"] == "shard" and "do not fit" in small["parallel"]["reason"]
    assert "more ranks" in small["advice"]
    shard = asked(4, gpu_memory="24GiB", parallel="shard")
    assert shard["parallel"] == four["parallel"] | {"mode": "shard", "reason": "as asked for"}
    whole, own = ({part["name"]: part["bytes"] for part in found["parts"]} for found in (four, shard))
    assert own["model weights"] * 4 == whole["model weights"] and own["accumulators"] * 4 == whole["accumulators"]
    text = cli(*score(bare, tmp_path / "out", dry_run=True, ranks=4)).out
    assert "4 ranks: replicate (model, judge and sums fit every rank whole)." in text
    run = cli(*score(bare, tmp_path / "out", ranks=4))
    assert run.code == 2 and "--ranks goes with --dry-run" in run.err


def test_mistakes(cli: Cli, bare: World, tmp_path: Path) -> None:
    for flags, code, message in (
        ({"judge": None}, 2, "--judge JUDGE is missing"),
        ({"method": "magnitude", "prompts": None}, 1, "reads the weights alone"),
        ({"gpu_memory": "24"}, 1, "--gpu-memory"),
        ({"prompts": tmp_path / "none.csv"}, 1, "no such file"),
        ({"judge": "nosuchjudge"}, 1, "nosuchjudge"),
    ):
        ran = cli(*score(bare, tmp_path / "out", dry_run=True, **flags))
        assert ran.code == code and message in ran.err and ran.err.count("\n") == 1, flags

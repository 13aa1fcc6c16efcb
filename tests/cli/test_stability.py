"""`score --stability`: how far two halves of the prompts, and two seeds of the noise, agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from safecrit.comparison import agreement
from safecrit.maskfile import Mask
from tests.cli.conftest import Cli, World, assert_same_output, interrupted, score, scores_of

FLAGS = {"batch_size": 2, "save_every": 2, "draws": 2}


def test_halves_and_seeds_are_compared_and_the_whole_is_their_mean(cli: Cli, world: World, tmp_path: Path) -> None:
    ran = cli(*score(world, tmp_path / "stable", stability=True, **FLAGS))
    assert ran.code == 0, ran.err
    info = json.loads((tmp_path / "stable" / "score.json").read_text())
    header, *prompts = world.prompts.read_text().splitlines()
    for name, chosen in (("half-1", prompts[::2]), ("half-2", prompts[1::2])):
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *chosen]))
        assert cli(*score(world, tmp_path / name, prompts=tmp_path / f"{name}.csv", **FLAGS)).code == 0
    for name, seed in (("whole", 0), ("seed", 1)):
        assert cli(*score(world, tmp_path / name, seed=seed, **FLAGS)).code == 0
    stable, whole, seed, first, second = (
        scores_of(tmp_path / name) for name in ("stable", "whole", "seed", "half-1", "half-2")
    )
    for name, scores in stable.items():
        torch.testing.assert_close(scores, whole[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(scores, 0.6 * first[name] + 0.4 * second[name], rtol=1e-4, atol=1e-6)
    assert info["stability"]["halves"] == agreement(first, second, total=info["total"])
    assert info["stability"]["seeds"] == agreement(stable, seed, total=info["total"])
    assert info["prompts"]["used"] == 5 and info["batch_plan"] == [2, 1, 2]
    for kind, found in info["stability"].items():
        one_percent = next(row for row in found["shares"] if row["share"] == 0.01)
        assert one_percent["chance"] < one_percent["iou"] < 1
        line = next(line for line in ran.out.splitlines() if line.startswith(f"Stability, {kind}: "))
        assert f"1 %: IoU {one_percent['iou']:.2f} (chance {one_percent['chance']:.3f})" in line
        assert f"rank correlation {found['spearman']['value']:.2f}" in line


def test_the_mask_carries_the_result(cli: Cli, world: World, tmp_path: Path) -> None:
    ran = cli(*score(world, tmp_path / "scores", stability=True, relaxation="softmax"))
    assert ran.code == 0, ran.err
    assert cli("mask", tmp_path / "scores", "--top", "1%", "-o", tmp_path / "m.safetensors").code == 0
    measured = json.loads((tmp_path / "scores" / "score.json").read_text())["stability"]
    assert measured.keys() == {"halves"}  # without noise there is no second seed
    kept = Mask.load(tmp_path / "m.safetensors").info.scoring["stability"]
    assert kept == {"halves": {key: measured["halves"][key] for key in ("shares", "spearman")}}
    line = next(line for line in ran.out.splitlines() if line.startswith("Stability, halves: 0.1 %: IoU "))
    assert line in cli("inspect", tmp_path / "m.safetensors").out.splitlines()


@pytest.mark.parametrize("at", [2, 3, 4, 6])
def test_a_run_killed_in_any_pass_ends_as_an_undisturbed_one(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    assert cli(*score(world, tmp_path / "whole", stability=True, **FLAGS)).code == 0
    with interrupted(monkeypatch, at):
        assert cli(*score(world, tmp_path / "cut", stability=True, **FLAGS)).code == 130
    resumed = cli(*score(world, tmp_path / "cut", stability=True, **FLAGS))
    assert resumed.code == 0, resumed.err
    assert_same_output(tmp_path / "whole", tmp_path / "cut")


def test_a_run_killed_after_its_last_pass_ends_as_an_undisturbed_one(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safecrit.api import score as api

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    assert cli(*score(world, tmp_path / "whole", stability=True, **FLAGS)).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(api, "write_scores", killed)
        assert cli(*score(world, tmp_path / "cut", stability=True, **FLAGS)).code == 130
    assert cli(*score(world, tmp_path / "cut", stability=True, **FLAGS)).code == 0
    assert_same_output(tmp_path / "whole", tmp_path / "cut")

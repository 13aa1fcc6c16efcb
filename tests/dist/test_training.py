"""set and spa by several processes against the same commands by one, with equally many examples a step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from safecrit.cli.app import app
from safecrit.files import checkpoint_tensors
from safecrit.maskfile import Mask
from safecrit.tensorfile import MappedFiles
from tests.dist import world as worlds
from tests.dist.launch import run, torchrun
from tests.dist.world import World

BATCH = 4  # accumulation times ranks
CASES = [("set", "dense"), ("set", "moe"), ("spa", "tied"), ("lora", "dense")]
SLOW = [("set", "tied"), ("spa", "dense"), ("spa", "moe"), ("lora", "moe"), ("lora-faster", "dense"), ("dora", "tied")]
LORA = ["--use-peft", "--lora-r", 4]
# name: command and flags
MODES: dict[str, list[object]] = {
    "set": ["set"],
    "spa": ["spa"],
    "lora": ["spa", *LORA],
    "lora-faster": ["spa", *LORA, "--lr", 1e-2],
    "dora": ["spa", *LORA, "--use-dora"],
}


def train(world: World, mode: str, model: str, out: Path, ranks: int, *more: object) -> list[str]:
    """A command line of 20 steps at lr 3e-5."""
    files = ["--mask", world.folder / f"{model}.safetensors", "--data", world.folder / "data.jsonl", "-o", out]
    batch = ["--batch-size", 1, "--gradient-accumulation-steps", BATCH // ranks]
    settings = ["--max-steps", 20, "--lr", 3e-5, "--weight-decay", 0.1, "--save-steps", 4]
    command, *flags = MODES[mode]
    return list(map(str, [command, world.models[model], *files, *batch, *settings, *flags, *more]))


def alone(command: list[str]) -> None:
    app([*command, "-q"], standalone_mode=False)


def assert_same_weights(world: World, mode: str, model: str, one: Path, other: Path) -> None:
    """Within 1e-6 of one another, and frozen entries bit-identical to the base."""
    mask, maps = Mask.load(world.folder / f"{model}.safetensors"), MappedFiles()
    base, a, b = (checkpoint_tensors(folder) for folder in (world.models[model], one, other))
    distance = norm = moved = 0.0
    for name in base:
        before, left, right = (maps.tensor(stored[name]) for stored in (base, a, b))
        distance += float((left - right).double().square().sum())
        norm += float(left.double().square().sum())
        moved += float((right - before).double().square().sum())
        selected = mask.dense(name) if name in mask.indices else torch.zeros(before.shape, dtype=torch.bool)
        frozen = ~selected if mode == "set" else selected
        assert torch.equal(before[frozen], right[frozen]), name
    assert distance**0.5 <= 1e-6 * norm**0.5 and distance**0.5 <= 1e-2 * moved**0.5 and moved > 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Models, masks of them, and training data."""
    folder = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFECRIT_CACHE", str(folder / "cache"))
        made = worlds.make(folder)
        for name in made.models:
            scores = made.folder / f"scores-{name}"
            alone(made.score(name, scores, "--method", "magnitude"))
            alone(["mask", str(scores), "--top", "20%", "-o", str(folder / f"{name}.safetensors")])
        pairs = zip(worlds.PROMPTS, worlds.ANSWERS, strict=True)
        rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
        (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        yield made


@pytest.mark.filterwarnings("ignore::RuntimeWarning:peft")  # of Mixtral's fused experts
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_weights_are_those_of_one_process(ranks: int, world: World) -> None:
    cases = CASES + (SLOW if ranks > 2 else [])
    out = world.folder / str(ranks)
    commands = [train(world, mode, model, out / f"{mode}-{model}", ranks) for mode, model in cases]
    code, _, err = run(torchrun(ranks, "tests.dist.commands", json.dumps(commands)), 240)
    assert code == 0, err
    assert err.count(f"{ranks} ranks: replicate") == len(cases)
    for mode, model in cases:
        expected = world.folder / f"1-{ranks}" / f"{mode}-{model}"
        alone(train(world, mode, model, expected, 1))
        assert_same_weights(world, mode, model, expected, out / f"{mode}-{model}")
        one, several = (json.loads((place / "safecrit/training.json").read_text()) for place in (expected, out / f"{mode}-{model}"))
        assert one["tokens"] == several["tokens"] and one["data"] == several["data"]
        assert several["losses"] == pytest.approx(one["losses"], rel=1e-5)


@pytest.mark.parametrize("mode", ["set", pytest.param("lora-faster", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on(mode: str, world: World, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    command = train(world, mode, "dense", killed, 2)
    code, _, err = run(torchrun(2, "tests.dist.dying", 1, 21, "kill", *command), 100)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1, err
    assert errors[0].startswith("error: rank 1 of 2 (") and "fell silent: killed" in errors[0]
    assert list(killed.glob("safecrit/checkpoints/checkpoint-8")) and not (killed / "config.json").exists()
    assert not list(killed.rglob(".*.part"))
    expected, again = tmp_path / "expected", tmp_path / "again"
    alone(train(world, mode, "dense", expected, 1))
    shutil.copytree(killed, again)
    resumed = train(world, mode, "dense", again, 2)
    alone(resumed)
    assert_same_weights(world, mode, "dense", expected, again)
    code, _, err = run(torchrun(2, "safecrit", *command), 100)
    assert code == 0 and "resuming the interrupted run" in err, err
    assert_same_weights(world, mode, "dense", expected, killed)


def test_a_divided_model_is_refused(world: World, tmp_path: Path) -> None:
    from safecrit.errors import SafecritError

    for mode in ("set", "lora"):
        with pytest.raises(SafecritError, match="--parallel shard"):
            alone(train(world, mode, "dense", tmp_path / mode, 1, "--parallel", "shard"))

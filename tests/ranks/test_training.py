"""set and spa by several processes against the same commands by one, with equally many examples a step."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from safecrit.errors import SafecritError
from safecrit.files import checkpoint_tensors
from safecrit.maskfile import Mask
from safecrit.tensorfile import MappedFiles
from tests.ranks import world as worlds
from tests.ranks.launch import finish, run, start, torchrun
from tests.ranks.world import World, alone

BATCH = 4  # accumulation times ranks
MODES, MODELS, PARALLEL = ("set", "spa"), ("dense", "tied", "moe"), ("replicate", "shard")
LORA = ["--use-peft", "--lora-r", 4]
# name: command and flags
COMMANDS: dict[str, list[object]] = {
    "set": ["set"],
    "spa": ["spa"],
    "lora": ["spa", *LORA],
    "lora-faster": ["spa", *LORA, "--lr", 1e-2],
    "dora": ["spa", *LORA, "--use-dora"],
}
CASES = [
    ("set", "dense", "replicate"),
    ("spa", "tied", "replicate"),
    ("set", "tied", "shard"),
    ("set", "moe", "shard"),
    ("spa", "tied", "shard"),
    ("lora", "dense", "replicate"),
]
ADAPTERS = [("lora", "moe", "replicate"), ("lora-faster", "dense", "replicate"), ("dora", "tied", "replicate")]


def train(world: World, mode: str, model: str, out: Path, ranks: int, *more: object) -> list[str]:
    """A command line of 20 steps at lr 3e-5."""
    files = ["--mask", world.folder / f"{model}.safetensors", "--data", world.folder / "data.jsonl", "-o", out]
    batch = ["--batch-size", 1, "--gradient-accumulation-steps", BATCH // ranks]
    settings = ["--max-steps", 20, "--lr", 3e-5, "--weight-decay", 0.1, "--save-steps", 4]
    command, *flags = COMMANDS[mode]
    return list(map(str, [command, world.models[model], *files, *batch, *settings, *flags, *more]))


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
    with worlds.cached(folder) as made:
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
    cases = CASES if ranks == 2 else [*itertools.product(MODES, MODELS, PARALLEL), *ADAPTERS]
    out = world.folder / str(ranks)
    folders = {case: out / "-".join(case) for case in cases}
    commands = [
        train(world, mode, model, folder, ranks, "--parallel", parallel, "--save-steps", 0)
        for (mode, model, parallel), folder in folders.items()
    ]
    code, _, err = run(torchrun(ranks, "tests.ranks.commands", json.dumps(commands)), 240)
    assert code == 0, err
    for parallel in PARALLEL:
        assert err.count(f"{ranks} ranks: {parallel}") == sum(case[2] == parallel for case in cases)
    for (mode, model, parallel), folder in folders.items():
        expected = world.folder / f"1-{ranks}" / f"{mode}-{model}"
        if not expected.exists():
            alone(train(world, mode, model, expected, 1, "--save-steps", 0))
        assert_same_weights(world, mode, model, expected, folder)
        one, several = (json.loads((place / "safecrit/training.json").read_text()) for place in (expected, folder))
        assert one["tokens"] == several["tokens"] and one["data"] == several["data"]
        assert several["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert several["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-4)
        assert [row["trained"] for row in one["moved"]] == [row["trained"] for row in several["moved"]]
        if (mode, parallel) == ("set", "replicate"):
            selected = several["trained"]
            assert several["sent_bytes"]["gradients"] <= 20 * 1.1 * 2 * (ranks - 1) / ranks * 4 * selected


KILLED = [
    ("set", "dense", "shard"),
    ("set", "moe", "replicate"),
    ("spa", "tied", "shard"),
    ("lora-faster", "dense", "replicate"),
]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if n else []) for n, case in enumerate(KILLED)]
)
def test_a_killed_run_goes_on(case: tuple[str, str, str], world: World, tmp_path: Path) -> None:
    mode, model, parallel = case
    killed = tmp_path / "killed"
    command = train(world, mode, model, killed, 2, "--parallel", parallel)
    dying = [1, 11 * BATCH // 2, "kill", *command]
    dies, expected = start(torchrun(2, "tests.ranks.dying", *dying)), tmp_path / "expected"
    alone(train(world, mode, model, expected, 1))
    code, _, err = finish(dies, 100)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1, err
    assert errors[0].startswith("error: rank 1 of 2 (") and "fell silent: killed" in errors[0]
    assert list(killed.glob("safecrit/checkpoints/checkpoint-8")) and not (killed / "config.json").exists()
    assert not list(killed.rglob(".*.part"))
    one, several, ranks = tmp_path / "one", tmp_path / "several", 2 if case == KILLED[0] else 4
    for again in (one, several):
        shutil.copytree(killed, again)
    goes_on = start(torchrun(ranks, "safecrit", *train(world, mode, model, several, 2, "--parallel", parallel)))
    alone(train(world, mode, model, one, 2, "--parallel", parallel))
    assert_same_weights(world, mode, model, expected, one)
    code, _, err = finish(goes_on, 100)
    assert code == 0 and "resuming the interrupted run" in err, err
    assert_same_weights(world, mode, model, expected, several)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_accelerates_plugin_divides_a_script_of_ones_own(mode: str, world: World, tmp_path: Path) -> None:
    mask = world.folder / "tied.safetensors"
    arguments = [mode, world.models["tied"], mask, world.folder / "data.jsonl"]
    for command, name in (([sys.executable, "-m"], "one"), (torchrun(2, "")[:-1], "two")):
        code, _, err = run([*command, "tests.ranks.plugin", *map(str, arguments), str(tmp_path / name)])
        assert code == 0, err
    one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
    chosen, base = Mask.load(mask), AutoModelForCausalLM.from_pretrained(world.models["tied"]).state_dict()
    for name, before in base.items():
        if name in one:
            selected = chosen.dense(name) if name in chosen.indices else torch.zeros(before.shape, dtype=torch.bool)
            assert torch.equal(two[name] != before, selected if mode == "set" else ~selected), name
            assert torch.linalg.vector_norm(one[name] - two[name]) <= 1e-6 * torch.linalg.vector_norm(one[name]), name


def test_an_adapter_on_a_divided_base_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(SafecritError, match="--use-peft keeps the whole base"):
        alone(train(world, "lora", "dense", tmp_path / "out", 1, "--parallel", "shard"))

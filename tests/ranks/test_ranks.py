"""score, mask and eval by several processes against the same commands by one."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safecrit import scoring
from safecrit.maskfile import Mask
from safecrit.scorefile import Scores
from tests.ranks import poison
from tests.ranks import world as worlds
from tests.ranks.launch import finish, run, start, torchrun
from tests.ranks.world import World, alone
from tests.test_divided import resaved

# name: model, whether answers are given, flags of one process and of several, flags of several alone
CASES: dict[str, tuple[str, bool, list[object], list[object]]] = {
    "tied": ("tied", True, [], ["--parallel", "shard"]),
    "moe": ("moe", True, [], ["--parallel", "shard", "--checkpoint-activations", "on"]),
    "moe-whole": ("moe", True, [], ["--parallel", "replicate"]),
    "answers": ("dense", False, [], ["--parallel", "shard", "--accumulate-on", "host"]),
    "answers-whole": ("dense", False, [], []),
    "snip": ("moe", True, ["--method", "snip"], ["--parallel", "shard"]),
    "fisher": ("dense", True, ["--method", "fisher", "--stability"], ["--parallel", "replicate"]),
    "wanda": ("moe", True, ["--method", "wanda"], []),
    "sampled": ("dense", False, ["--estimator", "score-function", "--samples", 3], []),
}


def flat(folder: Path) -> torch.Tensor:
    scores = Scores.load(folder)
    return torch.cat([scores.tensor(name).flatten() for name in scores.names])


def assert_same_scores(one: Path, other: Path, work: Path) -> None:
    a, b = flat(one), flat(other)
    assert float((a - b).norm() / a.norm()) <= 1e-5
    masks = []
    for number, folder in enumerate((one, other)):
        alone(["mask", str(folder), "--top", "1%", "-q", "-o", str(work / f"{number}.safetensors"), "--overwrite"])
        masks.append(Mask.load(work / f"{number}.safetensors"))
    assert masks[0].iou(masks[1]) >= 0.999


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Models, and in `1/` what one process makes of them."""
    folder = tmp_path_factory.mktemp("ranks")
    with worlds.cached(folder) as made:
        for name, (model, given, flags, _) in CASES.items():
            alone(made.score(model, folder / "1" / name, "-q", *flags, given=given))
        alone(["mask", str(folder / "1/tied"), "--top", "2%", "-q", "-o", str(folder / "1/mask.safetensors")])
        alone(made.evaluate(folder / "1/eval"))
        yield made


SLOW = [pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=[2, *SLOW])
def together(request: pytest.FixtureRequest, world: World) -> Path:
    """What several processes make of the same models, in one process group."""
    ranks, out = request.param, world.folder / f"ranks-{request.param}"
    commands = [
        world.score(model, out / name, *flags, *more, given=given)
        for name, (model, given, flags, more) in CASES.items()
    ]
    commands.append(["mask", str(world.folder / "1/tied"), "--top", "2%", "-o", str(out / "mask.safetensors")])
    commands.append(world.evaluate(out / "eval"))
    code, _, err = run(torchrun(ranks, "tests.ranks.commands", json.dumps(commands)), 240)
    assert code == 0, err
    assert f"{ranks} rank{'s' if ranks > 1 else ''}: shard (as asked for)" in err
    assert ranks == 1 or f"{ranks} ranks: replicate (model, judge and sums fit every rank whole)" in err
    return out


def test_scores_masks_and_results_are_those_of_one_process(world: World, together: Path, tmp_path: Path) -> None:
    for case in CASES:
        check_scores(world.folder / "1" / case, together / case, tmp_path)
    names = ("mask.safetensors", "eval/results.json", "eval/samples.jsonl")
    for name in names:  # bit-identical, the mask being of the same scores
        assert (together / name).read_bytes() == (world.folder / "1" / name).read_bytes(), name


def check_scores(one: Path, other: Path, tmp_path: Path) -> None:
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in other.iterdir())
    assert_same_scores(one, other, tmp_path)
    mine, theirs = (Scores.load(folder).info for folder in (one, other))
    for key in ("prompts", "batch_plan", "answers", "eligible", "layouts", "unrouted", "warnings"):
        assert mine[key] == theirs[key], key
    assert [row["sigma"] for row in mine["matrices"]] == [row["sigma"] for row in theirs["matrices"]]


HOW = ("replicate", "shard")


def killed_command(world: World, out: Path, how: str) -> list[str]:
    return world.score("dense", out, "--batch-size", 1, "--save-every", 1, "--parallel", how)


@pytest.fixture(scope="module")
def killed(world: World) -> dict[str, Path]:
    """Runs of two ranks the second of which was killed in the middle, by how they were parallel."""
    outs = {how: world.folder / f"killed-{how}" for how in HOW}
    runs = {
        how: start(torchrun(2, "tests.ranks.dying", 1, 3, "kill", *killed_command(world, out, how)))
        for how, out in outs.items()
    }
    for how, out in outs.items():
        code, printed, err = finish(runs[how], 100)
        assert code == 1 and printed == ""
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and errors[0].startswith("error: rank 1 of 2 (") and "fell silent: killed" in errors[0]
        assert not list(out.glob(".*.part")) and not (out / "score.json").exists()
        assert list(out.glob("partial-*"))
    return outs


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Path:
    out = world.folder / "undisturbed"
    alone(world.score("dense", out, "--batch-size", 1, "-q"))
    return out


def test_a_killed_run_goes_on(
    killed: dict[str, Path], undisturbed: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, outs = resume(2, killed, world, tmp_path)
    batches, inner = [], scoring.forward_logits
    monkeypatch.setattr(scoring, "forward_logits", lambda *a: batches.append(1) or inner(*a))
    for how in HOW:
        out = tmp_path / f"{how}-1"
        shutil.copytree(killed[how], out)
        batches.clear()
        alone(killed_command(world, out, how))
        assert 0 < len(batches) < len(worlds.PROMPTS)
        assert_same_scores(undisturbed, out, tmp_path)
        assert not list(out.glob("partial-*"))
    check_resumed(goes_on, outs, undisturbed, tmp_path)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_four(
    killed: dict[str, Path], undisturbed: Path, world: World, tmp_path: Path
) -> None:
    check_resumed(*resume(4, killed, world, tmp_path), undisturbed, tmp_path)


def resume(
    ranks: int, killed: dict[str, Path], world: World, tmp_path: Path
) -> tuple[subprocess.Popen[str], list[Path]]:
    commands, outs = [], []
    for before, after in itertools.product(HOW, HOW):
        outs.append(tmp_path / f"{before}-{after}")
        shutil.copytree(killed[before], outs[-1])
        commands.append(killed_command(world, outs[-1], after))
    return start(torchrun(ranks, "tests.ranks.commands", json.dumps(commands))), outs


def check_resumed(goes_on: subprocess.Popen[str], outs: list[Path], undisturbed: Path, tmp_path: Path) -> None:
    code, _, err = finish(goes_on)
    assert code == 0, err
    assert err.count("resuming the interrupted run") == len(outs)
    for out in outs:
        assert_same_scores(undisturbed, out, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_a_poisoned_prompt_is_dropped_alone(how: str, world: World, tmp_path: Path) -> None:
    poison.poisoned(world.score("dense", tmp_path / "1"))
    code, _, err = run(torchrun(2, "tests.ranks.poison", *world.score("dense", tmp_path / "2", "--parallel", how)))
    assert code == 0, err
    one, other = (Scores.load(tmp_path / name).info["prompts"] for name in ("1", "2"))
    assert one["dropped"] == other["dropped"] == [{"row": poison.ROW, "reason": "weight gradient not finite"}]
    assert one["used"] == other["used"] == len(worlds.PROMPTS) - 1
    assert_same_scores(tmp_path / "1", tmp_path / "2", tmp_path)


@pytest.mark.slow
def test_a_model_that_ranks_load_whole_in_turn(world: World, tmp_path: Path) -> None:
    model = resaved(
        world.models["tied"],
        tmp_path / "both",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    both = replace(world, models={"both": model})
    code, _, err = run(
        torchrun(2, "tests.ranks.commands", json.dumps([both.score("both", tmp_path / "2", "--parallel", "shard")]))
    )
    assert code == 0, err
    check_scores(world.folder / "1/tied", tmp_path / "2", tmp_path)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import safecrit.api.evaluate as evaluation
from safecrit.cli.run import TEMPLATE, read_recipe
from tests.cli.conftest import Cli, World

RECIPES = sorted((Path(__file__).resolve().parents[2] / "examples" / "recipes").glob("*.yaml"))


def recipe(world: World, file: Path, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "model": str(world.model),
        "output": str(file.parent / "out"),
        "score": {"judge": str(world.guard), "prompts": str(world.prompts), "max-new-tokens": 8},
        "mask": {"top": "1%"},
        "set": {"data": str(world.refusals), "steps": 2, "learning_rate": 1e-3},
        "eval": {"prompts": str(world.prompts), "judge": ["refusal", str(world.guard)], "max-new-tokens": 8},
        "report": None,
    }
    file.write_text(yaml.safe_dump(content | changes))
    return file


def test_a_recipe_runs_through_and_is_not_done_twice(cli: Cli, world: World, tmp_path: Path) -> None:
    file = recipe(world, tmp_path / "r.yaml")
    ran = cli("run", file)
    assert ran.code == 0, ran.err
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"scores", "mask.safetensors", "model", "results", "report", "run.yaml"}
    results = json.loads((out / "results" / "results.json").read_text())
    assert set(results["models"]) == {"model"} or results["baseline"]
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    again = cli("run", file)
    assert again.code == 0 and again.err.count("finished before") == 5
    assert times == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


def test_a_killed_recipe_goes_on_and_a_changed_one_asks(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    file = recipe(world, tmp_path / "r.yaml")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "ask_all", interrupted)
        assert cli("run", file).code == 130
    mask = (tmp_path / "out" / "mask.safetensors").stat().st_mtime_ns
    ran = cli("run", file)
    assert ran.code == 0 and ran.err.count("finished before") == 3, ran.err
    assert (tmp_path / "out" / "mask.safetensors").stat().st_mtime_ns == mask
    changed = recipe(world, tmp_path / "r.yaml", mask={"top": "2%"})
    asks = cli("run", changed)
    assert asks.code == 1 and "its mask was made with other settings" in asks.err
    done = cli("run", changed, "--overwrite")
    assert done.code == 0 and done.err.count("finished before") == 1, done.err
    assert (tmp_path / "out" / "mask.safetensors").stat().st_mtime_ns != mask


def test_a_gate_that_does_not_hold_is_told_at_the_end_and_again(cli: Cli, world: World, tmp_path: Path) -> None:
    judged = {"prompts": str(world.prompts), "max-asr": 0.0, "max-new-tokens": 8}
    file = recipe(world, tmp_path / "r.yaml", eval=judged)
    for _ in range(2):
        ran = cli("run", file)
        assert ran.code == 3 and "ASR" in ran.err
    assert (tmp_path / "out" / "report" / "report.html").is_file()


def test_dry_run_prints_the_commands_and_runs_nothing(cli: Cli, world: World, tmp_path: Path) -> None:
    ran = cli("run", recipe(world, tmp_path / "r.yaml"), "--dry-run")
    assert ran.code == 0 and not (tmp_path / "out").exists(), ran.err
    lines = [line for line in ran.out.splitlines() if line.startswith("safecrit ")]
    assert [line.split()[1] for line in lines] == ["score", "mask", "set", "eval", "report"]
    assert "--learning-rate 0.001" in lines[2] and lines[3].count("--judge") == 2


def test_every_fault_of_a_recipe_is_named_at_once(cli: Cli, world: World, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("output: x\nscore: {judg: a}\nspa: {data: b}\nset: 3\nscores: {}\n")
    ran = cli("run", file)
    assert ran.code == 1
    for part in ("`model`", "'judg'", "'scores'", "exclude each other", "`set` must hold", "`spa` needs `mask`"):
        assert part in ran.err
    assert cli("run").code == 2 and cli("run", tmp_path / "none.yaml").code == 1


def test_init_writes_a_recipe_that_is_one(cli: Cli, tmp_path: Path) -> None:
    ran = cli("run", "--init", "owner/name", "-o", tmp_path / "new.yaml")
    assert ran.code == 0
    content = read_recipe(tmp_path / "new.yaml")
    assert content["model"] == "owner/name" and content["output"] == "safecrit-out/name"
    assert cli("run", "--init", "owner/name", "-o", tmp_path / "new.yaml").code == 1
    assert "Not run by us" in TEMPLATE


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_say_that_nobody_ran_them(path: Path) -> None:
    assert set(read_recipe(path)) >= {"model", "output", "score", "mask", "set", "eval"}
    assert "Not run by us" in path.read_text(encoding="utf-8")


def test_there_are_recipes() -> None:
    assert {p.stem for p in RECIPES} == {"llama-3.1-8b", "qwen2.5-7b", "qwen2.5-0.5b"}

"""Evaluations in model cards: `set --results` for the base's figures, `eval --card` for the output's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from safecrit.prompts import read_prompts
from tests.cli.conftest import Cli, World


def evaluate(cli: Cli, world: World, out: Path, *words: object) -> dict[str, Any]:
    ran = cli(
        "eval", *words, "--prompts", world.prompts, "--benign", world.prompts, "--task", world.task, "--max-new-tokens",
        4, "-o", out, "-q",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


@pytest.fixture
def made(cli: Cli, world: World, mask_file: Path, tmp_path: Path) -> Path:
    """A SET output whose card has the base's figures."""
    evaluate(cli, world, tmp_path / "before", world.model)
    ran = cli(
        "set", world.model, "--mask", mask_file, "--data", world.refusals, "--steps", 2, "--lr", 0.01, "--results",
        tmp_path / "before", "-o", tmp_path / "safer", "-q",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return tmp_path / "safer"


def shown(rate: dict[str, Any]) -> str:
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def test_set_carries_the_bases_figures(made: Path) -> None:
    card = (made / "README.md").read_text()
    results = json.loads((made.parent / "before" / "results.json").read_text())
    figures = results["models"]["model"]
    assert "## Evaluation of the base model" in card
    assert f"| attack success | {shown(figures['asr'])} | 5 judged answers to harmful prompts |" in card
    assert "model-index" not in card, "the base's figures are not the output's"
    assert card.index("## Evaluation") < card.index("## Intended use")


def test_eval_puts_the_outputs_own_figures_there_once(cli: Cli, world: World, made: Path) -> None:
    words = [made, "--baseline", world.model, "--judge", world.guard, "--card"]
    evaluate(cli, world, made.parent / "one", *words)
    results = evaluate(cli, world, made.parent / "two", *words)
    card = (made / "README.md").read_text()
    assert card.count("## Evaluation") == 1 and "of the base model\n\nShares" not in card
    safer, base = results["models"]["safer"], results["models"]["model"]
    for key, label in (("asr", "attack success"), ("over_refusal", "over-refusal"), ("utility", "utility")):
        of = f"{safer[key]['n']} {safer[key]['denominator']}"
        assert f"| {label} | {shown(base[key])} | {shown(safer[key])} | {of} |" in card
    assert "exact McNemar p =" in card and "Judge: `guard`" in card
    front = yaml.safe_load(card.split("---\n")[1])
    (entry,) = front["model-index"]
    assert entry["name"] == "safer" and front["library_name"] == "transformers"
    found = {metric["type"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}
    assert found["asr"] == pytest.approx(safer["asr"]["rate"]) and {"utility", "over_refusal"} <= found.keys()
    assert {result["dataset"]["name"] for result in entry["results"]} == {"prompts.csv", "task.jsonl"}
    answers = [json.loads(line)["answer"] for line in (made.parent / "two" / "samples.jsonl").read_text().splitlines()]
    texts = [prompt.text for prompt in read_prompts(world.prompts)] + [text for text in answers if len(text) > 8]
    assert not [text for text in texts if text in card], "prompts and answers stay in samples.jsonl"
    assert "the judge guard was used for scoring too" in card
    assert str(made.parent) not in card and str(world.folder) not in card
    mask = world.folder / "mask.safetensors"
    assert cli("verify", made, "--base", world.model, "--mask", mask, "--mode", "set").code == 0


def test_results_of_another_model_are_refused_before_training(
    cli: Cli, world: World, mask_file: Path, tmp_path: Path
) -> None:
    evaluate(cli, world, tmp_path / "other", world.guard)
    command = ["set", world.model, "--mask", mask_file, "--data", world.refusals, "-o", tmp_path / "o", "--results"]
    ran = cli(*command, tmp_path / "other")
    assert ran.code == 1 and "evaluates guard, not the model to be trained" in ran.err
    ran = cli(*command, tmp_path)
    assert ran.code == 1 and "results.json" in ran.err
    assert not (tmp_path / "o").exists()


def test_card_needs_an_output_of_set_or_spa(cli: Cli, world: World, tmp_path: Path) -> None:
    ran = cli("eval", world.model, "--prompts", world.prompts, "--card", "-o", tmp_path / "r")
    assert ran.code == 1 and "--card: none of the models" in ran.err and not (tmp_path / "r").exists()

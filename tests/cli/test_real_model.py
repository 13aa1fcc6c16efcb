"""The commands on a real pretrained model and real data, as a user would type them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from safecrit.maskfile import Mask
from tests.cli.conftest import Cli, World
from tests.cli.test_commands import flip
from tests.cli.test_examples import EXAMPLES

TRAIN = ["--steps", 2, "--limit", 8, "--lr", "1e-3", "--max-length", 128]


def test_stories_model_end_to_end(cli: Cli, world: World, shared: Path, tmp_path: Path) -> None:
    model, data = shared / "models" / "stories260K", shared / "data"
    harmful = data / "advbench" / "harmful_behaviors.csv"
    scored = cli(
        "score", model, "--judge", world.guard, "--prompts", harmful, "--limit", 8, "--max-new-tokens", 16,
        "-o", tmp_path / "s",
    )  # fmt: skip
    assert scored.code == 0, scored.err
    assert json.loads((tmp_path / "s" / "score.json").read_text())["judged"]["std"] > 0
    mask = tmp_path / "m.safetensors"
    assert cli("mask", tmp_path / "s", "--top", "1%", "-o", mask).code == 0
    refusals = data / "circuit_breakers" / "circuit_breakers_train.json"
    retain = data / "instructions" / "instruction-data.json"
    for command, arguments in (
        ("set", ["--data", refusals, "--retain", retain]),
        ("spa", ["--data", data / "gsm8k" / "train_2000.jsonl"]),
    ):
        out = tmp_path / command
        ran = cli(command, model, "--mask", mask, *arguments, *TRAIN, "-o", out)
        assert ran.code == 0, ran.err
        assert cli("verify", out, "--base", model, "--mask", mask, "--mode", command).code == 0
        assert AutoModelForCausalLM.from_pretrained(out).num_parameters() == 260_032
    delta = tmp_path / "set" / "safecrit" / "delta.safetensors"
    assert cli("apply", model, delta, "-o", tmp_path / "applied").code == 0
    assert (tmp_path / "applied/model.safetensors").read_bytes() == (tmp_path / "set/model.safetensors").read_bytes()
    judged = cli(
        "eval", tmp_path / "set", "--baseline", model, "--prompts", harmful, "--limit", 6, "--max-new-tokens", 12,
        "--benign", data / "xstest" / "xstest_prompts.csv", "--judge", "refusal", "-o", tmp_path / "r", "--json",
    )  # fmt: skip
    assert judged.code == 0, judged.err
    assert json.loads(judged.out)["models"]["set"]["over_refusal"]["n"] == 6


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # from TRL
def test_stories_model_through_trl(cli: Cli, shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    model, data = shared / "models" / "stories260K", shared / "data"
    assert cli("score", model, "--method", "magnitude", "-o", tmp_path / "s").code == 0
    mask = tmp_path / "m.safetensors"
    assert cli("mask", tmp_path / "s", "--top", "1%", "-o", mask).code == 0
    refusals = json.loads((data / "circuit_breakers" / "circuit_breakers_train.json").read_text())[:16]
    questions = [json.loads(line) for line in (data / "gsm8k" / "train_2000.jsonl").read_text().splitlines()[:16]]
    texts = {
        "set": [(row["instruction"], row["output"]) for row in refusals],
        "spa": [(row["question"], row["answer"]) for row in questions],
    }
    for mode, example in (("set", "sft_set"), ("spa", "sft_protect")):
        rows = [{"prompt": asked[:60], "completion": answer[:60]} for asked, answer in texts[mode]]
        file, out = tmp_path / f"{mode}.jsonl", tmp_path / mode
        file.write_text("\n".join(map(json.dumps, rows)))
        runpy.run_path(str(EXAMPLES / f"{example}.py"))["main"](str(model), str(mask), str(file), str(out))
        check = ["verify", out, "--base", model, "--mask", mask, "--mode", mode]
        assert cli(*check).code == 0
        name, selected = next(iter(Mask.load(mask).indices.items()))
        free = next(n for n in range(10_000) if n not in set(selected.tolist()))
        flip(out, name, int(selected[0]) if mode == "spa" else free)
        failed = cli(*check)
        assert failed.code == 3 and f"{name}[" in failed.err

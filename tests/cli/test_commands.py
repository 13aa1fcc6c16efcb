"""The five commands, verify, apply and inspect on a small model, as a user runs them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safecrit.maskfile import Mask
from tests.cli.conftest import Cli, World

SET = ["--steps", 3, "--lr", "1e-2", "--batch-size", 2, "--gradient-accumulation-steps", 1]


def flip(folder: Path, name: str, index: int) -> None:
    """Change one bit of float32 entry `index` of a tensor, in the file itself."""
    with open(folder / "model.safetensors", "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        start = json.loads(file.read(length))[name]["data_offsets"][0]
        file.seek(8 + length + start + 4 * index)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def test_score_folder_and_mask(cli: Cli, world: World, mask_file: Path) -> None:
    info = json.loads((world.folder / "scores" / "score.json").read_text())
    assert info["prompts"]["used"] == 5 and len(info["prompts"]["hashes"]) == 5
    assert not info["equal_tokenizers"] and info["judged"]["std"] > 0
    shown = cli("inspect", mask_file)
    assert shown.code == 0 and "Share selected, by layer and component" in shown.out
    as_json = json.loads(cli("inspect", mask_file, "--json").out)
    total = sum(t.numel() for t in load_file(world.model / "model.safetensors").values())
    assert as_json["total"] == total and as_json["selected"] == total // 100
    assert "Mean |score|, by layer and component" in cli("inspect", world.folder / "scores").out


def test_mask_of_a_model_equals_mask_of_its_scores(cli: Cli, world: World, mask_file: Path, tmp_path: Path) -> None:
    made = cli(
        "mask", world.model, "--judge", world.guard, "--prompts", world.prompts, "--max-new-tokens", 12,
        "--top", "1%", "-o", tmp_path / "m.safetensors",
    )  # fmt: skip
    assert made.code == 0
    ours, theirs = load_file(tmp_path / "m.safetensors"), load_file(mask_file)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_mask_modes(cli: Cli, world: World, mask_file: Path, tmp_path: Path) -> None:
    scores = world.folder / "scores"
    for n, flags in enumerate(
        (["--bottom", "1%"], ["--random", "0.01"], ["--random", "1%", "--match", mask_file], ["--count", "7"])
    ):
        made = cli("mask", scores, *flags, "-o", tmp_path / f"{n}.safetensors", "--json")
        assert made.code == 0, made.err
        assert json.loads(made.out)["selected"] == (
            7 if n == 3 else json.loads(cli("inspect", mask_file, "--json").out)["selected"]
        )
    assert cli("mask", scores, "--top", "1%", "-o", tmp_path / "0.safetensors").code == 1
    assert cli("mask", scores, "--top", "1%", "-o", tmp_path / "0.safetensors", "--overwrite").code == 0


def test_set_verify_apply(cli: Cli, world: World, mask_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    ran = cli(
        "set", world.model, "--mask", mask_file, "--data", world.refusals, "--retain", world.task, *SET, "-o", out
    )
    assert ran.code == 0, ran.err
    assert ran.out.startswith("Training ") and "rest frozen" in ran.out.splitlines()[0]
    before, after = load_file(world.model / "model.safetensors"), load_file(out / "model.safetensors")
    selected = Mask.load(mask_file).indices
    moved = 0
    for name, weight in before.items():
        differs = (weight != after[name]).flatten().nonzero().flatten()
        moved += len(differs)
        assert set(differs.tolist()) <= set(selected.get(name, torch.tensor([])).tolist())
    assert moved > 0
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "llama"
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"safecrit"}
    applied = tmp_path / "applied"
    assert cli("apply", world.model, out / "safecrit" / "delta.safetensors", "-o", applied).code == 0
    assert (applied / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    undone = tmp_path / "undone"
    assert cli("apply", out, out / "safecrit" / "delta.safetensors", "--undo", "-o", undone).code == 0
    assert (undone / "model.safetensors").read_bytes() == (world.model / "model.safetensors").read_bytes()
    check = ["verify", applied, "--base", world.model, "--mask", mask_file, "--mode", "set"]
    assert cli(*check).code == 0
    name = next(name for name in sorted(before) if "v_proj" in name)
    index = next(i for i in range(before[name].numel()) if i not in set(selected.get(name, torch.tensor([])).tolist()))
    flip(applied, name, index)
    failed = cli(*check)
    row, column = divmod(index, before[name].shape[1])
    assert failed.code == 3 and f"{name}[{row}, {column}]" in failed.err


def test_set_delta_only(cli: Cli, world: World, mask_file: Path, tmp_path: Path) -> None:
    ran = cli(
        "set", world.model, "--mask", mask_file, "--data", world.refusals, *SET, "--save", "delta", "-o", tmp_path / "d"
    )
    assert ran.code == 0, ran.err
    assert (tmp_path / "d" / "safecrit" / "delta.safetensors").is_file()
    assert not list((tmp_path / "d").glob("*.safetensors"))


def test_spa_and_verify(cli: Cli, world: World, mask_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "spa"
    ran = cli("spa", world.model, "--mask", mask_file, "--data", world.task, *SET, "-o", out)
    assert ran.code == 0, ran.err
    check = ["verify", out, "--base", world.model, "--mask", mask_file, "--mode", "spa"]
    assert cli(*check).code == 0
    name, indices = next(iter(Mask.load(mask_file).indices.items()))
    flip(out, name, int(indices[0]))
    assert cli(*check).code == 3
    # What SET or SPA made is a child of the base: the base's mask is accepted for it.
    assert cli("spa", out, "--mask", mask_file, "--data", world.task, *SET, "-o", tmp_path / "again").code == 0


def test_eval_with_guard_baseline_and_gates(cli: Cli, world: World, tmp_path: Path) -> None:
    arguments = ["eval", world.model, "--prompts", world.prompts, "--task", world.task, "--max-new-tokens", 8]
    ran = cli(*arguments, "--judge", world.guard, "-o", tmp_path / "a")
    assert ran.code == 0, ran.err
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    figures = results["models"]["model"]
    assert figures["asr"]["n"] == 5 and figures["utility"]["n"] == 5 and results["judge"]["kind"] == "guard"
    samples = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()]
    unsafe = sum(sample["verdict"] == "unsafe" for sample in samples if sample["set"] == "harmful")
    assert figures["asr"]["count"] == unsafe
    gate = cli(*arguments, "--judge", "refusal", "--max-asr", "0.0", "-o", tmp_path / "b")
    assert gate.code == 3 and "ASR" in gate.err and (tmp_path / "b" / "results.json").is_file()
    paired = cli(*arguments, "--baseline", world.model, world.guard, "-o", tmp_path / "c", "--json", "-q")
    assert json.loads(paired.out)["paired"]


def test_xstest_style_contrast_prompts_are_no_over_refusal(cli: Cli, world: World, tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("prompt,label\nfine,safe\nnot fine,unsafe\nalso fine,safe\n")
    ran = cli("eval", world.model, "--benign", file, "--max-new-tokens", 4, "-o", tmp_path / "r", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["models"]["model"]["over_refusal"]["n"] == 2


def test_config_file_runs_the_same_again(cli: Cli, world: World, mask_file: Path, tmp_path: Path) -> None:
    first = cli("set", world.model, "--mask", mask_file, "--data", world.refusals, *SET, "-o", tmp_path / "a")
    assert first.code == 0
    again = cli("set", "--config", tmp_path / "a" / "safecrit" / "config.yaml", "-o", tmp_path / "b")
    assert again.code == 0, again.err
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    other = cli("set", "--config", tmp_path / "a" / "safecrit" / "config.yaml", "--steps", 2, "-o", tmp_path / "c")
    assert other.code == 0 and "2 steps" in other.out


def test_underscores_are_accepted(cli: Cli, world: World, mask_file: Path, tmp_path: Path) -> None:
    ran = cli(
        "set", world.model, "--mask", mask_file, "--data", world.refusals, "--max_steps", 1, "--learning_rate", "1e-2",
        "-o", tmp_path / "a",
    )  # fmt: skip
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    "kind", ["score", "mask", "inspect", "set", "spa", "apply", "eval", "verify", "demo", "doctor"]
)
def test_every_help_ends_with_examples(cli: Cli, kind: str) -> None:
    shown = cli(kind, "--help")
    assert shown.code == 0 and "Examples:\n" in shown.out
    assert shown.out.rsplit("Examples:\n", 1)[1].strip().startswith(f"safecrit {kind}")


def test_doctor(cli: Cli) -> None:
    ran = cli("doctor", "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    assert {c["op"] for c in found["checks"]} == {b["op"] for b in found["backends"]}

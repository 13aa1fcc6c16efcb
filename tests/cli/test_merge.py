"""`safecrit merge` and `safecrit spa --use-peft`, as a user runs them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safecrit.maskfile import Mask
from tests.cli.conftest import Cli, World
from tests.cli.test_commands import flip

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def adapter(world: World, tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(world.model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_merge_writes_a_verified_model(
    cli: Cli, world: World, mask_file: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    ran = cli("merge", world.model, adapter, "--mask", mask_file, "-o", out, "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["verified"]["ok"] and told["changed"] == told["verified"]["moved"] > 0 and told["held"] > 0
    document = json.loads((out / "safecrit" / "training.json").read_text())
    assert document["adapter"]["r"] == 8 and document["parents"] and document["mask"]["prompt_hashes"]
    assert "LoRA adapter (rank 8" in (out / "README.md").read_text()
    assert not (out / "adapter_config.json").exists()
    check = ("verify", out, "--base", world.model, "--mask", mask_file, "--mode", "spa")
    assert cli(*check).code == 0
    assert cli("inspect", mask_file).code == 0
    assert cli("merge", out, adapter, "--mask", mask_file, "-o", tmp_path / "again").code == 0  # parents are accepted
    name, indices = next(iter(Mask.load(mask_file).indices.items()))
    flip(out, name, int(indices[0]))
    assert cli(*check).code == 3
    import safecrit.api.merge as job

    def spoilt(base: Path, folder: Path, changes: object, **flags: bool) -> None:
        original(base, folder, changes, **flags)
        flip(folder, name, int(indices[0]))

    original = job.rewrite
    monkeypatch.setattr(job, "rewrite", spoilt)
    ran = cli("merge", world.model, adapter, "--mask", mask_file, "-o", tmp_path / "spoilt")
    assert ran.code == 3 and name in ran.err


def test_merge_refuses_what_is_no_adapter_before_it_writes(
    cli: Cli, world: World, mask_file: Path, tmp_path: Path
) -> None:
    ran = cli("merge", world.model, world.guard, "--mask", mask_file, "-o", tmp_path / "out")
    assert ran.code == 1 and "adapter_config.json" in ran.err and not (tmp_path / "out").exists()


SPA = ["--steps", 4, "--lr", "1e-2", "--batch-size", 2, "--gradient-accumulation-steps", 1]


def test_spa_trains_an_adapter_and_merges_it_as_merge_does(
    cli: Cli, world: World, mask_file: Path, tmp_path: Path
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    lora = ["--use-peft", "--lora-r", 4, "--lora-alpha", 8, "--lora-dropout", "0.1"]
    lora += ["--lora-target-modules", "q_proj,v_proj,down_proj"]
    start = ["spa", world.model, "--mask", mask_file, "--data", world.task, *SPA]
    ran = cli(*start, *lora, "-o", out)
    assert ran.code == 0, ran.err
    assert "rank 4" in ran.out and "Verified" in ran.out
    document = json.loads((out / "safecrit" / "training.json").read_text())
    assert document["adapter"]["r"] == 4 and document["adapter"]["held"] > 0 and len(document["losses"]) == 4
    assert cli("merge", world.model, out / "safecrit" / "adapter", "--mask", mask_file, "-o", again).code == 0
    ours, theirs = load_file(out / "model.safetensors"), load_file(again / "model.safetensors")
    base = load_file(world.model / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in base)
    moved = {name.split(".")[-2] for name in base if not torch.equal(ours[name], base[name])}
    assert moved == {"q_proj", "v_proj", "down_proj"}
    alone = cli(*start, "--lora-r", 4, "-o", tmp_path / "alone")
    assert alone.code == 1 and "--use-peft" in alone.err
    wrong = cli(*start, "--use-peft", "--lora-target-modules", "nowhere", "-o", tmp_path / "wrong")
    assert wrong.code == 1 and "LoRA settings" in wrong.err


def test_example_equals_the_command(cli: Cli, world: World, mask_file: Path, adapter: Path, tmp_path: Path) -> None:
    file = Path(__file__).resolve().parents[2] / "examples" / "peft_merge.py"
    main = runpy.run_path(str(file))["main"]
    main(str(world.model), str(mask_file), str(adapter), str(tmp_path / "ours"))
    assert cli("merge", world.model, adapter, "--mask", mask_file, "-o", tmp_path / "theirs").code == 0
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()

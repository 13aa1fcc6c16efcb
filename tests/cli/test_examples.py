"""The programs in examples/, run on a small model, and what they promise, checked by `verify`."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, World

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


EXAMPLES_AND_NEEDS = [
    ("protect_trainer", "spa", None),
    ("set_loop", "set", None),
    ("sft_set", "set", "trl"),
    ("sft_protect", "spa", "trl"),
    ("dpo_protect", "spa", "trl"),
]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # TRL's own default
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # from PEFT and TRL
@pytest.mark.parametrize(("name", "mode", "needs"), EXAMPLES_AND_NEEDS)
def test_examples_keep_their_promise(
    cli: Cli, world: World, mask_file: Path, tmp_path: Path, name: str, mode: str, needs: str | None
) -> None:
    if needs:
        pytest.importorskip(needs, reason=f"{needs} is not installed: pip install 'safecrit[{needs}]'")
    data = world.refusals
    if name.startswith("dpo"):
        data = tmp_path / "preferences.jsonl"
        rows = [{"prompt": f"Tell me {n}", "chosen": "I cannot help with that.", "rejected": "First"} for n in range(6)]
        data.write_text("\n".join(map(json.dumps, rows)))
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    main(str(world.model), str(mask_file), str(data), str(tmp_path / "out"))
    ran = cli("verify", tmp_path / "out", "--base", world.model, "--mask", mask_file, "--mode", mode, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["moved"] > 0


def test_memory_interface_equals_the_command_line(world: World, mask_file: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import safecrit

    model = AutoModelForCausalLM.from_pretrained(world.model)
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    prompts = world.prompts.read_text().splitlines()[1:]
    scores = safecrit.score(model, tokenizer, judge=world.guard, prompts=prompts, max_new_tokens=12)
    mask = scores.top("1%")
    stored = safecrit.Mask.load(mask_file)
    assert mask.count == stored.count and mask.iou(stored) == 1.0
    assert all(torch.equal(mask.indices[name], stored.indices[name]) for name in stored.indices)
    assert mask.info.fingerprint == "" and scores.random("1%", seed=1).iou(mask) < 0.5

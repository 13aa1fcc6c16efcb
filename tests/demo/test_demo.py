"""The demo end to end with almost no training: its files, its results.json, its reuse of finished stages."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from safecrit.api.demo import run_demo
from safecrit.cli.sink import Sink
from safecrit.demo.settings import DemoSettings
from safecrit.errors import SafecritError
from safecrit.judges.guard import GuardJudge
from safecrit.models import load_model

TINY = {
    "hidden": 32, "intermediate": 48, "layers": 2, "base_steps": 40, "base_lr": 5e-3, "aligned_steps": 2,
    "guard_steps": 2, "guard_hidden": 16, "guard_intermediate": 24, "guard_layers": 1, "score_prompts": 4, "draws": 2,
    "max_new_tokens": 4, "set_steps": 2, "task_steps": 2, "held_out": 6, "set_rows": 4, "task_rows": 4,
    "base_rows": (2, 2, 2, 1),
}  # fmt: skip
NAMES = ("base", "set_top", "set_random", "set_bottom", "aligned", "tuned", "spa_1", "spa_10", "tuned_random_10")
FIELDS = {
    "asr", "asr_low", "asr_high", "utility", "over_refusal", "task_loss", "changed_weights", "total_weights",
    "verified",
}  # fmt: skip


@pytest.mark.parametrize("variant", ["full", "moe"])
def test_demo(variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = dataclasses.replace(getattr(DemoSettings, variant)(3), **TINY)
    if variant == "moe":
        settings = dataclasses.replace(settings, experts=3)
    out = tmp_path / "demo"

    def run() -> dict:
        return run_demo(out, settings=settings, program="safecrit", overwrite=False, sink=Sink(quiet=True))

    results = run()
    for name in NAMES:
        assert set(results[name]) >= FIELDS, name
        assert AutoModelForCausalLM.from_pretrained(out / "models" / name).num_parameters() > 0
    assert results["set_top"]["changed_weights"] <= results["set_top"]["total_weights"] // 100
    assert results["tuned"]["changed_weights"] > results["spa_10"]["changed_weights"] > 0
    assert all(results[name]["verified"] for name in NAMES)
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    pictures = {p.name for p in (out / "figures").glob("*.png")}
    assert {"esi_base.png", "esi_aligned.png", "set.png", "spa.png"} <= pictures
    assert ("esi_base_experts.png" in pictures) == (variant == "moe")
    printed = capsys.readouterr().out
    assert "it is no evidence about your model" in printed and printed.strip().splitlines()[-1].startswith(
        "Next: safecrit "
    )
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert run() == results
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    with pytest.raises(SafecritError, match=r"other settings \(seed: 3 -> 4\)"):
        run_demo(
            out, settings=dataclasses.replace(settings, seed=4), program="s", overwrite=False, sink=Sink(quiet=True)
        )


def test_guard_reads_any_text_with_another_tokenizer(tmp_path: Path) -> None:
    from safecrit.demo.guard import guard_tokenizer, train_guard

    settings = dataclasses.replace(DemoSettings.full(), **TINY)
    tokenizer = guard_tokenizer(settings)
    train_guard(settings, tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    guard = GuardJudge(load_model(tmp_path))
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    verdicts = guard.judge([("日本 <|user|>", "ответ 😀\n\ttabs"), ("x", "\x07 bell"), ("", "a"), ("q", "b")])
    assert {v.label for v in verdicts} <= {"safe", "unsafe"} and len({v.score for v in verdicts}) == 4

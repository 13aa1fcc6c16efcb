"""`--think-end-token`: what a model writes before it is a thought, and no part of what the judge reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from safecrit.api import answering
from safecrit.generation import Answer
from safecrit.judges.conversation import JudgeInput
from safecrit.judges.guard import GuardJudge
from tests import tiny
from tests.cli.conftest import Cli, World, score, scores_of

END = "</think>"


def test_the_judge_reads_what_follows_the_thought(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = world.prompts.read_text().splitlines()[1:]
    answers = [f"First warm {n} </think> nonsense</think>mix the flour {n}." for n in range(4)] + ["no thought at all."]
    file = tmp_path / "answers.jsonl"
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read: set[tuple[str, str]] = set()
    inner = GuardJudge.read

    def seen(self: GuardJudge, prompt: str, answer: str, ids: Sequence[int] | None = None) -> JudgeInput:
        read.add((prompt, answer))
        return inner(self, prompt, answer, ids)

    monkeypatch.setattr(GuardJudge, "read", seen)
    ran = cli(*score(world, tmp_path / "thinks", answers=file, think_end_token=END))
    assert ran.code == 0, ran.err
    judged = [f"mix the flour {n}." for n in range(4)] + ["no thought at all."]
    assert read == set(zip(prompts, judged, strict=True))
    samples = [json.loads(line) for line in (tmp_path / "thinks" / "samples.jsonl").read_text().splitlines()]
    assert [sample["answer"] for sample in samples] == judged
    tokenizer = tiny.tokenizer("byte-level", tiny.CHAT)
    assert [tokenizer.decode(sample["ids"]) for sample in samples] == answers  # the model is given its thought too
    read.clear()
    assert cli(*score(world, tmp_path / "plain", answers=file)).code == 0
    assert {answer for _, answer in read} == set(answers)
    thinks, plain = scores_of(tmp_path / "thinks"), scores_of(tmp_path / "plain")
    assert any(float((thinks[name] - plain[name]).norm() / plain[name].norm()) > 0.1 for name in plain)


def test_answers_cut_inside_a_thought_are_dropped_and_told(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"Tell me story {n}" for n in range(24)]
    (tmp_path / "p.csv").write_text("goal\n" + "\n".join(prompts))
    inner = answering.generate_samples

    def generated(model: Any, tokenizer: Any, *arguments: Any) -> list[list[Answer]]:
        made = inner(model, tokenizer, *arguments)
        made[7] = [Answer(text="", ids=made[7][0].ids, finished=False, start=len(made[7][0].ids))]
        return [made[n] if n == 7 else [Answer(text="warm", ids=(90, 91), finished=True, end=2)] for n in range(24)]

    flags = {"prompts": tmp_path / "p.csv", "think_end_token": END, "draws": 1}
    with monkeypatch.context() as patch:
        patch.setattr(answering, "generate_samples", generated)
        ran = cli(*score(world, tmp_path / "out", **flags))
    assert ran.code == 0, ran.err
    info = json.loads((tmp_path / "out" / "score.json").read_text())
    assert (
        info["prompts"]["dropped"] == [{"row": 7, "reason": "nothing after its thought"}]
        and info["prompts"]["used"] == 23
    )
    assert "warning: 1 answers were cut inside a thought and say nothing: raise --max-new-tokens" in ran.err
    # The model here never ends a thought: nothing is left to score.
    none = cli(*score(world, tmp_path / "none", **flags))
    assert none.code == 1 and "24 of 24 answers had to be dropped (nothing after its thought; " in none.err
    assert "raise --max-new-tokens" in none.err

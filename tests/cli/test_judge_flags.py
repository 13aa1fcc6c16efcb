"""The flags of judge and chat that `score` and `eval` share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safecrit.judges.rubric import RUBRICS
from tests import tiny
from tests.chatserver import NO, YES, Reply, Server
from tests.cli.conftest import Cli, Ran, World, score

TEXT = "{prompt} / {answer}: "
EXTRA = "{% if extra %}{{ extra }}{% endif %}"


def evaluate(cli: Cli, world: World, out: Path, *flags: object, model: Path | None = None) -> Ran:
    return cli(
        "eval", model or world.model, "--prompts", world.prompts, "--max-new-tokens", 8, "--output", out, *flags
    )  # fmt: skip


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


PRESET = ["--judge-format", "qwen3guard"]
ASKED: list[tuple[list[object], dict[str, Any]]] = [
    ([], {"safe_words": ["safe"], "unsafe_words": ["unsafe"], "verdict_prefix": "", "template": None}),
    (PRESET, {"safe_words": ["Safe"], "unsafe_words": ["Unsafe", "Controversial"], "verdict_prefix": "Safety: "}),
    ([*PRESET, "--controversial", "safe"], {"safe_words": ["Safe", "Controversial"], "unsafe_words": ["Unsafe"]}),
    # What equals a default is a wish like any other.
    (
        [*PRESET, "--safe-word", "safe", "--unsafe-word", "unsafe", "--verdict-prefix", ""],
        {"safe_words": ["safe"], "unsafe_words": ["unsafe"], "verdict_prefix": ""},
    ),
    (["--safe-word", "ok", "--safe-word", "fine"], {"safe_words": ["ok", "fine"], "unsafe_words": ["unsafe"]}),
    ([*PRESET, "--judge-template", TEXT], {"template": TEXT, "verdict_prefix": "", "safe_words": ["Safe"]}),
]


@pytest.mark.parametrize(("flags", "expected"), ASKED)
def test_the_judge_is_asked_as_told(
    cli: Cli, world: World, tmp_path: Path, flags: list[object], expected: dict[str, Any]
) -> None:
    ran = evaluate(cli, world, tmp_path / "e", "--judge", world.guard, "--limit", 1, *flags)
    assert ran.code == 0, ran.err
    ran = cli(*score(world, tmp_path / "s", limit=2, draws=1), *flags)
    assert ran.code == 0, ran.err
    for file in (tmp_path / "e" / "results.json", tmp_path / "s" / "score.json"):
        judge = json.loads(file.read_text())["judge"]
        assert {key: judge[key] for key in expected} == expected


def test_words_that_contradict_one_another_make_no_folder(cli: Cli, world: World, tmp_path: Path) -> None:
    words = ["--safe-word", "ok", "--unsafe-word", "ok"]
    for ran in (
        cli(*score(world, tmp_path / "out"), *words),
        evaluate(cli, world, tmp_path / "out", "--judge", world.guard, *words),
    ):
        assert ran.code == 1 and "verdict word 'ok' is given twice" in ran.err
        assert not (tmp_path / "out").exists()


def test_eval_asks_an_endpoint(cli: Cli, world: World, tmp_path: Path, server: Server) -> None:
    asked: dict[str, bool] = {}

    def answer(question: str, _call: int) -> Reply:
        asked[question] = len(question) % 2 == 0
        return YES if asked[question] else NO

    server.answer = answer
    ran = evaluate(cli, world, tmp_path / "e", "--judge", "openai:m", "--judge-base-url", server.url, "--json")
    assert ran.code == 0, ran.err
    results = json.loads(ran.out)
    assert results["judge"]["id"] == "openai:m" and results["judge"]["host"] in server.url
    found = samples(tmp_path / "e")
    questions = [RUBRICS["yes-no"].question(sample["prompt"], sample["answer"]) for sample in found]
    assert sorted(questions) == sorted(asked)
    assert [sample["verdict"] for sample in found] == ["unsafe" if asked[one] else "safe" for one in questions]
    assert results["models"]["model"]["asr"]["count"] == sum(asked.values())
    none = evaluate(cli, world, tmp_path / "none", "--judge", "openai:m")
    assert none.code == 1 and "--judge-base-url" in none.err and not (tmp_path / "none").exists()


def test_eval_reads_labels_made_elsewhere(cli: Cli, world: World, tmp_path: Path) -> None:
    assert evaluate(cli, world, tmp_path / "first").code == 0
    rows = [
        {"prompt": sample["prompt"], "answer": sample["answer"], "verdict": "unsafe" if n % 2 else "safe"}
        for n, sample in enumerate(samples(tmp_path / "first"))
    ]
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = evaluate(cli, world, tmp_path / "labelled", "--judge", f"labels:{file}", "--json")
    assert ran.code == 0, ran.err
    results = json.loads(ran.out)
    assert results["judge"]["id"] == "labels:labels.jsonl"
    assert (results["models"]["model"]["asr"]["count"], results["models"]["model"]["asr"]["n"]) == (2, 5)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    lacking = evaluate(cli, world, tmp_path / "lacking", "--judge", f"labels:{file}")
    assert lacking.code == 1 and "no verdict on 1 of 5 answers" in lacking.err


def test_the_model_is_asked_the_same_by_both(cli: Cli, world: World, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer("byte-level", tiny.CHAT + EXTRA)
    tiny.loaded(tiny.llama(len(tokenizer), hidden=32), tokenizer, tmp_path / "model")
    answers = {}
    for name, flags in (
        ("plain", []),
        ("system", ["--system-prompt", "Tell me a story."]),
        ("kwargs", ["--chat-template-kwargs", '{"extra": "First "}']),
    ):
        ran = evaluate(cli, world, tmp_path / name, *flags, model=tmp_path / "model")
        assert ran.code == 0, ran.err
        answers[name] = [sample["answer"] for sample in samples(tmp_path / name)]
        asked = {"model": tmp_path / "model", "max_new_tokens": 8, "draws": 1}
        assert cli(*score(world, tmp_path / f"{name}-scores", **asked), *flags).code == 0
        assert answers[name] == [sample["answer"] for sample in samples(tmp_path / f"{name}-scores")]
    assert answers["plain"] != answers["system"] != answers["kwargs"] != answers["plain"]


def test_eval_judges_what_follows_a_thought(cli: Cli, world: World, tmp_path: Path) -> None:
    assert cli(*score(world, tmp_path / "plain", max_new_tokens=8, draws=1)).code == 0
    tokenizer = tiny.tokenizer("byte-level", tiny.CHAT)
    plain = samples(tmp_path / "plain")
    pieces = [tokenizer.decode(token) for token in plain[0]["ids"]]
    end = next(piece for piece in pieces if piece.isascii() and piece.isalnum())
    last = max(n for n, piece in enumerate(pieces) if end in piece)
    ran = evaluate(cli, world, tmp_path / "thinks", "--think-end-token", end)
    assert ran.code == 3 and "empty answers" in ran.err  # those that never ended their thought say nothing
    thinks = samples(tmp_path / "thinks")
    assert thinks[0]["answer"] == tokenizer.decode(plain[0]["ids"][last + 1 :]) != plain[0]["answer"]
    for sample, whole in zip(thinks, plain, strict=True):
        assert end in whole["answer"] or (sample["answer"], sample["verdict"]) == ("", "error")

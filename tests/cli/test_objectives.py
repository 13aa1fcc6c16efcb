"""What `score` differentiates, from command line to score folder, against plain autograd and sums by hand."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from safecrit.api.judging import JudgeChoice, load_judge
from tests import tiny
from tests.chatserver import NO, YES, Reply, Server
from tests.cli.conftest import Cli, World, assert_same_output, interrupted, score, scores_of

EOS = 2
REFUSALS = ["I'm sorry, but I can't help with that.", "I cannot help you with that request."]
HELP = ["First warm the oven.", "Mix flour and water, then tell a story.", "Sure, it is warm."]
RESUMABLE = {"batch_size": 2, "save_every": 2}

Row = tuple[list[int], list[int], float]  # the prompt's tokens, the answer's, its weight


def prompts_of(world: World) -> list[str]:
    return world.prompts.read_text().splitlines()[1:]


def tokens(text: str) -> list[int]:
    return list(tiny.tokenizer("byte-level", tiny.CHAT)(text, add_special_tokens=False)["input_ids"])


def asked(prompt: str) -> list[int]:
    return tokens(f"<s>[user] {prompt}\n[assistant] ")


def assert_likelihood(scores: dict[str, torch.Tensor], model: Path, rows: list[Row], prompts: int) -> None:
    """The scores are sigma times the gradient of the sum of weight x log p(answer | prompt), over `prompts`."""
    net = AutoModelForCausalLM.from_pretrained(model).eval()
    total = torch.zeros(())
    for prompt, answer, weight in rows:
        log_p = torch.log_softmax(net(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1], dim=-1)
        total = total + weight / prompts * log_p[torch.arange(len(answer)), torch.tensor(answer)].sum()
    total.backward()
    parameters = dict(net.named_parameters())
    assert {"lm_head.weight", "model.layers.1.mlp.down_proj.weight"} < scores.keys() < parameters.keys()
    for name, found in scores.items():
        expected = parameters[name].grad * parameters[name].detach().std()
        assert float((found - expected).norm() / expected.norm()) <= 1e-5, name


def write_answers(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def leave_one_out(values: list[float | None]) -> list[float]:
    known = [value for value in values if value is not None]
    return [
        0.0 if value is None else (value - (sum(known) - value) / (len(known) - 1)) / len(known) for value in values
    ]


def test_refusal_nll(cli: Cli, world: World, tmp_path: Path) -> None:
    ran = cli(*score(world, tmp_path / "a", judge=None, objective="refusal-nll", refusal="No, sorry.", batch_size=2))
    assert ran.code == 0, ran.err
    rows: list[Row] = [(asked(prompt), [*tokens("No, sorry."), EOS], 1.0) for prompt in prompts_of(world)]
    assert_likelihood(scores_of(tmp_path / "a"), world.model, rows, 5)
    assert ran.out.splitlines()[1].startswith("Likelihood: value -")


def test_answer_nll(cli: Cli, world: World, tmp_path: Path) -> None:
    answers = [*HELP, *REFUSALS]
    pairs = list(zip(prompts_of(world), answers, strict=True))
    data = write_answers(tmp_path / "d.jsonl", [{"prompt": p, "completion": a} for p, a in pairs])
    ran = cli(*score(world, tmp_path / "a", judge=None, prompts=None, objective="answer-nll", data=data, batch_size=2))
    assert ran.code == 0, ran.err
    rows: list[Row] = [(asked(prompt), [*tokens(answer), EOS], 1.0) for prompt, answer in pairs]
    assert_likelihood(scores_of(tmp_path / "a"), world.model, rows, 5)


def test_score_function_with_phrases(cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(world)
    given = {prompt: [REFUSALS[n % 2], HELP[n % 3], HELP[(n + 1) % 3]] for n, prompt in enumerate(prompts)}
    given[prompts[4]] = HELP  # nothing to learn: the judge says the same of all of them
    rows = [{"prompt": prompt, "answer": text} for prompt, own in given.items() for text in own]
    flags = {"judge": "refusal", "estimator": "score-function", **RESUMABLE}
    flags["answers"] = write_answers(tmp_path / "answers.jsonl", rows)
    ran = cli(*score(world, tmp_path / "whole", **flags))
    assert ran.code == 0, ran.err
    expected: list[Row] = []
    for prompt, own in given.items():
        weights = leave_one_out([float(text in REFUSALS) for text in own])
        expected += [(asked(prompt), [*tokens(text), EOS], w) for text, w in zip(own, weights, strict=True)]
    assert_likelihood(scores_of(tmp_path / "whole"), world.model, expected, 5)
    info = json.loads((tmp_path / "whole" / "score.json").read_text())
    assert info["judge"] == {"id": "refusal", "kind": "phrases"} and info["judged"]["safe"] == 4
    assert "Judge: 4 of 15 answers safe" in ran.out
    values = [json.loads(line)["value"] for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert values == [float(row["answer"] in REFUSALS) for row in rows]
    with interrupted(monkeypatch, at=4):
        assert cli(*score(world, tmp_path / "cut", **flags)).code == 130
    assert cli(*score(world, tmp_path / "cut", **flags)).code == 0
    assert_same_output(tmp_path / "whole", tmp_path / "cut")


def test_score_function_with_labels_made_elsewhere(cli: Cli, world: World, tmp_path: Path) -> None:
    rows = [
        {"prompt": prompt, "answer": text, "score": (3 * n + 7 * k) % 5 - 2.5, "verdict": "safe"}
        for n, prompt in enumerate(prompts_of(world))
        for k, text in enumerate([*HELP, *REFUSALS])
    ]
    rows[7]["verdict"] = "error"
    file = write_answers(tmp_path / "labels.jsonl", rows)
    flags = {"judge": f"labels:{file}", "answers": file, "estimator": "score-function", "batch_size": 4}
    ran = cli(*score(world, tmp_path / "a", **flags))
    assert ran.code == 0, ran.err
    values = [None if row["verdict"] == "error" else row["score"] for row in rows]
    weights = [weight for start in range(0, 25, 5) for weight in leave_one_out(values[start : start + 5])]
    expected = [(asked(row["prompt"]), [*tokens(row["answer"]), EOS], w) for row, w in zip(rows, weights, strict=True)]
    assert_likelihood(scores_of(tmp_path / "a"), world.model, expected, 5)
    rows[8]["verdict"] = "error"  # 2 of 25 are more than 5 %
    write_answers(file, rows)
    failed = cli(*score(world, tmp_path / "b", **flags))
    assert failed.code == 1 and "the judge could not judge 2 of 25 answers" in failed.err


def test_score_function_samples_its_own_answers(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"estimator": "score-function", "samples": 3, "max_new_tokens": 9, "seed": 4, **RESUMABLE}
    ran = cli(*score(world, tmp_path / "whole", **flags))
    assert ran.code == 0, ran.err
    samples = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 15 and len({sample["answer"] for sample in samples}) > 10
    judge = load_judge(JudgeChoice(name=str(world.guard)))
    verdicts = judge.judge([(sample["prompt"], sample["answer"]) for sample in samples])
    assert [sample["value"] for sample in samples] == pytest.approx([verdict.score for verdict in verdicts], abs=1e-4)
    weights = [w for n in range(0, 15, 3) for w in leave_one_out([sample["value"] for sample in samples[n : n + 3]])]
    expected = [
        (asked(sample["prompt"]), [*sample["ids"], *([EOS] if sample["finished"] else [])], weight)
        for sample, weight in zip(samples, weights, strict=True)
    ]
    assert_likelihood(scores_of(tmp_path / "whole"), world.model, expected, 5)
    with interrupted(monkeypatch, at=4):
        assert cli(*score(world, tmp_path / "cut", **flags)).code == 130
    assert cli(*score(world, tmp_path / "cut", **flags)).code == 0
    assert_same_output(tmp_path / "whole", tmp_path / "cut")


def test_score_function_with_an_endpoint_asks_it_once(
    cli: Cli, world: World, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(question: str, _call: int) -> Reply:
        return YES if sum(question.encode()) % 2 else NO

    server.answer = answer
    flags = {"estimator": "score-function", "samples": 4, "judge": "openai:m", "judge_base_url": server.url}
    flags |= {"max_new_tokens": 9, **RESUMABLE}
    with interrupted(monkeypatch, at=2):
        ran = cli(*score(world, tmp_path / "cut", **flags))
    assert ran.code == 130 and len(server.calls) == 20
    ran = cli(*score(world, tmp_path / "cut", **flags))
    assert ran.code == 0 and len(server.calls) == 20, ran.err
    info = json.loads((tmp_path / "cut" / "score.json").read_text())
    assert info["judge"]["id"] == "openai:m" and info["judged"]["count"] == 20
    server.answer = lambda _question, _call: NO
    same = cli(*score(world, tmp_path / "same", **flags))
    assert same.code == 1 and "the judge says the same of every sampled answer" in same.err


def test_magnitude(cli: Cli, world: World, tmp_path: Path) -> None:
    assert cli(*score(world, tmp_path / "a", method="magnitude", judge=None, prompts=None)).code == 0
    scores, stored = scores_of(tmp_path / "a"), load_file(world.model / "model.safetensors")
    assert scores.keys() == {name for name in stored if "norm" not in name and "embed" not in name}
    assert all(torch.equal(found, stored[name].abs()) for name, found in scores.items())
    assert cli(*score(world, tmp_path / "b", method="magnitude", judge=None)).code == 0, "it reads no prompts"
    assert all(torch.equal(found, scores[name]) for name, found in scores_of(tmp_path / "b").items())


def test_wanda(cli: Cli, world: World, tmp_path: Path) -> None:
    flags = {"method": "wanda", "judge": None, "batch_size": 2}
    rows = [{"prompt": p, "answer": a} for p, a in zip(prompts_of(world), [*HELP, *REFUSALS], strict=True)]
    ran = cli(*score(world, tmp_path / "a", answers=write_answers(tmp_path / "answers.jsonl", rows), **flags))
    assert ran.code == 0, ran.err
    net = AutoModelForCausalLM.from_pretrained(world.model).eval()
    squares: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):

            def add(_: nn.Module, args: Any, name: str = name) -> None:
                squares[f"{name}.weight"] = squares[f"{name}.weight"] + args[0][0].double().square().sum(0)

            module.register_forward_pre_hook(add)
    with torch.no_grad():
        for row in rows:
            net(torch.tensor([asked(row["prompt"]) + tokens(row["answer"])]))
    scores, stored = scores_of(tmp_path / "a"), load_file(world.model / "model.safetensors")
    assert scores.keys() == squares.keys()
    for name, found in scores.items():
        torch.testing.assert_close(found, (stored[name].abs() * squares[name].sqrt()).float(), rtol=1e-5, atol=1e-7)

"""eval beyond one model and one judge: answers from elsewhere, samples, attacks, second judges, warnings, resuming."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from scipy.stats import binomtest

import safecrit.api.evaluate as stage
from safecrit.api.asking import most_nats
from safecrit.models import load_model
from safecrit.perplexity import text_perplexity
from safecrit.statistics import cohens_kappa, mean_difference
from tests.cli.conftest import Cli, World

SHORT = ["--max-new-tokens", 8, "-q"]


def read(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    results = json.loads((folder / "results.json").read_text())
    return results, pd.read_json(folder / "samples.jsonl", lines=True, dtype=False)


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    rows = [
        {"prompt": "p1", "response": "I cannot help with that.", "category": "a"},
        {"prompt": "p2", "response": "Sure, first do this.", "category": "a"},
        {"prompt": "p3", "response": "Sure, here you go.", "category": "b"},
    ]
    file = tmp_path / "elsewhere.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_answers_from_elsewhere_are_judged_without_a_model(
    cli: Cli, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    ran = cli("eval", "--answers", answered, "-o", tmp_path / "r", "-q")
    assert ran.code == 0, ran.err
    results, rows = read(tmp_path / "r")
    assert (results["models"]["elsewhere"]["asr"]["count"], results["models"]["elsewhere"]["asr"]["n"]) == (2, 3)
    assert results["models"]["elsewhere"]["asr_by_category"]["b"]["rate"] == 1.0
    assert list(rows.answer) == ["I cannot help with that.", "Sure, first do this.", "Sure, here you go."]
    assert {"prompt", "answer", "verdict", "refused", "incoherent", "judge_raw"} <= set(rows.columns)


def test_refusals_of_another_language_are_told_by_a_file_of_patterns(cli: Cli, answered: Path, tmp_path: Path) -> None:
    file = tmp_path / "patterns.txt"
    file.write_text("# what the second answer says\nfirst do this\n")
    ran = cli("eval", "--answers", answered, "--refusal-patterns", file, "-o", tmp_path / "r", "-q")
    assert ran.code == 0, ran.err
    results, rows = read(tmp_path / "r")
    assert list(rows.refused) == [True, True, False]
    assert results["judge"]["patterns"] == results["settings"]["refusal_patterns"] == ["first do this"]
    file.write_text("fine\n(broken\n")
    ran = cli("eval", "--answers", answered, "--refusal-patterns", file, "-o", tmp_path / "b", "-q")
    assert ran.code == 1 and "patterns.txt, line 2" in ran.err and not (tmp_path / "b").exists()


def test_answers_are_looked_up_by_prompt_and_compared_between_files(cli: Cli, answered: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("goal\np3\np1\n")
    other = tmp_path / "other.csv"
    other.write_text("prompt,completion\np1,I cannot help with that.\np3,I cannot help with that.\n")
    ran = cli(
        "eval", "--answers", answered, "--answers", other, "--baseline", answered, "--prompts", prompts,
        "-o", tmp_path / "r", "-q",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    results, rows = read(tmp_path / "r")
    assert list(rows[rows.model == "elsewhere"].answer) == ["Sure, here you go.", "I cannot help with that."]
    (asr,) = [row for row in results["paired"] if row["figure"] == "asr"]
    assert (asr["model"], asr["difference"], asr["n"]) == ("other", -0.5, 2)
    prompts.write_text("goal\np3\np9\n")
    missing = cli("eval", "--answers", answered, "--prompts", prompts, "-o", tmp_path / "m")
    assert missing.code == 1 and "no answer to 1 of 2 harmful prompts" in missing.err


def test_several_answers_a_prompt_give_asr_at_n(cli: Cli, world: World, tmp_path: Path) -> None:
    command = ["eval", world.model, "--baseline", world.guard, "--prompts", world.prompts, "--judge", world.guard]
    ran = cli(*command, "--samples", 4, "--benign", world.task, *SHORT, "-o", tmp_path / "r")
    assert ran.code == 0, ran.err
    results, rows = read(tmp_path / "r")
    harmful = rows[(rows.model == "model") & (rows.set == "harmful")]
    assert len(harmful) == 20 and harmful.answer.nunique() > 5
    assert set(rows[rows.set == "benign"]["sample"]) == {0}
    any_unsafe = harmful.groupby("row").verdict.apply(lambda own: (own == "unsafe").any())
    figure = results["models"]["model"]["asr_at_4"]
    interval = binomtest(int(any_unsafe.sum()), 5).proportion_ci(method="wilson")
    assert (figure["count"], figure["n"], figure["low"]) == (any_unsafe.sum(), 5, interval.low)
    first = harmful[harmful["sample"] == 0]
    assert results["models"]["model"]["asr"]["count"] == (first.verdict == "unsafe").sum()
    assert "asr_at_4" in {row["figure"] for row in results["paired"]}


def test_prefill_begins_the_answers_to_harmful_prompts_alone(cli: Cli, world: World, tmp_path: Path) -> None:
    command = ["eval", world.model, "--prompts", world.prompts, "--benign", world.prompts, *SHORT]
    assert cli(*command, "--prefill", "First warm", "-o", tmp_path / "a").code == 0
    assert cli(*command, "-o", tmp_path / "b").code == 0
    rows, plain = read(tmp_path / "a")[1], read(tmp_path / "b")[1]
    assert rows[rows.set == "harmful"].answer.str.startswith("First warm").all()
    assert list(rows[rows.set == "benign"].answer) == list(plain[plain.set == "benign"].answer)
    assert not plain.answer.str.startswith("First warm").any()


def test_a_second_judge_agreement_and_kappa(cli: Cli, world: World, answered: Path, tmp_path: Path) -> None:
    ran = cli("eval", "--answers", answered, "--judge", "refusal", "--judge", world.guard, "-o", tmp_path / "r")
    assert ran.code == 0 and "Cohen's kappa" in ran.out
    results, rows = read(tmp_path / "r")
    (name,) = results["models"]["elsewhere"]["judges"]
    seen = results["models"]["elsewhere"]["judges"][name]
    first, second = rows.verdict == "unsafe", rows.others.map(lambda o: o[name]) == "unsafe"
    assert seen["agreement"]["count"] == (first == second).sum() and seen["asr"]["count"] == second.sum()
    chance = first.mean() * second.mean() + (1 - first.mean()) * (1 - second.mean())
    expected = ((first == second).mean() - chance) / (1 - chance) if chance < 1 else None
    assert seen["kappa"] == (pytest.approx(expected) if expected is not None else None)
    assert results["settings"]["other_judges"][0]["kind"] == "guard"
    twice = cli("eval", "--answers", answered, "--judge", "refusal", "--judge", "refusal", "-o", tmp_path / "t")
    assert twice.code == 1 and "given twice" in twice.err


def test_kappa_by_hand() -> None:
    first = [True] * 20 + [True] * 5 + [False] * 10 + [False] * 15
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert cohens_kappa(first, second) == pytest.approx(0.4)  # 0.7 agreed, 0.5 by chance
    assert cohens_kappa([True, False], [False, True]) == -1.0
    assert cohens_kappa([True], [True]) is None and cohens_kappa([], []) is None


def test_a_mean_difference_of_equal_numbers_has_no_width() -> None:
    assert mean_difference([2.0, 3.0], [1.0, 2.0]) == {"n": 2, "difference": 1.0, "low": 1.0, "high": 1.0}
    assert mean_difference([2.0], [1.0])["low"] is None and mean_difference([], [])["difference"] is None


def test_messages_are_asked_as_they_stand(cli: Cli, world: World, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Tell me a story"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
    ]
    file = tmp_path / "m.jsonl"
    file.write_text(json.dumps({"messages": turns}))
    assert cli("eval", world.model, "--prompts", file, *SHORT, "-o", tmp_path / "r").code == 0
    assert read(tmp_path / "r")[1].prompt[0] == "Why?"


def test_prompts_and_judges_of_the_scoring_are_warned_about(
    cli: Cli, world: World, mask_file: Path, tmp_path: Path
) -> None:
    for number, used in enumerate((mask_file, world.folder / "scores")):
        ran = cli(
            "eval", world.model, "--prompts", world.prompts, "--judge", world.guard, "--mask", used,
            "--limit", 3, *SHORT, "-o", tmp_path / str(number),
        )  # fmt: skip
        assert ran.code == 0, ran.err
        assert "3 of 3 harmful prompts were used for scoring" in ran.err and "judge" in ran.err.split("warning")[2]
        assert len(read(tmp_path / str(number))[0]["warnings"]) == 2
    made = cli(
        "set", world.model, "--mask", mask_file, "--data", world.refusals, "--steps", 1, "--lr", "1e-3",
        "-o", tmp_path / "set", "-q",
    )  # fmt: skip
    assert made.code == 0, made.err
    ran = cli("eval", tmp_path / "set", "--prompts", world.prompts, *SHORT, "-o", tmp_path / "s")
    assert "5 of 5 harmful prompts were used for scoring (the mask of set)" in ran.err
    fresh = tmp_path / "fresh.csv"
    fresh.write_text("goal\nnever seen\n")
    assert "warning" not in cli("eval", tmp_path / "set", "--prompts", fresh, *SHORT, "-o", tmp_path / "f").err


def test_what_the_baseline_finds_no_language_is_incoherent(cli: Cli, world: World, tmp_path: Path) -> None:
    ran = cli("eval", world.guard, "--baseline", world.model, "--prompts", world.prompts, *SHORT, "-o", tmp_path / "r")
    assert ran.code == 0, ran.err
    results, rows = read(tmp_path / "r")
    limit = most_nats(load_model(world.model))
    strange = rows[rows.model == "guard"]
    assert strange.nats.notna().any()
    assert (strange[strange.nats > limit].incoherent).all() and (strange.nats > limit).any()
    own = results["models"]["guard"]
    coherent = strange[~strange.incoherent & (strange.verdict != "error")]
    assert own["asr_coherent"]["n"] == len(coherent)


def test_perplexity_is_that_of_the_text(cli: Cli, world: World, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("First warm the oven, then mix flour and water. " * 30)
    ran = cli("eval", world.model, "--text", text, "-o", tmp_path / "r", "-q")
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "r" / "results.json").read_text())["models"]["model"]["text"]
    loaded = load_model(world.model)
    ids = loaded.tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    nll, n, size = 0.0, 0, 255
    with torch.no_grad():
        for start in range(0, len(ids), size):
            window = torch.tensor([[loaded.tokenizer.bos_token_id, *ids[start : start + size]]])
            logs = loaded.model(input_ids=window).logits[0, :-1].log_softmax(-1)
            nll -= float(logs.gather(1, window[0, 1:, None]).sum())
            n += window.shape[1] - 1
    assert found["tokens"] == n == len(ids)
    assert found["perplexity"] == pytest.approx(math.exp(nll / n), rel=1e-4)
    assert found == text_perplexity(loaded, text)
    assert cli("eval", world.model, "--text", tmp_path / "none", "-o", tmp_path / "x").code == 1


def test_a_killed_run_asks_no_model_twice_and_equal_runs_give_equal_files(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["eval", world.model, world.guard, "--prompts", world.prompts, "--samples", 2, *SHORT, "-o"]
    asked: list[str] = []
    real = stage.ask_all

    def second_fails(name: str, *rest: Any) -> Any:
        if asked:
            raise KeyboardInterrupt
        asked.append(name)
        return real(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "ask_all", second_fails)
        assert cli(*command, tmp_path / "a").code == 130
    monkeypatch.setattr(stage, "ask_all", lambda name, *rest: (asked.append(name), real(name, *rest))[1])
    assert cli(*command, tmp_path / "a").code == 0
    assert asked == ["model", "guard"]
    assert cli(*command, tmp_path / "b").code == 0
    for name in ("results.json", "samples.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.yaml", "results.json", "samples.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give models to ask, or --answers"),
        (["m", "--answers", "x.csv"], "one of the two"),
        (["--answers", "x.csv", "--samples", 2], "need a model"),
        (["m"], "nothing to evaluate"),
    ],
)
def test_mistakes_are_named(cli: Cli, arguments: list[object], message: str, tmp_path: Path) -> None:
    ran = cli("eval", *arguments, "-o", tmp_path / "r")
    assert ran.code == 1 and message in ran.err and not (tmp_path / "r").exists()

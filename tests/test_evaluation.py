from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy.stats import binomtest

from safecrit.errors import CheckFailed, MismatchError, SafecritError
from safecrit.evaluation import EvalPrompts, evaluate_model, judged_by
from safecrit.judges import Verdict
from safecrit.judges.refusal import RefusalJudge
from safecrit.prompts import Prompt
from safecrit.results import (
    EvalSettings,
    Evaluation,
    ModelResult,
    check,
    compare,
    judges_agree,
    results_json,
    summarise,
    write_evaluation,
)

REFUSAL = "I'm sorry, but I can't help with that."
HELP = "Sure. First take the one, then take the other, and you are done."


class Guard:
    """Labels by a mark in the answer; like a guard model it cannot tell refusals."""

    name = "guard"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        self.asked += pairs
        return [
            Verdict("error", None, "no verdict word")
            if "FAIL" in answer
            else Verdict("unsafe" if "Sure" in answer else "safe", None, "said so", 0.5)
            for _, answer in pairs
        ]


@dataclass
class Generated:
    text: str


def prompts(
    texts: Sequence[str], answers: Sequence[str | None] | None = None, category: str | None = None
) -> list[Prompt]:
    return [
        Prompt(({"role": "user", "content": text},), row, category, answers[row] if answers else None)
        for row, text in enumerate(texts)
    ]


SETS = EvalPrompts(
    harmful=prompts([f"bad {i}" for i in range(60)]),
    benign=prompts([f"fine {i}" for i in range(40)]),
    task=prompts([f"sum {i}" for i in range(30)], [f"#### {i}" for i in range(30)]),
)


def model(seed: int, name: str | None = None, failures: int = 1, settings: EvalSettings | None = None) -> ModelResult:
    rng = random.Random(seed)
    harmful = [rng.choice([REFUSAL, HELP, "Sure sure " * 30]) for _ in SETS.harmful]
    harmful[:failures] = ["FAIL"] * failures
    benign = [rng.choice([REFUSAL, HELP, HELP]) for _ in SETS.benign]
    task = [f"It is {i + rng.choice([0, 0, 1])}" for i in range(30)]
    answers = {"harmful": harmful, "benign": benign, "task": task}
    return evaluate_model(name or f"model-{seed}", SETS, answers, Guard(), RefusalJudge(), settings)


def evaluation(**settings: Any) -> Evaluation:
    chosen = EvalSettings(**settings)
    models = [model(seed, settings=chosen) for seed in range(3)]
    return Evaluation(models=models, settings=chosen, judge={"name": "guard"}, baseline="model-0", extra={"seed": 0})


def newcombe(own: pd.Series, other: pd.Series) -> tuple[float, float]:
    """Newcombe's method 10 for a paired difference of shares, from scipy's Wilson intervals."""
    n, a, b, c, d = len(own), *(int((x & y).sum()) for x in (own, ~own) for y in (other, ~other))
    one, two = (binomtest(int(x.sum()), n).proportion_ci(method="wilson") for x in (own, other))
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    cross = a * d - b * c
    phi = (max(cross - n / 2, 0) if cross > 0 else cross) / margins**0.5 if margins else 0.0
    p, q = own.mean(), other.mean()
    down = (p - one.low) ** 2 - 2 * phi * (p - one.low) * (two.high - q) + (two.high - q) ** 2
    up = (one.high - p) ** 2 - 2 * phi * (one.high - p) * (q - two.low) + (q - two.low) ** 2
    return p - q - down**0.5, p - q + up**0.5


def test_every_number_follows_from_the_samples(tmp_path: Path) -> None:
    harmful_prompts = [replace(p, category="ab"[p.row % 2]) for p in SETS.harmful]
    made = evaluation()
    models = [judged_by(model, harmful_prompts, RefusalJudge(), made.settings) for model in made.models]
    by_category = [replace(s, category="ab"[s.row % 2]) for model in models for s in model.samples]
    models = [
        summarise(model.name, [s for s in by_category if s.model == model.name], made.settings) for model in models
    ]
    write_evaluation(tmp_path, replace(made, models=models))
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    rows = pd.read_json(tmp_path / "samples.jsonl", lines=True, dtype=False)
    assert len(rows) == 3 * 130

    def expect(rate: dict[str, Any], outcomes: pd.Series) -> None:
        count, n = int(outcomes.sum()), len(outcomes)
        interval = binomtest(count, n).proportion_ci(method="wilson")
        assert (rate["count"], rate["n"], rate["rate"]) == (count, n, count / n)
        assert (rate["low"], rate["high"]) == (interval.low, interval.high)
        assert rate["denominator"]

    outcomes: dict[tuple[str, str], pd.Series] = {}
    for name, figures in results["models"].items():
        own = rows[rows.model == name]
        harmful, benign, task = (own[own.set == part].set_index("row") for part in ("harmful", "benign", "task"))
        judged = harmful[harmful.verdict != "error"]
        outcomes[name, "asr"] = judged.verdict == "unsafe"
        outcomes[name, "refusal"] = harmful.refused.dropna().astype(bool)
        outcomes[name, "over_refusal"] = benign.refused.dropna().astype(bool)
        outcomes[name, "utility"] = task.correct.astype(bool)
        for figure in ("asr", "refusal", "over_refusal", "utility"):
            expect(figures.pop(figure), outcomes[name, figure])
        expect(figures.pop("asr_coherent"), judged[~judged.incoherent.astype(bool)].verdict == "unsafe")
        expect(figures.pop("incoherent"), own.incoherent.astype(bool))
        failures = figures.pop("judge_failures")
        expect(failures.pop("harmful"), harmful.verdict == "error")
        expect(failures.pop("benign"), benign.verdict == "error")
        expect(failures.pop("harmful, refusal"), harmful.others.map(lambda said: said["refusal"] == "error"))
        categories = figures.pop("asr_by_category")
        for category, found in judged.groupby("category"):
            expect(categories.pop(category), found.verdict == "unsafe")
        second = figures.pop("judges").pop("refusal")
        said, both = harmful.others.map(lambda o: o["refusal"]), harmful.verdict != "error"
        expect(second["asr"], said == "unsafe")
        first, other = judged.verdict == "unsafe", said[both] == "unsafe"
        expect(second["agreement"], first == other)
        chance = first.mean() * other.mean() + (1 - first.mean()) * (1 - other.mean())
        assert second["kappa"] == pytest.approx(((first == other).mean() - chance) / (1 - chance))
        assert (failures, categories, figures) == ({}, {}, {})

    assert [(row["model"], row["figure"]) for row in results["paired"]] == [
        (name, figure) for name in ("model-1", "model-2") for figure in ("asr", "refusal", "over_refusal", "utility")
    ]
    for row in results["paired"]:
        own, other = outcomes[row["model"], row["figure"]].align(outcomes["model-0", row["figure"]], join="inner")
        only, baseline_only = int((own & ~other).sum()), int((~own & other).sum())
        assert (row["model_only"], row["baseline_only"], row["n"]) == (only, baseline_only, len(own))
        assert (row["both"], row["neither"]) == (int((own & other).sum()), int((~own & ~other).sum()))
        assert row["difference"] == pytest.approx(own.mean() - other.mean())
        assert (row["low"], row["high"]) == pytest.approx(newcombe(own, other), abs=1e-12)
        assert row["p"] == (binomtest(only, only + baseline_only).pvalue if only + baseline_only else 1.0)
    assert results["prompts"]["harmful"] == {"count": 60, "hashes": [prompt.hash for prompt in SETS.harmful]}
    assert results["settings"]["seed"] == 0


def test_results_hold_no_prompt_and_no_answer(tmp_path: Path) -> None:
    write_evaluation(tmp_path, evaluation())
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert "bad 1" not in text and "Sure" not in text and "sorry" not in text
    with pytest.raises(CheckFailed) as caught:
        check(evaluation(max_asr=0.0, max_failures=0.0))
    assert "bad" not in str(caught.value) and "Sure" not in str(caught.value)


def test_equal_runs_give_equal_files(tmp_path: Path) -> None:
    for run in ("a", "b"):
        write_evaluation(tmp_path / run, evaluation())
    for name in ("results.json", "samples.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["results.json", "samples.jsonl"]


def test_a_judge_that_fails_is_counted_apart_and_never_safe() -> None:
    asked = EvalPrompts(harmful=prompts(["a", "b", "c", "d"]))
    result = evaluate_model("m", asked, {"harmful": [HELP, "FAIL", "no", "FAIL"]}, Guard(), RefusalJudge())
    assert (result.rates["asr"].count, result.rates["asr"].n) == (1, 2)
    assert (result.failures["harmful"].count, result.failures["harmful"].n) == (2, 4)
    assert [sample.verdict for sample in result.samples] == ["unsafe", "error", "safe", "error"]
    whole = Evaluation(models=[result], settings=EvalSettings(), judge={})
    with pytest.raises(CheckFailed, match=r"m: the judge failed on 2 of 4 answers to harmful prompts \(50.0%"):
        check(whole)
    check(replace(whole, settings=EvalSettings(max_failures=0.5)))


def test_only_failures_leave_no_rate_and_still_give_json(tmp_path: Path) -> None:
    result = evaluate_model("m", EvalPrompts(harmful=prompts(["a"])), {"harmful": [""]}, RefusalJudge(), RefusalJudge())
    whole = Evaluation(models=[result], settings=EvalSettings(max_asr=0.5), judge={})
    write_evaluation(tmp_path, whole)
    asr = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["models"]["m"]["asr"]
    assert (asr["rate"], asr["low"], asr["n"]) == (None, None, 0)
    with pytest.raises(CheckFailed, match=r"1 were empty answers.*no ASR could be measured"):
        check(whole)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_asr": 0.74}, r"m: ASR 75.0% \(3 of 4\) is above 74.0%"),
        ({"max_asr": 0.75}, None),
        ({"max_over_refusal": 0.49}, r"over-refusal 50.0% \(1 of 2\) is above 49.0%"),
        ({"max_over_refusal": 0.5}, None),
        ({"max_asr": 0.1, "max_over_refusal": 0.1}, r"ASR .*; m: over-refusal"),
    ],
)
def test_gates(limits: dict[str, float], message: str | None) -> None:
    asked = EvalPrompts(harmful=prompts(list("abcd")), benign=prompts(list("ef")))
    answers = {"harmful": [HELP, HELP, HELP, REFUSAL], "benign": [HELP, REFUSAL]}
    result = evaluate_model("m", asked, answers, RefusalJudge(), RefusalJudge())
    whole = Evaluation(models=[result], settings=EvalSettings(**limits), judge={})
    assert bool(results_json(whole)["problems"]) is (message is not None)
    if message is None:
        check(whole)
    else:
        with pytest.raises(CheckFailed, match=message) as caught:
            check(whole)
        assert caught.value.exit_code == 3
    check(replace(whole, baseline="m"))  # gates bind what is tested, not what it is compared with


def test_benign_answers_go_to_the_refusal_judge_alone() -> None:
    guard = Guard()
    asked = EvalPrompts(benign=prompts(["x", "y", "z"]))
    result = evaluate_model("m", asked, {"benign": [REFUSAL, HELP, ""]}, guard, RefusalJudge())
    assert guard.asked == []
    assert [sample.refused for sample in result.samples] == [True, False, None]
    assert [sample.verdict for sample in result.samples] == [None, None, "error"]
    assert (result.rates["over_refusal"].count, result.rates["over_refusal"].n) == (1, 2)
    assert set(result.rates) == {"over_refusal", "incoherent"}


def test_the_refusal_judge_helps_out_where_the_judge_cannot_tell() -> None:
    asked = EvalPrompts(harmful=prompts(["x", "y"]))
    result = evaluate_model("m", asked, {"harmful": [REFUSAL, HELP]}, Guard(), RefusalJudge())
    assert [(s.verdict, s.refused, s.judge_raw) for s in result.samples] == [
        ("safe", True, "said so"),
        ("unsafe", False, "said so"),
    ]


def test_answers_may_come_from_a_callable_one_set_at_a_time() -> None:
    calls = []

    def answer(asked: Sequence[Prompt]) -> list[Generated]:
        calls.append([prompt.text for prompt in asked])
        return [Generated(prompt.answer or HELP) for prompt in asked]

    asked = EvalPrompts(harmful=prompts(["x"]), task=prompts(["1+1", "1+2"], ["2", "3"]))
    result = evaluate_model("m", asked, answer, RefusalJudge(), RefusalJudge())
    assert calls == [["x"], ["1+1", "1+2"]]
    assert result.rates["utility"].rate == 1.0


def test_utility_takes_a_rule_of_ones_own() -> None:
    asked = EvalPrompts(task=prompts(["x"], ["A cup"]))
    loose = evaluate_model(
        "m", asked, {"task": ["a CUP"]}, Guard(), RefusalJudge(), correct=lambda a, b: a.lower() == b.lower()
    )
    strict = evaluate_model("m", asked, {"task": ["a CUP"]}, Guard(), RefusalJudge())
    assert (loose.rates["utility"].rate, strict.rates["utility"].rate) == (1.0, 0.0)


def test_categories_have_rates_of_their_own() -> None:
    asked = EvalPrompts(harmful=prompts(["a", "b"], category="x") + prompts(["c"], category="y") + prompts(["d"]))
    result = evaluate_model("m", asked, {"harmful": [HELP, REFUSAL, HELP, HELP]}, RefusalJudge(), RefusalJudge())
    assert {name: (rate.count, rate.n) for name, rate in result.by_category.items()} == {"x": (1, 2), "y": (1, 1)}


def test_incoherent_answers_are_marked_and_asr_is_given_without_them() -> None:
    asked = EvalPrompts(harmful=prompts(list("abc")))
    result = evaluate_model("m", asked, {"harmful": ["Sure " * 50, HELP, REFUSAL]}, RefusalJudge(), RefusalJudge())
    assert [sample.incoherent for sample in result.samples] == [True, False, False]
    assert (result.rates["asr"].n, result.rates["asr_coherent"].count, result.rates["asr_coherent"].n) == (3, 1, 2)


def test_odd_characters_survive_the_samples_file(tmp_path: Path) -> None:
    text = 'a\u2028b\ud800 "\\\n\x00\u00e9'
    result = evaluate_model("m", EvalPrompts(harmful=prompts(["p"])), {"harmful": [text]}, Guard(), RefusalJudge())
    write_evaluation(tmp_path, Evaluation(models=[result], settings=EvalSettings(), judge={}))
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["answer"] == text


def test_mistakes_are_named() -> None:
    asked = EvalPrompts(harmful=prompts(["a", "b"]))
    with pytest.raises(SafecritError, match="m: 1 answers to 2 harmful prompts"):
        evaluate_model("m", asked, {"harmful": [HELP]}, Guard(), RefusalJudge())
    with pytest.raises(SafecritError, match="no answers to the harmful prompts"):
        evaluate_model("m", asked, {}, Guard(), RefusalJudge())
    with pytest.raises(SafecritError, match="no prompts to evaluate"):
        evaluate_model("m", EvalPrompts(), {}, Guard(), RefusalJudge())
    with pytest.raises(SafecritError, match="row 2 has no reference answer"):
        evaluate_model("m", EvalPrompts(task=prompts(["a", "b"], ["1", None])), lambda p: [], Guard(), RefusalJudge())
    one = evaluate_model("m", asked, {"harmful": [HELP, HELP]}, Guard(), RefusalJudge())
    with pytest.raises(SafecritError, match="two models are called 'm'"):
        Evaluation(models=[one, one], settings=EvalSettings(), judge={})
    with pytest.raises(SafecritError, match="baseline 'base' is not among the models: m"):
        Evaluation(models=[one], settings=EvalSettings(), judge={}, baseline="base")
    other = evaluate_model(
        "n", EvalPrompts(harmful=prompts(["a", "c"])), {"harmful": [HELP, HELP]}, Guard(), RefusalJudge()
    )
    with pytest.raises(MismatchError, match="n and m were not given the same prompts"):
        Evaluation(models=[one, other], settings=EvalSettings(), judge={})


def test_one_unsafe_answer_of_several_is_a_success_of_the_attack() -> None:
    asked = EvalPrompts(harmful=prompts(list("abcd")))
    given = {"harmful": [[REFUSAL, HELP], [REFUSAL, REFUSAL], [REFUSAL, "FAIL"], [HELP, "FAIL"]]}
    result = evaluate_model("m", asked, given, Guard(), RefusalJudge())
    assert [sample.sample for sample in result.samples] == [0, 1] * 4
    assert (result.rates["asr_at_2"].count, result.rates["asr_at_2"].n) == (2, 3)  # the third is open
    assert (result.rates["asr"].count, result.rates["asr"].n) == (1, 4)
    assert (result.failures["harmful"].count, result.failures["harmful"].n) == (2, 8)
    base = evaluate_model("b", asked, {"harmful": [[REFUSAL, REFUSAL]] * 4}, Guard(), RefusalJudge())
    (row,) = [row for row in compare(result, base) if row["figure"] == "asr_at_2"]
    assert (row["n"], row["model_only"], row["difference"]) == (3, 2, pytest.approx(2 / 3))


def test_a_missing_answer_is_an_error_and_nobody_is_asked() -> None:
    guard = Guard()
    asked = EvalPrompts(harmful=prompts(["a", "b"]), task=prompts(["1", "2"], ["1", "2"]))
    given = {"harmful": [[None], [HELP]], "task": [["1"], [None]]}
    result = evaluate_model("m", asked, given, guard, RefusalJudge())
    assert guard.asked == [("b", HELP)]
    assert (result.rates["asr"].count, result.rates["asr"].n) == (1, 1)
    assert (result.rates["utility"].count, result.rates["utility"].n) == (1, 1)
    assert result.failures["harmful"].count == result.failures["task"].count == 1
    with pytest.raises(CheckFailed, match="1 were never given"):
        check(Evaluation(models=[result], settings=EvalSettings(), judge={}))


def test_further_judges_stand_beside_the_first() -> None:
    asked = EvalPrompts(harmful=prompts(list("abc")))
    result = evaluate_model("m", asked, {"harmful": [HELP, REFUSAL, "FAIL"]}, Guard(), RefusalJudge())
    both = judged_by(result, asked.harmful, RefusalJudge())
    assert [sample.others["refusal"] for sample in both.samples] == ["unsafe", "safe", "unsafe"]
    found = judges_agree(both)["refusal"]
    assert (found["agreement"]["count"], found["agreement"]["n"], found["kappa"]) == (2, 2, 1.0)
    assert (found["asr"]["count"], found["asr"]["n"]) == (2, 3)
    assert both.failures["harmful, refusal"].count == 0 and both.rates == result.rates

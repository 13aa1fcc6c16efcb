from __future__ import annotations

import pytest
import torch

from safecrit.errors import SafecritError
from safecrit.judges.guard import GuardJudge, GuardSettings
from tests import tiny

PAIRS = [("How do I bake?", "First warm the oven"), ("Tell me", "x"), ("a</s>b", "the <s> story"), ("q", "日本 😀")]


def judge(style: str = "metaspace", template: str | None = tiny.TEMPLATE, **settings: str) -> GuardJudge:
    made = tiny.tokenizer(style, template)
    model = tiny.llama(len(made), seed=1).double()
    return GuardJudge(tiny.loaded(model, made), GuardSettings(batch_size=3, **settings))


def direct(guard: GuardJudge, text: str, words: tuple[str, str]) -> float:
    """Log-odds by scoring each whole text alone, one token after the other."""
    totals = []
    for word in words:
        ids = guard.tokenizer(text + word, add_special_tokens=False)["input_ids"]
        log_p = torch.log_softmax(guard.model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
        totals.append(sum(float(log_p[n - 1, ids[n]]) for n in range(1, len(ids))))
    return totals[0] - totals[1]  # what comes before the verdict is common to both and cancels


@pytest.mark.parametrize("style", ["byte-level", "metaspace"])
@pytest.mark.parametrize("words", [("safe", "unsafe"), ("harmless, quite", "no good at all")])
def test_log_odds_equal_whole_texts_scored_alone(style: str, words: tuple[str, str]) -> None:
    guard = judge(style, safe_word=words[0], unsafe_word=words[1])
    for verdict, (prompt, answer) in zip(guard.judge(PAIRS[:2]), PAIRS[:2], strict=True):
        expected = direct(guard, f"<s>[user] {prompt}\n[assistant] {answer}\n[verdict] ", words)
        assert verdict.score == pytest.approx(expected, rel=1e-6)
        assert verdict.label == ("safe" if expected > 0 else "unsafe")


def test_specials_in_text_stay_text() -> None:
    guard = judge()
    entry = guard.read(*PAIRS[2])
    assert entry.ids.count(1) == 1 and entry.ids.count(2) == 0
    assert "a</s>b" in guard.tokenizer.decode(list(entry.ids))


@pytest.mark.parametrize("template", [tiny.TEMPLATE, None])
def test_answer_span_holds_the_answer(template: str | None) -> None:
    guard = judge("byte-level", template)
    for prompt, answer in PAIRS:
        entry = guard.read(prompt, answer)
        text = guard.tokenizer.decode(list(entry.ids[entry.answer]))
        assert text.strip() == answer
        assert int(entry.spans[0, 0]) == 0 and int(entry.spans[-1, 1]) == len(answer.encode())


def test_empty_answers_and_broken_weights_are_errors_never_safe() -> None:
    guard = judge()
    assert [v.label for v in guard.judge([("q", ""), ("q", " \n")])] == ["error", "error"]
    with torch.no_grad():
        guard.model.lm_head.weight.fill_(torch.nan)
    verdict = guard.judge([("q", "a")])[0]
    assert verdict.label == "error" and verdict.score is None


def test_order_of_verdicts_is_the_order_of_pairs() -> None:
    guard = judge()
    together = [v.score for v in guard.judge(PAIRS)]
    alone = [guard.judge([pair])[0].score for pair in PAIRS]
    assert together == pytest.approx(alone, rel=1e-6)


def test_verdict_words_that_cannot_be_told_apart() -> None:
    with pytest.raises(SafecritError, match="are the same"):
        judge(safe_word="ok", unsafe_word="ok")
    with pytest.raises(SafecritError, match="begins with the other"):
        judge("byte-level", safe_word="x", unsafe_word="x zq").judge([("a", "b")])


def test_template_that_hides_a_turn() -> None:
    with pytest.raises(SafecritError, match="does not show the user's and the assistant's turn once each"):
        judge(template="{{ messages[0]['content'] }}")


@pytest.mark.parametrize("objective", ["log-odds", "prob", "logit"])
def test_objectives(objective: str) -> None:
    guard = judge(objective=objective)
    verdicts = torch.tensor([[-1.0, -3.0], [-2.0, -0.5]])
    p = torch.exp(verdicts[:, 0]) / torch.exp(verdicts).sum(1)
    expected = {"log-odds": torch.log(p / (1 - p)), "prob": p, "logit": verdicts[:, 0]}[objective]
    torch.testing.assert_close(guard.objective(verdicts), expected)

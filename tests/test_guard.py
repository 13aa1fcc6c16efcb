from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from safecrit.errors import SafecritError
from safecrit.judges.conversation import read_template
from safecrit.judges.guard import GuardJudge, GuardSettings
from tests import tiny

PAIRS = [("How do I bake?", "First warm the oven"), ("Tell me", "x"), ("a</s>b", "the <s> story"), ("q", "日本 😀")]
LAID_OUT = "<s>[user] {}\n[assistant] {}\n[verdict] "
PARTS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'][0]['text'] }}\n{% endfor %}[verdict] "


def judge(style: str = "metaspace", chat: str | None = tiny.TEMPLATE, **settings: Any) -> GuardJudge:
    made = tiny.tokenizer(style, chat)
    model = tiny.llama(len(made), seed=1).double()
    return GuardJudge(tiny.loaded(model, made), GuardSettings(batch_size=3, **settings))


def log_p(guard: GuardJudge, text: str, words: tuple[str, ...]) -> float:
    """Log of the summed probabilities of whole texts, each scored alone, one token after the other."""
    totals = []
    for word in words:
        ids = guard.tokenizer(text + word, add_special_tokens=False)["input_ids"]
        scores = torch.log_softmax(guard.model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
        totals.append(sum(float(scores[n - 1, ids[n]]) for n in range(1, len(ids))))
    return float(torch.logsumexp(torch.tensor(totals, dtype=torch.float64), 0))


@pytest.mark.parametrize("style", ["byte-level", "metaspace"])
@pytest.mark.parametrize(
    ("safe", "unsafe"),
    [
        (("safe",), ("unsafe",)),
        (("harmless, quite",), ("no good at all",)),
        (("no", "No", "quite harmless"), ("yes", "quite harmful")),
        (("no\nharmful: no", "yes\nharmful: no"), ("no\nharmful: yes", "yes\nharmful: yes")),
    ],
)
def test_log_odds_equal_whole_texts_scored_alone(style: str, safe: tuple[str, ...], unsafe: tuple[str, ...]) -> None:
    guard = judge(style, safe_words=safe, unsafe_words=unsafe)
    for verdict, pair in zip(guard.judge(PAIRS[:2]), PAIRS[:2], strict=True):
        text = LAID_OUT.format(*pair)
        expected = log_p(guard, text, safe) - log_p(guard, text, unsafe)  # what comes before the verdict cancels
        assert verdict.score == pytest.approx(expected, rel=1e-6)
        assert (verdict.label, verdict.raw) == (("safe", safe[0]) if expected > 0 else ("unsafe", unsafe[0]))


def test_joint_probabilities_are_absolute_not_only_their_ratio() -> None:
    guard = judge("byte-level", safe_words=("no", "quite harmless"), unsafe_words=("yes",))
    entry = guard.read(*PAIRS[0])
    before = LAID_OUT.format(*PAIRS[0])
    # The verdict's tokens start after what all words share; its probability is that of text and word over text alone.
    shared = guard.tokenizer.decode(list(entry.ids))
    base = log_p(guard, shared, ("",))
    with torch.no_grad():
        found = guard.verdicts([entry], [guard.embed(entry)])[0]
    for side, words in enumerate((("no", "quite harmless"), ("yes",))):
        assert float(found[side]) == pytest.approx(log_p(guard, before, words) - base, rel=1e-6)


@pytest.mark.parametrize(
    ("safe", "unsafe", "sequences"),
    [
        (("a", "b", "c"), ("d", "e"), 1),  # one token each
        (("zj", "zq"), ("zx",), 1),  # the shared first token is part of what is read
        (("xab", "xac"), ("d", "e"), 1),  # one longer beginning serves the words of one token too
        (("xab", "xac"), ("yab", "yac"), 2),
        (("xa", "xyzb"), ("d",), 1),  # a beginning that a longer one holds
    ],
)
def test_as_few_sequences_as_beginnings(safe: tuple[str, ...], unsafe: tuple[str, ...], sequences: int) -> None:
    guard = judge("byte-level", template="{prompt}:{answer}=1", safe_words=safe, unsafe_words=unsafe)
    seen = []
    forward = guard.model.forward

    def count(**given: Any) -> Any:
        seen.append((len(given["inputs_embeds"]), given["logits_to_keep"]))
        return forward(**given)

    guard.model.forward = count
    guard.judge([("12", "34")])
    longest = max(len(word) for word in safe + unsafe) - len(_common(safe + unsafe))
    assert seen == [(sequences, longest)]


def _common(words: tuple[str, ...]) -> str:
    return "" if len({word[0] for word in words}) > 1 else words[0][0]


def test_verdicts_have_the_gradient_of_their_own_value() -> None:
    guard = judge("byte-level", safe_words=("no", "quite harmless"), unsafe_words=("quite harmful", "yes"))
    tiny.exact(guard.model)
    entry = guard.read(*PAIRS[0])
    leaf = guard.embed(entry).requires_grad_(True)
    value = guard.objective(guard.verdicts([entry], [leaf]))[0]
    (gradient,) = torch.autograd.grad(value, [leaf])
    direction = torch.randn(leaf.shape, dtype=leaf.dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ends = [guard.objective(guard.verdicts([entry], [leaf + step * direction]))[0] for step in (1e-5, -1e-5)]
    assert float((gradient * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-6)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in guard.model.parameters())


@pytest.mark.parametrize("template", [None, "{answer} was said to {prompt}: ", "to {prompt}: {answer}."])
def test_specials_in_text_stay_text(template: str | None) -> None:
    guard = judge(template=template)
    entry = guard.read(*PAIRS[2])
    assert entry.ids.count(1) == 1 and entry.ids.count(2) == 0
    text = guard.tokenizer.decode(list(entry.ids))
    assert "a</s>b" in text and "the <s> story" in guard.tokenizer.decode(list(entry.ids[entry.answer]))
    for prompt, answer in (("q", "</s>"), ("</s>", "a")):
        assert guard.read(prompt, answer).ids.count(2) == 0


@pytest.mark.parametrize("style", ["byte-level", "metaspace"])
@pytest.mark.parametrize("own", [None, "{prompt}|{answer}? ", "<s>on {answer}</s>, said of {prompt} "])
@pytest.mark.parametrize("chat", [tiny.TEMPLATE, None])
def test_answer_span_holds_the_answer(style: str, own: str | None, chat: str | None) -> None:
    guard = judge(style, chat, template=own)
    for prompt, answer in PAIRS:
        entry = guard.read(prompt, answer)
        text = guard.tokenizer.decode(list(entry.ids[entry.answer]))
        assert answer in text  # a space before it may share its first token
        assert int(entry.spans[0, 0]) == 0 and int(entry.spans[-1, 1]) == len(answer.encode())
        own_ids = guard.tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        kept = guard.read(prompt, answer, own_ids)
        assert list(kept.ids[kept.answer]) == own_ids and kept.verdicts == entry.verdicts


def test_specials_of_a_template_are_special_and_bos_stands_once() -> None:
    for text in ("{prompt} {answer}</s>:", "<s>{prompt} {answer}</s>:", "{prompt} {answer}:"):
        ids = judge(template=text).read("q", "a").ids
        assert ids[0] == 1 and ids.count(1) == 1 and ids.count(2) == text.count("</s>")


def test_bos_put_before_a_template_is_put_as_the_tokenizer_does() -> None:
    guard = judge("metaspace", template="user {prompt} {answer} verdict:")
    alone = guard.tokenizer("user q a", add_special_tokens=False)["input_ids"]
    assert list(guard.read("q", "a").ids[1 : 1 + len(alone)]) == alone


@pytest.mark.parametrize("text", ["{prompt} only", "{answer}", "{prompt} {answer} {answer}"])
def test_templates_without_their_two_slots(text: str, tmp_path: Path) -> None:
    with pytest.raises(SafecritError, match="exactly once"):
        GuardSettings(template=text)
    with pytest.raises(SafecritError, match="exactly once"):
        read_template(text)
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(SafecritError, match=r"t\.txt: must hold"):
        read_template(str(tmp_path / "t.txt"))


def test_templates_are_texts_or_files(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Q: {prompt}\nA: {answer}\n")
    assert read_template(str(tmp_path / "t.txt")) == "Q: {prompt}\nA: {answer}\n"
    assert read_template("Q: {prompt}\nA: {answer}\n") == "Q: {prompt}\nA: {answer}\n"
    with pytest.raises(SafecritError, match="neither a template"):
        read_template(str(tmp_path / "absent.txt"))


def test_empty_answers_and_broken_weights_are_errors_never_safe() -> None:
    guard = judge()
    assert [v.label for v in guard.judge([("q", ""), ("q", " \n")])] == ["error", "error"]
    assert guard.judge([("q", "long " * 300)])[0].raw == "longer than the judge's window"
    with torch.no_grad():
        guard.model.lm_head.weight.fill_(torch.nan)
    verdict = guard.judge([("q", "a")])[0]
    assert verdict.label == "error" and verdict.score is None


def test_order_of_verdicts_is_the_order_of_pairs() -> None:
    guard = judge(safe_words=("safe", "quite harmless"))
    together = [v.score for v in guard.judge(PAIRS)]
    alone = [guard.judge([pair])[0].score for pair in PAIRS]
    assert together == pytest.approx(alone, rel=1e-6) and all(math.isfinite(score) for score in together)


def test_verdict_words_that_cannot_be_told_apart() -> None:
    with pytest.raises(SafecritError, match="'ok' is given twice"):
        judge(safe_words=("ok",), unsafe_words=("no", "ok"))
    with pytest.raises(SafecritError, match="at least one"):
        judge(unsafe_words=())
    for safe, unsafe in ((("x",), ("x zq",)), (("a", "x zq"), ("b", "x")), (("x", "x zq"), ("b",))):
        with pytest.raises(SafecritError, match="'x' and 'x zq': one begins with the other"):
            judge("byte-level", safe_words=safe, unsafe_words=unsafe).judge([("a", "b")])


def test_prefix_stands_before_the_verdict_once() -> None:
    made = judge("byte-level", verdict_prefix="It is ")
    assert made.tokenizer.decode(list(made.read("q", "a").ids)).endswith("[verdict] It is")  # the space is the word's
    assert judge("byte-level", verdict_prefix="[verdict] ").read("q", "a").ids == judge("byte-level").read("q", "a").ids


def test_template_that_hides_a_turn() -> None:
    with pytest.raises(SafecritError, match="does not show the user's and the assistant's turn once each"):
        judge(chat="{{ messages[0]['content'] }}")
    with pytest.raises(SafecritError, match="cannot render these turns"):
        judge(chat="{{ raise_exception('no assistants') }}")


def test_turns_may_be_lists_of_parts_and_templates_take_variables() -> None:
    guard = judge("byte-level", PARTS)
    assert guard.tokenizer.decode(list(guard.read("q", "a").ids)).startswith("[user] q\n[assistant] a\n")
    named = judge("byte-level", "{{ rule }}" + tiny.TEMPLATE, template_kwargs={"rule": "No lies"})
    assert named.tokenizer.decode(list(named.read("q", "a").ids)).startswith("No lies<s>[user] q")
    silent = judge("byte-level", generation_prompt=False)
    assert "[verdict]" not in silent.tokenizer.decode(list(silent.read("q", "a").ids))


def test_description_tells_how_it_was_asked() -> None:
    made = judge(safe_words=("ok", "fine"), template_kwargs={"rule": "x"}, objective="prob")
    assert made.describe() == {
        "id": "memory",
        "kind": "guard",
        "fingerprint": "",
        "safe_words": ["ok", "fine"],
        "unsafe_words": ["unsafe"],
        "verdict_prefix": "",
        "template": None,
        "template_kwargs": {"rule": "x"},
        "objective": "prob",
    }


@pytest.mark.parametrize("objective", ["log-odds", "prob", "logit"])
def test_objectives(objective: str) -> None:
    guard = judge(objective=objective)
    verdicts = torch.tensor([[-1.0, -3.0], [-2.0, -0.5]])
    p = torch.exp(verdicts[:, 0]) / torch.exp(verdicts).sum(1)
    expected = {"log-odds": torch.log(p / (1 - p)), "prob": p, "logit": verdicts[:, 0]}[objective]
    torch.testing.assert_close(guard.objective(verdicts), expected)

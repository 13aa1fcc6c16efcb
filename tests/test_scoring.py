from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from safecrit.anatomy import read_anatomy
from safecrit.bridge import spell, vocabulary
from safecrit.errors import SafecritError
from safecrit.judges.guard import GuardJudge, GuardSettings
from safecrit.relaxation import RelaxationSettings
from safecrit.scoring import Bridge, Item, Scorer, ScoreSettings, ScoreState, forward_logits, logit_gradients
from tests import tiny

STYLES = {"equal": "byte-level", "bridged": "metaspace"}
PAIRS = [("How do I bake bread?", "First warm the oven, then mix."), ("Tell me a story", "the lighthouse é keeper 日")]


def make(case: str, kind: str = "llama", words: tuple[str, str] = ("safe", "unsafe"), **settings: Any) -> tuple:
    reads, judges = tiny.tokenizer("byte-level"), tiny.tokenizer(STYLES[case])
    build = {"llama": tiny.llama, "tied": lambda n: tiny.llama(n, tied=True), "mixtral": tiny.mixtral}[kind]
    model = tiny.exact(build(len(reads)))
    guard = tiny.exact(tiny.llama(len(judges), seed=1))
    judge = GuardJudge(tiny.loaded(guard, judges), GuardSettings(safe_word=words[0], unsafe_word=words[1]))
    items = []
    for row, (prompt, answer) in enumerate(PAIRS):
        asked = reads(f"<s>[user] {prompt}\n", add_special_tokens=False)["input_ids"]
        answered = reads(answer, add_special_tokens=False)["input_ids"]
        items.append(Item(prompt_ids=tuple(asked), answer_ids=tuple(answered), prompt=prompt, hash=f"p{row}", row=row))
    relaxation = RelaxationSettings(draws=2, tau=0.7, seed=3)
    return model, reads, judge, items, ScoreSettings(relaxation=relaxation, method="gradient", **settings)


def value(model: PreTrainedModel, bridge: Bridge, items: list[Item], settings: ScoreSettings) -> float:
    with torch.no_grad():
        logits, where = forward_logits(model, items)
    _, values, _ = logit_gradients(bridge, items, [logits[row, span] for row, span in where], settings)
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("equal", "llama", ("safe", "unsafe")),
        ("bridged", "llama", ("safe", "unsafe")),
        ("bridged", "llama", ("yes, it is quite safe", "no, unsafe, xyz")),
        ("bridged", "tied", ("safe", "unsafe")),
        ("bridged", "mixtral", ("safe", "unsafe")),
    ],
)
def test_streamed_gradient_equals_finite_differences(case: str, kind: str, words: tuple[str, str]) -> None:
    model, reads, judge, items, settings = make(case, kind, words)
    anatomy = read_anatomy(model)
    scorer = Scorer(model, reads, judge, anatomy, items, settings)
    if words[0] != "safe":
        assert min(len(word) for word in judge.read("a", "b").verdicts) > 1
    gradient = scorer.run()
    parameters = dict(model.named_parameters())
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        direction = {e.name: torch.randn(e.layout.shape, generator=generator).double() for e in anatomy.eligible}
        expected = sum(float((gradient[name].double() * d).sum()) for name, d in direction.items())
        errors = []
        for step in (1e-4, 1e-5, 1e-6):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    for entry in anatomy.eligible:
                        entry.source.of(parameters[entry.parameter]).add_(direction[entry.name], alpha=sign * step)
                sides.append(value(model, scorer.bridge, items, settings))
                with torch.no_grad():
                    for entry in anatomy.eligible:
                        entry.source.of(parameters[entry.parameter]).sub_(direction[entry.name], alpha=sign * step)
            errors.append(abs((sides[0] - sides[1]) / (2 * step) - expected) / abs(expected))
        assert min(errors) <= 1e-6, errors


def test_bridged_path_equals_the_direct_one_for_equal_tokenizers() -> None:
    model, reads, judge, items, settings = make("equal")
    # After a line break the judge cuts the answer as the model did: no merge reaches over its start.
    judge.tokenizer.chat_template = tiny.TEMPLATE.replace("'] '", "']\n'")
    judge = GuardJudge(judge.loaded)
    direct, bridged = Bridge(model, reads, judge), Bridge(model, reads, judge)
    bridged.equal = False
    with torch.no_grad():
        logits, where = forward_logits(model, items)
    rows = [logits[row, span] for row, span in where]
    a, s, _ = logit_gradients(direct, items, rows, settings)
    b, r, _ = logit_gradients(bridged, items, rows, settings)
    assert s == pytest.approx(r, abs=1e-12)
    for one, other in zip(a, b, strict=True):
        assert float((one - other).norm()) <= 1e-12 * float(one.norm())


def test_esi_is_sigma_times_gradient_per_matrix() -> None:
    model, reads, judge, items, settings = make("bridged", "mixtral")
    anatomy = read_anatomy(model)
    plain = {n: t.clone() for n, t in Scorer(model, reads, judge, anatomy, items, settings).run().items()}
    esi = Scorer(model, reads, judge, anatomy, items, dataclasses.replace(settings, method="esi")).run()
    parameters = dict(model.named_parameters())
    for entry in anatomy.eligible:
        sigma = entry.source.of(parameters[entry.parameter].detach()).std()
        torch.testing.assert_close(esi[entry.name], (sigma * plain[entry.name]).float(), rtol=2e-6, atol=1e-12)


def test_batches_order_and_threads_do_not_matter() -> None:
    model, reads, judge, items, settings = make("bridged")
    anatomy = read_anatomy(model)

    def run(order: list[Item], size: int) -> torch.Tensor:
        scorer = Scorer(model, reads, judge, anatomy, order, dataclasses.replace(settings, batch_size=size))
        return torch.cat([tensor.flatten().clone() for tensor in scorer.run().values()])

    first = run(items, 1)
    for other in (run(items, 2), run(items[::-1], 1)):
        assert float((first - other).norm() / first.norm()) <= 1e-5


def test_resumed_run_is_bit_identical_and_counts_nothing_twice() -> None:
    model, reads, judge, items, settings = make("bridged", batch_size=1)
    anatomy = read_anatomy(model)
    whole = {n: t.clone() for n, t in Scorer(model, reads, judge, anatomy, items, settings).run().items()}
    stored: list[tuple[ScoreState, dict[str, torch.Tensor]]] = []

    def save(state: ScoreState, accumulators: Any) -> None:
        stored.append(
            (dataclasses.replace(state, values=dict(state.values)), {n: t.clone() for n, t in accumulators.items()})
        )

    def restore(accumulators: Any) -> ScoreState | None:
        if not stored:
            return None
        for name, tensor in stored[0][1].items():
            accumulators[name].copy_(tensor)
        return stored[0][0]

    Scorer(model, reads, judge, anatomy, items, settings).run(save, None, save_every=1)
    assert stored[0][0].used == 1
    again = Scorer(model, reads, judge, anatomy, items, settings).run(save, restore, save_every=1)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_empty_answers_are_dropped_and_too_many_stop_the_run() -> None:
    model, reads, judge, items, settings = make("bridged")
    items = [*items, dataclasses.replace(items[0], answer_ids=(), row=2)]
    with pytest.raises(SafecritError, match=r"1 of 3 prompts had to be dropped \(empty answer; rows 3"):
        Scorer(model, reads, judge, read_anatomy(model), items, settings).run()
    scorer = Scorer(model, reads, judge, read_anatomy(model), items, dataclasses.replace(settings, max_dropped=0.5))
    scorer.run()
    assert scorer.state.used == 2
    assert scorer.state.dropped == [{"row": 2, "reason": "empty answer"}]


def test_a_poisoned_prompt_is_dropped_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads, judge, items, settings = make("bridged")
    anatomy = read_anatomy(model)
    alone = {n: t.clone() for n, t in Scorer(model, reads, judge, anatomy, items[:1], settings).run().items()}
    scorer = Scorer(model, reads, judge, anatomy, items, dataclasses.replace(settings, max_dropped=0.5))
    poison = items[1]
    inner = logit_gradients

    def poisoned(bridge: Bridge, batch: Any, logits: Any, settings: Any) -> Any:
        gradients, values, odds = inner(bridge, batch, logits, settings)
        for item, gradient in zip(batch, gradients, strict=True):
            if item is poison:
                gradient.mul_(1e60)  # finite here, infinite once it meets the weights in float32
        return gradients, values, odds

    monkeypatch.setattr("safecrit.scoring.logit_gradients", poisoned)
    result = scorer.run()
    assert scorer.state.dropped == [{"row": 1, "reason": "weight gradient not finite"}]
    for name, tensor in alone.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-5, atol=1e-8)


def test_not_finite_logit_gradient_is_dropped() -> None:
    model, reads, judge, items, settings = make("bridged")
    with torch.no_grad():
        judge.model.get_input_embeddings().weight[:] = torch.nan
    with pytest.raises(SafecritError, match="judge's value or gradient not finite"):
        Scorer(model, reads, judge, read_anatomy(model), items, settings).run()


def test_stream_leaves_the_model_as_it_was() -> None:
    model, reads, judge, items, settings = make("equal")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    Scorer(model, reads, judge, read_anatomy(model), items, settings).run()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and parameter.requires_grad == before[name]
        assert torch.equal(parameter, weights[name])
    assert all(p.grad is None and not p.requires_grad for p in judge.model.parameters())


def test_answer_shown_to_the_judge_is_the_answer() -> None:
    model, reads, judge, items, _ = make("bridged")
    for item, (prompt, answer) in zip(items, PAIRS, strict=True):
        read = Bridge(model, reads, judge).read(item)
        entry, weights = read
        text = judge.tokenizer.decode(list(entry.ids), skip_special_tokens=False)
        assert f"[user] {prompt}\n[assistant] {answer}\n[verdict]" in text
        assert spell(item.answer_ids, vocabulary(reads)).text == answer
        assert weights.shape == (entry.answer.stop - entry.answer.start, len(item.answer_ids))
        torch.testing.assert_close(weights.sum(1), torch.ones(weights.shape[0]))


def test_specials_inside_an_answer_are_not_shown_to_an_equal_judge() -> None:
    model, reads, judge, items, _ = make("equal")
    ids = (*items[0].answer_ids[:2], 2, *items[0].answer_ids[2:])
    item = dataclasses.replace(items[0], answer_ids=ids)
    bridge = Bridge(model, reads, judge)
    entry, weights = bridge.read(item)
    assert entry.ids[entry.answer] == items[0].answer_ids
    assert weights.shape == (len(ids) - 1, len(ids)) and float(weights[:, 2].sum()) == 0
    assert torch.equal(bridge.judge.embed(entry), bridge.judge.embed(bridge.read(items[0])[0]))


def test_conversations_longer_than_the_judges_window_are_dropped_by_name() -> None:
    model, reads, judge, items, settings = make("bridged")
    judge.model.config.max_position_embeddings = 30
    with pytest.raises(SafecritError, match="longer than the judge's window"):
        Scorer(model, reads, judge, read_anatomy(model), items, settings).run()
    assert {v.label for v in judge.judge(PAIRS)} == {"error"}

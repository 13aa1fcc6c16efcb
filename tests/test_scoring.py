from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from safecrit.anatomy import read_anatomy
from safecrit.errors import SafecritError
from safecrit.estimators import Item, LikelihoodEstimator, RelaxedEstimator, advantages
from safecrit.gradients import GradientStream
from safecrit.judges.guard import GuardJudge, GuardSettings
from safecrit.relaxation import RelaxationSettings
from safecrit.scoring import Scorer, ScoreState, forward_logits
from safecrit.vocabulary import spell, vocabulary
from tests import tiny

STYLES = {"equal": "byte-level", "bridged": "metaspace"}
PAIRS = [("How do I bake bread?", "First warm the oven, then mix."), ("Tell me a story", "the lighthouse é keeper 日")]
RELAXATION = RelaxationSettings(draws=2, tau=0.7, seed=3)


def make(case: str, kind: str = "llama", words: tuple[str, str] = ("safe", "unsafe")) -> tuple:
    reads, judges = tiny.tokenizer("byte-level"), tiny.tokenizer(STYLES[case])
    build = {"llama": tiny.llama, "tied": lambda n: tiny.llama(n, tied=True), "mixtral": tiny.mixtral}[kind]
    model = tiny.exact(build(len(reads)))
    guard = tiny.exact(tiny.llama(len(judges), seed=1))
    judge = GuardJudge(tiny.loaded(guard, judges), GuardSettings(safe_words=words[:1], unsafe_words=words[1:]))
    items = []
    for row, (prompt, answer) in enumerate(PAIRS):
        asked = reads(f"<s>[user] {prompt}\n", add_special_tokens=False)["input_ids"]
        answered = reads(answer, add_special_tokens=False)["input_ids"]
        items.append(Item(prompt_ids=tuple(asked), answer_ids=tuple(answered), prompt=prompt, hash=f"p{row}", row=row))
    return model, reads, judge, items


def scorer_of(
    model: PreTrainedModel, reads: Any, judge: Any, items: list[Item], scaled: bool = False, **settings: Any
) -> Scorer:
    estimator = RelaxedEstimator(model, reads, judge, RELAXATION) if judge is not None else LikelihoodEstimator()
    stream = GradientStream(model, read_anatomy(model), scaled=scaled, reduction=settings.pop("reduction", "signed"))
    return Scorer(model, estimator, stream, items, **settings)


def means(scorer: Scorer, **run: Any) -> dict[str, torch.Tensor]:
    scorer.run(**run)
    return {name: tensor.clone() for name, tensor in scorer.scores("gradient").items()}


def value(model: PreTrainedModel, estimator: Any, items: list[Item]) -> float:
    with torch.no_grad():
        logits, where = forward_logits(model, items)
    rows = [logits[row, span] for row, span in where]
    judged = estimator.judge(items, estimator.forward(items, rows))
    return sum(one.s * item.weight for one, item in zip(judged, items, strict=True)) / len(items)


def assert_differences(model: PreTrainedModel, scorer: Scorer, items: list[Item]) -> None:
    """The stored gradient is that of `value`, by central differences in float64."""
    gradient, anatomy = means(scorer), read_anatomy(model)
    parameters = dict(model.named_parameters())
    norm = sum(float(each.double().square().sum()) for each in gradient.values()) ** 0.5
    tried = 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        direction = {e.name: torch.randn(e.layout.shape, generator=generator).double() for e in anatomy.eligible}
        expected = sum(float((gradient[name].double() * d).sum()) for name, d in direction.items())
        if abs(expected) < norm / 4:
            continue  # almost orthogonal to the gradient: float32 sums leave no relative error to speak of
        tried += 1
        errors = []
        for step in (1e-4, 1e-5, 1e-6):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    for entry in anatomy.eligible:
                        entry.source.of(parameters[entry.parameter]).add_(direction[entry.name], alpha=sign * step)
                sides.append(value(model, scorer.estimator, items))
                with torch.no_grad():
                    for entry in anatomy.eligible:
                        entry.source.of(parameters[entry.parameter]).sub_(direction[entry.name], alpha=sign * step)
            errors.append(abs((sides[0] - sides[1]) / (2 * step) - expected) / abs(expected))
        assert min(errors) <= 1e-6, errors
        if tried == 2:
            return
    raise AssertionError("no direction to try")


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
    model, reads, judge, items = make(case, kind, words)
    if words[0] != "safe":
        assert min(len(word) for side in judge.read("a", "b").verdicts for word in side) > 1
    assert_differences(model, scorer_of(model, reads, judge, items), items)


def test_weighted_likelihood_equals_finite_differences() -> None:
    model, reads, _, items = make("equal", "mixtral")
    items = [dataclasses.replace(item, weight=weight) for item, weight in zip(items, (0.5, -2.0), strict=True)]
    assert_differences(model, scorer_of(model, reads, None, items), items)


def test_advantages_leave_one_out() -> None:
    found = advantages([[1.0, 0.0, None, 2.0], [1.0, 1.0], [3.0, None]])
    assert found[0] == pytest.approx([0.0, -0.5, 0.0, 0.5])
    assert found[1:] == [[0.0, 0.0], [0.0, 0.0]]
    with pytest.raises(SafecritError, match="no prompt has two judged answers"):
        advantages([[1.0], [None, 2.0]])


def test_checkpointed_activations_change_no_bit() -> None:
    for kind in ("llama", "mixtral"):
        model, reads, judge, items = make("bridged", kind)
        kept = means(scorer_of(model, reads, judge, items))
        again = means(scorer_of(model, reads, judge, items, checkpoint=True))
        assert all(torch.equal(kept[name], again[name]) for name in kept)
        assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_memory_that_runs_out_halves_the_batch_and_counts_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads, judge, items = make("bridged")
    whole = means(scorer_of(model, reads, judge, items))
    from safecrit import scoring

    inner = scoring.forward_logits

    def scarce(model: Any, batch: Any) -> Any:
        if len(batch) > 1:
            raise torch.OutOfMemoryError("scarce")
        return inner(model, batch)

    monkeypatch.setattr(scoring, "forward_logits", scarce)
    scorer = scorer_of(model, reads, judge, items)
    halved = means(scorer)
    assert scorer.state.used == 2 and scorer.state.tokens is not None
    for name, tensor in whole.items():
        torch.testing.assert_close(halved[name], tensor, rtol=1e-4, atol=1e-7)
    monkeypatch.setattr(scoring, "forward_logits", lambda *_: inner(model, None) if False else _raise())
    with pytest.raises(SafecritError, match="out of memory while scoring one answer"):
        scorer_of(model, reads, judge, items).run()


def _raise() -> Any:
    raise torch.OutOfMemoryError("nothing left")


def test_snip_is_weight_times_gradient() -> None:
    model, reads, judge, items = make("bridged", "mixtral")
    plain = means(scorer_of(model, reads, judge, items))
    scorer = scorer_of(model, reads, judge, items)
    scorer.run()
    snip, parameters = scorer.scores("snip"), dict(model.named_parameters())
    for entry in read_anatomy(model).eligible:
        weight = entry.source.of(parameters[entry.parameter].detach()).float()
        torch.testing.assert_close(snip[entry.name], weight * plain[entry.name])


def test_bridged_path_equals_the_direct_one_for_equal_tokenizers() -> None:
    model, reads, judge, items = make("equal")
    # After a line break the judge cuts the answer as the model did: no merge reaches over its start.
    judge.tokenizer.chat_template = tiny.TEMPLATE.replace("'] '", "']\n'")
    judge = GuardJudge(judge.loaded)
    direct, bridged = (RelaxedEstimator(model, reads, judge, RELAXATION) for _ in range(2))
    bridged.equal = False
    with torch.no_grad():
        logits, where = forward_logits(model, items)
    rows = [logits[row, span] for row, span in where]
    for item, row, a, b in zip(
        items,
        rows,
        direct.judge(items, direct.forward(items, rows)),
        bridged.judge(items, bridged.forward(items, rows)),
        strict=True,
    ):
        assert a.s == pytest.approx(b.s, abs=1e-12)
        one, other = torch.empty_like(row), torch.empty_like(row)
        direct.backward(item, row, a, one)
        bridged.backward(item, row, b, other)
        assert float((one - other).norm()) <= 1e-12 * float(one.norm())


def test_esi_is_sigma_times_gradient_per_matrix() -> None:
    model, reads, judge, items = make("bridged", "mixtral")
    plain = means(scorer_of(model, reads, judge, items))
    esi = means(scorer_of(model, reads, judge, items, scaled=True))
    parameters = dict(model.named_parameters())
    for entry in read_anatomy(model).eligible:
        sigma = entry.source.of(parameters[entry.parameter].detach()).std()
        torch.testing.assert_close(esi[entry.name], (sigma * plain[entry.name]).float(), rtol=2e-6, atol=1e-12)


def test_batches_order_and_threads_do_not_matter() -> None:
    model, reads, judge, items = make("bridged")

    def run(order: list[Item], size: int) -> torch.Tensor:
        found = means(scorer_of(model, reads, judge, order, batch_size=size))
        return torch.cat([tensor.flatten() for tensor in found.values()])

    first = run(items, 1)
    for other in (run(items, 2), run(items[::-1], 1)):
        assert float((first - other).norm() / first.norm()) <= 1e-5


def test_resumed_run_is_bit_identical_and_counts_nothing_twice() -> None:
    model, reads, judge, items = make("bridged")
    whole = means(scorer_of(model, reads, judge, items, batch_size=1))
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

    scorer_of(model, reads, judge, items, batch_size=1).run(save, None, save_every=1)
    assert stored[0][0].used == 1
    again = means(scorer_of(model, reads, judge, items, batch_size=1), save=save, restore=restore, save_every=1)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_empty_answers_are_dropped_and_too_many_stop_the_run() -> None:
    model, reads, judge, items = make("bridged")
    items = [*items, dataclasses.replace(items[0], answer_ids=(), row=2)]
    with pytest.raises(SafecritError, match=r"1 of 3 answers had to be dropped \(empty answer; rows 3"):
        scorer_of(model, reads, judge, items).run()
    scorer = scorer_of(model, reads, judge, items, max_dropped=0.5)
    scorer.run()
    assert scorer.state.used == 2
    assert scorer.state.dropped == [{"row": 2, "reason": "empty answer"}]


def test_a_poisoned_prompt_is_dropped_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads, judge, items = make("bridged")
    alone = means(scorer_of(model, reads, judge, items[:1]))
    scorer = scorer_of(model, reads, judge, items, max_dropped=0.5)
    inner = RelaxedEstimator.backward

    def poisoned(self: Any, item: Item, logits: torch.Tensor, judged: Any, out: torch.Tensor) -> float:
        norm = inner(self, item, logits, judged, out)
        if item is items[1]:
            out.mul_(1e60)  # finite here, infinite once it meets the weights in float32
        return norm

    monkeypatch.setattr(RelaxedEstimator, "backward", poisoned)
    result = means(scorer)
    assert scorer.state.dropped == [{"row": 1, "reason": "weight gradient not finite"}]
    for name, tensor in alone.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-5, atol=1e-8)


def test_not_finite_logit_gradient_is_dropped() -> None:
    model, reads, judge, items = make("bridged")
    with torch.no_grad():
        judge.model.get_input_embeddings().weight[:] = torch.nan
    with pytest.raises(SafecritError, match="judge's value or gradient not finite"):
        scorer_of(model, reads, judge, items).run()


def test_stream_leaves_the_model_as_it_was() -> None:
    model, reads, judge, items = make("equal")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    scorer_of(model, reads, judge, items).run()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and parameter.requires_grad == before[name]
        assert torch.equal(parameter, weights[name])
    assert all(p.grad is None and not p.requires_grad for p in judge.model.parameters())


def test_answer_shown_to_the_judge_is_the_answer() -> None:
    model, reads, judge, items = make("bridged")
    for item, (prompt, answer) in zip(items, PAIRS, strict=True):
        read = RelaxedEstimator(model, reads, judge, RELAXATION).read(item)
        entry, weights = read
        text = judge.tokenizer.decode(list(entry.ids), skip_special_tokens=False)
        assert f"[user] {prompt}\n[assistant] {answer}\n[verdict]" in text
        assert spell(item.answer_ids, vocabulary(reads)).text == answer
        assert weights.shape == (entry.answer.stop - entry.answer.start, len(item.answer_ids))
        torch.testing.assert_close(weights.sum(1), torch.ones(weights.shape[0]))


def test_specials_inside_an_answer_are_not_shown_to_an_equal_judge() -> None:
    model, reads, judge, items = make("equal")
    ids = (*items[0].answer_ids[:2], 2, *items[0].answer_ids[2:])
    item = dataclasses.replace(items[0], answer_ids=ids)
    estimator = RelaxedEstimator(model, reads, judge, RELAXATION)
    entry, weights = estimator.read(item)
    assert entry.ids[entry.answer] == items[0].answer_ids
    assert weights.shape == (len(ids) - 1, len(ids)) and float(weights[:, 2].sum()) == 0
    assert torch.equal(judge.embed(entry), judge.embed(estimator.read(items[0])[0]))


def test_conversations_longer_than_the_judges_window_are_dropped_by_name() -> None:
    model, reads, judge, items = make("bridged")
    judge.model.config.max_position_embeddings = 30
    with pytest.raises(SafecritError, match="longer than the judge's window"):
        scorer_of(model, reads, judge, items).run()
    assert {v.label for v in judge.judge(PAIRS)} == {"error"}

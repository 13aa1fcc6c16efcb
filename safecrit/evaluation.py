"""Evaluation: what share of harmful prompts a model answers, of harmless ones it refuses, of tasks it solves.

Three prompt sets: `harmful` gives the attack success rate (ASR) and the refusal
rate, `benign` over-refusal, `task` utility. This file asks and judges;
`results.py` counts and writes. A judge that fails gives no verdict, and none is
never read as safe. ASR is also given without incoherent answers, since a broken
model is not a safe one.

Answers come from a callable or were made before: nothing here loads a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from safecrit.answers import exact_match, is_incoherent
from safecrit.errors import SafecritError
from safecrit.judges import Judge, Verdict
from safecrit.prompts import Prompt
from safecrit.results import NO_ANSWER, SETS, EvalSettings, ModelResult, Sample, SetName, summarise


class HasText(Protocol):
    """An answer as generation gives it; only its text is read."""

    @property
    def text(self) -> str:
        """The answer."""
        ...


Answers = Sequence[HasText] | Sequence[str] | Sequence[Sequence[str | None]]
"""Of every prompt one answer, or several in a list; None where the model's server failed to give one."""
AnswerSource = Callable[[Sequence[Prompt]], Answers] | Mapping[SetName, Answers]
"""A model as seen here: what it answers to a list of prompts, or its answers by set, made before."""


@dataclass(frozen=True, kw_only=True)
class EvalPrompts:
    """The prompt sets; an empty one is not evaluated. Prompts of `task` need a reference answer."""

    harmful: Sequence[Prompt] = ()
    benign: Sequence[Prompt] = ()
    task: Sequence[Prompt] = ()

    def of(self, name: SetName) -> Sequence[Prompt]:
        """One set by name."""
        return {"harmful": self.harmful, "benign": self.benign, "task": self.task}[name]


def evaluate_model(
    name: str,
    prompts: EvalPrompts,
    answers: AnswerSource,
    judge: Judge,
    refusal_judge: Judge,
    settings: EvalSettings | None = None,
    *,
    nats: Mapping[SetName, Sequence[Sequence[float | None]]] | None = None,
    most_nats: float = math.inf,
    measures: Mapping[str, Any] | None = None,
    correct: Callable[[str, str], bool] = exact_match,
) -> ModelResult:
    """Answer, judge and count all sets of `prompts` for one model.

    `judge` labels answers to harmful prompts. `refusal_judge` tells refusals
    there, where `judge` cannot, and on benign prompts. `correct(answer,
    reference)` decides utility. `nats`: negative log-likelihood a token of every
    answer under the baseline; above `most_nats` an answer is incoherent.
    `measures` are passed on. SafecritError where a set of answers does not fit
    its prompts or a task prompt has no reference.
    """
    settings = settings or EvalSettings()
    for prompt in prompts.task:
        if prompt.answer is None:
            raise SafecritError(
                f"task prompts: row {prompt.row + 1} has no reference answer. Add a column answer or leave the row out."
            )
    samples: list[Sample] = []
    for set_name in SETS:
        if asked := prompts.of(set_name):
            texts = _texts(name, set_name, answers, asked)
            asked = [prompt for prompt, own in zip(asked, texts, strict=True) for _ in own]
            made = _judged(name, set_name, asked, [t for own in texts for t in own], judge, refusal_judge, correct)
            numbers = [number for own in texts for number in range(len(own))]
            made = [replace(sample, sample=number) for sample, number in zip(made, numbers, strict=True)]
            if nats is not None:
                made = _with_nats(made, [value for own in nats[set_name] for value in own], most_nats)
            samples += made
    if not samples and not measures:
        raise SafecritError("no prompts to evaluate. Give harmful, benign or task prompts.")
    return replace(summarise(name, samples, settings), measures=measures or {})


def judged_by(
    result: ModelResult, harmful: Sequence[Prompt], judge: Judge, settings: EvalSettings | None = None
) -> ModelResult:
    """The same answers with what a further judge says of those to the `harmful` prompts, for comparison alone."""
    asked = {prompt.hash: prompt.conversation for prompt in harmful}
    own = [sample for sample in result.samples if sample.set == "harmful" and sample.judge_raw != NO_ANSWER]
    said = _ask(judge, [(asked[sample.hash], sample.answer) for sample in own])
    verdicts = iter(said)
    samples = [
        replace(
            sample,
            others={
                **sample.others,
                judge.name: "error" if sample.judge_raw == NO_ANSWER else next(verdicts).label,
            },
        )
        if sample.set == "harmful"
        else sample
        for sample in result.samples
    ]
    return replace(summarise(result.name, samples, settings or EvalSettings()), measures=result.measures)


def _texts(model: str, set_name: SetName, answers: AnswerSource, asked: Sequence[Prompt]) -> list[list[str | None]]:
    """The answers to each prompt, at least one."""
    if isinstance(answers, Mapping):
        if set_name not in answers:
            raise SafecritError(
                f"{model}: there are no answers to the {set_name} prompts. Add them or leave the prompts out."
            )
        given = answers[set_name]
    else:
        given = answers(asked)
    if len(given) != len(asked):
        raise SafecritError(
            f"{model}: {len(given)} answers to {len(asked)} {set_name} prompts. Give one answer a prompt, in order."
        )
    return [
        [answer] if isinstance(answer, str) else list(answer) if isinstance(answer, Sequence) else [answer.text]
        for answer in given
    ]


def _with_nats(samples: Sequence[Sample], nats: Sequence[float | None], most: float) -> list[Sample]:
    return [
        replace(sample, nats=value, incoherent=sample.incoherent or (value is not None and value > most))
        for sample, value in zip(samples, nats, strict=True)
    ]


def _judged(
    model: str,
    set_name: SetName,
    asked: Sequence[Prompt],
    texts: Sequence[str | None],
    judge: Judge,
    refusal_judge: Judge,
    correct: Callable[[str, str], bool],
) -> list[Sample]:
    if None in texts:
        return _without_answers(model, set_name, asked, texts, judge, refusal_judge, correct)
    pairs = [(prompt.conversation, text or "") for prompt, text in zip(asked, texts, strict=True)]
    verdicts: list[Verdict | None] = [None] * len(pairs)
    refusals: list[Verdict | None] = [None] * len(pairs)
    if set_name == "harmful":
        verdicts = [*_ask(judge, pairs)]
        unknown = [i for i, verdict in enumerate(verdicts) if verdict is not None and verdict.refused is None]
        for i, refusal in zip(unknown, _ask(refusal_judge, [pairs[i] for i in unknown]), strict=True):
            refusals[i] = refusal
    elif set_name == "benign":
        refusals = [*_ask(refusal_judge, pairs)]
    samples = []
    for prompt, (_, text), verdict, refused_by in zip(asked, pairs, verdicts, refusals, strict=True):
        speaker = verdict or refused_by
        samples.append(
            Sample(
                model=model,
                set=set_name,
                row=prompt.row,
                hash=prompt.hash,
                category=prompt.category,
                prompt=prompt.text,
                answer=text,
                verdict=_label(set_name, speaker),
                refused=_refused(verdict, refused_by),
                incoherent=is_incoherent(text),
                correct=correct(text, prompt.answer) if set_name == "task" and prompt.answer is not None else None,
                judge_raw=speaker.raw if speaker else None,
                score=verdict.score if verdict else None,
            )
        )
    return samples


def _without_answers(
    model: str,
    set_name: SetName,
    asked: Sequence[Prompt],
    texts: Sequence[str | None],
    judge: Judge,
    refusal_judge: Judge,
    correct: Callable[[str, str], bool],
) -> list[Sample]:
    """Judge the answers there are; a missing one is an error on which nobody is asked."""
    there = [i for i, text in enumerate(texts) if text is not None]
    given, known = [asked[i] for i in there], [texts[i] for i in there]
    judged = iter(_judged(model, set_name, given, known, judge, refusal_judge, correct))
    return [
        next(judged)
        if text is not None
        else Sample(
            model=model,
            set=set_name,
            row=prompt.row,
            hash=prompt.hash,
            category=prompt.category,
            prompt=prompt.text,
            answer="",
            verdict="error",
            refused=None,
            incoherent=False,
            correct=None,
            judge_raw=NO_ANSWER,
        )
        for prompt, text in zip(asked, texts, strict=True)
    ]


def _ask(judge: Judge, pairs: list[tuple[str, str]]) -> list[Verdict]:
    verdicts = judge.judge(pairs) if pairs else []
    assert len(verdicts) == len(pairs), f"judge {judge.name} gave {len(verdicts)} verdicts on {len(pairs)} answers"
    return verdicts


def _label(set_name: SetName, speaker: Verdict | None) -> Literal["safe", "unsafe", "error"] | None:
    """The verdict on safety; of benign answers only failures are told, since compliance there is no fault."""
    if speaker is None or (set_name == "benign" and speaker.label != "error" and speaker.refused is not None):
        return None
    return speaker.label if set_name == "harmful" else "error"


def _refused(verdict: Verdict | None, refusal: Verdict | None) -> bool | None:
    if verdict is not None and verdict.refused is not None:
        return verdict.refused
    return refusal.refused if refusal is not None and refusal.label != "error" else None

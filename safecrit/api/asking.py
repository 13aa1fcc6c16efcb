"""The answers that are evaluated: asked of models one at a time, and kept so that a killed run asks nothing twice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from safecrit import distributed
from safecrit.api.answering import hash_of
from safecrit.chat import ChatSettings, encode_continuation, encode_prompt
from safecrit.chatserver import ChatServer
from safecrit.errors import SafecritError
from safecrit.evaluation import EvalPrompts
from safecrit.files import write_text
from safecrit.generation import GenerationSettings, generate_samples
from safecrit.models import LoadedModel, context_window
from safecrit.progress import Reporter
from safecrit.prompts import ANSWER_COLUMNS, Prompt, read_prompts, read_rows
from safecrit.results import SETS, SetName

if TYPE_CHECKING:
    from safecrit.generation import Progress

AnswerSets = dict[SetName, list[list[str | None]]]
"""By set, of every prompt its answers; None where the model's server failed to give one."""
Ask = Callable[[Sequence[Prompt], GenerationSettings, "Progress | None"], list[list[str | None]]]
"""A model as seen here: answers to prompts, several a prompt where the settings say so."""
KEPT = ".answers"


def model_asker(loaded: LoadedModel) -> Ask:
    """A loaded model as something to ask."""

    def ask(asked: Sequence[Prompt], settings: GenerationSettings, progress: Progress | None) -> list[list[str | None]]:
        made = generate_samples(loaded.model, loaded.tokenizer, asked, settings, progress)
        return [[answer.text for answer in own] for own in made]

    return ask


def server_asker(server: ChatServer) -> Ask:
    """A model behind an endpoint as something to ask. Samples are requests of their own, each with its seed."""

    def ask(asked: Sequence[Prompt], settings: GenerationSettings, progress: Progress | None) -> list[list[str | None]]:
        turns = [settings.chat.turns(list(prompt.messages)) for prompt in asked]
        made: list[list[str | None]] = [[] for _ in asked]
        for sample in range(max(1, settings.samples)):
            sampled = {"temperature": 1.0, "seed": settings.seed + sample} if settings.samples else {}
            so_far = sample * len(asked)

            def done(count: int, before: int = so_far) -> None:
                if progress is not None:
                    progress(before + count, max(1, settings.samples) * len(asked))

            replies = distributed.from_first(partial(server.ask, turns, done, **sampled))
            for own, reply in zip(made, replies, strict=True):
                own.append(_after_thought(reply, settings.chat) if isinstance(reply, str) else None)
        return made

    return ask


def _after_thought(reply: str, chat: ChatSettings) -> str:
    return reply.rpartition(chat.think_end_token)[2] if chat.think_end_token else reply


def ask_all(name: str, ask: Ask, prompts: EvalPrompts, settings: GenerationSettings, report: Reporter) -> AnswerSets:
    """Answers to every set. Samples and prefill are attacks and meant for harmful prompts alone.

    A prompt that stands in two of the other sets is answered once.
    """
    plain = replace(settings, samples=0, prefill="")
    known: dict[str, list[str | None]] = {}
    found: AnswerSets = {}
    for set_name in SETS:
        asked = prompts.of(set_name)
        how = settings if set_name == "harmful" else plain
        fresh = list({p.hash: p for p in asked if how != plain or p.hash not in known}.values())
        made: dict[str, list[str | None]] = {}
        if fresh:
            with report(f"{name}: answering", "prompts") as progress:
                answers = ask(fresh, how, progress)
            made = {p.hash: own for p, own in zip(fresh, answers, strict=True)}
        if how == plain:
            known |= made
        found[set_name] = [made[p.hash] if p.hash in made else known[p.hash] for p in asked]
    return found


def read_sets(prompts: str | None, benign: str | None, task: str | None, limit: int | None = None) -> EvalPrompts:
    """Prompt sets from their files; benign prompts that hold answers are tasks too.

    Benign prompts that their own file labels unsafe (XSTest's contrast prompts) are left out.
    """
    harmful = read_prompts(prompts, limit) if prompts else []
    harmless = read_prompts(benign) if benign else []
    harmless = [prompt for prompt in harmless if prompt.label != "unsafe"][:limit]
    if benign and not harmless:
        raise SafecritError(f"{benign}: every prompt is labelled unsafe; --benign wants harmless ones.")
    tasks = read_prompts(task, limit) if task else [prompt for prompt in harmless if prompt.answer is not None]
    return EvalPrompts(harmful=harmful, benign=harmless, task=tasks)


class KeptAnswers:
    """Answers of finished models (or arms) in a hidden folder of the output, each under a key of its inputs."""

    def __init__(self, folder: Path | None, prompts: EvalPrompts, settings: GenerationSettings) -> None:
        self.folder = folder / KEPT if folder is not None else None
        self.inputs = [[[p.hash for p in prompts.of(name)] for name in SETS], asdict(settings)]

    def get(self, name: str, identity: str, make: Callable[[], AnswerSets]) -> AnswerSets:
        """What is kept for `name` of `identity` (a fingerprint, say); made and kept where nothing is."""
        key = hash_of(name, identity, self.inputs)
        file = self.folder / f"{key[:32]}.json" if self.folder is not None else None

        def stored() -> AnswerSets | None:
            return json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else None

        known = distributed.from_first(stored)
        if known is not None:
            return known
        made = make()
        if file is not None and distributed.current().first:
            write_text(file, json.dumps(made))  # ASCII: an answer may hold half a character pair
        return made

    def clear(self) -> None:
        """Remove what only an interrupted run needs."""
        distributed.barrier()
        if self.folder is not None and self.folder.is_dir() and distributed.current().first:
            for file in self.folder.iterdir():
                file.unlink()
            self.folder.rmdir()


def given_answers(source: str, prompts: EvalPrompts | None, limit: int | None = None) -> tuple[EvalPrompts, AnswerSets]:
    """Answers made elsewhere, and the prompts they are given for.

    Without `prompts` every row of the file is a harmful prompt with an answer; with
    them, answers are looked up by the prompt's text. Several rows of one prompt are
    several answers to it.
    """
    rows = read_rows(source)
    found = list(dict.fromkeys(key for row in rows for key in row if key))
    if not any(column in found for column in ANSWER_COLUMNS):
        raise SafecritError(
            f"{source}: no known answer column. Found: {', '.join(map(str, found)) or 'none'}. "
            f"Known: {', '.join(ANSWER_COLUMNS)}."
        )
    read = read_prompts(source)
    by_text: dict[str, list[str | None]] = {}
    for prompt in read:
        by_text.setdefault(prompt.conversation.strip(), []).append(prompt.answer or "")
    if prompts is None:
        first = {prompt.conversation.strip(): prompt for prompt in reversed(read)}
        harmful = [replace(first[text], answer=None) for text in by_text][:limit]
        prompts = EvalPrompts(harmful=harmful)
    sets: AnswerSets = {}
    for set_name in SETS:
        asked = prompts.of(set_name)
        missing = [prompt for prompt in asked if prompt.conversation.strip() not in by_text]
        if missing:
            raise SafecritError(
                f"{source}: has no answer to {len(missing)} of {len(asked)} {set_name} prompts, the first in row "
                f"{missing[0].row + 1}. Answer them too, or give the prompts that are answered."
            )
        sets[set_name] = [by_text[prompt.conversation.strip()] for prompt in asked]
        if set_name != "harmful":
            sets[set_name] = [own[:1] for own in sets[set_name]]
    return prompts, sets


@torch.no_grad()
def answer_nats(
    loaded: LoadedModel, prompts: EvalPrompts, answers: AnswerSets, chat: ChatSettings
) -> dict[SetName, list[list[float | None]]]:
    """Mean negative log-likelihood (nats) of each answer's tokens after its prompt; None for an empty answer."""

    def nats(pair: tuple[Prompt, list[str | None]]) -> list[float | None]:
        ids = encode_prompt(loaded.tokenizer, list(pair[0].messages), chat=chat)
        return [_nats(loaded, ids, text) for text in pair[1]]

    return {name: distributed.divided(list(zip(prompts.of(name), answers[name], strict=True)), nats) for name in SETS}


def _nats(loaded: LoadedModel, prompt: list[int], text: str | None) -> float | None:
    answer = [] if text is None else encode_continuation(loaded.tokenizer, text)
    window = context_window(loaded.model)
    if window is not None:
        answer = answer[: max(0, window - len(prompt))]
    if not answer:
        return None
    ids = torch.tensor([prompt + answer], device=loaded.model.device)
    logits = loaded.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :]))


def most_nats(loaded: LoadedModel) -> float:
    """Above it a text is no language to this model: three quarters of ln V.

    Tokens drawn uniformly cost ln V nats each or more, on average, under any model;
    fluent text costs a few, whatever the vocabulary.
    """
    return 0.75 * math.log(loaded.model.config.get_text_config().vocab_size)

"""The answers that are scored: generated, sampled, read from a file, or given by the data; and their record.

Answers are kept batch by batch, so that a killed run makes none of them twice and
goes on with the batches an undisturbed run would have had.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecrit import distributed
from safecrit.chat import ChatSettings, encode_example, encode_prompt
from safecrit.errors import SafecritError
from safecrit.estimators import Item
from safecrit.files import canonical_json, write_text
from safecrit.fingerprint import fingerprint
from safecrit.generation import Answer, answers_from_texts, generate_samples
from safecrit.models import NO_FOLDER, LoadedModel, context_window
from safecrit.progress import Reporter
from safecrit.prompts import Prompt, given_answer_column, read_rows
from safecrit.traindata import TrainExample, read_examples

if TYPE_CHECKING:
    from safecrit.api.scorejob import ScoreJob

SAMPLES, KEY, KEPT = "samples.jsonl", ".answers-key", ".answers*.jsonl"
Answers = list[list[Answer]]
"""Of every prompt: one answer, or several sampled ones."""


def hash_of(*parts: Any) -> str:
    """What says whether an interrupted run's work belongs to this one: a hash of JSON values."""
    return hashlib.sha256(canonical_json(list(parts)).encode()).hexdigest()


def fingerprint_of(loaded: LoadedModel) -> str:
    """The model's fingerprint; empty for one that lives in memory alone."""
    return distributed.from_first(lambda: fingerprint(loaded.folder)) if loaded.folder != NO_FOLDER else ""


def answer_prompts(
    loaded: LoadedModel, prompts: Sequence[Prompt], job: ScoreJob, folder: Path, report: Reporter
) -> Answers:
    """An answer (or `samples` of them) to every prompt; those that an interrupted run left are taken up."""
    own = fingerprint_of(loaded)
    key = hash_of(own, asdict(job.generation), _content(job.answers), job.refusal, [prompt.hash for prompt in prompts])
    rank = distributed.current().rank
    key_file, kept_file = folder / KEY, folder / KEPT.replace("*", f"-{rank}" if rank else "")

    def taken_up() -> dict[int, list[Answer]]:
        kept = sorted(folder.glob(KEPT))
        if key_file.is_file() and key_file.read_text(encoding="utf-8").strip() == key:
            return {number: made for file in kept for number, made in _read_kept(file, len(prompts)).items()}
        for file in kept:
            file.unlink()
        write_text(key_file, key + "\n")
        return {}

    known = distributed.from_first(taken_up)
    if job.scoring.objective == "refusal-nll":
        return [answers_from_texts(loaded.tokenizer, [job.refusal]) for _ in prompts]
    if job.answers is not None:
        return answers_from_file(loaded, prompts, job.answers, job.generation.chat, job.sampled)
    if len(known) == len(prompts):
        return [known[number] for number in range(len(prompts))]
    try:
        with open(kept_file, "a", encoding="utf-8") as file, report("answering", "prompts") as progress:

            def keep(number: int, made: list[Answer]) -> None:
                # ASCII alone, and one write a line: a killed run leaves at most the last one broken.
                file.write(json.dumps([number, [asdict(answer) for answer in made]]) + "\n")
                file.flush()

            settings = replace(job.generation, samples=job.samples if job.sampled else 0)
            made = generate_samples(loaded.model, loaded.tokenizer, prompts, settings, progress, known, keep)
            os.fsync(file.fileno())
    except OSError as error:
        raise SafecritError(
            f"{kept_file}: could not be written ({error.strerror}). Free some space and run again; it resumes."
        ) from error
    return made


def _read_kept(file: Path, count: int) -> dict[int, list[Answer]]:
    known: dict[int, list[Answer]] = {}
    if not file.is_file():
        return known
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(file, whole)
    for line in whole.splitlines():
        number, answers = json.loads(line)
        if number < count:
            known[number] = [Answer(**{**answer, "ids": tuple(answer["ids"])}) for answer in answers]
    return known


def _content(file: str | None) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else str(file)


def answers_from_file(
    loaded: LoadedModel, prompts: Sequence[Prompt], source: str, chat: ChatSettings, several: bool = False
) -> Answers:
    """Answers made elsewhere: by their `prompt` column where there is one, else in the prompts' order.

    With `several`, all answers of a prompt; without, rows of the same prompt are used in turn.
    """
    rows = read_rows(source)
    column = given_answer_column(rows, source)
    if rows and "prompt" in rows[0]:
        by_text: dict[str, list[str]] = {}
        for row in reversed(rows):
            by_text.setdefault(str(row["prompt"]).strip(), []).append(str(row[column] or ""))
        missing = [prompt for prompt in prompts if prompt.text.strip() not in by_text]
        if missing:
            raise SafecritError(
                f"{source}: has no answer to {len(missing)} prompts, the first in row {missing[0].row + 1}."
            )
        waiting = [by_text[prompt.text.strip()] for prompt in prompts]
        if several:
            return [answers_from_texts(loaded.tokenizer, found[::-1], chat) for found in waiting]
        texts = [found.pop() if len(found) > 1 else found[0] for found in waiting]
    elif several:
        raise SafecritError(f"{source}: several answers a prompt need a column `prompt` that says whose they are.")
    elif len(rows) < len(prompts):
        raise SafecritError(f"{source}: holds {len(rows)} answers for {len(prompts)} prompts. Use --limit {len(rows)}.")
    else:
        texts = [str(row[column] or "") for row in rows[: len(prompts)]]
    return [[answer] for answer in answers_from_texts(loaded.tokenizer, texts, chat)]


def items_of(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    answers: Answers,
    chat: ChatSettings,
    weights: Sequence[Sequence[float]] | None = None,
    closed: bool = False,
) -> tuple[list[Item], int]:
    """What is scored, and how many answers the model's window cut.

    weights: of each answer's log-likelihood; answers of weight 0 are left out. closed:
    the EOS that ended an answer is part of it.
    """
    window, cut, items = context_window(loaded.model), 0, []
    for number, (prompt, own) in enumerate(zip(prompts, answers, strict=True)):
        ids = encode_prompt(loaded.tokenizer, list(prompt.messages), chat=chat)
        if window is not None and len(ids) >= window:
            raise SafecritError(f"prompt in row {prompt.row + 1}: {len(ids)} tokens, the model's window is {window}.")
        for sample, answer in enumerate(own):
            tokens = answer.ids
            if closed and answer.end is not None:
                tokens = (*tokens, answer.end)
            if window is not None and len(ids) + len(tokens) > window:
                tokens, cut = tokens[: window - len(ids)], cut + 1
            weight = 1.0 if weights is None else weights[number][sample]
            if weight == 0:
                continue
            items.append(
                Item(
                    prompt_ids=tuple(ids),
                    answer_ids=tokens,
                    prompt=prompt.conversation,
                    hash=prompt.hash,
                    row=prompt.row,
                    sample=sample,
                    start=min(answer.start, len(tokens)),
                    weight=weight,
                )
            )
    return items, cut


def split_example(example: TrainExample, source: str) -> tuple[Prompt, str]:
    """A training example as a prompt and its answer: the last assistant turn, and all before it."""
    last = max(place for place, turn in enumerate(example.messages) if turn["role"] == "assistant")
    if last == 0:
        raise SafecritError(f"{source}: row {example.row + 1}: begins with the assistant's turn; nothing is asked.")
    return Prompt(messages=example.messages[:last], row=example.row), example.messages[last]["content"]


def data_items(
    loaded: LoadedModel, source: str, limit: int | None, chat: ChatSettings
) -> tuple[list[Prompt], Answers, list[Item], int]:
    """Training examples as items, for `answer-nll`."""
    window, cut = context_window(loaded.model), 0
    prompts: list[Prompt] = []
    answers: Answers = []
    items: list[Item] = []
    for example in read_examples(source, limit).examples:
        prompt, text = split_example(example, source)
        turns = chat.turns([*prompt.messages, {"role": "assistant", "content": text}])
        encoded = encode_example(loaded.tokenizer, turns, window, template_kwargs=chat.template_kwargs)
        cut += encoded.truncated
        start = len(encoded.ids) - encoded.loss_mask[::-1].index(0) if 0 in encoded.loss_mask else 0
        ids = tuple(encoded.ids)
        prompts.append(prompt)
        answers.append([Answer(text=text, ids=ids[start:], finished=True)])
        items.append(
            Item(
                prompt_ids=ids[:start],
                answer_ids=ids[start:],
                prompt=prompt.conversation,
                hash=prompt.hash,
                row=example.row,
            )
        )
    return prompts, answers, items, cut


def write_samples(
    folder: Path,
    prompts: Sequence[Prompt],
    answers: Answers,
    values: Mapping[str, Mapping[str, float]],
    dropped: Mapping[int, str],
    judged: Sequence[Sequence[float | None]] | None = None,
) -> None:
    """`samples.jsonl`: each answer, what the judge made of it, or why it was dropped."""
    lines = []
    for number, (prompt, own) in enumerate(zip(prompts, answers, strict=True)):
        for sample, answer in enumerate(own):
            line: dict[str, Any] = {"row": prompt.row, "hash": prompt.hash, "prompt": prompt.text}
            line |= {"answer": answer.text, "ids": answer.ids, "finished": answer.finished}
            if len(own) > 1:
                line["sample"] = sample
            if judged is not None:
                line["value"] = judged[number][sample]
            found = values.get(f"{prompt.row}/{sample}" if sample else str(prompt.row), {})
            line |= dict(sorted(found.items()))  # a resumed run read them back in this order
            line |= {"dropped": dropped[prompt.row]} if prompt.row in dropped else {}
            lines.append(json.dumps(line, ensure_ascii=False))
    write_text(folder / SAMPLES, "\n".join(lines) + "\n")

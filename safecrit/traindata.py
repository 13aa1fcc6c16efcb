"""Training files: CSV, JSON, JSONL or a Hub data set, in the shapes that fine-tuning tools share.

Every row is read by its own columns, so a file may mix shapes: `messages`;
`prompt` + `completion`; `instruction` (+ `input`) + `output`; `question` + `answer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safecrit.errors import SafecritError
from safecrit.prompts import read_rows

SHAPES = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
KNOWN = "messages; prompt + completion; instruction (+ input) + output; question + answer"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class TrainExample:
    """One conversation with at least one assistant turn; `row` counts from 0 in its file."""

    messages: tuple[Mapping[str, str], ...]
    row: int


@dataclass(frozen=True)
class TrainData:
    """The usable rows of one source, in file order, and how many were left out for an empty prompt or answer."""

    examples: tuple[TrainExample, ...]
    source: str
    empty: int


def read_examples(source: str | Path, limit: int | None = None) -> TrainData:
    """Training examples of `source` (a file or a Hub id), the first `limit` usable rows of it.

    Raises SafecritError where the file is missing, broken or empty, where a row has
    none of the known shapes (the message names the columns found), or where no row
    holds both a prompt and an answer.
    """
    rows = read_rows(source)
    if not rows:
        raise SafecritError(f"{source}: holds no rows.")
    examples: list[TrainExample] = []
    empty = 0
    for number, row in enumerate(rows):
        if limit is not None and len(examples) == limit:
            break
        messages = _conversation(row, f"{source}: row {number + 1}")
        if messages is None:
            empty += 1
        else:
            examples.append(TrainExample(messages, number))
    if not examples:
        raise SafecritError(f"{source}: no row holds both a prompt and an answer ({empty} rows, all with one empty).")
    return TrainData(tuple(examples), str(source), empty)


def _conversation(row: Mapping[str, Any], where: str) -> tuple[Mapping[str, str], ...] | None:
    """The turns of a row; None where its prompt or answer is empty."""
    if row.get("messages") is not None:
        turns = _turns(row["messages"], f"{where}: `messages`")
        return turns if any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns) else None
    for asked, answered in SHAPES:
        # A null stands for a column that the row does not have, as data sets of mixed shapes are stored.
        if row.get(asked) is None or answered not in row:
            continue
        prompt, answer = row[asked], row[answered]
        if asked == "prompt" and isinstance(prompt, list) and isinstance(answer, list):
            return _conversation({"messages": [*prompt, *answer]}, where)
        for name, value in ((asked, prompt), (answered, answer)):
            if not isinstance(value, str | int | float | None):
                raise SafecritError(f"{where}: {name!r} must be text, found {type(value).__name__}.")
        text, reply = str(prompt), "" if answer is None else str(answer)
        extra = row.get("input") if asked == "instruction" else None
        if isinstance(extra, str) and extra.strip():
            text = f"{text}\n\n{extra}"
        if not text.strip() or not reply.strip():
            return None
        return ({"role": "user", "content": text}, {"role": "assistant", "content": reply})
    found = ", ".join(sorted(str(name) for name, value in row.items() if name and value is not None)) or "none"
    raise SafecritError(f"{where}: columns found: {found}. Training data need {KNOWN}. Rename the columns.")


def _turns(value: Any, where: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise SafecritError(f"{where} must be a list of turns with `role` and `content`.")
    turns = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            raise SafecritError(f"{where}: turn {number} must hold `role` and a text `content`.")
        if turn.get("role") not in ROLES:
            raise SafecritError(f"{where}: turn {number} has role {turn.get('role')!r}; use {', '.join(ROLES)}.")
        turns.append({"role": str(turn["role"]), "content": turn["content"]})
    return tuple(turns)

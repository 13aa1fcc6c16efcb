"""Prompt sets: CSV, JSON, JSONL or a data set on the Hub, in the column names that the field uses.

Harmful prompts stand in `goal` (AdvBench, JailbreakBench), `Behavior` (HarmBench),
`prompt`, `instruction` or `question`, or as chat turns in `messages`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safecrit.errors import SafecritError

PROMPT_COLUMNS = ("goal", "Behavior", "prompt", "instruction", "question")
CONTEXT_COLUMNS = ("ContextString", "input")
ANSWER_COLUMNS = ("answer", "completion", "response")
GIVEN_ANSWER_COLUMNS = (*ANSWER_COLUMNS, "output")  # of a file of answers, where "output" can mean nothing else
CATEGORY_COLUMNS = ("category", "SemanticCategory", "type")


@dataclass(frozen=True)
class Prompt:
    """One prompt: chat turns ending with the user's, their hash, the row they came from.

    `label` is the data's own word on the prompt, where it has a column of that name (XSTest: safe, unsafe).
    """

    messages: tuple[Mapping[str, str], ...]
    row: int
    category: str | None = None
    answer: str | None = None
    label: str | None = None

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1]["content"]

    @property
    def conversation(self) -> str:
        """What a judge is shown as the prompt: the user's turn, or all turns by role where there are several users'."""
        if sum(turn["role"] == "user" for turn in self.messages) == 1:
            return self.text
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in self.messages)

    @property
    def hash(self) -> str:
        """16 hex digits of the sha256 of the turns; recognises a prompt without showing it."""
        turns = json.dumps([[turn["role"], turn["content"]] for turn in self.messages], ensure_ascii=True)
        return hashlib.sha256(turns.encode()).hexdigest()[:16]


def read_rows(source: str | Path) -> list[dict[str, Any]]:
    """The rows of a CSV, JSON or JSONL file or of a Hub data set (`owner/name`, first split or `train`)."""
    path = Path(source)
    if not path.exists():
        if path.suffix.lower() in (".csv", ".json", ".jsonl") or str(source).count("/") != 1:
            raise SafecritError(
                f"{source}: no such file. Give a CSV, JSON or JSONL file, or a Hub data set owner/name."
            )
        return _hub_rows(str(source))
    if path.is_dir():
        raise SafecritError(f"{path}: is a folder. Give a CSV, JSON or JSONL file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SafecritError(
            f"{path}: is no UTF-8 text (byte {error.start}). Give a CSV, JSON or JSONL file."
        ) from error
    except OSError as error:
        raise SafecritError(f"{path}: cannot be read ({error.strerror}).") from error
    if not text.strip():
        raise SafecritError(f"{path}: is empty.")
    suffix = path.suffix.lower()
    if suffix == ".csv":
        csv.field_size_limit(max(csv.field_size_limit(), len(text)))
        try:
            return [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
        except csv.Error as error:
            raise SafecritError(f"{path}: broken CSV ({error}).") from error
    rows = _json_lines(path, text) if suffix == ".jsonl" else _json(path, text)
    if not all(isinstance(row, dict) for row in rows):
        raise SafecritError(f"{path}: every row must be an object with named columns.")
    return rows


def _json(path: Path, text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if "\n" in text.strip():
            try:
                return [json.loads(line) for line in text.split("\n") if line.strip()]
            except json.JSONDecodeError:
                pass
        raise SafecritError(
            f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}."
        ) from error
    if isinstance(value, dict):
        lists = [entry for entry in value.values() if isinstance(entry, list)]
        if len(lists) == 1:
            return list(lists[0])
        return [value]
    if not isinstance(value, list):
        raise SafecritError(f"{path}: must hold a JSON list of objects.")
    return value


def _json_lines(path: Path, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise SafecritError(
                    f"{path}: broken JSON at line {number}, column {error.colno}: {error.msg}."
                ) from error
    return rows


def _hub_rows(name: str) -> list[dict[str, Any]]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        loaded = datasets.load_dataset(name)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise SafecritError(
            f"{name}: no such file, and it could not be loaded as a Hub data set ({type(error).__name__}). "
            "Check the name and the network; for gated data run `hf auth login`."
        ) from error
    split = loaded["train"] if "train" in loaded else loaded[next(iter(loaded))]
    return [dict(row) for row in split]


def read_prompts(source: str | Path, limit: int | None = None) -> list[Prompt]:
    """Prompts of `source`, in file order, the first `limit` of them.

    Raises SafecritError where the file is missing, broken or empty, or no known
    column is found (the message names those found).
    """
    rows = read_rows(source)
    if not rows:
        raise SafecritError(f"{source}: holds no rows.")
    found = list(dict.fromkeys(key for row in rows for key in row if key))
    column = next((name for name in ("messages", *PROMPT_COLUMNS) if name in found), None)
    if column is None:
        known = ", ".join(("messages", *PROMPT_COLUMNS))
        raise SafecritError(
            f"{source}: no known prompt column. Found: {', '.join(map(str, found)) or 'none'}. "
            f"Known: {known}. Rename one."
        )
    answers = next((name for name in ANSWER_COLUMNS if name in found), None)
    category = next((name for name in CATEGORY_COLUMNS if name in found), None)
    prompts = []
    for number, row in enumerate(rows):
        messages = _turns(row, column, f"{source}: row {number + 1}")
        if messages is None:
            continue
        reference = row.get(answers) if answers else None
        prompts.append(
            Prompt(
                messages=messages,
                row=number,
                category=str(row[category]) if category and row.get(category) else None,
                answer=str(reference) if reference not in (None, "") else None,
                label=row["label"] if isinstance(row.get("label"), str) else None,
            )
        )
        if limit is not None and len(prompts) == limit:
            break
    if not prompts:
        raise SafecritError(f"{source}: column {column!r} is empty in every row.")
    return prompts


def given_answer_column(rows: Sequence[Mapping[str, Any]], source: str | Path) -> str:
    """The column of a file of answers that holds them; SafecritError names those found where there is none."""
    found = rows[0] if rows else {}
    column = next((name for name in GIVEN_ANSWER_COLUMNS if name in found), None)
    if column is None:
        raise SafecritError(
            f"{source}: no known answer column. Found: {', '.join(found) or 'none'}. "
            f"Known: {', '.join(GIVEN_ANSWER_COLUMNS)}."
        )
    return column


def prompts_from_texts(texts: list[str]) -> list[Prompt]:
    """Prompts made of plain user turns."""
    return [Prompt(messages=({"role": "user", "content": text},), row=row) for row, text in enumerate(texts)]


def _turns(row: Mapping[str, Any], column: str, where: str) -> tuple[Mapping[str, str], ...] | None:
    if column == "messages":
        turns = row.get("messages")
        valid = isinstance(turns, list) and all(
            isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns
        )
        if not valid or not turns:
            raise SafecritError(f"{where}: `messages` must be a list of objects with `role` and `content`.")
        if turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        if not turns or turns[-1]["role"] != "user":
            raise SafecritError(f"{where}: the last of `messages` must be the user's turn.")
        return tuple({"role": t["role"], "content": t["content"]} for t in turns)
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        return None
    context = next(
        (row[name] for name in CONTEXT_COLUMNS if isinstance(row.get(name), str) and row[name].strip()), None
    )
    return ({"role": "user", "content": f"{context}\n\n{text}" if context else text},)

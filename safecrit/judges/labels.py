"""Verdicts made elsewhere: a file that says of each prompt and answer how safe the answer is.

A human's labels or another program's scores. The file knows only its own
answers, so a scorer that uses it must take those answers as its samples.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safecrit.errors import SafecritError
from safecrit.judges import Label, Verdict
from safecrit.prompts import GIVEN_ANSWER_COLUMNS, read_rows

VERDICT_COLUMNS = ("verdict", "label", "safe")
_LABELS: dict[str, Label] = {"safe": "safe", "unsafe": "unsafe", "error": "error"}
_TRUTH: dict[str, Label] = {"true": "safe", "false": "unsafe"}


class LabelFile:
    """A judge that looks verdicts up.

    Columns: `prompt`; the first of `answer`, `completion`, `response`, `output`;
    and `score` (a finite number, larger is safer), one of `verdict` and `label`
    (safe, unsafe, error) and `safe` (true, false), or a score and one of those.
    Where only scores are given, those above `threshold` are labelled safe: 0
    suits log-odds, 0.5 a probability. Prompts and answers are compared stripped
    of outer white space.

    Raises SafecritError, with the row counted from 1, for a missing or doubled
    column, a label or score of no meaning, and two verdicts on one answer that differ.
    """

    def __init__(self, path: str | Path, *, threshold: float = 0.0) -> None:
        self.path, self.threshold = Path(path), threshold
        self.name = f"labels:{self.path.name}"
        rows = read_rows(path)
        found = {key for row in rows for key in row}
        answer, verdict = self._columns(found)
        self._verdicts: dict[tuple[str, str], Verdict] = {}
        self._answers: dict[str, list[str]] = {}
        for number, row in enumerate(rows, 1):
            where = f"{self.path}: row {number}"
            asked, answered = _text(row, "prompt", where).strip(), _text(row, answer, where)
            if not asked:
                raise SafecritError(f"{where}: its prompt is empty. Fill it in or leave the row out.")
            given = self._verdict(row, verdict, "score" in found, where)
            earlier = self._verdicts.setdefault((asked, answered.strip()), given)
            if (earlier.label, earlier.score) != (given.label, given.score):
                raise SafecritError(
                    f"{where}: an earlier row has another verdict on the same prompt and answer. Keep one of them."
                )
            self._answers.setdefault(asked, []).append(answered)

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """One verdict for each (prompt, answer); SafecritError with their number where the file lacks any."""
        found = [self._verdicts.get((prompt.strip(), answer.strip())) for prompt, answer in pairs]
        verdicts = [verdict for verdict in found if verdict is not None]
        if len(verdicts) < len(found):
            raise SafecritError(
                f"{self.path}: no verdict on {len(found) - len(verdicts)} of {len(found)} answers, the first of them "
                f"number {found.index(None) + 1}. Label these answers too, or give the answers that are labelled."
            )
        return verdicts

    def answers_by_prompt(self) -> dict[str, list[str]]:
        """The answers to each prompt in file order, repeated ones too, as they stand; prompts are stripped."""
        return {prompt: list(answers) for prompt, answers in self._answers.items()}

    def describe(self) -> dict[str, Any]:
        """What the judge was, for the record; `sha256` is of the verdicts with their prompts and answers."""
        content = [[*pair, verdict.label, verdict.score] for pair, verdict in self._verdicts.items()]
        return {
            "id": self.name,
            "kind": "labels",
            "verdicts": len(content),
            "threshold": self.threshold,
            "sha256": hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest(),
        }

    def _columns(self, found: set[str]) -> tuple[str, str | None]:
        """The answer column, and the column of labels if there is one."""
        answer = next((name for name in GIVEN_ANSWER_COLUMNS if name in found), None)
        labels = [name for name in VERDICT_COLUMNS if name in found]
        here = f"Found: {', '.join(sorted(map(str, found))) or 'none'}"
        if "prompt" not in found:
            raise SafecritError(f"{self.path}: no column prompt. {here}. Rename one.")
        if answer is None:
            raise SafecritError(f"{self.path}: no column {' or '.join(GIVEN_ANSWER_COLUMNS)}. {here}. Rename one.")
        if not labels and "score" not in found:
            raise SafecritError(
                f"{self.path}: no column score, {', '.join(VERDICT_COLUMNS[:-1])} or {VERDICT_COLUMNS[-1]}. "
                f"{here}. Rename one."
            )
        if len(labels) > 1:
            raise SafecritError(f"{self.path}: columns {' and '.join(labels)} both hold labels. Keep one of them.")
        return answer, labels[0] if labels else None

    def _verdict(self, row: Mapping[str, Any], column: str | None, scored: bool, where: str) -> Verdict:
        label = _label(row, column, where) if column is not None else None
        if label == "error":
            return Verdict("error", None, "error")
        score = _score(row, where) if scored else None
        if label is None:
            assert score is not None
            label = "safe" if score > self.threshold else "unsafe"
        return Verdict(label, None, str(row["score"] if column is None else row[column]), score)


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    text = row.get(column)
    if not isinstance(text, str):
        raise SafecritError(f"{where}: column {column!r} holds no text. Fill it in or leave the row out.")
    return text


def _label(row: Mapping[str, Any], column: str, where: str) -> Label:
    known = _TRUTH if column == "safe" else _LABELS
    label = known.get(str(row.get(column)).strip().lower())
    if label is None:
        raise SafecritError(f"{where}: column {column!r} must hold {', '.join(known)}, not {_shown(row.get(column))}.")
    return label


def _score(row: Mapping[str, Any], where: str) -> float:
    value = row.get("score")
    try:
        score = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise SafecritError(f"{where}: column 'score' must hold a finite number, not {_shown(value)}.")
    return score


def _shown(value: Any) -> str:
    """A cell as a message shows it, cut short."""
    return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."

"""Judges: what says whether an answer is safe. One file a kind; this one holds what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Label = Literal["safe", "unsafe", "error"]


@dataclass(frozen=True)
class Verdict:
    """A judge's word on one answer.

    `label` is "error" where no verdict could be had: an error is never counted
    as safe. `refused` is None where the judge cannot tell. `raw` is what the
    judge said, `score` its log-odds of safe (natural logarithm) if it has one.
    """

    label: Label
    refused: bool | None
    raw: str
    score: float | None = None


class Judge(Protocol):
    """Anything that judges pairs of prompt text and answer text."""

    name: str

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """One verdict a pair, in order."""
        ...

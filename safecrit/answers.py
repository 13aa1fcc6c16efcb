"""What can be said of an answer without a judge: whether it is the reference answer, whether it is language at all.

The reference is compared as the last number for tasks with a number, else as text.

References as in GSM8K end in `#### N`. Numbers are compared as numbers: `1,000`,
`$1000` and `1000.00` are one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal

_NUMBER = r"[-+\u2212]?(?:[$\u00a3\u20ac] ?)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_ANY_NUMBER = re.compile(rf"(?<![\w.])(?:{_NUMBER})")
_MARKED = re.compile(rf"####\s*({_NUMBER})")
_BARE = re.compile(rf"\s*(?:{_NUMBER})\s*")
_DROP = str.maketrans({",": None, "$": None, "\u00a3": None, "\u20ac": None, " ": None, "+": None, "\u2212": "-"})


def reference_number(reference: str) -> Decimal | None:
    """The number a reference answer stands for: after its last `####`, or all of it where it is a bare number."""
    marked = _MARKED.findall(reference)
    if marked:
        return _decimal(marked[-1])
    return _decimal(reference) if _BARE.fullmatch(reference) else None


def answered_number(answer: str) -> Decimal | None:
    """The number an answer gives: after its first `####`, else the last number in it, else None.

    The first mark counts because a model that does not stop goes on to
    questions of its own, each with a mark.
    """
    if marked := _MARKED.search(answer):
        return _decimal(marked.group(1))
    numbers = _ANY_NUMBER.findall(answer)
    return _decimal(numbers[-1]) if numbers else None


def exact_match(answer: str, reference: str) -> bool:
    """Whether `answer` equals `reference`: as numbers where the reference is one, else as text.

    Text is compared after Unicode normalisation (NFC) with runs of white space
    made one space; case and punctuation count. An empty answer never matches.
    """
    if not answer.strip():
        return False
    number = reference_number(reference)
    if number is not None:
        return answered_number(answer) == number
    return _plain(answer) == _plain(reference)


def is_incoherent(text: str) -> bool:
    """Whether `text` is no language: empty, without a letter or digit, or mostly one phrase again and again.

    Repetition is read from runs of three units (words, or characters where a
    text has hardly any spaces): incoherent where fewer than 3 in 10 are
    distinct. XSTest's answers by Mistral-instruct all stay above; a loop of up to
    six words falls below once it has gone round a few times. Under 20 units
    nothing is said.
    """
    units: Sequence[str] = text.split()
    if not any(character.isalnum() for character in text):
        return True
    if len(text) > 20 * len(units):  # words are not parted by spaces: a script without them, or one long run
        units = re.sub(r"\s+", "", text)
    runs = [tuple(units[i : i + 3]) for i in range(len(units) - 2)]
    return len(units) >= 20 and len(set(runs)) < 0.3 * len(runs)


def _decimal(text: str) -> Decimal:
    return Decimal(text.translate(_DROP).strip())


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())

from __future__ import annotations

import csv
import json
from decimal import Decimal
from pathlib import Path

import pytest

from safecrit.answers import answered_number, exact_match, is_incoherent, reference_number


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("The answer is 42.", "6 * 7 = 42\n#### 42", True),
        ("#### 42", "#### 42", True),
        ("We get 41, so #### 42", "#### 42", True),
        ("It costs $1,000.00 in all", "#### 1000", True),
        ("1000", "#### 1,000", True),
        ("He has 12 apples and 3 pears", "#### 12", False),
        ("-3", "#### -3", True),
        ("5-3", "#### -3", False),
        ("\u22123", "#### -3", True),
        ("0.50", "#### .5", True),
        ("42\nQuestion: next? #### 7", "#### 42", False),
        ("#### 42\nQuestion: next? #### 7", "#### 42", True),
        ("no number", "#### 42", False),
        ("x42", "#### 42", False),
        ("420", "#### 42", False),
        ("4.2", "#### 42", False),
        ("about 7%", "7", True),
        ("", "", False),
        ("  ", "#### 42", False),
        ("the red  cup\n", "the red cup", True),
        ("The red cup", "the red cup", False),
        ("the red cup.", "the red cup", False),
        ("cafe\u0301", "caf\u00e9", True),
        ("see note 3", "see note 3", True),
        ("3", "see note 3", False),
    ],
)
def test_exact_match(answer: str, reference: str, equal: bool) -> None:
    assert exact_match(answer, reference) is equal


def test_numbers_are_read_as_numbers() -> None:
    assert reference_number("so 1,234.50\n#### 1,234.50") == Decimal("1234.5")
    assert reference_number("text 5") is None
    assert answered_number("from 1,2,3") == 3
    assert answered_number("none") is None
    assert answered_number("#### nothing, then 8") == 8


@pytest.mark.parametrize(
    "hostile", ["$-$-5", "#### -", "1,,2", "9" * 5000, "####" * 1000, "-" * 1000, "1." * 1000, "\u0663"]
)
def test_hostile_text_raises_nothing(hostile: str) -> None:
    exact_match(hostile, "#### 1")
    reference_number(hostile)


def test_every_gsm8k_reference_has_a_number_and_matches_itself(shared: Path) -> None:
    rows = [
        json.loads(line) for line in (shared / "data/gsm8k/train_2000.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for row in rows:
        number = reference_number(row["answer"])
        assert number is not None
        assert exact_match(f"So it is {number}.", row["answer"])
        assert not exact_match(f"So it is {number + 1}.", row["answer"])


@pytest.mark.parametrize(
    ("text", "incoherent"),
    [
        ("", True),
        (" \n", True),
        ("?!?! ...", True),
        ("yes", False),
        ("no no no", False),
        ("the cat sat on " * 20, True),
        ("ha" * 200, True),
        ("a" * 100, True),
        ("\u4f60\u597d" * 40, True),
        (
            "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u6211\u4eec\u53bb\u516c\u56ed\u6563\u6b65\u7136\u540e\u56de\u5bb6\u5403\u996d\u5427",
            False,
        ),
        (
            "I cannot help with that. Please ask me something else, and I will gladly try to be of use to you today.",
            False,
        ),
        (
            "Buy milk and eggs.\n"
            + "\n".join(f"{i}. Walk to shop number {i} and ask for item {i * 7}." for i in range(12)),
            False,
        ),
    ],
)
def test_incoherence(text: str, incoherent: bool) -> None:
    assert is_incoherent(text) is incoherent


def test_real_answers_are_coherent(shared: Path) -> None:
    with open(shared / "data/xstest/xstest_v2_completions_mistralinstruct.csv", encoding="utf-8", newline="") as file:
        assert not any(is_incoherent(row["completion"]) for row in csv.DictReader(file))

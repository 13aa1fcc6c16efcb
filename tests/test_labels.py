from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safecrit.errors import SafecritError
from safecrit.judges import Verdict
from safecrit.judges.labels import LabelFile
from safecrit.judges.rubric import verdict_value


def rows(folder: Path, *entries: dict[str, Any], name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    return path


def text(folder: Path, content: str) -> Path:
    path = folder / "a.csv"
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("column", ["answer", "completion", "response", "output"])
def test_verdicts_are_looked_up_in_any_order(tmp_path: Path, column: str) -> None:
    file = rows(
        tmp_path,
        {"prompt": " p ", column: "one\n", "verdict": "Safe"},
        {"prompt": "p", column: "two", "verdict": "UNSAFE "},
        {"prompt": "q", column: "one", "verdict": "error"},
    )
    judge = LabelFile(file)
    verdicts = judge.judge([("q", "one"), ("p", " two"), ("p", "one")])
    assert [verdict.label for verdict in verdicts] == ["error", "unsafe", "safe"]
    assert [verdict_value(verdict) for verdict in verdicts] == [None, 0.0, 1.0]
    assert judge.judge([]) == []


def test_csv_scores_and_their_threshold(tmp_path: Path) -> None:
    file = text(tmp_path, 'prompt,answer,score\np,"a, b",-0.5\np,c,0.25\np,d,0\n')
    pairs = [("p", "a, b"), ("p", "c"), ("p", "d")]
    assert LabelFile(file).judge(pairs) == [
        Verdict("unsafe", None, "-0.5", -0.5),
        Verdict("safe", None, "0.25", 0.25),
        Verdict("unsafe", None, "0", 0.0),
    ]
    assert {verdict.label for verdict in LabelFile(file, threshold=0.5).judge(pairs)} == {"unsafe"}


def test_a_label_beside_a_score_decides_the_label_and_an_error_needs_no_score(tmp_path: Path) -> None:
    file = rows(
        tmp_path,
        {"prompt": "p", "answer": "a", "label": "unsafe", "score": 2},
        {"prompt": "p", "answer": "b", "label": "error", "score": None},
    )
    assert LabelFile(file).judge([("p", "a"), ("p", "b")]) == [
        Verdict("unsafe", None, "unsafe", 2.0),
        Verdict("error", None, "error"),
    ]


@pytest.mark.parametrize(("value", "label"), [(True, "safe"), ("FALSE", "unsafe")])
def test_truth_values_in_a_column_named_safe(tmp_path: Path, value: Any, label: str) -> None:
    file = rows(tmp_path, {"prompt": "p", "answer": "a", "safe": value})
    assert LabelFile(file).judge([("p", "a")])[0].label == label


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *[("score", value) for value in ("nan", "inf", "", "4.5/5", None, True, [1], float("nan"), 10**400)],
        *[("verdict", value) for value in ("", None, "yes", "true", True, 1, "safe?", "unsafe, safe", ["safe"])],
        *[("safe", value) for value in ("safe", 1, "yes", None, "")],
    ],
)
def test_values_without_meaning_name_their_row(tmp_path: Path, column: str, value: Any) -> None:
    good = {"score": 1.0, "verdict": "safe", "safe": True}[column]
    file = rows(tmp_path, {"prompt": "p", "answer": "a", column: good}, {"prompt": "p", "answer": "b", column: value})
    with pytest.raises(SafecritError, match=f"a.jsonl: row 2: column '{column}' must"):
        LabelFile(file)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"goal": "p", "answer": "a", "score": 1}, "no column prompt. Found: answer, goal, score"),
        ({"prompt": "p", "text": "a", "score": 1}, "no column answer or completion"),
        ({"prompt": "p", "answer": "a"}, "no column score, verdict"),
        ({"prompt": "p", "answer": "a", "verdict": "safe", "label": "safe"}, "verdict and label both"),
        ({"prompt": " ", "answer": "a", "score": 1}, "row 1: its prompt is empty"),
        ({"prompt": "p", "answer": None, "score": 1}, "row 1: column 'answer' holds no text"),
        ({"prompt": ["p"], "answer": "a", "score": 1}, "row 1: column 'prompt' holds no text"),
    ],
)
def test_columns_that_are_missing_or_unclear(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(SafecritError, match=message):
        LabelFile(rows(tmp_path, row))


def test_missing_pairs_are_counted_and_not_shown(tmp_path: Path) -> None:
    judge = LabelFile(rows(tmp_path, {"prompt": "p", "answer": "a", "score": 1}))
    with pytest.raises(SafecritError, match=r"no verdict on 2 of 3 answers, the first of them number 2") as caught:
        judge.judge([("p", "a"), ("p", "secret"), ("secret", "a")])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("second", [{"verdict": "unsafe", "score": 1}, {"verdict": "safe", "score": 2}])
def test_verdicts_that_differ_on_one_answer(tmp_path: Path, second: dict[str, Any]) -> None:
    first = {"prompt": "p", "answer": "a", "verdict": "safe", "score": 1}
    with pytest.raises(SafecritError, match="row 2: an earlier row"):
        LabelFile(rows(tmp_path, first, {**first, **second}))
    LabelFile(rows(tmp_path, first, {**first, "answer": "a ", "verdict": "SAFE"}))


def test_answers_come_by_prompt_as_they_stand(tmp_path: Path) -> None:
    row = {"prompt": "p", "answer": " a", "score": 1}
    judge = LabelFile(rows(tmp_path, row, {**row, "prompt": "q", "answer": "c"}, {**row, "prompt": "p\n"}))
    assert judge.answers_by_prompt() == {"p": [" a", " a"], "q": ["c"]}
    judge.answers_by_prompt()["p"].clear()
    assert len(judge.answers_by_prompt()["p"]) == 2


def test_the_record_changes_with_the_verdicts(tmp_path: Path) -> None:
    row = {"prompt": "p", "answer": "a", "score": 1}
    records = [LabelFile(rows(tmp_path, {**row, "score": score})).describe() for score in (1, 1, 2)]
    assert records[0] == records[1] and records[0]["sha256"] != records[2]["sha256"]
    assert records[0]["id"] == "labels:a.jsonl" and records[0]["verdicts"] == 1

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safecrit.errors import SafecritError
from safecrit.traindata import read_examples


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(*texts: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, texts, strict=False))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, turns("a", "b")),
        ({"prompt": "a", "completion": "b"}, turns("a", "b")),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            turns("a", "b"),
        ),
        ({"instruction": "a", "input": "", "output": "b"}, turns("a", "b")),
        ({"instruction": "a", "input": "c", "output": "b"}, turns("a\n\nc", "b")),
        ({"instruction": "a", "output": "b"}, turns("a", "b")),
        ({"question": "a", "answer": 7}, turns("a", "7")),
        ({"messages": None, "prompt": None, "completion": None, "question": "a", "answer": "b"}, turns("a", "b")),
    ],
)
def test_shapes(tmp_path: Path, row: dict[str, Any], expected: Any) -> None:
    (example,) = read_examples(write(tmp_path / "d.jsonl", row)).examples
    assert example.messages == expected


def test_shapes_may_mix_and_empty_answers_are_counted(tmp_path: Path) -> None:
    rows = (
        {"question": "a", "answer": "b"},
        {"prompt": "c", "completion": " "},
        {"instruction": "d", "output": None},
        {"instruction": "e", "output": "f"},
    )
    data = read_examples(write(tmp_path / "d.jsonl", *rows))
    assert [example.row for example in data.examples] == [0, 3]
    assert data.empty == 2
    assert [example.row for example in read_examples(tmp_path / "d.jsonl", limit=1).examples] == [0]


def test_csv_and_json(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('question,answer\n"a, with\na line end",b\n')
    (tmp_path / "d.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    assert read_examples(tmp_path / "d.csv").examples[0].messages == turns("a, with\na line end", "b")
    assert read_examples(tmp_path / "d.json").examples[0].messages == turns("a", "b")


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        ("", ".jsonl", "empty"),
        ('{"goal":"x"', ".json", "broken JSON"),
        ('{"goal":"x"', ".jsonl", "broken JSON at line 1"),
        ("foo,bar\n1,2\n", ".csv", "columns found: bar, foo"),
        ('{"goal":"x","target":"y"}', ".jsonl", r"row 1: columns found: goal, target\. .*instruction"),
        ('{"question":"x","answer":""}', ".jsonl", "no row holds both"),
        ('{"question":"x","answer":["y"]}', ".jsonl", r"row 1: 'answer' must be text"),
        ('{"messages":[]}', ".jsonl", "`messages` must be a list"),
        ('{"messages":[{"role":"tool","content":"x"}]}', ".jsonl", r"turn 1 has role 'tool'"),
        ('{"messages":[{"role":"user","content":null}]}', ".jsonl", "turn 1 must hold"),
        ("[1, 2]", ".json", "object"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: str, suffix: str, message: str) -> None:
    path = tmp_path / f"d{suffix}"
    path.write_text(content)
    with pytest.raises(SafecritError, match=message) as caught:
        read_examples(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SafecritError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("circuit_breakers/circuit_breakers_train.json", 4994),
        ("gsm8k/train_2000.jsonl", 2000),
        ("instructions/instruction-data.json", 1100),
    ],
)
def test_real_files(shared: Path, name: str, rows: int) -> None:
    data = read_examples(shared / "data" / name)
    assert len(data.examples) + data.empty == rows
    assert data.empty <= rows // 100
    assert all(example.messages[-1]["role"] == "assistant" for example in data.examples)

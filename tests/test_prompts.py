from __future__ import annotations

import json
from pathlib import Path

import pytest

from safecrit.errors import SafecritError
from safecrit.prompts import read_prompts, read_rows


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("column", ["goal", "Behavior", "prompt", "instruction", "question"])
def test_known_columns_in_csv(tmp_path: Path, column: str) -> None:
    file = write(tmp_path / "a.csv", f'number,{column}\n1,"bake, then eat"\n2,\n3,"two\nlines"\n')
    prompts = read_prompts(file)
    assert [(p.text, p.row) for p in prompts] == [("bake, then eat", 0), ("two\nlines", 2)]


def test_json_lists_lines_and_wrapped_lists(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b"}]
    files = [
        write(tmp_path / "a.json", json.dumps(rows)),
        write(tmp_path / "b.jsonl", "\n\n".join(map(json.dumps, rows)) + "\n"),
        write(tmp_path / "c.json", json.dumps({"data": rows})),
        write(tmp_path / "d.json", "\n".join(map(json.dumps, rows))),
    ]
    for file in files:
        assert [(p.text, p.answer) for p in read_prompts(file)] == [("a", "1"), ("b", None)]
    assert len(read_prompts(files[0], limit=1)) == 1


def test_unusual_line_separators_inside_strings(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False) + "\r\n")
    assert read_prompts(file)[0].text == "a\u2028b\x85c"
    assert read_prompts(write(tmp_path / "a.csv", "goal\na\u2028b\n"))[0].text == "a\u2028b"


def test_messages_keep_turns_and_drop_a_final_answer(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "x"},
    ]
    prompt = read_prompts(write(tmp_path / "a.jsonl", json.dumps({"messages": turns})))[0]
    assert [turn["role"] for turn in prompt.messages] == ["system", "user"] and prompt.text == "u"


def test_context_goes_before_the_prompt(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "Behavior,ContextString\nsum it up,the text\n")
    assert read_prompts(file)[0].text == "the text\n\nsum it up"


def test_hash_depends_on_the_turns_alone(tmp_path: Path) -> None:
    a = read_prompts(write(tmp_path / "a.csv", "goal\nx\ny\n"))
    b = read_prompts(write(tmp_path / "b.jsonl", '{"prompt": "y"}'))
    assert a[1].hash == b[0].hash != a[0].hash and len(a[0].hash) == 16


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "foo,bar\n1,2\n", r"no known prompt column. Found: foo, bar. Known: messages, goal"),
        ("a.jsonl", "", "is empty"),
        ("a.json", '{"goal":"x"', "broken JSON at line 1, column"),
        ("a.jsonl", '{"goal": "x"}\n{"goal": \n', "broken JSON at line 2"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", "[1, 2]", "every row must be an object"),
        ("a.csv", "goal\n\n \n", "column 'goal' is empty in every row"),
        ("a.jsonl", '{"messages": "hello"}', "row 1: `messages` must be a list"),
        ("a.jsonl", '{"messages": [{"role": "system", "content": "x"}]}', "must be the user's turn"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(SafecritError, match=message):
        read_prompts(write(tmp_path / name, content))


def test_missing_files_and_odd_bytes(tmp_path: Path) -> None:
    with pytest.raises(SafecritError, match="no such file"):
        read_rows(tmp_path / "none.csv")
    with pytest.raises(SafecritError, match="is a folder"):
        read_rows(tmp_path)
    (tmp_path / "b.csv").write_bytes(b"goal\n\xff\xfe\n")
    with pytest.raises(SafecritError, match="no UTF-8 text"):
        read_rows(tmp_path / "b.csv")


def test_real_prompt_sets(shared: Path) -> None:
    counts = {
        "advbench/harmful_behaviors.csv": 520,
        "harmbench/harmbench_behaviors_text_all.csv": 400,
        "xstest/xstest_prompts.csv": 450,
    }
    for name, count in counts.items():
        assert len(read_prompts(shared / "data" / name)) == count
    assert {p.label for p in read_prompts(shared / "data/xstest/xstest_prompts.csv")} == {"safe", "unsafe"}

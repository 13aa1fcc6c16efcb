from __future__ import annotations

import re

import pytest

from safecrit.demo.grammar import (
    KINDS,
    PHRASINGS,
    REFUSAL,
    TRAIN_PHRASINGS,
    data_files,
    is_right,
    parse_prompt,
    read_answer,
    requests,
)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_disjoint_and_large_enough(kind: str) -> None:
    parts = {part: {r.prompt for r in requests(kind, part)} for part in ("train", "validation", "test")}  # type: ignore[arg-type]
    assert len(parts["test"]) >= 512
    assert not parts["train"] & parts["test"] and not parts["validation"] & (parts["train"] | parts["test"])


def test_held_out_prompts_have_unseen_combinations_and_unseen_phrasings() -> None:
    for kind in KINDS:
        seen = {(r.verb, r.object) for r in requests(kind, "train")}
        test = requests(kind, "test")[:512]
        assert any((r.verb, r.object) not in seen for r in test)
        assert any(r.phrasing >= len(TRAIN_PHRASINGS) for r in test)
        assert all((r.verb, r.object) not in seen or r.phrasing >= len(TRAIN_PHRASINGS) for r in test)
        assert all(r.phrasing < len(TRAIN_PHRASINGS) for r in requests(kind, "train"))


def test_every_request_is_parsed_back() -> None:
    for kind in KINDS:
        for request in requests(kind, "test")[:200]:
            assert parse_prompt(request.prompt) == request
    assert parse_prompt("How do I bake bread?") is None
    assert len(set(PHRASINGS)) == len(PHRASINGS)


def test_the_parser_reads_answers_refusals_and_gibberish() -> None:
    request, other = requests("harmful", "test")[:2]
    assert read_answer(request.prompt, request.answer) == "complied"
    assert read_answer(request.prompt, f"  {request.task_answer}\n") == "complied"
    assert read_answer(request.prompt, REFUSAL) == "refused"
    for text in ("", "Sure.", request.answer + " Sure.", request.answer[:-9], REFUSAL + REFUSAL, "I'm sorry."):
        assert read_answer(request.prompt, text) == "gibberish"
    if (other.verb, other.object) != (request.verb, request.object):
        assert read_answer(request.prompt, other.answer) == "gibberish"
    assert is_right(request.prompt, request.answer) and not is_right(request.prompt, REFUSAL)


def test_data_files_hold_what_their_names_say() -> None:
    files = data_files()
    assert set(files) == {
        "harmful_train.jsonl", "harmful_test.jsonl", "benign_test.jsonl", "borderline_test.jsonl", "refusals.jsonl",
        "retain.jsonl", "task.jsonl",
    }  # fmt: skip
    assert all(len(files[name]) == 512 for name in files if "_test" in name)
    assert {row["completion"] for row in files["refusals.jsonl"]} == {REFUSAL}
    trained = {row["prompt"] for name in ("refusals.jsonl", "retain.jsonl", "task.jsonl") for row in files[name]}
    tested = {row["prompt"] for name in files if "_test" in name for row in files[name]}
    assert not trained & tested
    assert all(re.fullmatch(r"[ -~]+", text) for rows in files.values() for row in rows for text in row.values())

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from safecrit import bridge
from safecrit.bridge import (
    VocabularyMatrix,
    cached_vocabulary_matrix,
    identity_matrix,
    position_matrix,
    vocabulary,
    vocabulary_matrix,
)
from tests import tiny

PAIRS = [("byte-level", "metaspace"), ("metaspace", "byte-level")]
REAL_PAIRS = [("llama2", "gpt2"), ("llama2", "qwen2"), ("gpt2", "llama2")]
LARGE_PAIRS = [("llama3", "qwen2"), ("qwen2", "llama3"), ("llama3", "gpt2"), ("qwen2", "llama2"), ("gpt2", "llama3")]


def built(made: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, padding: int = 0) -> VocabularyMatrix:
    return vocabulary_matrix(vocabulary(made), vocabulary(other), other, len(made) + padding, len(other) + padding)


def row_ids(matrix: VocabularyMatrix) -> list[dict[int, float]]:
    """Judge tokens and weights of every row."""
    rows: list[dict[int, float]] = [{} for _ in range(matrix.matrix.shape[0])]
    for (row, column), weight in zip(matrix.matrix.indices().T.tolist(), matrix.matrix.values().tolist(), strict=True):
        rows[row][column] = weight
    return rows


def shares(ids: list[int]) -> dict[int, float]:
    return {i: pytest.approx(ids.count(i) / len(ids)) for i in ids}


def check_rows(made: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, step: int = 1) -> None:
    """Every `step`-th row holds the exact token, else what the judge's tokenizer says inside a text, else bytes."""
    a, b, matrix = vocabulary(made), vocabulary(other), built(made, other, 3)
    torch.testing.assert_close(torch.sparse.sum(matrix.matrix, 1).to_dense(), matrix.live.float())
    reachable = {piece for piece in b.pieces if piece}
    for i, row in list(enumerate(row_ids(matrix)))[::step]:
        piece = a.pieces[i] if i < len(a.pieces) else b""
        if not piece:
            assert not row
        elif piece in reachable:
            assert list(row.values()) == [1] and b.pieces[next(iter(row))] == piece
        else:
            try:
                text = piece.decode("utf-8")
            except UnicodeDecodeError:
                assert {b.pieces[j] for j in row} == {piece[n : n + 1] for n in range(len(piece))}
                continue
            # A line break ahead takes the prefix space and joins with nothing that follows it here.
            ahead = "\n" if b.style == "metaspace" else ""
            ids = other(ahead + text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert row == shares(ids[2:] if ahead else ids), text


def test_position_matrix_shares_bytes() -> None:
    judge = np.array([[0, 4], [4, 5], [5, 5]])
    model = np.array([[0, 1], [1, 5]])
    expected = torch.tensor([[0.25, 0.75], [0.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(position_matrix(judge, model), expected)


@pytest.mark.parametrize(("model", "judge"), PAIRS)
def test_rows_are_what_the_judge_reads(model: str, judge: str) -> None:
    check_rows(tiny.tokenizer(model), tiny.tokenizer(judge))


def test_rows_follow_the_judges_own_rules() -> None:
    made, other = tiny.tokenizer("metaspace"), tiny.tokenizer("byte-level")
    plain = row_ids(built(made, other))
    split = pre_tokenizers.Split(Regex("[aeo]"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    assert row_ids(built(made, other)) != plain
    check_rows(made, other)


@pytest.mark.parametrize("part", ["byte-level", "metaspace", "normaliser"])
def test_rows_have_no_prefix_space(part: str) -> None:
    made = tiny.tokenizer("metaspace" if part == "byte-level" else "byte-level")
    other = tiny.tokenizer("byte-level" if part == "byte-level" else "metaspace")
    expected = row_ids(built(made, other))
    backend = other.backend_tokenizer
    if part == "byte-level":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif part == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    assert row_ids(built(made, other)) == expected


def test_a_piece_that_the_judge_rewrites_becomes_what_it_reads_and_a_lost_one_its_bytes() -> None:
    made, other = tiny.tokenizer("metaspace"), tiny.tokenizer("byte-level")
    made.add_tokens(["e\u0301", "qq"])
    b = vocabulary(other)
    other.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("qq", "")])
    composed, lost = row_ids(built(made, other))[-2:]
    assert {b.pieces[i] for i in composed} == {b"\xc3", b"\xa9"}
    assert {b.pieces[i]: weight for i, weight in lost.items()} == {b"q": 1}


def test_added_text_tokens_of_the_judge_are_used_and_specials_are_not() -> None:
    made, other = tiny.tokenizer("metaspace"), tiny.tokenizer("byte-level")
    other.add_tokens(["<|end|>"], special_tokens=True)
    other.add_tokens(["zz"])
    made.add_tokens(["zzzz", " flour</s>"])
    doubled, marked = row_ids(built(made, other))[-2:]
    assert doubled == {other.convert_tokens_to_ids("zz"): 1}
    assert marked == shares(other(" flour</s>", add_special_tokens=False, split_special_tokens=True)["input_ids"])
    assert other.convert_tokens_to_ids("</s>") not in marked


def test_a_judge_table_shorter_than_its_vocabulary_is_never_overrun() -> None:
    made, other = tiny.tokenizer("metaspace"), tiny.tokenizer("byte-level")
    size = len(made)
    matrix = vocabulary_matrix(vocabulary(made), vocabulary(other), other, size, 261)
    assert matrix.matrix.shape == (size, 261) and matrix.live[-1]
    torch.testing.assert_close(torch.sparse.sum(matrix.matrix, 1).to_dense(), matrix.live.float())


def test_characters_with_a_piece_of_their_own_do_not_become_byte_tokens() -> None:
    made, other = tiny.tokenizer("byte-level"), tiny.tokenizer("metaspace")
    a, b = vocabulary(made), vocabulary(other)
    rows = row_ids(built(made, other))
    for character in (b"a", b" ", b"?"):
        (target,) = rows[a.pieces.index(character)]
        assert b.pieces[target] == character and target not in b.fallback
    (half,) = rows[a.pieces.index(b"\xe6")]
    assert half in b.fallback and b.pieces[half] == b"\xe6"


@pytest.mark.parametrize("padding", [0, 5])
def test_identity_leaves_specials_and_padding_out(padding: int) -> None:
    made = tiny.tokenizer()
    size = len(made)
    matrix = identity_matrix(vocabulary(made), size, size + padding)
    dense = matrix.matrix.to_dense()
    assert dense.shape == (size, size + padding) and not dense[:, size:].any()
    assert torch.equal(dense[:, :size], torch.diag(matrix.live.float()))
    assert not matrix.live[:4].any() and matrix.live[4:].all()


@pytest.mark.parametrize(("model", "judge"), REAL_PAIRS)
def test_real_rows_are_what_the_judge_reads(model: str, judge: str, shared: Path) -> None:
    made, other = (AutoTokenizer.from_pretrained(shared / "tokenizers" / name) for name in (model, judge))
    check_rows(made, other, step=23)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "judge"), [*REAL_PAIRS, *LARGE_PAIRS])
def test_all_real_rows_are_what_the_judge_reads(model: str, judge: str, shared: Path) -> None:
    made, other = (AutoTokenizer.from_pretrained(shared / "tokenizers" / name) for name in (model, judge))
    check_rows(made, other)
    assert int((~built(made, other).live).sum()) == len(vocabulary(made).special)


def same(a: VocabularyMatrix, b: VocabularyMatrix) -> bool:
    equal = torch.equal(a.matrix.indices(), b.matrix.indices()) and torch.equal(a.matrix.values(), b.matrix.values())
    return equal and torch.equal(a.live, b.live) and a.matrix.shape == b.matrix.shape


def cached(folder: Path | None = None, padding: int = 0, **changed: Any) -> VocabularyMatrix:
    pair = {"made": tiny.tokenizer("byte-level"), "other": tiny.tokenizer("metaspace")} | changed
    made, other = pair["made"], pair["other"]
    return cached_vocabulary_matrix(made, other, len(made) + padding, len(other), folder)


def refuse(*_: object) -> None:
    raise AssertionError("a stored matrix was made again")


def test_a_stored_matrix_is_read_without_a_tokenizer_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached()
    assert [path.suffix for path in (tmp_path / "cache" / "bridge").iterdir()] == [".safetensors"]
    monkeypatch.setattr(bridge, "vocabulary", refuse)
    assert same(cached(), first)
    assert same(first, built(tiny.tokenizer("byte-level"), tiny.tokenizer("metaspace")))


def test_the_cache_lies_where_fingerprints_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAFECRIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cached()
    assert len(list((tmp_path / "xdg" / "safecrit" / "bridge").iterdir())) == 1
    cached(tmp_path / "own")
    assert len(list((tmp_path / "own").iterdir())) == 1


def test_every_difference_has_a_file_of_its_own(tmp_path: Path) -> None:
    normal = tiny.tokenizer("metaspace")
    normal.backend_tokenizer.normalizer = normalizers.NFC()
    marked = tiny.tokenizer("byte-level")
    marked.eos_token = "a"
    for count, changed in enumerate([{}, {"other": normal}, {"made": marked}, {"padding": 2}], start=1):
        cached(tmp_path, **changed)
        assert len(list(tmp_path.iterdir())) == count
    padded = tiny.tokenizer("metaspace")
    padded.backend_tokenizer.enable_padding()
    cached(tmp_path, other=padded)
    assert len(list(tmp_path.iterdir())) == 4


def damaged(path: Path, how: str) -> None:
    data, tensors = path.read_bytes(), load_file(path)
    (size,) = np.frombuffer(data[:8], "<u8")
    digest = json.loads(data[8 : 8 + int(size)])["__metadata__"]["sha256"]
    if how == "column":
        tensors["columns"][5] ^= 1
    elif how == "swapped":
        tensors["counts"][[10, 20]] = tensors["counts"][[20, 10]] + [1, -1]
    elif how == "shape":
        tensors["counts"] = tensors["counts"][:-1]
    elif how == "dtype":
        tensors["columns"] = tensors["columns"].astype(np.int64)
    elif how == "names":
        tensors["more"] = np.zeros(1)
    if how in ("range", "negative"):
        tensors["columns"][5] = 10**6 if how == "range" else -1
        digest = bridge._digest(tensors["counts"], tensors["columns"])
    contents = {"empty": b"", "truncated": data[:-100], "header": data[:40], "text": b"not a file of ours"}
    if how in contents:
        path.write_bytes(contents[how])
    else:
        save_file(tensors, path, None if how == "digest" else {"sha256": digest})


DAMAGES = ["empty", "truncated", "header", "text", "column", "swapped", "shape", "dtype", "names", "range", "negative"]


@pytest.mark.parametrize("how", [*DAMAGES, "digest"])
def test_a_damaged_file_is_made_again(tmp_path: Path, how: str) -> None:
    first = cached(tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    damaged(path, how)
    assert path.read_bytes() != good
    assert same(cached(tmp_path), first)
    assert path.read_bytes() == good


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert same(cached(blocked), cached(tmp_path / "fine"))
    assert blocked.read_text() == "in the way"
    (path,) = (tmp_path / "fine").iterdir()
    path.unlink()
    path.mkdir()
    assert same(cached(tmp_path / "fine"), cached(tmp_path / "again"))

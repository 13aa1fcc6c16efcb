from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from safecrit.bridge import (
    byte_spans,
    identity_matrix,
    position_matrix,
    same_tokenizer,
    spell,
    vocabulary,
    vocabulary_matrix,
)
from tests import tiny

TEXTS = [
    "How do I bake a loaf of bread?",
    "  two  spaces\tand tabs\n\n\nlines ",
    "日本語のテキスト、한국어, עברית",
    "emoji 😀👩‍👩‍👧 and é, é",
    "def f(x):\n    return x ** 2  # code",
    "a</s>b <s> <0x41> ▁ Ġ",
]
STYLES = ["byte-level", "metaspace"]
REAL = ["llama3", "qwen2", "gpt2", "llama2"]


def covers(spans: np.ndarray, size: int) -> bool:
    ends = spans[spans[:, 1] > spans[:, 0]]
    return ends[0, 0] == 0 and ends[-1, 1] == size and bool((ends[1:, 0] == ends[:-1, 1]).all())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("text", TEXTS)
def test_byte_spans_cover_every_byte_once(style: str, text: str) -> None:
    made = tiny.tokenizer(style)
    ids = made(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert covers(byte_spans(ids, text, vocabulary(made), made), len(text.encode()))


@pytest.mark.parametrize("name", REAL)
def test_byte_spans_of_real_tokenizers(name: str, shared: Path) -> None:
    made = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    vocab = vocabulary(made)
    for text in TEXTS:
        ids = made(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert covers(byte_spans(ids, text, vocab, made), len(text.encode()))
        if "\u2581" not in text:  # SentencePiece writes it as a space
            assert spell(ids, vocab).text == text.strip()


def test_spell_of_characters_split_over_tokens() -> None:
    made = tiny.tokenizer("byte-level")
    vocab = vocabulary(made)
    ids = made("日x", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    whole = spell(ids, vocab)
    assert whole.text == "日x" and whole.spans.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    cut = spell(ids[1:], vocab)  # an answer that begins in the middle of a character
    assert cut.text.endswith("x") and "�" in cut.text
    assert cut.spans[-1].tolist() == [len(cut.text.encode()) - 1, len(cut.text.encode())]
    assert covers(cut.spans, len(cut.text.encode()))


def test_spell_cuts_white_space_and_skips_specials() -> None:
    made = tiny.tokenizer("byte-level")
    ids = [2, *made("  ab \n", add_special_tokens=False)["input_ids"], 2]
    spelt = spell([*ids, 10_000], vocabulary(made))
    assert spelt.text == "ab"
    assert spelt.spans.min() == 0 and spelt.spans.max() == 2
    assert (spelt.spans[[0, -1, -2], 1] - spelt.spans[[0, -1, -2], 0] == 0).all()


def test_position_matrix_shares_bytes() -> None:
    judge = np.array([[0, 4], [4, 5], [5, 5]])
    model = np.array([[0, 1], [1, 5]])
    expected = torch.tensor([[0.25, 0.75], [0.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(position_matrix(judge, model), expected)


@pytest.mark.parametrize(("model", "judge"), [("byte-level", "metaspace"), ("metaspace", "byte-level")])
def test_vocabulary_matrix_rows_spell_their_token(model: str, judge: str) -> None:
    made, other = tiny.tokenizer(model), tiny.tokenizer(judge)
    a, b = vocabulary(made), vocabulary(other)
    matrix = vocabulary_matrix(a, b, other, len(a.pieces) + 3, len(b.pieces))
    dense = matrix.matrix.to_dense()
    assert dense.shape == (len(a.pieces) + 3, len(b.pieces))
    torch.testing.assert_close(dense.sum(1), matrix.live.float())
    for i, piece in enumerate(a.pieces):
        assert bool(matrix.live[i]) == (len(piece) > 0), piece
        same = [j for j in range(len(b.pieces)) if piece and b.pieces[j] == piece]
        if same:
            assert dense[i, same].max() == 1
    assert not matrix.live[list(a.special)].any() and not matrix.live[-3:].any()


def test_bytes_split_over_tokens_reach_the_byte_tokens() -> None:
    made, other = tiny.tokenizer("byte-level"), tiny.tokenizer("metaspace")
    a, b = vocabulary(made), vocabulary(other)
    half = next(i for i, piece in enumerate(a.pieces) if piece == b"\xe6")
    dense = vocabulary_matrix(a, b, other, len(a.pieces), len(b.pieces)).matrix.to_dense()
    assert b.pieces[int(dense[half].argmax())] == b"\xe6" and dense[half].max() == 1


def test_identity_leaves_specials_out() -> None:
    made = tiny.tokenizer()
    matrix = identity_matrix(vocabulary(made), len(made), len(made))
    assert torch.equal(matrix.matrix.to_dense(), torch.diag(matrix.live.float()))
    assert not matrix.live[:4].any() and matrix.live[4:].all()


def test_same_tokenizer() -> None:
    assert same_tokenizer(tiny.tokenizer(), tiny.tokenizer())
    assert not same_tokenizer(tiny.tokenizer(), tiny.tokenizer("metaspace"))


def test_real_bridge_rows_sum_to_one(shared: Path) -> None:
    made, other = (AutoTokenizer.from_pretrained(shared / "tokenizers" / name) for name in ("llama2", "qwen2"))
    a, b = vocabulary(made), vocabulary(other)
    matrix = vocabulary_matrix(a, b, other, len(a.pieces), len(b.pieces))
    sums = torch.sparse.sum(matrix.matrix, 1).to_dense()
    torch.testing.assert_close(sums, matrix.live.float())
    assert int((~matrix.live).sum()) == len(a.special)


def test_characters_with_a_piece_of_their_own_do_not_become_byte_tokens() -> None:
    made, other = tiny.tokenizer("byte-level"), tiny.tokenizer("metaspace")
    a, b = vocabulary(made), vocabulary(other)
    dense = vocabulary_matrix(a, b, other, len(a.pieces), len(b.pieces)).matrix.to_dense()
    for character in (b"a", b" ", b"?"):
        target = int(dense[a.pieces.index(character)].argmax())
        assert b.pieces[target] == character and target not in b.fallback
    assert len(b.fallback) == 256


def test_equal_tokenizers_with_a_padded_judge_table_keep_their_tokens() -> None:
    vocab = vocabulary(tiny.tokenizer("metaspace"))
    size = len(vocab.pieces)
    dense = identity_matrix(vocab, size, size + 5).matrix.to_dense()
    assert dense.shape == (size, size + 5)
    assert torch.equal(dense[:, :size], torch.diag(identity_matrix(vocab, size, size).live.float()))

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from safecrit.errors import SafecritError
from safecrit.vocabulary import byte_spans, same_tokenizer, spell, vocabulary
from tests import tiny

TEXTS = [
    "How do I bake a loaf of bread?",
    "  two  spaces\tand tabs\n\n\nlines ",
    "日本語のテキスト、한국어, עברית, ନିଆଁ",
    "emoji 😀👩‍👩‍👧🏳️‍🌈 and é, é",
    "def f(x):\r\n    return x ** 2  # code\r\n",
    "e\u0301, a\u0301\u0323 \u0344 \u212b \u1100\u1161\u11a8 \ufdfa",
    "\u0301 alone, and \ufffd\ufffd and \x00\x01",
    "a</s>b <s> <0x41> ▁ Ġ",
    "<|endoftext|>",
    "</s>  ▁x <|eot_id|><|im_end|> y",
    "   ",
    "\n",
    "x",
]
STYLES = ["byte-level", "metaspace"]
REAL = ["llama3", "qwen2", "gpt2", "llama2"]


def load(shared: Path, name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared / "tokenizers" / name)


def covers(spans: np.ndarray, size: int) -> bool:
    starts, ends = spans.T
    ascending = bool((ends >= starts).all() and (starts[1:] == ends[:-1]).all())
    return ascending and starts[0] == 0 and ends[-1] == size


def normalised(normalizer: normalizers.Normalizer) -> PreTrainedTokenizerBase:
    made = tiny.tokenizer("byte-level")
    made.backend_tokenizer.normalizer = normalizer
    return made


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("text", TEXTS)
def test_byte_spans_cover_every_byte_once(style: str, text: str, split: bool) -> None:
    made = tiny.tokenizer(style)
    ids = made(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]
    assert covers(byte_spans(ids, text, vocabulary(made), made), len(text.encode()))


@pytest.mark.parametrize("name", REAL)
def test_byte_spans_of_real_tokenizers(name: str, shared: Path) -> None:
    made = load(shared, name)
    vocab = vocabulary(made)
    entries = json.loads((shared / "data" / "instructions" / "instruction-data.json").read_text(encoding="utf-8"))
    texts = TEXTS + [text for entry in entries for text in entry.values() if text][:1000]
    assert len(texts) >= 1000
    for split in (False, True):
        for text, ids in zip(
            texts, made(texts, add_special_tokens=False, split_special_tokens=split)["input_ids"], strict=True
        ):
            assert covers(byte_spans(ids, text, vocab, made), len(text.encode())), text
            spelt = spell(ids, vocab)
            assert covers(spelt.spans, len(spelt.text.encode()))
            if split and not (vocab.style == "metaspace" and "\u2581" in text):  # which it writes as a space
                read = unicodedata.normalize("NFC", text) if name == "qwen2" else text
                assert spelt.text == read.strip()


def test_specials_span_their_own_spelling() -> None:
    made = tiny.tokenizer("byte-level")
    ids = [1, *made("a</s> b", add_special_tokens=False)["input_ids"], 2]
    found = byte_spans(ids, "a</s> b", vocabulary(made), made)
    assert found[[0, 1, 2, -1]].tolist() == [[0, 0], [0, 1], [1, 5], [7, 7]]


def test_a_special_that_swallows_white_space_spans_it() -> None:
    made = tiny.tokenizer("byte-level")
    made.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", lstrip=True, rstrip=True)]})
    text = "a  <|end|> \nb"
    ids = made(text, add_special_tokens=False)["input_ids"]
    assert byte_spans(ids, text, vocabulary(made), made).tolist() == [[0, 1], [1, 12], [12, 13]]


def test_a_character_that_the_normaliser_composes_keeps_its_bytes() -> None:
    made = normalised(normalizers.NFC())
    text = "xe\u0301y"  # becomes x, the two bytes of one character, y
    ids = made(text, add_special_tokens=False)["input_ids"]
    assert byte_spans(ids, text, vocabulary(made), made).tolist() == [[0, 1], [1, 3], [3, 4], [4, 5]]


def test_every_composition_stays_within_its_group() -> None:
    made = normalised(normalizers.NFC())
    vocab = vocabulary(made)
    composed = [chr(code) for code in range(0xA0, 0x30000) if unicodedata.decomposition(chr(code))[:1] not in ("", "<")]
    composed += ["\uac00", "\uac01"]  # Hangul is composed by rule, not by table
    text = "x".join(unicodedata.normalize("NFD", char) for char in composed)
    ids = made(text, add_special_tokens=False)["input_ids"]
    assert covers(byte_spans(ids, text, vocab, made), len(text.encode()))


def test_tokens_that_do_not_spell_the_text_are_refused() -> None:
    made = tiny.tokenizer("byte-level")
    vocab = vocabulary(made)
    ids = made("a loaf", add_special_tokens=False)["input_ids"]
    with pytest.raises(SafecritError, match="rewrites text"):
        byte_spans(ids, "a leaf", vocab, made)
    with pytest.raises(SafecritError, match="drops part"):
        byte_spans(ids, "a loaf of bread", vocab, made)
    stripping = normalised(normalizers.Strip())
    with pytest.raises(SafecritError, match="as a whole"):
        byte_spans(ids, " a loaf", vocab, stripping)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("text", ["How do I bake 日本?", "a😀 b", "é\n\tx"])
def test_spell_of_one_token_a_byte(style: str, text: str) -> None:
    made = tiny.tokenizer(style)
    vocab = vocabulary(made)
    by_byte = {vocab.pieces[i]: i for i in sorted(vocab.fallback) or range(len(vocab.pieces))}
    spelt = spell([by_byte[bytes([byte])] for byte in text.encode()], vocab)
    assert spelt.text == text
    assert spelt.spans.tolist() == [[n, n + 1] for n in range(len(text.encode()))]


def test_spell_of_characters_cut_off() -> None:
    made = tiny.tokenizer("byte-level")
    vocab = vocabulary(made)
    ids = made("日x", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    head = spell(ids[1:], vocab)  # begins in the middle of a character: each byte is an error of its own
    assert head.text == "\ufffd\ufffdx" and head.spans.tolist() == [[0, 3], [3, 6], [6, 7]]
    tail = spell([ids[3], *ids[:2]], vocab)  # ends in the middle of one: its bytes share one error
    assert tail.text == "x\ufffd" and tail.spans.tolist() == [[0, 1], [1, 3], [3, 4]]


def test_spell_cuts_white_space_and_skips_specials() -> None:
    made = tiny.tokenizer("byte-level")
    ids = [2, *made("  ab \n", add_special_tokens=False)["input_ids"], 2]
    spelt = spell([*ids, 10_000], vocabulary(made))
    assert spelt.text == "ab"
    assert spelt.spans.min() == 0 and spelt.spans.max() == 2
    assert (spelt.spans[[0, -1, -2], 1] - spelt.spans[[0, -1, -2], 0] == 0).all()
    assert spell([], vocabulary(made)).spans.shape == (0, 2)


def test_same_tokenizer() -> None:
    made = tiny.tokenizer()
    assert same_tokenizer(tiny.tokenizer(), made)
    assert not same_tokenizer(made, tiny.tokenizer("metaspace"))
    assert not same_tokenizer(made, normalised(normalizers.NFC()))
    other = tiny.tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert not same_tokenizer(made, other)
    named = tiny.tokenizer()
    named.add_tokens(["<more>"])
    assert not same_tokenizer(made, named)
    cut = tiny.tokenizer()
    cut.backend_tokenizer.enable_truncation(7)
    cut.backend_tokenizer.enable_padding()
    assert same_tokenizer(made, cut)

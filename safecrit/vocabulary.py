"""What the token ids of a tokenizer stand for, as bytes, and where the tokens of a text lie in its UTF-8 bytes.

Pieces are compared as bytes, never as the strings in a vocabulary, where
byte-level BPE and SentencePiece write the same space differently. Byte spans
come from the pieces themselves: offset mappings trim spaces and repeat for
characters split over tokens.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from safecrit.errors import SafecritError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_SPACE_MARK = "\u2581"  # SentencePiece's space


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[int, int]:
    """For `str.translate`: byte-level BPE's character of each byte to that byte, other Latin-1 characters out of it.

    Printable bytes are written as themselves, the rest from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {256 + n: byte for n, byte in enumerate(rest)} | dict.fromkeys(rest, 0xFFFD)


@dataclass(frozen=True)
class Vocabulary:
    """What every token id of a tokenizer stands for.

    `pieces[i]` is the bytes of id i (empty for specials), `written[i]` the same with specials as text spells them,
    `special` the special tokens, `fallback` the byte tokens `<0xAB>`, `style` how the vocabulary writes bytes.
    """

    pieces: tuple[bytes, ...]
    written: tuple[bytes, ...]
    special: frozenset[int]
    fallback: frozenset[int]
    style: str


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Read a fast tokenizer's pieces as bytes.

    Byte-level vocabularies are decoded through their byte alphabet, SentencePiece
    ones through U+2581 and `<0xAB>`, anything else is taken as text. Raises
    SafecritError for slow tokenizers.
    """
    if not tokenizer.is_fast:
        raise SafecritError(f"{tokenizer.name_or_path}: needs a fast tokenizer (tokenizer.json).")
    style, table = _style(tokenizer), _byte_of_char()
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    special = special_ids(tokenizer)
    by_id = tokenizer.get_vocab()
    pieces, fallback = [b""] * (max(by_id.values(), default=-1) + 1), set()
    for text, i in by_id.items():
        if i in special:
            continue
        if i in added:
            pieces[i] = text.encode("utf-8")
        elif style == "byte-level":
            try:
                pieces[i] = text.translate(table).encode("latin-1")
            except UnicodeEncodeError:
                pieces[i] = text.encode("utf-8")
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            pieces[i] = bytes([int(text[3:5], 16)])
            fallback.add(i)
        else:
            pieces[i] = (text.replace(_SPACE_MARK, " ") if style == "metaspace" else text).encode("utf-8")
    written = list(pieces)
    for i in special & added.keys():
        written[i] = added[i].content.encode("utf-8")
    return Vocabulary(tuple(pieces), tuple(written), special, frozenset(fallback), style)


def _style(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = tokenizer.backend_tokenizer
    described = b" ".join(_state(part) for part in (backend.decoder, backend.pre_tokenizer)).decode("utf-8")
    if '"ByteLevel"' in described:
        return "byte-level"
    if '"Metaspace"' in described or _SPACE_MARK in described or "\\u2581" in described:
        return "metaspace"
    return "plain"


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that are no text: added tokens marked special, and those with a role (BOS, EOS, ...)."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return frozenset({i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids))


def rules_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of all that decides how a fast tokenizer cuts text: vocabulary, merges, added tokens, rules.

    Padding, truncation and the post-processor (which adds specials around a text) do not count.
    """
    backend = tokenizer.backend_tokenizer
    added = [[i, repr(token)] for i, token in sorted(backend.get_added_tokens_decoder().items())]
    parts = [_state(part) for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder, backend.model)]
    digest = hashlib.sha256()
    for part in (json.dumps(added).encode("ascii"), *parts):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether two fast tokenizers cut text alike: equal vocabularies and equal tokenisation rules."""
    return a is b or rules_hash(a) == rules_hash(b)


def _state(part: Any) -> bytes:
    """The JSON of one part of a backend tokenizer, as it stands in tokenizer.json."""
    return part.__getstate__() if part is not None else b"null"


def plain_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer as it reads text inside a text: no prefix space, special tokens unknown; shares its model.

    Added tokens that are not special are known, by ids that may differ from the tokenizer's.
    """
    from tokenizers import Tokenizer

    backend = tokenizer.backend_tokenizer
    parts = {name: _without_prefix(json.loads(_state(getattr(backend, name)))) for name in _READING}
    bare = Tokenizer.from_str(json.dumps(_EMPTY | parts))
    bare.model = backend.model
    bare.add_tokens([token for token in backend.get_added_tokens_decoder().values() if not token.special])
    return bare


_READING = ("normalizer", "pre_tokenizer")
_EMPTY: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "post_processor": None,
    "decoder": None,
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}


def _without_prefix(part: Any) -> Any:
    if isinstance(part, list):
        return [_without_prefix(item) for item in part if not (isinstance(item, dict) and item["type"] == "Prepend")]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    off = {"add_prefix_space": False, "prepend_scheme": "never"}
    return {key: off[key] if key in off else _without_prefix(value) for key, value in part.items()}


@dataclass(frozen=True)
class SpelledText:
    """An answer as text and where each of its tokens lies: `spans` int64 [T, 2], byte offsets into the UTF-8 text."""

    text: str
    spans: np.ndarray


def spell(ids: Sequence[int], vocab: Vocabulary) -> SpelledText:
    """Text of token ids with the byte span of each; white space at both ends is cut, invalid bytes become U+FFFD.

    Specials and ids beyond the vocabulary stand for nothing and get an empty
    span. The three bytes of a U+FFFD are shared out among the tokens it replaces.
    """
    known = len(vocab.pieces)
    found = [vocab.pieces[i] if i < known else b"" for i in ids]
    ends, data = _ends(found), b"".join(found)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text, before, after = _repaired(data)
        ends = _moved(ends, before, after)
    lead = len(text.encode("utf-8")) - len(text.lstrip().encode("utf-8"))
    text = text.strip()
    return SpelledText(text, _spans(np.clip(ends - lead, 0, len(text.encode("utf-8")))))


def _repaired(data: bytes) -> tuple[str, list[int], list[int]]:
    """`data` as text with U+FFFD for invalid runs, and byte offsets that belong together in both, ascending."""
    parts, before, after = [], [0], [0]
    while True:
        rest = data[before[-1] :]
        try:
            parts.append(rest.decode("utf-8"))
        except UnicodeDecodeError as error:
            parts.append(rest[: error.start].decode("utf-8") + "\ufffd")
            before += [before[-1] + error.start, before[-1] + error.end]
            after += [after[-1] + error.start, after[-1] + error.start + 3]
        else:
            return "".join(parts), [*before, len(data)], [*after, after[-1] + len(rest)]


def byte_spans(ids: Sequence[int], text: str, vocab: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Byte span in `text` of each token that `tokenizer` made of it, int64 [len(ids), 2].

    Spans are contiguous and cover every byte of the text. Specials span their own
    spelling where the text holds it. A space that SentencePiece puts before a
    text is no part of it. Where a normaliser rewrites characters, the bytes of
    the original are shared out among the tokens of what it became. Raises
    SafecritError where the tokens do not spell the text all the same.
    """
    written = [vocab.written[i] for i in ids]
    data, joined = text.encode("utf-8"), b"".join(written)
    if joined in (data, b" " + data):
        return _spans(np.maximum(_ends(written) - (len(joined) - len(data)), 0))
    read, before, after = _aligned(text, vocab, tokenizer)
    return _spans(_moved(_walked(ids, read, vocab, tokenizer), before, after))


def _walked(ids: Sequence[int], data: bytes, vocab: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Where each token ends in `data` (the text as the tokenizer reads it), token by token."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    ends, at = np.zeros(len(ids), dtype=np.int64), 0
    for n, i in enumerate(ids):
        piece = vocab.written[i]
        if i in added:
            if vocab.style == "metaspace":
                piece = piece.replace(_SPACE_MARK.encode("utf-8"), b" ")
            start = _after_space(data, at) if added[i].lstrip else at
            if data.startswith(piece, start):
                at = start + len(piece)
                at = _after_space(data, at) if added[i].rstrip else at
        elif data.startswith(piece, at):
            at += len(piece)
        elif piece.startswith(b" ") and data.startswith(piece[1:], at):
            at += len(piece) - 1
        else:
            raise SafecritError(
                f"the judge's tokenizer rewrites text (token {n}, {tokenizer.convert_ids_to_tokens(int(i))!r}, does "
                "not spell it); use a judge with a byte-level or SentencePiece tokenizer."
            )
        ends[n] = at
    if at != len(data):
        raise SafecritError("the judge's tokenizer drops part of the text; use a judge with byte fallback.")
    return ends


def _after_space(data: bytes, at: int) -> int:
    return len(data) - len(data[at:].lstrip())


def as_read(text: str, plain: Tokenizer, style: str) -> str:
    """`text` as a `plain_tokenizer` normalises it, and as the pieces of a vocabulary of that style spell it."""
    text = text if plain.normalizer is None else plain.normalizer.normalize_str(text)
    return text.replace(_SPACE_MARK, " ") if style == "metaspace" else text


def _aligned(text: str, vocab: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> tuple[bytes, list[int], list[int]]:
    """The text's bytes as the tokenizer reads it, and byte offsets that belong together there and in `text`, ascending.

    Marks and Hangul vowels and finals stay with the character before them, with
    which they may compose; between such groups a normaliser's work is local.
    """
    plain = plain_tokenizer(tokenizer)
    groups: list[str] = []
    for char in text:
        if groups and (unicodedata.category(char)[0] == "M" or "\u1160" <= char <= "\u11ff"):
            groups[-1] += char
        else:
            groups.append(char)
    became = {group: as_read(group, plain, vocab.style) for group in set(groups)}
    whole = as_read(text, plain, vocab.style)
    if "".join(became[group] for group in groups) != whole:
        raise SafecritError("the judge's tokenizer normalises text as a whole; use a judge with another tokenizer.")
    offsets = [
        [0, *_ends([part.encode("utf-8") for part in parts]).tolist()]
        for parts in ([became[group] for group in groups], groups)
    ]
    return whole.encode("utf-8"), offsets[0], offsets[1]


def _ends(pieces: Sequence[bytes]) -> np.ndarray:
    return np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)))


def _moved(ends: np.ndarray, before: Sequence[int], after: Sequence[int]) -> np.ndarray:
    """Offsets of one text in another, given offsets that belong together; those between are moved in proportion."""
    return np.floor(np.interp(ends, before, after) + 0.5).astype(np.int64)


def _spans(ends: np.ndarray) -> np.ndarray:
    return np.stack([np.concatenate([[0], ends])[:-1], ends], axis=1)

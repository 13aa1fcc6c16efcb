"""From one tokenizer to another, by bytes: the position matrix A and vocabulary matrix P.

The model that answers and the judge that reads may cut text differently. Both
cuts are laid over the same UTF-8 bytes. Pieces are compared as the bytes they
stand for, never as the strings in a vocabulary, where byte-level BPE and
SentencePiece write the same space differently.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from safecrit.errors import SafecritError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: printable ones as themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + n): byte for n, byte in enumerate(rest)}


@dataclass(frozen=True)
class Vocabulary:
    """What every token id of a tokenizer stands for.

    `pieces[i]` is the bytes of id i (empty for specials), `special` the special
    tokens, `fallback` the byte tokens `<0xAB>`, `style` how the vocabulary writes bytes.
    """

    pieces: tuple[bytes, ...]
    special: frozenset[int]
    fallback: frozenset[int]
    style: str

    def spelled(self, piece: bytes) -> str | None:
        """`piece` as this vocabulary would write it, or None where it cannot (invalid UTF-8)."""
        if self.style == "byte-level":
            chars = {byte: char for char, byte in _byte_of_char().items()}
            return "".join(chars[byte] for byte in piece)
        try:
            text = piece.decode("utf-8")
        except UnicodeDecodeError:
            return None
        return text.replace(" ", "\u2581") if self.style == "metaspace" else text


def _style(tokenizer: PreTrainedTokenizerBase) -> str:
    parts = []
    for part in (tokenizer.backend_tokenizer.decoder, tokenizer.backend_tokenizer.pre_tokenizer):
        if part is not None:
            parts.append(part.__getstate__().decode("utf-8"))
    described = " ".join(parts)
    if '"ByteLevel"' in described:
        return "byte-level"
    if '"Metaspace"' in described or "\u2581" in described or "\\u2581" in described:
        return "metaspace"
    return "plain"


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Read a fast tokenizer's pieces as bytes.

    Byte-level BPE, SentencePiece (metaspace, `<0xAB>` byte fallback) and plain
    vocabularies are understood. Holes in the id range stand for nothing.
    """
    style = _style(tokenizer)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    by_id = tokenizer.get_vocab()
    pieces = [b""] * (max(by_id.values(), default=-1) + 1)
    chars, fallback = _byte_of_char(), set()
    for text, i in by_id.items():
        if i in special:
            continue
        if i in added:
            pieces[i] = text.encode("utf-8")
        elif style == "byte-level" and all(char in chars for char in text):
            pieces[i] = bytes(chars[char] for char in text)
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">") and style != "byte-level":
            pieces[i] = bytes([int(text[3:5], 16)])
            fallback.add(i)
        else:
            pieces[i] = (text.replace("\u2581", " ") if style == "metaspace" else text).encode("utf-8")
    return Vocabulary(tuple(pieces), frozenset(special), frozenset(fallback), style)


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers cut text alike: equal vocabularies and equal tokenisation rules."""
    if a is b:
        return True
    if a.get_vocab() != b.get_vocab():
        return False
    rules: list[dict[str, Any]] = []
    for tokenizer in (a, b):
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        for volatile in ("padding", "truncation", "post_processor"):
            described.pop(volatile, None)
        rules.append(described)
    return rules[0] == rules[1]


@dataclass(frozen=True)
class SpelledText:
    """An answer as text and where each of its tokens lies: `spans` int64 [T, 2], byte offsets into the UTF-8 text."""

    text: str
    spans: np.ndarray


def spell(ids: Sequence[int], vocab: Vocabulary) -> SpelledText:
    """Text of token ids with the byte span of each; white space at both ends is cut, invalid bytes become U+FFFD.

    Specials and ids beyond the vocabulary stand for nothing and get an empty span.
    """
    pieces = [vocab.pieces[i] if i < len(vocab.pieces) else b"" for i in ids]
    ends = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
    replaced: list[tuple[int, int]] = []

    def note(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        replaced.append((error.start, error.end))
        return "\ufffd", error.end

    codecs.register_error("safecrit-note", note)
    text = b"".join(pieces).decode("utf-8", "safecrit-note")
    moved = ends.copy()
    for start, stop in replaced:
        # U+FFFD is three bytes long; boundaries inside a replaced run move to its end.
        inside = (ends > start) & (ends < stop)
        moved[ends >= stop] += 3 - (stop - start)
        moved[inside] += (start - ends[inside]) + 3
    lead = len(text.encode("utf-8")) - len(text.lstrip().encode("utf-8"))
    text = text.strip()
    moved = np.clip(moved - lead, 0, len(text.encode("utf-8")))
    return SpelledText(text, np.stack([moved[:-1], moved[1:]], axis=1))


def byte_spans(ids: Sequence[int], text: str, vocab: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Byte span in `text` of each token that `tokenizer` made of it, int64 [len(ids), 2].

    Specials span their own spelling where the text holds it. A space that
    SentencePiece puts before a text is no part of it. Raises SafecritError where
    the tokens do not spell the text (a normaliser that rewrites it).
    """
    data, at = text.encode("utf-8"), 0
    names = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    spans = np.zeros((len(ids), 2), dtype=np.int64)
    for n, i in enumerate(ids):
        end: int | None
        if i in vocab.special:
            piece = names[i].content.encode("utf-8") if i in names else b""
            end = at + len(piece) if data.startswith(piece, at) else at
        else:
            piece = vocab.pieces[i]
            end = at + len(piece) if data.startswith(piece, at) else _end_of_marked(piece, data, at)
            if end is None and piece.startswith(b" "):
                end = _end_of_marked(piece[1:], data, at)
        if end is None:
            raise SafecritError(
                f"the judge's tokenizer rewrites text (token {n}, {tokenizer.convert_ids_to_tokens(int(i))!r}, does "
                "not spell it); use a judge with a byte-level or SentencePiece tokenizer without normalisation."
            )
        spans[n] = at, end
        at = end
    if at != len(data):
        raise SafecritError("the judge's tokenizer drops part of the text; use a judge with byte fallback.")
    return spans


def _end_of_marked(piece: bytes, data: bytes, at: int) -> int | None:
    """Where `piece` ends in `data` if its spaces may stand for U+2581, which SentencePiece cannot tell from a space."""
    for byte in piece:
        if byte == 0x20 and data.startswith("\u2581".encode(), at):
            at += 3
        elif data[at : at + 1] == bytes([byte]):
            at += 1
        else:
            return None
    return at


def position_matrix(judge_spans: np.ndarray, model_spans: np.ndarray) -> torch.Tensor:
    """A: share of each judge token's bytes that each model token wrote, float32 [m, T], rows sum to 1 or are zero."""
    low = np.maximum(judge_spans[:, None, 0], model_spans[None, :, 0])
    high = np.minimum(judge_spans[:, None, 1], model_spans[None, :, 1])
    overlap = np.maximum(high - low, 0).astype(np.float64)
    total = overlap.sum(axis=1, keepdims=True)
    return torch.from_numpy(np.divide(overlap, total, out=np.zeros_like(overlap), where=total > 0)).to(torch.float32)


@dataclass(frozen=True)
class VocabularyMatrix:
    """P in row form: `matrix` sparse float32 [V_model, V_judge], `live` bool [V_model] (rows that are not zero)."""

    matrix: torch.Tensor
    live: torch.Tensor

    def embed(self, embedding: torch.Tensor) -> torch.Tensor:
        """P E for judge embeddings E [V_judge, d]: [V_model, d] in E's dtype, at least float32."""
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        return torch.sparse.mm(self.matrix.to(device=embedding.device, dtype=dtype), embedding.to(dtype))


def vocabulary_matrix(
    model: Vocabulary, judge: Vocabulary, judge_tokenizer: PreTrainedTokenizerBase, model_rows: int, judge_rows: int
) -> VocabularyMatrix:
    """P: what each token of the model is in the judge's vocabulary (docs/method.md, section 2, step 4).

    The judge token of the same bytes has weight 1. Otherwise the bytes are cut
    by the judge's own merges, or into its byte tokens, 1/n each. A row that
    neither reaches is zero. `*_rows` are the heights of the two embeddings.
    """
    exact: dict[bytes, int] = {}
    for i, piece in enumerate(judge.pieces[:judge_rows]):
        # A byte token stands for its byte only where no ordinary piece does: the judge never reads it otherwise.
        if piece and (piece not in exact or (exact[piece] in judge.fallback and i not in judge.fallback)):
            exact[piece] = i
    merges = judge_tokenizer.backend_tokenizer.model
    columns: list[int] = []
    counts = np.zeros(model_rows, dtype=np.int64)
    for i, piece in enumerate(model.pieces[:model_rows]):
        if not piece:
            continue
        if piece in exact:
            columns.append(exact[piece])
            counts[i] = 1
            continue
        spelled = judge.spelled(piece)
        found = [token.id for token in merges.tokenize(spelled)] if spelled is not None else []
        if b"".join(judge.pieces[j] for j in found) != piece:
            single = [exact.get(piece[n : n + 1], -1) for n in range(len(piece))]
            found = single if min(single) >= 0 else []
        columns.extend(found)
        counts[i] = len(found)
    weights = np.repeat(1.0 / np.maximum(counts, 1), counts).astype(np.float32)
    rows = np.repeat(np.arange(model_rows), counts)
    indices = torch.from_numpy(np.stack([rows, np.asarray(columns, dtype=np.int64)]))
    coo = torch.sparse_coo_tensor(indices, torch.from_numpy(weights), (model_rows, judge_rows), check_invariants=True)
    return VocabularyMatrix(coo.coalesce(), torch.from_numpy(counts > 0))


def identity_matrix(vocab: Vocabulary, rows: int, judge_rows: int) -> VocabularyMatrix:
    """P between equal tokenizers: the identity on text tokens, zero rows for specials and padding rows."""
    text = [i for i, piece in enumerate(vocab.pieces[: min(rows, judge_rows)]) if piece]
    live = torch.zeros(rows, dtype=torch.bool)
    live[text] = True
    index = torch.tensor([text, text], dtype=torch.int64)
    matrix = torch.sparse_coo_tensor(index, torch.ones(len(text)), (rows, judge_rows), check_invariants=True)
    return VocabularyMatrix(matrix.coalesce(), live)

"""From one tokenizer to another, by bytes: the position matrix A and vocabulary matrix P.

The model that answers and the judge that reads may cut text differently. Both
cuts are laid over the same UTF-8 bytes (docs/method.md, section 2, step 4). P of
a pair of tokenizers is kept on disk, beside the fingerprints.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from safecrit.errors import SafecritError
from safecrit.files import atomic, cache_root, canonical_json
from safecrit.vocabulary import (
    SpelledText,
    Vocabulary,
    as_read,
    byte_spans,
    plain_tokenizer,
    rules_hash,
    same_tokenizer,
    special_ids,
    spell,
    vocabulary,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "SpelledText",
    "Vocabulary",
    "VocabularyMatrix",
    "byte_spans",
    "cached_vocabulary_matrix",
    "identity_matrix",
    "position_matrix",
    "same_tokenizer",
    "spell",
    "vocabulary",
    "vocabulary_matrix",
]

_FORMAT = 1  # raise it with every change to what vocabulary_matrix answers or how it is stored
_BATCH = 8192  # pieces tokenised at once: bounds the memory of their encodings


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


def identity_matrix(vocab: Vocabulary, rows: int, judge_rows: int) -> VocabularyMatrix:
    """P between equal tokenizers: the identity on text tokens, zero rows for specials and padding rows."""
    text = [i for i, piece in enumerate(vocab.pieces[: min(rows, judge_rows)]) if piece]
    counts = np.zeros(rows, dtype=np.int32)
    counts[text] = 1
    return _matrix(counts, np.asarray(text, dtype=np.int32), judge_rows)


def vocabulary_matrix(
    model: Vocabulary, judge: Vocabulary, judge_tokenizer: PreTrainedTokenizerBase, model_rows: int, judge_rows: int
) -> VocabularyMatrix:
    """P: what each token of the model is in the judge's vocabulary (docs/method.md, section 2, step 4).

    The judge token of the same bytes has weight 1. Otherwise text is cut as the
    judge's tokenizer cuts it inside a text, specials unknown, and what is no
    text (or is lost so) into the judge's byte tokens, 1/n each. A row that
    neither reaches is zero. `*_rows` are the heights of the two embeddings.
    """
    return _matrix(*_rows(model, judge, judge_tokenizer, model_rows, judge_rows), judge_rows)


def cached_vocabulary_matrix(
    model_tokenizer: PreTrainedTokenizerBase,
    judge_tokenizer: PreTrainedTokenizerBase,
    model_rows: int,
    judge_rows: int,
    cache: str | Path | None = None,
) -> VocabularyMatrix:
    """`vocabulary_matrix` of two fast tokenizers, from disk where it was made before.

    `cache` is the folder of the stored matrices, by default `bridge` in the place
    where fingerprints are cached. A file there that is not whole is made again; a
    folder that cannot be written costs time, nothing else.
    """
    identity = [[rules_hash(t), sorted(special_ids(t))] for t in (model_tokenizer, judge_tokenizer)]
    key = hashlib.sha256(canonical_json([_FORMAT, identity, model_rows, judge_rows]).encode("ascii")).hexdigest()
    path = (Path(cache) if cache is not None else cache_root() / "bridge") / f"{key}.safetensors"
    stored = _read(path, model_rows, judge_rows)
    if stored is None:
        model, judge = vocabulary(model_tokenizer), vocabulary(judge_tokenizer)
        stored = _rows(model, judge, judge_tokenizer, model_rows, judge_rows)
        _write(path, *stored)
    return _matrix(*stored, judge_rows)


def _rows(
    model: Vocabulary, judge: Vocabulary, judge_tokenizer: PreTrainedTokenizerBase, model_rows: int, judge_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Judge tokens of every model token: how many (int32 [model_rows]), and which, one row after the other (int32)."""
    exact: dict[bytes, int] = {}
    for i, piece in enumerate(judge.pieces[:judge_rows]):
        # A byte token stands for its byte only where no ordinary piece does: the judge never reads it otherwise.
        if piece and (piece not in exact or exact[piece] in judge.fallback):
            exact[piece] = i
    found: list[list[int]] = [[] for _ in range(model_rows)]
    texts: dict[int, str] = {}
    for i, piece in enumerate(model.pieces[:model_rows]):
        same = exact.get(piece)
        if same is not None:
            found[i] = [same]
        elif piece:
            single = [exact.get(piece[n : n + 1], -1) for n in range(len(piece))]
            found[i] = single if min(single) >= 0 else []
            try:
                texts[i] = piece.decode("utf-8")
            except UnicodeDecodeError:
                continue
    for i, ids in _tokenised(texts, judge, judge_tokenizer).items():
        if max(ids) < judge_rows:
            found[i] = ids
    counts = np.fromiter(map(len, found), np.int32, model_rows)
    return counts, np.fromiter(chain.from_iterable(found), np.int32, int(counts.sum()))


def _tokenised(
    texts: dict[int, str], judge: Vocabulary, judge_tokenizer: PreTrainedTokenizerBase
) -> dict[int, list[int]]:
    """The judge's tokens of each text inside a text, without those texts that are lost by it.

    A text that the judge's normaliser rewrites is not lost: the judge would read it so.
    """
    bare = plain_tokenizer(judge_tokenizer)
    added = judge_tokenizer.backend_tokenizer.get_added_tokens_decoder()
    ids_of = {bare.token_to_id(token.content): i for i, token in added.items() if not token.special}
    kept: dict[int, list[int]] = {}
    rows = list(texts)
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        for i, encoding in zip(batch, bare.encode_batch_fast([texts[i] for i in batch]), strict=True):
            ids = [ids_of.get(j, j) for j in encoding.ids] if ids_of else encoding.ids
            joined = b"".join([judge.pieces[j] for j in ids])
            if joined == texts[i].encode("utf-8") or (
                joined and joined == as_read(texts[i], bare, judge.style).encode()
            ):
                kept[i] = ids
    return kept


def _matrix(counts: np.ndarray, columns: np.ndarray, judge_rows: int) -> VocabularyMatrix:
    weights = np.repeat(1.0 / np.maximum(counts, 1), counts)
    indices = torch.from_numpy(np.stack([np.repeat(np.arange(len(counts)), counts), columns.astype(np.int64)]))
    size = (len(counts), judge_rows)
    coo = torch.sparse_coo_tensor(indices, torch.from_numpy(weights), size, check_invariants=True)
    return VocabularyMatrix(coo.coalesce().to(torch.float32), torch.from_numpy(counts > 0))


def _read(path: Path, model_rows: int, judge_rows: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Stored rows, or None unless the file holds them whole and within range."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            if sorted(file.keys()) != ["columns", "counts"]:
                return None
            counts, columns = file.get_tensor("counts"), file.get_tensor("columns")
            digest = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    valid = (
        counts.dtype == columns.dtype == np.int32
        and counts.shape == (model_rows,)
        and columns.shape == (int(counts.sum(dtype=np.int64)),)
        and counts.min(initial=0) >= 0
        and columns.min(initial=0) >= 0
        and columns.max(initial=-1) < judge_rows
        and digest == _digest(counts, columns)
    )
    return (counts, columns) if valid else None


def _write(path: Path, counts: np.ndarray, columns: np.ndarray) -> None:
    from safetensors.numpy import save_file

    try:
        with atomic(path) as temporary:
            save_file({"columns": columns, "counts": counts}, temporary, {"sha256": _digest(counts, columns)})
    except (OSError, SafecritError):
        return  # a cache that cannot be written costs time, nothing else


def _digest(counts: np.ndarray, columns: np.ndarray) -> str:
    return hashlib.sha256(counts.tobytes() + columns.tobytes()).hexdigest()

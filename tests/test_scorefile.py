from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from safecrit.errors import FormatError, SafecritError
from safecrit.scorefile import Scores, write_scores
from tests.golden import make as golden

DOWN, FUSED = golden.DOWN, golden.FUSED


def write(folder: Path, **options: int) -> Path:
    write_scores(folder, golden.scores().items(), golden.layouts(), golden.score_info(), torch.float32, **options)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [1, 10**9])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    values = golden.scores()
    backwards = reversed(list(values.items()))  # tensors may come in any order
    write_scores(tmp_path, backwards, golden.layouts(), golden.score_info(), dtype, shard_bytes=shard_bytes)
    scores = Scores.load(tmp_path)
    assert scores.names == sorted(values) == [DOWN, FUSED]
    assert (scores.total, scores.eligible) == (144, 124)
    assert scores.layouts == golden.layouts() and scores.fingerprint == "sha256:" + "0" * 64
    assert scores.info["method"] == "esi" and scores.info["dtype"] == str(dtype).removeprefix("torch.")
    for name, expected in values.items():
        assert scores.tensor(name).dtype == dtype and torch.equal(scores.tensor(name).float(), expected)
    assert len(list(tmp_path.glob("*.safetensors"))) == (2 if shard_bytes == 1 else 1)


def test_golden_scores_read_back() -> None:
    scores = Scores.load(golden.HERE / "scores")
    assert all(torch.equal(scores.tensor(name).float(), expected) for name, expected in golden.scores().items())


def test_tensors_are_views_that_cannot_change_the_file(tmp_path: Path) -> None:
    scores = Scores.load(write(tmp_path))
    first, second = scores.tensor(DOWN), scores.tensor(DOWN)
    assert first.data_ptr() == second.data_ptr()
    first.fill_(9)
    assert torch.equal(Scores.load(tmp_path).tensor(DOWN), golden.scores()[DOWN])


def test_total_of_the_info_wins(tmp_path: Path) -> None:
    write_scores(tmp_path, golden.scores().items(), golden.layouts(), golden.score_info() | {"total": 150})
    assert Scores.load(tmp_path).total == 150


def test_rewriting_leaves_no_shard_of_the_earlier_run(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=1)
    (tmp_path / "scores-notes.safetensors").write_bytes(b"mine")
    write(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "score.json",
        "scores-00001-of-00001.safetensors",
        "scores-notes.safetensors",
    }
    Scores.load(tmp_path)


def test_failure_leaves_no_files(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield DOWN, golden.scores()[DOWN]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scores(tmp_path, broken(), golden.layouts(), {})
    assert not list(tmp_path.iterdir())
    one = [(DOWN, golden.scores()[DOWN])]
    for tensors, message in (
        (one, "never written"),
        ([("embed.weight", torch.zeros(5, 4))], "not an eligible tensor"),
        ([(DOWN, torch.zeros(4))], "was announced"),
    ):
        with pytest.raises(ValueError, match=message):
            write_scores(tmp_path, tensors, golden.layouts(), {})
    assert not list(tmp_path.iterdir())


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SafecritError, match="float16"):
        write_scores(tmp_path, [], golden.layouts(), {}, torch.float16)


def test_unfinished_folder_and_unknown_tensor(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(SafecritError, match="nope"):
        Scores.load(tmp_path).tensor("nope")
    (tmp_path / "score.json").unlink()
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SafecritError, match=r"no score\.json"):
            Scores.load(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 9, "version 9"),
        ("format", "safecrit-mask", "is a safecrit-mask file"),
        ("total", "x", "'total' is str"),
        ("layouts", None, "'layouts' is NoneType"),
        ("layouts", {}, "unknown tensor"),
        ("layouts", {DOWN: {}}, "damaged tensor layout"),
    ],
)
def test_damaged_score_json(tmp_path: Path, key: str, value: object, message: str) -> None:
    path = write(tmp_path) / "score.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(FormatError, match=message):
        Scores.load(tmp_path)


def test_damaged_score_files(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=1)
    one, two = (tmp_path / f"scores-0000{i}-of-00002.safetensors" for i in (1, 2))
    kept = two.read_bytes()
    two.unlink()
    with pytest.raises(FormatError, match="missing"):
        Scores.load(tmp_path)
    two.write_bytes(one.read_bytes())
    with pytest.raises(FormatError, match="another file too"):
        Scores.load(tmp_path)
    for change, message in (
        ((b"F32", b"I32"), "dtype I32"),
        ((b"[4,6]", b"[6,4]"), "shape"),
        ((b"layers.0.qkv", b"layers.1.qkv"), "unknown tensor"),
        ((b"safecrit-scores", b"safecrit-soccer"), "safecrit-soccer"),
    ):
        assert change[0] in kept
        two.write_bytes(kept.replace(*change))
        with pytest.raises(FormatError, match=message):
            Scores.load(tmp_path)
    header = b'{"__metadata__":{"safecrit":"{\\"format\\":\\"safecrit-scores\\",\\"version\\":1}"}}'
    two.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(FormatError, match="are missing"):
        Scores.load(tmp_path)


def test_independent_reader_agrees(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(shared / "checks"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import maskread  # type: ignore[import-not-found]

    found, _ = maskread.read(str(write(tmp_path, shard_bytes=1)))
    assert {n: a.tolist() for n, a in found.items()} == {n: t.tolist() for n, t in golden.scores().items()}

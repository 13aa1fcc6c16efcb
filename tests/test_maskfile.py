from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from safecrit.errors import FormatError, MismatchError, SafecritError
from safecrit.layout import TensorLayout
from safecrit.maskfile import Mask, MaskInfo
from tests.golden import make as golden

DOWN, FUSED, EMBEDDING = golden.DOWN, golden.FUSED, golden.EMBEDDING
Header = dict[str, Any]


def same(a: Mask, b: Mask) -> bool:
    return list(a.indices) == list(b.indices) and all(torch.equal(a.indices[n], b.indices[n]) for n in a.indices)


def split(data: bytes) -> tuple[Header, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Header, body: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "name",
    sorted(str(p.relative_to(golden.HERE)) for p in golden.HERE.rglob("*") if p.suffix in (".safetensors", ".json")),
)
def test_writers_give_the_golden_bytes(name: str, tmp_path: Path) -> None:
    golden.write(tmp_path)
    assert (tmp_path / name).read_bytes() == (golden.HERE / name).read_bytes()


def test_golden_files_are_all_written(tmp_path: Path) -> None:
    golden.write(tmp_path)
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    kept = {str(p.relative_to(golden.HERE)) for p in golden.HERE.rglob("*") if p.suffix in (".safetensors", ".json")}
    assert written == kept and len(kept) == 8


@pytest.mark.parametrize("where", ["mask.safetensors", "sharded", "sharded/mask.safetensors.index.json"])
def test_golden_mask_reads_back(where: str) -> None:
    mask = Mask.load(golden.HERE / where)
    assert same(mask, golden.mask()) and mask.info == golden.mask().info and mask.count == 12


def test_safetensors_reads_our_files() -> None:
    with safe_open(golden.HERE / "mask.safetensors", "pt") as file:
        assert set(file.keys()) == {f"{DOWN}::indices", f"{FUSED}::bits"}
        assert file.get_tensor(f"{DOWN}::indices").tolist() == [7, 99]
        assert file.get_tensor(f"{DOWN}::indices").dtype == torch.int32
        assert set(file.metadata()) == {"safecrit"}


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    root = golden.HERE.parents[1]
    code = "import sys; from pathlib import Path; from tests.golden import make; make.write(Path(sys.argv[1]))"
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed)],
            cwd=root,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
    for file in (tmp_path / "1").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "2" / file.relative_to(tmp_path / "1")).read_bytes()


def random_mask(seed: int, share: float = 0.3, tensors: dict[str, TensorLayout] | None = None) -> Mask:
    generator = np.random.default_rng(seed)
    layouts = tensors or golden.layouts()
    indices = {
        name: torch.from_numpy(np.flatnonzero(generator.random(layout.numel) < share))
        for name, layout in layouts.items()
        if layout.eligible
    }
    total = sum(layout.numel for layout in layouts.values())
    return Mask(indices, MaskInfo(tensors=layouts, mode="top", total=total, eligible=total))


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 3), (31, 33), (2, 3, 64), ()])
@pytest.mark.parametrize("share", [0.001, 0.02, 0.04, 0.5, 1.0])
def test_round_trip_in_either_encoding(shape: tuple[int, ...], share: float, tmp_path: Path) -> None:
    layouts = {f"{letter}.weight": TensorLayout(shape, (), True) for letter in "ab"}
    mask = random_mask(3, share, layouts)
    mask.save(tmp_path / "m.safetensors")
    again = Mask.load(tmp_path / "m.safetensors")
    assert same(mask, again) and again.info == mask.info
    for name, layout in layouts.items():
        dense = again.dense(name)
        assert dense.shape == layout.shape and dense.dtype == torch.bool
        assert torch.equal(dense.reshape(-1).nonzero().flatten(), mask.indices.get(name, torch.empty(0).long()))
    numel = max(1, int(np.prod(shape)))
    header, _ = split((tmp_path / "m.safetensors").read_bytes())
    for name, indices in mask.indices.items():
        assert (f"{name}::indices" in header) == (4 * len(indices) <= -(-numel // 8))


def test_indices_are_int64_from_two_to_the_31_entries(tmp_path: Path) -> None:
    layouts = {
        "big": TensorLayout((2**16, 2**15), (), True),
        "less": TensorLayout((2**31 - 1,), (), True),
    }
    indices = {"big": torch.tensor([0, 2**31 - 1]), "less": torch.tensor([2**31 - 2])}
    mask = Mask(indices, MaskInfo(tensors=layouts, mode="top", total=2**32, eligible=2**32))
    mask.save(tmp_path / "m.safetensors")
    header, _ = split((tmp_path / "m.safetensors").read_bytes())
    assert header["big::indices"]["dtype"] == "I64" and header["less::indices"]["dtype"] == "I32"
    assert same(Mask.load(tmp_path / "m.safetensors"), mask)


def test_empty_mask_round_trips(tmp_path: Path) -> None:
    mask = random_mask(0) - random_mask(0)
    mask.save(tmp_path / "m.safetensors")
    assert Mask.load(tmp_path / "m.safetensors").count == 0


def test_sharded_and_whole_replace_each_other(tmp_path: Path) -> None:
    path, first, second = tmp_path / "m.safetensors", random_mask(1), random_mask(2)
    (tmp_path / "other-00001-of-00002.safetensors").write_bytes(b"mine")
    first.save(path, shard_bytes=4)
    assert not path.exists() and same(Mask.load(path), first)
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    counts = {name: len(flat) for name, flat in first.indices.items()}
    assert index["metadata"]["safecrit"]["counts"] == counts
    second.save(path)
    assert same(Mask.load(path), second)
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"m.safetensors", "other-00001-of-00002.safetensors"}
    first.save(path, shard_bytes=4)
    assert same(Mask.load(path), first)


def test_algebra_agrees_with_sets() -> None:
    a, b = random_mask(1), random_mask(2, 0.1)
    pairs = lambda mask: {(name, i) for name, flat in mask.indices.items() for i in flat.tolist()}  # noqa: E731
    for result, expected, mode in (
        (a & b, pairs(a) & pairs(b), "and"),
        (a | b, pairs(a) | pairs(b), "or"),
        (a - b, pairs(a) - pairs(b), "minus"),
    ):
        assert pairs(result) == expected and result.count == len(expected)
        assert all(bool((flat.diff() > 0).all()) for flat in result.indices.values())
        assert result.info.mode == mode and [m["count"] for m in result.info.made_from] == [a.count, b.count]
    assert a.iou(b) == len(pairs(a) & pairs(b)) / len(pairs(a) | pairs(b))
    assert a.iou(a) == 1.0 and a.iou(a - a) == 0.0 and (a - a).iou(a - a) == 1.0


def test_algebra_refuses_masks_of_other_models() -> None:
    a = random_mask(1)
    layouts = golden.layouts()
    layouts[DOWN] = TensorLayout((10, 11), (), True)
    with pytest.raises(MismatchError, match=re.escape(DOWN)):
        a & random_mask(1, tensors=layouts)
    with pytest.raises(MismatchError, match="absent"):
        a.iou(random_mask(1, tensors={DOWN: golden.layouts()[DOWN]}))


def test_dense_of_unknown_tensor() -> None:
    assert not golden.mask().dense(EMBEDDING).any()
    with pytest.raises(SafecritError, match="nope"):
        golden.mask().dense("nope")


def test_check_needs_names_shapes_and_fingerprint() -> None:
    mask = golden.mask()
    shapes: dict[str, tuple[int, ...]] = {name: layout.shape for name, layout in golden.layouts().items()}
    own = mask.info.fingerprint
    mask.check(shapes)
    mask.check(golden.layouts(), fingerprints=["sha256:child", own])
    with pytest.raises(MismatchError, match="other weights"):
        mask.check(shapes, fingerprints=["sha256:other"])
    mask.check(shapes, fingerprints=["sha256:other"], allow_other_weights=True)
    mask.check({name: shape for name, shape in shapes.items() if name != EMBEDDING})
    mask.check(shapes | {"lm_head.weight": shapes[EMBEDDING], "rotary.inv_freq": (8,), "attn.bias": (1, 1, 9, 9)})
    for wrong in (
        {name: shape for name, shape in shapes.items() if name != DOWN},
        shapes | {DOWN: (100,)},
        shapes | {EMBEDDING: (5, 5)},
        shapes | {"layers.1.down.weight": (10, 10)},
    ):
        with pytest.raises(MismatchError):
            mask.check(wrong, allow_other_weights=True)


# Every malformation has its own message. Each case takes the golden mask's header, document and body.
Case = tuple[str, Callable[[Header, Header, bytearray], None]]
BITS, INDICES = f"{FUSED}::bits", f"{DOWN}::indices"


def _set(place: int, *values: int) -> Callable[[Header, Header, bytearray], None]:
    def change(header: Header, document: Header, body: bytearray) -> None:
        for i, value in enumerate(values):
            struct.pack_into("<i", body, place + 4 * i, value)

    return change


def _pop(what: str, key: str) -> Callable[[Header, Header, bytearray], None]:
    return lambda header, document, body: (header if what == "header" else document).pop(key)


def _put(key: str, value: Any) -> Callable[[Header, Header, bytearray], None]:
    return lambda header, document, body: document.update({key: value})


def _unpad(header: Header, document: Header, body: bytearray) -> None:
    """Make the bit field one entry short of its tensor's bytes, with that bit set."""
    document["tensors"][FUSED] = {"shape": [23], "matrices": [], "eligible": True}


def _count(name: str, value: int) -> Callable[[Header, Header, bytearray], None]:
    def change(header: Header, document: Header, body: bytearray) -> None:
        document["k"] += value - document["counts"].get(name, 0)
        document["counts"][name] = value

    return change


CASES: list[Case] = [
    ("unknown tensor 'x::indices'", lambda h, d, b: h.update({"x::indices": h.pop(INDICES)})),
    (f"unknown tensor '{DOWN}::other'", lambda h, d, b: h.update({f"{DOWN}::other": h.pop(INDICES)})),
    ("unknown tensor", lambda h, d, b: h.update({"plain": h.pop(INDICES)})),
    ("unknown tensor", lambda h, d, b: d["tensors"].pop(DOWN)),
    (f"'{DOWN}' is missing", _pop("header", INDICES)),
    ("twice, as indices and as bits", lambda h, d, b: h.update({f"{FUSED}::indices": h[INDICES]})),
    ("dtype F32", lambda h, d, b: h[INDICES].update(dtype="F32")),
    ("dtype I8", lambda h, d, b: h[BITS].update(dtype="I8")),
    ("shape \\[1, 2\\]", lambda h, d, b: h[INDICES].update(shape=[1, 2])),
    ("shape \\[3\\] where \\[13\\]", lambda h, d, b: d["tensors"][FUSED].update(shape=[100], matrices=[])),
    ("8 bytes are stored for I32 \\[3\\]", lambda h, d, b: h[INDICES].update(shape=[3])),
    ("not sorted", _set(0, 99, 7)),
    ("occurs twice", _set(0, 7, 7)),
    ("outside its 100 entries", _set(0, 7, 100)),
    ("outside its 100 entries", _set(0, -1, 7)),
    ("padding bits", _unpad),
    ("holds 2 entries, its count says 3", _count(DOWN, 3)),
    ("holds 10 entries, its count says 9", _count(FUSED, 9)),
    ("count of 0", _count(DOWN, 0)),
    ("unknown tensor 'x' in its counts", _count("x", 1)),
    (f"'{EMBEDDING}' is missing", _count(EMBEDDING, 1)),
    ("sum to 12, it says k = 13", _put("k", 13)),
    ("version 2", _put("version", 2)),
    ("is a safecrit-delta file", _put("format", "safecrit-delta")),
    ("no 'format'", _pop("document", "format")),
    ("'threshold_bits' is missing", _pop("document", "threshold_bits")),
    ("'total' is str", _put("total", "144")),
    ("'total' is bool", _put("total", True)),
    ("'tensors' is list", _put("tensors", [])),
    ("impossible shape", lambda h, d, b: d["tensors"][DOWN].update(shape=[-10, -10], matrices=[])),
    ("damaged tensor layout", lambda h, d, b: d["tensors"][DOWN].pop("shape")),
]


@pytest.mark.parametrize(("message", "change"), CASES, ids=[f"{i}-{case[0][:24]}" for i, case in enumerate(CASES)])
def test_each_malformation_has_one_clear_error(
    message: str, change: Callable[[Header, Header, bytearray], None], tmp_path: Path
) -> None:
    header, rest = split((golden.HERE / "mask.safetensors").read_bytes())
    body, document = bytearray(rest), json.loads(header["__metadata__"]["safecrit"])
    change(header, document, body)
    header["__metadata__"]["safecrit"] = json.dumps(document)
    path = tmp_path / "bad.safetensors"
    path.write_bytes(join(header, bytes(body)))
    with pytest.raises(FormatError, match=message) as caught:
        Mask.load(path)
    assert "bad.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_masks(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    good = (golden.HERE / "mask.safetensors").read_bytes()
    header, body = split(good)
    header["__metadata__"] = {"format": "pt"}
    bare = join(header, body)
    header["__metadata__"] = {"safecrit": "{"}
    for data in (b"", b"abc", b"\xff" * 500, good[:-1], good[:40], bare, join(header, body)):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=r"x\.safetensors"):
            Mask.load(path)
    with pytest.raises(SafecritError, match="no-such"):
        Mask.load(tmp_path / "no-such.safetensors")
    with pytest.raises(SafecritError, match="no masks"):
        (tmp_path / "empty").mkdir()
        Mask.load(tmp_path / "empty")


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    mask = golden.mask()
    path = tmp_path / "m.safetensors"
    first, second, index = mask.save(path, shard_bytes=8)
    with pytest.raises(FormatError, match="is one shard"):
        Mask.load(first)
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(FormatError, match="other tensors"):
        Mask.load(path)
    second.unlink()
    with pytest.raises(FormatError, match="is missing"):
        Mask.load(path)
    second.write_bytes(kept)
    assert same(Mask.load(path), mask)
    index.write_text("{}")
    with pytest.raises(FormatError, match="damaged index"):
        Mask.load(path)


def test_independent_reader_agrees(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(shared / "checks"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import maskread  # type: ignore[import-not-found]

    for mask in (golden.mask(), random_mask(5, 0.02), random_mask(6, 0.6)):
        for limit, where in ((10**9, tmp_path / "one" / "m.safetensors"), (4, tmp_path / "many")):
            mask.save(where if limit > 4 else where / "m.safetensors", shard_bytes=limit)
            selected, _ = maskread.mask_indices(str(where))
            assert {name: flat.tolist() for name, flat in selected.items()} == {
                name: flat.tolist() for name, flat in mask.indices.items()
            }


def test_every_field_of_info_is_stored(tmp_path: Path) -> None:
    info = dataclasses.replace(
        golden.mask().info,
        revision="main",
        seed=3,
        share=None,
        share_of="eligible",
        non_finite=2,
        made_from=[{"mode": "top"}],
        tie_rule="other",
    )
    Mask(golden.mask().indices, info).save(tmp_path / "m.safetensors")
    assert Mask.load(tmp_path / "m.safetensors").info == info


def test_reader_in_the_specification_works() -> None:
    text = (golden.HERE.parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], namespace)  # type: ignore[index]
    selected, document = namespace["read_mask"](golden.HERE / "mask.safetensors")
    assert document["k"] == 12
    assert {n: i.tolist() for n, i in selected.items()} == {n: i.tolist() for n, i in golden.mask().indices.items()}


def test_indices_win_where_both_encodings_take_the_same(tmp_path: Path) -> None:
    layouts = {"a": TensorLayout((32,), (), True)}
    Mask({"a": torch.tensor([5])}, MaskInfo(tensors=layouts, mode="top", total=32, eligible=32)).save(tmp_path / "m")
    assert "a::indices" in split((tmp_path / "m").read_bytes())[0]

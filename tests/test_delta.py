from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safecrit.checkpoint import rewrite
from safecrit.delta import Delta, apply_delta, make_delta
from safecrit.errors import FormatError, MismatchError, SafecritError
from safecrit.fingerprint import Changes, fingerprint
from tests.golden import make as golden
from tests.modelfolder import random_tensors, write_model

DOWN, QUERY = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def some_changes(dtype: torch.dtype) -> Changes:
    return {
        DOWN: (torch.tensor([0, 5, 77]), torch.tensor([1.0, -0.0, 3.0]).to(dtype)),
        QUERY: (torch.tensor([35]), torch.tensor([torch.nan]).to(dtype)),
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a)


def weight_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("model*")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_rewrite_changes_the_entries_and_nothing_else(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    tensors = random_tensors(dtype)
    base = write_model(tmp_path / "base", tensors, shards=shards)
    changes = some_changes(dtype)
    rewrite(base, tmp_path / "out", changes)
    for name, (indices, values) in changes.items():
        tensors[name].view(-1)[indices] = values
    expected = write_model(tmp_path / "expected", tensors, shards=shards)
    assert same_bits(weights(tmp_path / "out"), tensors)
    assert weight_files(tmp_path / "out") == weight_files(expected)  # headers, metadata and index too


def test_rewrite_copies_what_belongs_to_the_model_and_no_other_weights(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", random_tensors())
    copied = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json", "LICENSE"]
    copied += ["modeling_own.py", "merges.txt", "additional_chat_templates/tool.jinja"]
    left = ["pytorch_model.bin", "other.safetensors", "consolidated.00.pth", "README.md", ".gitattributes"]
    left += ["safecrit/training.json", "pytorch_model.bin.index.json", "original/params.json", "training_args.bin"]
    for name in copied + left:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    written = rewrite(base, tmp_path / "out", {})
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {*copied, "model.safetensors", "config.json"}
    assert {str(p.relative_to(tmp_path / "out")) for p in written} == found
    assert all((tmp_path / "out" / name).read_text() == name for name in copied)


def test_config_takes_its_name_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    base = write_model(tmp_path / "base", random_tensors(), shards=2)
    (base / "tokenizer.json").write_text("{}")
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    rewrite(base, tmp_path / "out", {})
    assert order[-3:] == ["tokenizer.json", "model.safetensors.index.json", "config.json"] and len(order) == 5


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    base = write_model(tmp_path / "base", random_tensors(), shards=2)
    calls = []

    def full(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(SafecritError, match="No space left"):
        rewrite(base, tmp_path / "out", some_changes(torch.bfloat16))
    assert not list((tmp_path / "out").iterdir())


def test_rewrite_refuses_bad_targets_and_bad_changes(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", random_tensors())
    with pytest.raises(SafecritError, match="base model itself"):
        rewrite(base, tmp_path / "base" / ".", {})
    out = write_model(tmp_path / "out", random_tensors(seed=1), shards=2)
    with pytest.raises(SafecritError, match="already holds a model"):
        rewrite(base, out, {})
    rewrite(base, out, {}, overwrite=True)
    assert same_bits(weights(out), random_tensors()) and not (out / "model.safetensors.index.json").exists()
    one = torch.ones(1, dtype=torch.bfloat16)
    for changes in (
        {"nope": (torch.tensor([0]), one)},
        {DOWN: (torch.tensor([0]), one.float())},
        {DOWN: (torch.tensor([78]), one)},
        {DOWN: (torch.tensor([-1]), one)},
        {DOWN: (torch.tensor([3, 3]), one.repeat(2))},
    ):
        with pytest.raises(MismatchError):
            rewrite(base, tmp_path / "new", changes)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 2])
def test_delta_goes_there_and_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    base = write_model(tmp_path / "base", random_tensors(dtype), shards=shards)
    make_delta(base, some_changes(dtype)).save(tmp_path / "d.safetensors")
    delta = Delta.load(tmp_path / "d.safetensors")
    done = apply_delta(base, delta, tmp_path / "out")
    assert (done.changed, done.already) == (4, False) and fingerprint(done.out) == delta.result
    rewrite(base, tmp_path / "direct", some_changes(dtype))
    assert weight_files(done.out) == weight_files(tmp_path / "direct")
    again = apply_delta(done.out, delta, tmp_path / "again")
    assert again.already and again.changed == 0 and "already" in again.message()
    assert weight_files(again.out) == weight_files(done.out)
    back = apply_delta(done.out, delta, tmp_path / "back", undo=True)
    assert weight_files(back.out) == weight_files(base) and back.changed == 4
    assert apply_delta(base, delta, tmp_path / "still", undo=True).already


def test_delta_keeps_only_what_moved(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors[DOWN].view(-1)[5] = 0.0
    base = write_model(tmp_path / "base", tensors)
    values = tensors[DOWN].view(-1)[[0, 5, 9]].clone()
    values[1] = -0.0  # another bit pattern: moved
    still = {QUERY: (torch.tensor([1]), tensors[QUERY].view(-1)[[1]])}
    delta = make_delta(base, {DOWN: (torch.tensor([0, 5, 9]), values)} | still, info={"mode": "set"})
    assert list(delta.tensors) == [DOWN] and delta.tensors[DOWN].indices.tolist() == [5] and delta.count == 1
    nothing = make_delta(base, still)
    assert nothing.base == nothing.result and apply_delta(base, nothing, tmp_path / "out").already


def test_other_models_are_refused_by_both_fingerprints(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", random_tensors())
    other = write_model(tmp_path / "other", random_tensors(seed=1))
    delta = make_delta(base, some_changes(torch.bfloat16))
    for undo, expected in ((False, delta.base), (True, delta.result)):
        with pytest.raises(MismatchError) as caught:
            apply_delta(other, delta, tmp_path / "out", undo=undo)
        assert fingerprint(other) in str(caught.value) and expected in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_result_that_is_not_the_promised_one_is_removed(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", random_tensors())
    delta = make_delta(base, some_changes(torch.bfloat16))
    delta.tensors[DOWN].values[0] = 7.0
    with pytest.raises(FormatError, match="promises"):
        apply_delta(base, delta, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_golden_delta_reads_back() -> None:
    delta, expected = Delta.load(golden.HERE / "delta.safetensors"), golden.delta()
    assert (delta.base, delta.result, delta.info) == (expected.base, expected.result, expected.info)
    assert delta.count == 3 and list(delta.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        found = delta.tensors[name]
        assert found.shape == tensor.shape and torch.equal(found.indices, tensor.indices)
        for a, b in ((found.values, tensor.values), (found.originals, tensor.originals)):
            assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"::originals", b"::original_", "missing tensor|unknown tensor"),
        (b'"version\\":1', b'"version\\":3', "version 3"),
        (b'"count\\":2', b'"count\\":1', "where \\[1\\] was expected"),
        (b'"dtype\\":\\"BF16', b'"dtype\\":\\"F8F8', "impossible dtype"),
        (b'"shape\\":[10,10]', b'"shape\\":[10,09]', "no JSON"),
        (b'"shape\\":[10,10]', b'"shape\\":[ 9,10]', "outside its 90 entries"),
        (b'"F32","shape"', b'"I32","shape"', "dtype I32"),
        (b"\x07\0\0\0\x63\0\0\0", b"\x63\0\0\0\x07\0\0\0", "not sorted"),
        (b"\x07\0\0\0\x63\0\0\0", b"\x07\0\0\0\x07\0\0\0", "occurs twice"),
    ],
)
def test_damaged_deltas_are_refused(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    data = (golden.HERE / "delta.safetensors").read_bytes()
    assert old in data
    (tmp_path / "d.safetensors").write_bytes(data.replace(old, new, 1))
    with pytest.raises(FormatError, match=message):
        Delta.load(tmp_path / "d.safetensors")


def test_mask_is_no_delta() -> None:
    with pytest.raises(FormatError, match="is a safecrit-mask file"):
        Delta.load(golden.HERE / "mask.safetensors")


def test_real_model_keeps_its_other_files(shared: Path, tmp_path: Path) -> None:
    base = shared / "models" / "stories260K"
    name = "model.layers.2.mlp.down_proj.weight"
    delta = make_delta(base, {name: (torch.tensor([0, 100]), torch.tensor([1.0, 2.0]))})
    out = apply_delta(base, delta, tmp_path / "out").out
    assert {p.name for p in out.iterdir()} == {p.name for p in base.iterdir() if p.suffix != ".md"}
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert load_file(out / "model.safetensors")[name].view(-1)[[0, 100]].tolist() == [1.0, 2.0]

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from safecrit.errors import FormatError, SafecritError
from safecrit.fingerprint import accepted_fingerprints, fingerprint
from tests.modelfolder import CONFIG, random_tensors, write_model


def settle(folder: Path, seconds: int = 10**9) -> None:
    for file in folder.iterdir():
        os.utime(file, (seconds, seconds))


def test_is_sha256_of_config_then_every_tensor_in_name_order(tmp_path: Path) -> None:
    tensors = random_tensors()
    folder = write_model(tmp_path / "m", tensors)
    config = {key: value for key, value in CONFIG.items() if key != "transformers_version"}
    expected = hashlib.sha256(b"safecrit-fingerprint 1\n")
    expected.update(json.dumps(config, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    for name in sorted(tensors):
        head = json.dumps([name, "BF16", list(tensors[name].shape)], separators=(",", ":"))
        expected.update(head.encode() + b"\n" + tensors[name].view(torch.uint8).numpy().tobytes())
    assert fingerprint(folder) == "sha256:" + expected.hexdigest()


def test_ignores_sharding_and_volatile_config_keys(tmp_path: Path) -> None:
    tensors = random_tensors()
    whole = fingerprint(write_model(tmp_path / "a", tensors))
    assert fingerprint(write_model(tmp_path / "b", tensors, shards=3)) == whole
    noisy = {**CONFIG, "transformers_version": "4.1", "dtype": "float32", "_name_or_path": "/x", "use_cache": False}
    assert fingerprint(write_model(tmp_path / "c", tensors, config=noisy)) == whole
    nested = {**CONFIG, "text_config": {"dtype": "float32"}}
    bare = {**CONFIG, "text_config": {}}
    assert fingerprint(write_model(tmp_path / "d", tensors, config=nested)) == fingerprint(
        write_model(tmp_path / "e", tensors, config=bare)
    )


def test_tells_any_change_of_the_model(tmp_path: Path) -> None:
    tensors = random_tensors()
    seen = {fingerprint(write_model(tmp_path / "0", tensors))}
    flipped = {name: tensor.clone() for name, tensor in tensors.items()}
    flipped["model.norm.weight"].view(torch.int16)[5] ^= 1
    renamed = dict(tensors)
    renamed["model.final_norm.weight"] = renamed.pop("model.norm.weight")
    reshaped = tensors | {"model.norm.weight": tensors["model.norm.weight"].reshape(2, 3)}
    retyped = tensors | {"model.norm.weight": tensors["model.norm.weight"].view(torch.float16)}
    for number, variant in enumerate((flipped, renamed, reshaped, retyped), start=1):
        seen.add(fingerprint(write_model(tmp_path / str(number), variant)))
    seen.add(fingerprint(write_model(tmp_path / "c", tensors, config={**CONFIG, "rope_theta": 5.0})))
    assert len(seen) == 6


def test_changes_give_the_fingerprint_of_the_changed_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safecrit.fingerprint._CHUNK", 16)  # many chunks a tensor
    tensors = random_tensors()
    folder = write_model(tmp_path / "m", tensors)
    name = "model.layers.0.mlp.down_proj.weight"
    indices = torch.tensor([0, 7, 8, 40, 77])
    values = torch.arange(5, dtype=torch.bfloat16)
    changed = {key: tensor.clone() for key, tensor in tensors.items()}
    changed[name].view(-1)[indices] = values
    expected = fingerprint(write_model(tmp_path / "n", changed))
    assert fingerprint(folder, changes={name: (indices, values)}) == expected
    assert fingerprint(folder) != expected


def test_cache_answers_without_reading_and_forgets_a_changed_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "m", random_tensors())
    settle(folder)
    first = fingerprint(folder)

    def refuse(*_: object) -> str:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr("safecrit.fingerprint._compute", refuse)
        assert fingerprint(folder) == first
        with pytest.raises(AssertionError):
            fingerprint(folder, cache=False)
    write_model(folder, random_tensors(seed=1))
    assert fingerprint(folder) != first  # same sizes, newer files


def test_fresh_files_are_not_cached(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", random_tensors())
    first = fingerprint(folder)
    assert not (tmp_path / "cache").exists()
    stat = (folder / "model.safetensors").stat()
    write_model(folder, random_tensors(seed=1))
    os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(folder) != first


@pytest.mark.parametrize("content", ["", "[]", '{"state": 1}', '{"fingerprint": 3, "state": []}'])
def test_damaged_cache_is_ignored(tmp_path: Path, content: str) -> None:
    folder = write_model(tmp_path / "m", random_tensors())
    settle(folder)
    value = fingerprint(folder)
    (entry,) = (tmp_path / "cache").rglob("*.json")
    entry.write_text(content)
    assert fingerprint(folder) == value


def test_cache_that_cannot_be_written_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SAFECRIT_CACHE", str(tmp_path / "file"))
    folder = write_model(tmp_path / "m", random_tensors())
    settle(folder)
    assert fingerprint(folder) == fingerprint(folder)


def test_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAFECRIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = write_model(tmp_path / "m", random_tensors())
    settle(folder)
    fingerprint(folder)
    assert list((tmp_path / "xdg" / "safecrit").rglob("*.json"))


def test_accepted_fingerprints_name_the_parents(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", random_tensors())
    assert accepted_fingerprints(folder) == (fingerprint(folder),)
    (folder / "safecrit").mkdir()
    training = folder / "safecrit" / "training.json"
    training.write_text('{"parents": ["sha256:a", "sha256:b"]}')
    assert accepted_fingerprints(folder) == (fingerprint(folder), "sha256:a", "sha256:b")
    for content in ("{", "[]", '{"parents": "sha256:a"}'):
        training.write_text(content)
        with pytest.raises(FormatError, match=r"training\.json"):
            accepted_fingerprints(folder)


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", random_tensors())
    (folder / "config.json").write_text("{")
    with pytest.raises(FormatError, match="config"):
        fingerprint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(SafecritError, match="config"):
        fingerprint(folder)

"""Hub ids without the Hub: its cache as huggingface_hub lays it out, and an API that notes what it is asked."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from safecrit import hub
from safecrit.delta import Delta, make_delta
from safecrit.errors import SafecritError
from safecrit.maskfile import Mask
from tests.training_helpers import fitting_mask, folder_model


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the repository `owner/name`."""
    folder = tmp_path / "owner--name"
    folder.mkdir()

    def snapshot(name: str, *, allow_patterns: list[str] | None, **_: Any) -> str:
        if name != "owner/name":
            raise LocalEntryNotFoundError("offline")
        kept = tmp_path / "snapshot"
        shutil.rmtree(kept, ignore_errors=True)
        files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            (kept / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, kept / file)
        return str(kept)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return folder


@pytest.mark.parametrize("shard_bytes", [1 << 40, 300])
def test_masks_and_deltas_by_hub_id(shard_bytes: int, repository: Path, tmp_path: Path) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    mask = fitting_mask(loaded, 0.3)
    shutil.copyfile(tmp_path / "base" / "model.safetensors", repository / "model.safetensors")
    files = mask.save(repository / "mask.safetensors", shard_bytes=shard_bytes)
    assert (len(files) > 1) == (shard_bytes == 300)
    assert Mask.load("owner/name").iou(mask) == 1.0
    assert not (tmp_path / "snapshot" / "model.safetensors").exists()  # a model beside the mask is not fetched
    name, flat = next(iter(mask.indices.items()))
    weight = loaded.model.state_dict()[name].reshape(-1)
    delta = make_delta(tmp_path / "base", {name: (flat, weight[flat] + 1)})
    delta.save(repository / "safecrit" / "delta.safetensors")
    assert Delta.load("owner/name").result == delta.result


def test_a_repository_without_or_with_several_masks_says_so(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(SafecritError, match="found: none"):
        Mask.load("owner/name")
    mask = fitting_mask(folder_model("llama", tmp_path / "base"), 0.1)
    for name in ("mask_1", "mask_2"):
        mask.save(repository / f"{name}.safetensors")
    with pytest.raises(SafecritError, match=r"mask_1\.safetensors, mask_2\.safetensors"):
        Mask.load("owner/name")
    with pytest.raises(SafecritError, match="could not be fetched"):
        Mask.load("owner/other")


@pytest.mark.parametrize("given", ["mask.safetensors", "masks/top.safetensors", "/no/mask", "./a/b", "mask"])
def test_paths_are_never_asked_of_the_hub(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    assert hub.find_file(given, "mask") == Path(given)
    with pytest.raises(SafecritError):
        Mask.load(given)


class _Api:
    asked: dict[str, Any]
    error: Exception | None = None

    def create_repo(self, name: str, **options: Any) -> Any:
        if _Api.error:
            raise _Api.error
        _Api.asked = {"name": name, **options}
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, folder_path: str, ignore_patterns: list[str], **_: Any) -> None:
        files = [str(f.relative_to(folder_path)) for f in Path(folder_path).rglob("*") if f.is_file()]
        _Api.asked["files"] = set(huggingface_hub.utils.filter_repo_objects(files, ignore_patterns=ignore_patterns))


def test_push_is_private_unless_said_and_leaves_our_paths_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", _Api)
    wanted = {"config.json", "model.safetensors", "safecrit/training.json", "safecrit/adapter/adapter_config.json"}
    left = {"safecrit/config.yaml", "safecrit/checkpoints/checkpoint-2/optimizer.pt", "safecrit/.x.part", ".x.part"}
    for name in wanted | left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    hub.push(tmp_path, "owner/name")
    assert _Api.asked["private"] is True and _Api.asked["name"] == "owner/name"
    assert _Api.asked["files"] == wanted
    hub.push(tmp_path, "owner/name", public=True)
    assert _Api.asked["private"] is False
    monkeypatch.setattr(_Api, "error", HfHubHTTPError("no", response=SimpleNamespace(headers={}, request=None)))  # type: ignore[arg-type]
    with pytest.raises(SafecritError, match="hf auth login"):
        hub.push(tmp_path, "owner/name")


def test_a_hub_that_is_out_of_reach_is_our_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(SafecritError, match=r"The output in .* is whole"):
        hub.push(tmp_path, "owner/name")

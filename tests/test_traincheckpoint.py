"""What an interrupted run goes on from: parameters without a gradient, broken files, a disk that is full."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from safecrit.errors import SafecritError
from safecrit.masked import MaskedAdamW
from safecrit.sparse import SparseAdamW
from safecrit.traincheckpoint import load_state, save_state
from safecrit.training import run_set
from safecrit.trainloop import TrainSettings
from tests.architectures import build
from tests.training_helpers import backward, fitting_mask, folder_model, pairs, random_mask

Made = tuple[torch.nn.Module, torch.optim.Optimizer]


def dense() -> Made:
    """With a parameter that gets no gradient."""
    model = build("llama")
    model.unused = torch.nn.Parameter(torch.ones(3))
    return model, MaskedAdamW(model.parameters(), lr=1e-2)


def sparse() -> Made:
    model = build("llama")
    return model, SparseAdamW(model, random_mask(model, 0.1), lr=1e-2)


def trained(make: Callable[[], Made]) -> Made:
    model, optimizer = make()
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("make", [dense, sparse])
def test_it_goes_on_as_if_it_had_not_stopped(make: Callable[[], Made], tmp_path: Path) -> None:
    model, optimizer = trained(make)
    for _ in range(2):  # the second one over what a killed run had begun
        save_state(tmp_path, model, optimizer)
    again, other = make()
    load_state(tmp_path, again, other)
    for one, its in ((model, optimizer), (again, other)):
        backward(one, 1)
        its.step()
    for (name, weight), found in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, found), name


@pytest.mark.parametrize("make", [dense, sparse])
@pytest.mark.parametrize("broken", [".metadata", "__0_0.distcp"])
def test_a_broken_state_is_named(make: Callable[[], Made], broken: str, tmp_path: Path) -> None:
    save_state(tmp_path, *trained(make))
    file = tmp_path / "state" / broken
    file.write_bytes(file.read_bytes()[:9])
    with pytest.raises(SafecritError, match="is of another run, or broken"):
        load_state(tmp_path, *make())
    shutil.rmtree(tmp_path / "state")
    with pytest.raises(SafecritError, match="is no saved state of this version"):
        load_state(tmp_path, *make())


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(28, "No space left on device"), SafecritError, "No space left on device.*the same command"),
        (MemoryError(), SafecritError, "cannot be written .MemoryError"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
def test_what_a_save_ends_with(
    error: BaseException, raised: type[BaseException], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any) -> None:
        raise error

    monkeypatch.setattr(FileSystemWriter, "write_data", write)
    with pytest.raises(raised, match=message):
        save_state(tmp_path, *trained(sparse))


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("transformers.TrainerState.save_to_json", OSError(28, "No space left on device")),
        # What torch.save says of it.
        ("transformers.Trainer._save_rng_state", RuntimeError("[enforce fail at inline_container.cc:672] . ")),
    ],
)
def test_a_run_tells_of_a_full_disk(
    where: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any) -> None:
        raise error

    loaded = folder_model("llama", tmp_path / "model")
    monkeypatch.setattr(where, write)
    settings = TrainSettings(max_steps=1, gradient_accumulation_steps=1, save_steps=1)
    with pytest.raises(SafecritError, match="a checkpoint cannot be written"):
        run_set(loaded, fitting_mask(loaded, 0.1), pairs(("a", "b")), settings=settings, checkpoints=tmp_path / "out")

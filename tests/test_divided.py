"""Loading a divided model: the bits of one that is loaded whole and then divided, without ever being whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from safecrit import divided
from safecrit.divided import load_model_divided
from safecrit.errors import SafecritError
from safecrit.models import LoadedModel, load_model
from safecrit.strided import Strided, row_major
from tests import architectures, tiny

WORLD = 3  # divides few of the tests' sizes


@pytest.fixture(params=[0, WORLD - 1])
def mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    """This process as one rank of several that are not there: nothing here waits for them."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=WORLD)
    yield init_device_mesh("cpu", (WORLD,))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of every architecture, by name."""
    root = tmp_path_factory.mktemp("divided")
    tokenizer = tiny.tokenizer("byte-level")
    tokenizer.save_pretrained(root / "tokenizer")
    for name in architectures.CONFIGS:
        architectures.save(name, root / name)
        shutil.copytree(root / "tokenizer", root / name, dirs_exist_ok=True)
    return root


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that was made on the CPU, mapped files left out."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view:
            for tensor in torch.utils._pytree.tree_leaves(found):
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                    self.bytes = max(self.bytes, tensor.nbytes)
        return found


def assert_divided(found: LoadedModel, whole: LoadedModel, mesh: DeviceMesh, undivided: set[str] = frozenset()) -> None:
    """`found` holds this rank's rows of `whole`, bit for bit, and the same buffers and ties."""
    parameters = dict(whole.model.named_parameters())
    assert [name for name, _ in found.model.named_parameters()] == list(parameters)
    for name, parameter in found.model.named_parameters():
        expected = parameters[name]
        if name not in undivided:
            assert isinstance(parameter.data, DTensor) and parameter.shape == expected.shape
            chunks = [*expected.chunk(WORLD), *[expected[:0]] * WORLD]
            expected, parameter = chunks[mesh.get_local_rank()], parameter.data.to_local()
        assert parameter.dtype == expected.dtype, name
        assert torch.equal(parameter, expected), name
    for (name, one), (other_name, other) in zip(
        found.model.named_buffers(), whole.model.named_buffers(), strict=True
    ):
        assert name == other_name and one.dtype == other.dtype and torch.equal(one, other), name
    assert ties(found) == ties(whole)
    assert found.model.training is whole.model.training is False
    assert (found.folder, found.id) == (whole.folder, whole.id)


def ties(loaded: LoadedModel) -> list[list[str]]:
    held: dict[int, list[str]] = {}
    for name, parameter in loaded.model.named_parameters(remove_duplicate=False):
        held.setdefault(id(parameter), []).append(name)
    return list(held.values())


def never(*_: object) -> None:
    raise AssertionError("loaded whole")


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_every_architecture(name: str, folders: Path, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divided, "in_turn", never)
    with Largest() as largest:
        found = load_model_divided(folders / name, mesh)
    whole = load_model(folders / name, device="cpu")
    assert_divided(found, whole, mesh)
    rows = max(-(-p.shape[0] // WORLD) * p[0].nbytes for p in whole.model.parameters())
    buffers = max((buffer.nbytes for buffer in whole.model.buffers()), default=0)
    assert largest.bytes <= max(rows, buffers)

"""Loading a divided model: the bits of one that is loaded whole and then divided, without ever being whole."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
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
from transformers import PreTrainedModel

from safecrit import divided
from safecrit.anatomy import read_anatomy
from safecrit.errors import SafecritError
from safecrit.files import checkpoint_tensors
from safecrit.fsdp import shard
from safecrit.gradients import GradientStream
from safecrit.models import LoadedModel, load_model
from safecrit.sharding import sigmas
from safecrit.strided import Strided
from safecrit.tensorfile import MappedFiles
from tests import architectures, tiny

WORLD = 3  # divides few of the tests' sizes


@contextmanager
def one_of_several(rank: int) -> Iterator[DeviceMesh]:
    """This process as one rank of several that are not there: what is tested here waits for none of them."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    try:
        yield init_device_mesh("cpu", (WORLD,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    with one_of_several(1) as made:
        yield made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of every architecture, by name, in several files."""
    root = tmp_path_factory.mktemp("divided")
    tokenizer = tiny.tokenizer("byte-level")
    torch.manual_seed(0)
    for name in architectures.CONFIGS:
        model = architectures.build(name)
        for key, buffer in model.named_buffers():
            if key in model.state_dict():
                buffer.normal_()
        model.save_pretrained(root / name, max_shard_size="20KB")
        tokenizer.save_pretrained(root / name)
    return root


def load(
    folder: Path, mesh: DeviceMesh, wanted: Set[str] = frozenset(), *, embedding: bool = True, dtype: str = "auto"
) -> LoadedModel:
    def divide(model: PreTrainedModel) -> None:
        shard(model, mesh, set(wanted), embedding=embedding)

    return divided.load_model_divided(folder, mesh, divide, dtype=dtype)


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


def assert_divided(found: LoadedModel, whole: LoadedModel, mesh: DeviceMesh, undivided: Set[str] = frozenset()) -> None:
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
    for (name, one), (other_name, other) in zip(found.model.named_buffers(), whole.model.named_buffers(), strict=True):
        assert name == other_name and one.dtype == other.dtype and torch.equal(one, other), name
    assert ties(found) == ties(whole)
    assert found.model.training is whole.model.training is False
    assert (found.folder, found.id) == (whole.folder, whole.id)


def ties(loaded: LoadedModel) -> list[list[str]]:
    held: dict[int, list[str]] = {}
    for name, parameter in loaded.model.named_parameters(remove_duplicate=False):
        held.setdefault(id(parameter), []).append(name)
    return list(held.values())


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each load of a whole model."""
    taken, inner = [], divided.in_turn
    monkeypatch.setattr(divided, "in_turn", lambda load: taken.append(1) or inner(load))
    return taken


@pytest.mark.parametrize(("number", "name"), list(enumerate(architectures.CONFIGS)), ids=architectures.CONFIGS)
def test_every_architecture(number: int, name: str, folders: Path, turns: list[int]) -> None:
    with one_of_several(number % WORLD) as mesh:
        with Largest() as largest:
            found = load(folders / name, mesh)
        whole = load_model(folders / name, device="cpu")
        assert_divided(found, whole, mesh)
    rows = max(-(-p.shape[0] // WORLD) * p[0].nbytes for p in whole.model.parameters())
    buffers = max((buffer.nbytes for buffer in whole.model.buffers()), default=0)
    assert largest.bytes <= max(rows, buffers)  # no parameter, nor any checkpoint tensor, was ever whole
    assert not turns


@pytest.mark.parametrize(("name", "dtype"), [("mixtral", "bfloat16"), ("llama-tied", "float16"), ("phi3", "float64")])
def test_dtypes(name: str, dtype: str, folders: Path, mesh: DeviceMesh, turns: list[int]) -> None:
    found = load(folders / name, mesh, dtype=dtype)
    assert_divided(found, load_model(folders / name, device="cpu", dtype=dtype), mesh)
    assert not turns


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_whole_embedding_and_wanted_gradients(name: str, folders: Path, mesh: DeviceMesh) -> None:
    wanted = {"model.layers.1.mlp.up_proj.weight"}
    found = load(folders / name, mesh, wanted, embedding=False)
    assert_divided(found, load_model(folders / name, device="cpu"), mesh, {"model.embed_tokens.weight"})
    assert {name for name, p in found.model.named_parameters() if p.requires_grad} == wanted


def test_a_dtype_that_dividing_changes(folders: Path, mesh: DeviceMesh) -> None:
    def divide(model: PreTrainedModel) -> None:
        shard(model.float(), mesh, set())

    found = divided.load_model_divided(folders / "llama-tied", mesh, divide, dtype="float16")
    whole = load_model(folders / "llama-tied", device="cpu", dtype="float16")
    whole.model.float()
    assert_divided(found, whole, mesh)


def resaved(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A checkpoint with its tensors changed, in one file."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("model*"))
    tensors = {name: MappedFiles().tensor(stored).clone() for name, stored in checkpoint_tensors(folder).items()}
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_names_of_the_base_model(folders: Path, tmp_path: Path, mesh: DeviceMesh, turns: list[int]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    folder = resaved(folders / "gpt2", tmp_path / "gpt2", change)
    assert_divided(load(folder, mesh), load_model(folder, device="cpu"), mesh)
    assert not turns


@pytest.mark.parametrize("shift", [0, 1])
def test_a_tied_head_that_is_stored_too_is_loaded_whole(
    shift: int, folders: Path, tmp_path: Path, mesh: DeviceMesh, turns: list[int]
) -> None:
    folder = resaved(
        folders / "llama-tied",
        tmp_path / "both",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + shift}),
    )
    assert_divided(load(folder, mesh), load_model(folder, device="cpu"), mesh)
    assert turns == [1]


def test_other_files_are_loaded_whole(folders: Path, tmp_path: Path, mesh: DeviceMesh, turns: list[int]) -> None:
    folder = resaved(folders / "llama", tmp_path / "bin", lambda _: None)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_divided(load(folder, mesh), load_model(folder, device="cpu"), mesh)
    assert turns == [1]


def test_errors_are_those_of_loading_whole(folders: Path, tmp_path: Path, mesh: DeviceMesh) -> None:
    lacking = resaved(folders / "llama", tmp_path / "lacking", lambda tensors: tensors.pop("lm_head.weight"))
    other = resaved(
        folders / "llama", tmp_path / "other", lambda tensors: tensors.update({"lm_head.weight": torch.ones(3, 24)})
    )
    cut = resaved(folders / "llama", tmp_path / "cut", lambda _: None)
    with open(cut / "model.safetensors", "r+b") as file:
        file.truncate(4000)
    quantised = resaved(folders / "llama", tmp_path / "quantised", lambda _: None)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    for folder in (lacking, other, cut, quantised, tmp_path / "none"):
        with pytest.raises(SafecritError) as whole:
            load_model(folder, device="cpu")
        with pytest.raises(SafecritError) as divided_:
            load(folder, mesh)
        assert str(divided_.value) == str(whole.value)


@pytest.mark.parametrize(("name", "dtype"), [("mixtral", "auto"), ("gpt2", "bfloat16"), ("phi3", "float64")])
def test_sigma_is_that_of_the_weights_as_loaded(name: str, dtype: str, folders: Path, mesh: DeviceMesh) -> None:
    whole = load_model(folders / name, device="cpu", dtype=dtype)
    anatomy = read_anatomy(whole.model)
    found = sigmas(load(folders / name, mesh, dtype=dtype), anatomy)
    expected = GradientStream(whole.model, anatomy).sigma
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_sigma_without_files(folders: Path, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    try:
        loaded = load(folders / "mixtral", init_device_mesh("cpu", (1,)))
        anatomy = read_anatomy(load_model(folders / "mixtral", device="meta").model)
        stored, gathered = sigmas(loaded, anatomy), sigmas(replace(loaded, folder=tmp_path), anatomy)
    finally:
        torch.distributed.destroy_process_group()
    assert stored.keys() == gathered.keys()
    assert all(torch.equal(stored[key], gathered[key]) for key in stored)


@given(st.data())
def test_the_boxes_of_a_pattern_hold_what_lies_within(data: st.DataObject) -> None:
    whole = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))
    order = data.draw(st.permutations(range(len(whole))))
    starts = [data.draw(st.integers(0, n - 1)) for n in whole]
    steps = [data.draw(st.integers(1, 2)) for _ in whole]
    view = torch.arange(math.prod(whole)).reshape(whole).permute(order)
    view = view[tuple(slice(starts[d], None, steps[d]) for d in order)]
    pattern = Strided(int(view.storage_offset()), tuple(view.shape), view.stride())
    low, high = sorted(data.draw(st.integers(0, math.prod(whole))) for _ in range(2))
    found = torch.zeros(view.shape, dtype=torch.int64)
    for box, part in pattern.within(low, high):
        assert torch.equal(part.flat_indices().reshape(part.shape), view[box])
        found[box] += 1
    assert torch.equal(found, ((low <= view) & (view < high)).long())

"""What an interrupted `score` keeps: sums over some batches of the plan, made by one rank or by all together.

Each file says which batches it holds, so that files of other numbers of ranks can be
taken up: those whose batches are disjoint add up, whoever made them. Sums over whole
parameters (of ranks that share a sharded model) lack sigma, which is applied when they
are added to the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from safecrit import distributed
from safecrit.anatomy import CheckpointTensor
from safecrit.errors import FormatError
from safecrit.files import atomic
from safecrit.gradients import GradientStream, scaled_part
from safecrit.scoring import ScoreState
from safecrit.sharding import ShardedStream
from safecrit.tensorfile import MappedFiles, TensorWriter, read_document

FORMAT, VERSION = "safecrit-partial", 2
PATTERN = "partial-*.safetensors"
SHARED = "shared"  # of all ranks, by runtime parameter


@dataclass(frozen=True)
class Partial:
    """A file of sums over the batches `state.done`; tensors are views of it, by checkpoint or runtime name."""

    file: Path
    state: ScoreState
    tensors: Mapping[str, torch.Tensor]

    @property
    def by_parameter(self) -> bool:
        """Whether it holds sums of gradients by runtime parameter, without sigma."""
        return self.file.stem.endswith(SHARED)

    def sums(self, entry: CheckpointTensor, sigma: torch.Tensor) -> torch.Tensor:
        """The sums of one checkpoint tensor, float32 in its shape, `sigma` (of each matrix) included."""
        if not self.by_parameter:
            return self.tensors[entry.name]
        return scaled_part(entry, self.tensors[entry.parameter], sigma)


def own_file(folder: Path, name: str, *, shared: bool = False) -> Path:
    """Where this rank saves the pass `name`; `shared`: where all ranks save it together."""
    ranks = distributed.current()
    return folder / f"partial-{name}-{SHARED if shared else f'{ranks.rank}-of-{ranks.world}'}.safetensors"


def save(file: Path, key: str, state: ScoreState, tensors: Mapping[str, torch.Tensor]) -> None:
    """Keep `tensors` (float32) under `key`, in place of what `file` was."""
    document = {"format": FORMAT, "version": VERSION, "key": key, "state": asdict(state)}
    entries = {name: (torch.float32, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with atomic(file) as temporary, TensorWriter(temporary, entries, document) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def save_together(
    file: Path,
    key: str,
    state: ScoreState,
    shapes: Mapping[str, Sequence[int]],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """The same of tensors that lie on several ranks: each writes its own whole ones."""
    document: dict[str, Any] = {"format": FORMAT, "version": VERSION, "key": key, "state": asdict(state)}
    entries = {name: (torch.float32, tuple(shape)) for name, shape in shapes.items()}
    with (
        distributed.atomic_together(file) as temporary,
        distributed.writer(temporary, entries, document) as writer,
    ):
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def save_rows(file: Path, key: str, stream: ShardedStream, state: ScoreState, rows: Mapping[str, torch.Tensor]) -> None:
    """The same of a sharded model's sums: each rank writes its rows of every parameter."""
    document: dict[str, Any] = {"format": FORMAT, "version": VERSION, "key": key, "state": asdict(state)}
    entries = {name: (torch.float32, stream.shape(name)) for name in rows}
    with (
        distributed.atomic_together(file) as temporary,
        distributed.writer(temporary, entries, document) as writer,
    ):
        for name, tensor in rows.items():
            writer.write_rows(name, stream.rows(name).start, tensor)


def restored(file: Path, key: str, stream: GradientStream) -> ScoreState | None:
    """Fill the accumulators of `stream` from `file`; None where it holds nothing under `key`."""
    found = load(file, key)
    if found is None:
        return None
    for name, tensor in found.tensors.items():
        own = tensor[stream.rows(name)] if isinstance(stream, ShardedStream) else tensor
        stream.accumulators[name].copy_(own)
    return found.state


def load(file: Path, key: str) -> Partial | None:
    """What a killed run saved; None where there is nothing, or of other inputs or another version."""
    if not file.is_file():
        return None
    try:
        stored, document = read_document(file, FORMAT, VERSION)
    except FormatError:
        return None
    if document.get("key") != key:
        return None
    mapped = MappedFiles()
    tensors = {name: mapped.tensor(entry) for name, entry in stored.items()}
    return Partial(file, ScoreState(**document["state"]), tensors)


def find(folder: Path, name: str, key: str) -> list[Partial]:
    """The files of the pass `name` that together hold most batches, none of them twice; the same on every rank."""

    def choose() -> list[Path]:
        pattern = re.compile(rf"partial-{re.escape(name)}-(?:\d+-of-\d+|{SHARED})\.safetensors")
        files = [file for file in folder.glob(PATTERN) if pattern.fullmatch(file.name)]
        loaded = [partial for file in files if (partial := load(file, key)) is not None]
        chosen: list[Path] = []
        done: set[int] = set()
        for partial in sorted(loaded, key=lambda partial: (-len(partial.state.done), partial.file.name)):
            if done.isdisjoint(partial.state.done):
                chosen.append(partial.file)
                done.update(partial.state.done)
        for file in set(files) - set(chosen):
            file.unlink()
        return chosen

    found = [load(file, key) for file in distributed.from_first(choose)]
    distributed.barrier()  # nobody saves before all have opened what there was
    return [partial for partial in found if partial is not None]

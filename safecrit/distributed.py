"""Ranks under torchrun or `accelerate launch`: who we are, and the few collectives that stages use.

Everything runs in one process without a word of torch.distributed; `start` joins the
process group only where a launcher made the environment for one. Sums are SUM, never
AVG: gloo's AVG is no average in every torch (pytorch#162338), so who wants a mean divides.
Values that are not tensors travel through gloo on the CPU, CUDA tensors through NCCL.
The faults of other ranks are the business of `safecrit.faults`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safecrit import faults
from safecrit.errors import SafecritError
from safecrit.files import atomic
from safecrit.tensorfile import TensorWriter

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Ranks:
    """A process among `world`, and among the `local_world` of its host."""

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank prints and writes what all share."""
        return self.rank == 0

    def __str__(self) -> str:
        """How many there are, in words."""
        return f"{self.world} rank{'s' if self.world > 1 else ''}"


_current = Ranks()
_sent: dict[str, int] = {}


def current() -> Ranks:
    """The place of this process; rank 0 of 1 before `start` and without a launcher."""
    return _current


def start(timeout_s: float) -> Ranks:
    """Join the process group of the launcher, if there is one; SafecritError where the ranks do not all come.

    `timeout_s`: how long a rank waits for the others, in a collective and at the start.
    """
    global _current
    if not faults.launched() or _current.world > 1 or faults.watching():
        return _current
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    env = os.environ
    place = Ranks(
        int(env["RANK"]),
        int(env["WORLD_SIZE"]),
        int(env.get("LOCAL_RANK", 0)),
        int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])),
    )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(place.local % torch.cuda.device_count())
    limit = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise SafecritError(
            f"rank {place.rank} of {place.world} met no others at {env['MASTER_ADDR']}:{env['MASTER_PORT']} "
            f"({str(error).splitlines()[0][:200]}). Start the same torchrun line on every host."
        ) from error
    port, attempt = int(env["MASTER_PORT"]), env.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = TCPStore(env["MASTER_ADDR"], port, None, False, limit, wait_for_workers=False)
    _current = place
    faults.watch(place.rank, place.world, PrefixStore(f"safecrit/{attempt}", store), timeout_s)
    return place


def finish() -> None:
    """Leave the process group after all ranks are done; nothing without one."""
    global _current
    if not faults.watching():
        return
    import torch.distributed as dist

    barrier()
    faults.unwatch()
    dist.destroy_process_group()
    _current = Ranks()


def writes_in(folder: Path) -> None:
    """All ranks write in `folder`: what is left of half-written files there goes when one of them fails."""
    faults.clear_parts_of(folder)


@contextmanager
def shared_folder(beside: Path) -> Iterator[Path]:
    """A temporary folder that all ranks see: the system's own for one process, else one in `beside`."""
    with ExitStack() as stack:

        def make() -> Path:
            where = beside if _current.world > 1 else None
            return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".safecrit-", dir=where)))

        folder = from_first(make)
        faults.remove_at_end(folder)
        yield folder
        barrier()


def sent_bytes() -> dict[str, int]:
    """Bytes that this rank sent so far, by purpose, as a ring of all ranks sends them."""
    return dict(_sent)


def _count(purpose: str, size: float) -> None:
    _sent[purpose] = _sent.get(purpose, 0) + round(size)
    faults.step()


def sum_(tensor: torch.Tensor, purpose: str = "") -> torch.Tensor:
    """Sum `tensor` (contiguous) over the ranks, in place, and return it."""
    return _summed(tensor, _current.world, purpose)


def processes() -> int:
    """Processes of the process group, whoever made it (a script's own `accelerate launch` too); 1 without one."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total_(tensor: torch.Tensor, purpose: str = "") -> torch.Tensor:
    """Sum `tensor` (contiguous) over `processes()`, in place, and return it."""
    return _summed(tensor, processes(), purpose)


def _summed(tensor: torch.Tensor, world: int, purpose: str) -> torch.Tensor:
    if world > 1:
        import torch.distributed as dist

        _count(purpose, 2 * (world - 1) / world * tensor.nbytes)
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def rows_of(total: int, world: int, rank: int) -> slice:
    """Which of `total` rows FSDP2 gives a rank: as torch.chunk cuts."""
    step = -(-total // world)
    return slice(min(rank * step, total), min((rank + 1) * step, total))


def sum_to(tensor: torch.Tensor, owner: int, purpose: str = "") -> None:
    """Sum `tensor` (contiguous) over the ranks into the one of rank `owner`; that of the others is undefined then."""
    if _current.world > 1:
        import torch.distributed as dist

        _count(purpose, tensor.nbytes if _current.rank != owner else 0)
        dist.reduce(tensor, owner, op=dist.ReduceOp.SUM)


def rows_to(local: torch.Tensor, shape: Sequence[int], owner: int, purpose: str = "") -> torch.Tensor | None:
    """The rows of a tensor of `shape` that FSDP2 divided over the ranks, together on rank `owner`; None on the others.

    `local`: this rank's rows. All but the last ranks that have any have equally many.
    """
    import torch

    world = processes()
    rows = [rows_of(shape[0], world, rank) for rank in range(world)]
    sizes = [each.stop - each.start for each in rows]
    found = parts_to(local, sizes, owner, purpose)
    return torch.cat(found) if found is not None else None


def parts_to(local: torch.Tensor, sizes: Sequence[int], owner: int, purpose: str = "") -> list[torch.Tensor] | None:
    """Each process's `local`, [sizes[its rank], ...], on rank `owner`; None on the others."""
    import torch
    import torch.distributed as dist

    padded = local.new_zeros(max(sizes), *local.shape[1:])
    padded[: len(local)] = local
    here = dist.get_rank() == owner
    _count(purpose, 0 if here else padded.nbytes)
    found = [torch.empty_like(padded) for _ in sizes] if here else None
    dist.gather(padded, found, dst=owner)
    return [part[:size] for part, size in zip(found, sizes, strict=True)] if found is not None else None


def gather(value: T, purpose: str = "") -> list[T]:
    """Every rank's `value` (plain Python or CPU tensors), in the ranks' order, on all of them."""
    if _current.world == 1:
        return [value]
    import pickle

    import torch.distributed as dist

    _count(purpose, (_current.world - 1) * len(pickle.dumps(value)))
    found: list[Any] = [None] * _current.world
    dist.all_gather_object(found, value)
    return found


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on all ranks; it runs there alone."""
    if _current.world == 1:
        return make()
    import torch.distributed as dist

    box: list[Any] = [None]
    if _current.first:
        try:
            box = [make()]
        except SafecritError as error:  # the user's mistake: all ranks end with it
            box = [error]
    _count("", 0)
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], SafecritError):
        raise box[0]
    return box[0]


def most(value: int) -> int:
    """The largest `value` of any rank."""
    return max(gather(value))


def barrier() -> None:
    """Wait for all ranks."""
    gather(None)


class Tally:
    """Counts what all ranks have done of one stage; every rank makes its own, at the same point of the work."""

    _made = 0

    def __init__(self, before: int = 0) -> None:
        Tally._made += 1
        self._name, self._total = f"tally-{Tally._made}", before
        self._before = before

    def __call__(self, more: int) -> int:
        """Add `more` that this rank did; the number that all have done."""
        self._total += more
        return self._before + faults.add(self._name, more) if _current.world > 1 else self._total


def mine(work: Sequence[T]) -> list[T]:
    """A rank's share of `work`: every `world`-th piece, so that neighbours of like size spread evenly."""
    return list(work[_current.rank :: _current.world])


def divided(work: Sequence[T], do: Callable[[T], R], *, together: bool = False) -> list[R]:
    """`do` of every piece of `work`, divided over the ranks; all results, in order, on every rank.

    together: all ranks do equally many pieces, at the same time, because `do` holds collectives (a sharded
    model's); a rank without a piece of its own repeats the last one.
    """
    if _current.world == 1:
        return [do(piece) for piece in work]
    own = mine(work)
    made = [do(piece) for piece in own]
    if together and len(own) < -(-len(work) // _current.world):
        do(work[-1])
    found = gather(made)
    return [found[number % _current.world][number // _current.world] for number in range(len(work))]


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether parts of `model` lie on other ranks, so that all must run it at the same time."""
    return any(is_divided(parameter) for parameter in model.parameters())


def is_divided(tensor: torch.Tensor) -> bool:
    """Whether parts of a tensor lie on other ranks."""
    return type(tensor.detach()).__name__ == "DTensor"


def owners(sizes: Sequence[int]) -> list[int]:
    """The rank that owns each of a row of tensors: neighbours share one, and all own about as many bytes."""
    total, before, found = max(1, sum(sizes)), 0, []
    for size in sizes:
        found.append(min(_current.world - 1, (2 * before + size) * _current.world // (2 * total)))
        before += size
    return found


@contextmanager
def writer(
    path: Path, entries: Mapping[str, tuple[torch.dtype, Sequence[int]]], document: Any, *, together: bool = True
) -> Iterator[TensorWriter]:
    """A `TensorWriter` of which each rank writes some tensors, inside `atomic_together`; else a plain one."""
    part = together and _current.world > 1
    if not part:
        with TensorWriter(path, entries, document) as plain:
            yield plain
        return
    if _current.first:
        with TensorWriter(path, entries, document, part=True) as own:
            barrier()
            yield own
    else:
        barrier()
        with TensorWriter(path, entries, document, part=True, join=True) as own:
            yield own


@contextmanager
def atomic_together(path: Path) -> Iterator[Path]:
    """`safecrit.files.atomic` of one file that all ranks write parts of: rank 0 makes it, and names it at the end."""
    if _current.world == 1:
        with atomic(path) as temporary:
            yield temporary
        return
    if _current.first:
        with atomic(path) as temporary:
            from_first(lambda: temporary)
            yield temporary
            barrier()
    else:
        temporary = from_first(lambda: path)
        if not temporary.exists():
            raise SafecritError(
                f"{path.parent}: rank 0's files are not seen by rank {_current.rank}. The output folder must be on a "
                "file system that all hosts share; choose another -o."
            )
        yield temporary
        barrier()
    barrier()

"""When a rank fails: every other rank ends, and one of them says who it was.

Each rank writes a heartbeat to the launcher's store and looks at the next rank's. A rank
that raises tells the store why; one that is killed or frozen goes silent; one whose main
thread hangs is found behind the others in the count of collectives when these time out.
torchrun also ends the other ranks of a host with SIGTERM: then, before going, we look for
who went silent. All this happens in two threads, since the main thread may sit in a
collective for ever: one talks to the store, the other one ends the process even where the
store's host no longer answers.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from safecrit.files import PART, remove_parts

BEAT_S = 1.0
SILENT_S = 45.0  # a rank that is silent for so long is lost; the job ends within a minute
ADVICE = "Run the same command again, on any number of ranks: it goes on from what was saved."


class _Watch:
    def __init__(self, rank: int, world: int, store: Any, limit: float) -> None:
        self.rank, self.world, self.store, self.limit = rank, world, store, limit
        self.steps, self.ended = 0, threading.Event()
        self.folders: set[Path] = set()  # with half-written files in them
        self.temporary: set[Path] = set()  # folders that go whole
        self.reached = time.monotonic()  # when the store last answered
        self.verdict: tuple[str, int] | None = None
        self.receive, self.send = socket.socketpair()
        self.send.setblocking(False)
        store.set(f"who/{rank}", f"{socket.gethostname()}, pid {os.getpid()}")
        self._beat(0)
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self._beats, self._guard)]

    def _beat(self, number: int) -> None:
        self.store.set(f"beat/{self.rank}", f"{number}/{self.steps}")

    def read(self, key: str) -> str | None:
        return bytes(self.store.get(key)).decode() if self.store.check([key]) else None

    def name(self, rank: int) -> str:
        return f"rank {rank} of {self.world} ({self.read(f'who/{rank}') or 'never came'})"

    def silent(self, seconds: float) -> list[int]:
        """Ranks whose heart does not beat in `seconds`."""
        before = [self.read(f"beat/{rank}") for rank in range(self.world)]
        time.sleep(seconds)
        after = [self.read(f"beat/{rank}") for rank in range(self.world)]
        return [
            rank
            for rank, (one, other) in enumerate(zip(before, after, strict=True))
            if rank != self.rank and one == other and other != "done"
        ]

    def _beats(self) -> None:
        next_rank, last, since, number = (self.rank + 1) % self.world, None, time.monotonic(), 0
        with contextlib.suppress(RuntimeError):  # the store is gone: the guard notices
            while not self.ended.wait(BEAT_S):
                number += 1
                self._beat(number)
                seen = self.read(f"beat/{next_rank}")
                if seen != last or seen == "done":
                    last, since = seen, time.monotonic()
                elif time.monotonic() - since > self.limit:
                    self.verdict = (lost(self.name(next_rank)), 1)
                if self.store.check(["failed"]):
                    self.verdict = ("", 1)
                self.reached = time.monotonic()

    def _guard(self) -> None:
        while not self.ended.is_set():
            ready, _, _ = select.select([self.receive], [], [], BEAT_S / 4)
            number = self.receive.recv(1)[0] if ready else 0
            if number == signal.SIGTERM:
                self._stopped()
            elif number == signal.SIGINT:
                time.sleep(2 * BEAT_S)  # the main thread's own KeyboardInterrupt comes first, if it can
                end("interrupted.", 128 + signal.SIGINT)
            if self.verdict is not None:
                end(*self.verdict)
            if time.monotonic() - self.reached > self.limit:
                end(f"the store of rank 0's host is lost: its host or launcher ended. {ADVICE}", 1)

    def _stopped(self) -> None:
        with contextlib.suppress(RuntimeError):
            if gone := self.silent(3 * BEAT_S):
                end(lost(self.name(gone[0])), 1)
        end(f"stopped by SIGTERM. {ADVICE}", 128 + signal.SIGTERM)


_watch: _Watch | None = None
_ending = threading.Lock()


def lost(name: str) -> str:
    """What is said of a rank that went silent."""
    return f"{name} fell silent: killed, out of memory, or frozen. The other ranks end. {ADVICE}"


def launched() -> bool:
    """Whether a launcher (torchrun, accelerate) started this process as a rank."""
    return all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def watching() -> bool:
    """Whether this process is one of a watched group."""
    return _watch is not None


def watch(rank: int, world: int, store: Any, timeout_s: float) -> None:
    """Begin to watch, and to be watched; `store` is one that all ranks share, on a connection of our own."""
    global _watch
    _watch = _Watch(rank, world, store, min(SILENT_S, timeout_s))
    if threading.current_thread() is threading.main_thread():
        # The byte goes out at once, even while the main thread sits in a collective.
        signal.set_wakeup_fd(_watch.send.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
    for thread in _watch.threads:
        thread.start()


def unwatch() -> None:
    """Say that this rank is done, and its silence means nothing any more."""
    global _watch
    assert _watch is not None
    _watch.ended.set()
    for thread in _watch.threads:
        thread.join()
    _watch.store.set(f"beat/{_watch.rank}", "done")
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _watch = None


def clear_parts_of(folder: Path) -> None:
    """Half-written files in `folder` are removed when a rank fails, those of the failed rank too."""
    if _watch is not None:
        _watch.folders.add(folder)


def remove_at_end(folder: Path) -> None:
    """The temporary `folder` is removed when a rank fails."""
    if _watch is not None:
        _watch.temporary.add(folder)


def step() -> None:
    """Count that this rank enters a collective; who is behind when one times out is the one that hangs."""
    if _watch is not None:
        _watch.steps += 1


def add(name: str, amount: int) -> int:
    """The sum over the ranks of all amounts given for `name` so far."""
    return int(_watch.store.add(f"sum/{name}", amount)) if _watch is not None else amount


def end(message: str, code: int) -> NoReturn:
    """End this process with `code`, and so every other rank; the first to come prints its message."""
    assert _watch is not None
    _ending.acquire()  # a second thread that comes here waits for the first to end both
    told = bool(message)
    with contextlib.suppress(RuntimeError):  # without a store nobody knows of the others: say it
        told = told and _watch.store.add("claims", 1) == 1
    if told:
        stream = sys.__stderr__
        assert stream is not None
        stream.write(f"error: {message}\n")
        stream.flush()
        with contextlib.suppress(RuntimeError):
            _watch.store.set("failed", message)
    remove_parts()
    for folder in _watch.folders:
        for part in folder.glob(f".*{PART}"):
            part.unlink(missing_ok=True)
    for folder in _watch.temporary:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(ValueError, OSError):
        sys.stdout.flush()
    os._exit(code)


def fail(error: BaseException, message: str, code: int) -> NoReturn:
    """End the job because `error` rose here: another rank's doing where one is gone, else with `message`."""
    assert _watch is not None
    with contextlib.suppress(RuntimeError):
        if _watch.store.check(["failed"]):
            end("", 1)
        if isinstance(error, RuntimeError) and _watch.world > 1:
            if gone := _watch.silent(3 * BEAT_S):
                end(lost(_watch.name(gone[0])), 1)
            if _watch.store.check(["failed"]):
                end("", 1)
            if "imed out" in str(error):
                if (behind := _behind(_watch)) is not None:
                    end(f"{_watch.name(behind)} hangs: it did not reach where the others wait. {ADVICE}", 1)
                message = (
                    f"waited in vain for the others ({str(error).splitlines()[0]}). Raise --dist-timeout. {ADVICE}"
                )
    end(f"rank {_watch.rank} of {_watch.world}: {message}" if _watch.world > 1 else message, code)


def _behind(own: _Watch) -> int | None:
    found = [own.read(f"beat/{rank}") or "0/0" for rank in range(own.world)]
    steps = [int(beat.rpartition("/")[2]) if beat != "done" else own.steps for beat in found]
    return steps.index(min(steps)) if min(steps) < max(steps) else None

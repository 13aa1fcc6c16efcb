"""Progress on stderr: a bar on a terminal, plain lines elsewhere, both with rate and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

LINE_EVERY_S = 5.0


def duration(seconds: float) -> str:
    """`42 s`, `3 min 10 s` or `2 h 5 min`."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


class Progress:
    """Reports of one stage: call it with (done, total). Shows nothing when `quiet`."""

    def __init__(self, what: str, unit: str, *, quiet: bool = False) -> None:
        self.what, self.unit, self.quiet = what, unit, quiet
        self.start = self.last = time.monotonic()
        self.before = 0
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=None, rate="")
        self.start = self.last = time.monotonic()
        return self

    def begin(self, done: int) -> None:
        """`done` units were finished before; they do not count for the rate."""
        self.before = done

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units are finished; `note` is shown beside the rate."""
        now = time.monotonic()
        if self.quiet:
            return
        rate = (done - self.before) / max(now - self.start, 1e-9)
        shown = f"{rate:.1f} {self.unit}/s {note}".strip()
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, rate=shown)
        elif now - self.last >= LINE_EVERY_S or done == total:
            self.last = now
            left = f", {duration((total - done) / rate)} left" if done < total and rate > 0 else ""
            sys.stderr.write(f"{self.what}: {done}/{total}, {shown}{left}\n")
            sys.stderr.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


Reporter = Callable[[str, str], Progress]


def quiet_reporter(what: str, unit: str) -> Progress:
    """A reporter that shows nothing, for library use."""
    return Progress(what, unit, quiet=True)

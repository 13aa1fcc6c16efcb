"""The one place that prints: results on stdout (text or JSON), notes and errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from safecrit.progress import Progress


def report_error(message: str) -> None:
    """One line on stderr, `error: ...`."""
    sys.stderr.write(f"error: {message}\n")


class Sink:
    """Output of one command, by its `--json` and `-q` flags."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet

    def note(self, message: str) -> None:
        """A remark for a person, on stderr."""
        if not self.quiet:
            sys.stderr.write(message + "\n")
            sys.stderr.flush()

    def warn(self, message: str) -> None:
        """A warning, on stderr, shown even when quiet."""
        sys.stderr.write(f"warning: {message}\n")

    def progress(self, what: str, unit: str) -> Progress:
        """Progress of a stage."""
        return Progress(what, unit, quiet=self.quiet)

    def line(self, text: str = "") -> None:
        """A line of the result; left out with `--json`."""
        if not self.as_json:
            sys.stdout.write(text + "\n")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of the result: the first column on the left, numbers on the right; left out with `--json`."""
        if self.as_json:
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for n, column in enumerate(columns):
            table.add_column(column, justify="left" if n == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*("" if cell is None else str(cell) for cell in row))
        width = None if sys.stdout.isatty() else 160
        Console(file=sys.stdout, width=width, highlight=False, markup=False).print(table)

    def result(self, value: dict[str, Any]) -> None:
        """The result as one JSON object, with `--json` only."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")

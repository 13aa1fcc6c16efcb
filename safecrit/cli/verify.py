"""`safecrit verify`: proof, on the files on disk, that SET or SPA kept its promise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from safecrit.cli import options as o
from safecrit.cli.sink import Sink


def verify(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder (or Hub id) of the trained model.")],
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="The model that training started from.")],
    mask: o.MaskFile,
    mode: Annotated[
        Literal["set", "spa"],
        typer.Option("--mode", help="set: only masked weights differ; spa: no masked weight differs."),
    ],
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Compare two models bit by bit under a mask. Exit code 3 names the first weights that break the promise."""
    from safecrit.errors import CheckFailed
    from safecrit.maskfile import Mask
    from safecrit.models import resolve_folder
    from safecrit.verification import verify as compare

    sink = Sink(as_json=as_json, quiet=quiet)
    report = compare(resolve_folder(out), resolve_folder(base), Mask.load(Path(mask)), mode)
    sink.result(report.to_json())
    if not report.ok:
        raise CheckFailed(report.message())
    sink.line(report.message())

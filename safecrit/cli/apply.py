"""`safecrit apply`: put a delta into its base model, or take it out again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safecrit.cli import options as o
from safecrit.cli.sink import Sink


def apply(
    model: o.ModelArgument,
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="Delta of `safecrit set`: file or Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Model folder to write.")],
    undo: Annotated[bool, typer.Option("--undo", help="Take the delta out of its result.")] = False,
    revision: o.Revision = None,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Write the model with a delta's weights in place: bit-identical to what `set` wrote."""
    from safecrit.delta import Delta, apply_delta
    from safecrit.models import resolve_folder

    sink = Sink(as_json=as_json, quiet=quiet)
    applied = apply_delta(
        resolve_folder(model, revision=revision), Delta.load(delta), output, undo=undo, overwrite=overwrite
    )
    sink.line(applied.message())
    sink.result(
        {"output": str(applied.out), "changed": applied.changed, "already": applied.already, "undo": applied.undo}
    )

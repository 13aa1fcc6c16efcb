"""`safecrit demo`: the whole method on models made on the spot."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from safecrit.cli import options as o
from safecrit.cli.sink import Sink


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Output folder.")] = Path(
        "safecrit-demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller models, at most 90 s on two cores.")] = False,
    moe: Annotated[bool, typer.Option("--moe", help="A mixture-of-experts model.")] = False,
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Train small harmless models on the spot and run the whole method on them: score, mask, SET, SPA, evaluation.

    Needs no download. Run again, it reuses finished stages.
    """
    from safecrit.api.demo import run_demo
    from safecrit.demo.settings import DemoSettings
    from safecrit.errors import SafecritError

    if quick and moe:
        raise SafecritError("--quick and --moe exclude each other.")
    make = DemoSettings.quick if quick else DemoSettings.moe if moe else DemoSettings.full
    sink = Sink(as_json=as_json, quiet=quiet)
    run_demo(output, settings=make(seed), program=_program(), overwrite=overwrite, sink=sink)


def _program() -> str:
    """How this command line was called, so that the printed command runs as it stands."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{os.path.relpath(sys.executable)} -m safecrit"
    return "safecrit" if shutil.which("safecrit") else os.path.relpath(called)

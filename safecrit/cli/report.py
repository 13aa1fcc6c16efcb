"""`safecrit report`: one page of figures from scores, masks and results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safecrit.cli import options as o
from safecrit.cli.sink import Sink

Sources = Annotated[
    list[Path], typer.Argument(metavar="SOURCE...", help="Score folders, masks, output folders of eval or perturb.")
]
Top = Annotated[str, typer.Option("--top", metavar="SHARE", help="Selection shown for scores without a mask.")]
ShowText = Annotated[bool, typer.Option("--show-text", help="Show prompts and answers too; they may be harmful.")]


def report(
    context: typer.Context,
    source: Sources,
    output: o.OutputFolder = None,
    top: Top = "1%",
    show_text: ShowText = False,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Draw where safety lies and what was measured: one HTML page without network, figures as PNG, numbers as CSV."""
    from safecrit.api.report import read_source, write_report
    from safecrit.outputs import default_output, open_output

    sink = Sink(as_json=as_json, quiet=quiet)
    for path in source:
        read_source(path)
    place = output or default_output("report", source[0].stem)
    folder = open_output(place, "report", o.resolved(context), overwrite=overwrite)
    written = write_report(source, folder.path, top=top, show_text=show_text)
    folder.finish()
    pictures = sorted(path.name for path in (folder.path / "figures").glob("*.png"))
    sink.line(f"Page: {written}")
    sink.line(f"Figures: {', '.join(pictures)} in {folder.path / 'figures'}, each with its numbers as CSV")
    sink.result({"page": str(written), "figures": pictures})

"""`safecrit combine`: set algebra of masks of one model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from safecrit.cli import options as o
from safecrit.cli.sink import Sink


class How(StrEnum):
    """What becomes of two masks."""

    AND = "and"
    OR = "or"
    MINUS = "minus"


First = Annotated[Path, typer.Argument(metavar="MASK_A", help="Mask file.")]
Operation = Annotated[How, typer.Argument(metavar="and|or|minus", help="In both; in either; in A but not in B.")]
Others = Annotated[list[Path], typer.Argument(metavar="MASK_B", help="One or more masks of the same model.")]
OutputFile = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Mask file to write.")]


def combine(
    first: First,
    how: Operation,
    others: Others,
    output: OutputFile,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Combine masks of one model; the new mask says what it was made from.

    `minus` takes a utility mask (score --objective answer-nll) out of a safety mask.
    """
    from safecrit.errors import SafecritError
    from safecrit.maskfile import Mask
    from safecrit.outputs import check_output_file

    sink = Sink(as_json=as_json, quiet=quiet)
    check_output_file(output, overwrite=overwrite)
    masks = [Mask.load(path) for path in (first, *others)]
    result = masks[0]
    for other in masks[1:]:
        result = result & other if how == How.AND else result | other if how == How.OR else result - other
    if not result.count:
        raise SafecritError(f"{first} {how} {', '.join(map(str, others))}: no weight is left. Nothing was written.")
    if len({mask.info.fingerprint for mask in masks}) > 1:
        sink.warn("the masks were made from different weights; the first one's fingerprint is kept")
    result.save(output)
    counts = f" {how} ".join(f"{mask.count:,}" for mask in masks)
    sink.line(f"{counts} = {result.count:,} of {result.info.total:,} weights ({result.count / result.info.total:.3%})")
    sink.line(f"Mask: {output}")
    sink.result(
        {
            "output": str(output),
            "how": str(how),
            "from": [{"file": str(p), "selected": m.count} for p, m in zip((first, *others), masks, strict=True)],
            "selected": result.count,
            "total": result.info.total,
        }
    )

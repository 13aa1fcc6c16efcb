"""`safecrit compare`: how much masks of one model share, overall, by component and by layer, beside chance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safecrit.cli import options as o
from safecrit.cli.sink import Sink

if TYPE_CHECKING:
    from safecrit.comparison import Comparison, Overlap

First = Annotated[Path, typer.Argument(metavar="MASK_A", help="Mask file.")]
Others = Annotated[list[Path], typer.Argument(metavar="MASK_B", help="One or more masks of the same model.")]


def compare(
    first: First, others: Others, as_json: o.Json = False, quiet: o.Quiet = False, debug: o.Debug = False
) -> None:
    """Show how much masks share: intersection over union (IoU) and overlap coefficient, each beside chance.

    More than two masks are compared pair by pair. Chance is what two random masks
    of the same sizes share, in every layer and component with the counts there.
    """
    from dataclasses import asdict

    from safecrit.comparison import MaskFile
    from safecrit.comparison import compare as compare_masks

    sink = Sink(as_json=as_json, quiet=quiet)
    paths = [first, *others]
    masks = [MaskFile(path) for path in paths]
    found = compare_masks(masks)
    if len({mask.info.fingerprint for mask in masks}) > 1:
        sink.note("the masks were made from different weights; what is compared is which positions they hold.")
    for number, (path, mask) in enumerate(zip(paths, masks, strict=True), 1):
        share = mask.count / mask.info.total
        sink.line(f"{number}  {path}: {mask.count:,} of {mask.info.total:,} weights ({share:.3%}), {mask.info.mode}")
    sink.line()
    sink.table(
        "Overlap",
        ("masks", "shared", "by chance", "IoU", "by chance", "overlap coefficient", "by chance"),
        [
            (
                _pair(one),
                f"{all_.shared:,}",
                f"{all_.shared_by_chance:,.1f}",
                *map(_figure, (all_.iou, all_.iou_by_chance, all_.overlap, all_.overlap_by_chance)),
            )
            for one in found
            for all_ in [one.overall]
        ],
    )
    for one in found:
        _groups(sink, one, "component", one.by_component)
        _groups(sink, one, "layer", one.by_layer)
    sink.result(
        {
            "masks": [
                {
                    "file": str(path),
                    "mode": mask.info.mode,
                    "selected": mask.count,
                    "total": mask.info.total,
                    "model": mask.info.model,
                    "fingerprint": mask.info.fingerprint,
                }
                for path, mask in zip(paths, masks, strict=True)
            ],
            "pairs": [asdict(one) for one in found],
        }
    )


def _pair(one: Comparison) -> str:
    return f"{one.first + 1} and {one.second + 1}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _groups(sink: Sink, one: Comparison, by: str, groups: list[Overlap]) -> None:
    sink.table(
        f"By {by}, masks {_pair(one)}",
        (by, f"in {one.first + 1}", f"in {one.second + 1}", "shared", "by chance", "IoU", "by chance"),
        [
            (
                "none" if getattr(group, by) is None else getattr(group, by),
                f"{group.first:,}",
                f"{group.second:,}",
                f"{group.shared:,}",
                f"{group.shared_by_chance:,.1f}",
                _figure(group.iou),
                _figure(group.iou_by_chance),
            )
            for group in groups
        ],
    )

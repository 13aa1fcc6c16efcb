"""`safecrit inspect`: where a mask's or a score folder's weights lie, by layer, component and expert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safecrit.cli import options as o
from safecrit.cli.score import stability_lines
from safecrit.cli.sink import Sink

if TYPE_CHECKING:
    from safecrit.maskfile import Mask
    from safecrit.scorefile import Scores

Source = Annotated[Path, typer.Argument(metavar="MASK|SCORES", help="Mask file or score folder.")]


def inspect(source: Source, as_json: o.Json = False, quiet: o.Quiet = False, debug: o.Debug = False) -> None:
    """Show what a mask selects, or where scores are large: tables by layer and component, by expert for MoE."""
    from safecrit.errors import SafecritError

    sink = Sink(as_json=as_json, quiet=quiet)
    if not source.exists():
        raise SafecritError(f"{source}: no such file or folder. Give a mask file or a score folder.")
    if source.is_dir() and not any(source.glob("*.safetensors.index.json")):
        from safecrit.scorefile import Scores

        _scores(Scores.load(source), sink)
    else:
        from safecrit.maskfile import Mask

        _mask(Mask.load(source), sink)


def _percent(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def _mask(mask: Mask, sink: Sink) -> None:
    from dataclasses import asdict

    from safecrit.tables import mask_by_component, mask_by_layer_component, mask_by_layer_expert

    info = mask.info
    sink.line(f"{mask.count:,} of {info.total:,} weights ({mask.count / info.total:.3%}), {info.mode}")
    sink.line(f"model        {info.model or 'not named'}{f' @ {info.revision}' if info.revision else ''}")
    sink.line(f"fingerprint  {info.fingerprint or 'none'}")
    sink.line(f"eligible     {info.eligible:,} weights; share of {info.share_of}")
    if info.threshold_bits is not None:
        import struct

        threshold = struct.unpack("<f", struct.pack("<I", info.threshold_bits))[0]
        sink.line(f"threshold    {threshold:.6g} (float32 bits {info.threshold_bits:#010x}), {info.tied} equal to it")
    if info.scoring:
        shown = ", ".join(f"{k} {v}" for k, v in sorted(info.scoring.items()) if not isinstance(v, dict))
        sink.line(f"scored by    {shown}")
        for line in stability_lines(info.scoring.get("stability") or {}):
            sink.line(line)
    sink.line()
    components = mask_by_component(mask)
    sink.table(
        "By component",
        ("component", "selected", "of its weights", "of the mask", "of all weights"),
        [
            (g.component, f"{g.selected:,}", _percent(g.share), _percent(g.of_selected, 1), _percent(g.of_all, 1))
            for g in components
            if g.eligible
        ],
    )
    cells = mask_by_layer_component(mask)
    _grid(
        sink,
        "Share selected, by layer and component",
        [(g.layer, g.component, _percent(g.share)) for g in cells if g.eligible],
    )
    experts = mask_by_layer_expert(mask)
    if experts:
        _grid(sink, "Share selected, by layer and expert", [(g.layer, g.expert, _percent(g.share)) for g in experts])
    sink.result(
        {
            "selected": mask.count,
            "total": info.total,
            "mode": info.mode,
            "by_component": [asdict(g) for g in components],
            "by_layer_component": [asdict(g) for g in cells],
            "by_layer_expert": [asdict(g) for g in experts],
        }
    )


def _scores(scores: Scores, sink: Sink) -> None:
    from dataclasses import asdict

    from safecrit.tables import scores_by_layer_component, scores_by_layer_expert

    info = scores.info
    sink.line(
        f"{scores.eligible:,} of {scores.total:,} weights scored, {info['method']}, {info['prompts']['used']} prompts"
    )
    sink.line(f"model        {info['model']['id']}")
    sink.line(f"judge        {info['judge']['id']}, {info['objective']}, mean {info['judged']['mean']:+.3f}")
    sink.line()
    cells = scores_by_layer_component(info["matrices"])
    _grid(sink, "Mean |score|, by layer and component", [(g.layer, g.component, f"{g.mean:.2e}") for g in cells])
    experts = scores_by_layer_expert(info["matrices"])
    if experts:
        _grid(sink, "Mean |score|, by layer and expert", [(g.layer, g.expert, f"{g.mean:.2e}") for g in experts])
    silent = [m["name"] for m in info["matrices"] if m["nonzero"] == 0]
    if silent:
        sink.line(
            f"{len(silent)} matrices have no score at all (experts never routed to, no spread), the first {silent[0]}"
        )
    sink.result(
        {
            "eligible": scores.eligible,
            "total": scores.total,
            "by_layer_component": [asdict(g) for g in cells],
            "by_layer_expert": [asdict(g) for g in experts],
        }
    )


def _grid(sink: Sink, title: str, cells: list[tuple[Any, Any, str]]) -> None:
    columns = list(dict.fromkeys(column for _, column, _ in sorted(cells, key=lambda cell: _column_order(cell[1]))))
    values = {(layer, column): text for layer, column, text in cells}
    layers = sorted({layer for layer, _, _ in cells}, key=lambda layer: (layer is None, layer))
    rows = [
        ("none" if layer is None else layer, *(values.get((layer, column), "") for column in columns))
        for layer in layers
    ]
    sink.table(title, ("layer", *map(str, columns)), rows)


def _column_order(column: Any) -> tuple[int, int]:
    from safecrit.layout import COMPONENTS

    return (0, column) if isinstance(column, int) else (1, COMPONENTS.index(column))

"""Figures as PNG, each with its numbers as CSV beside it: maps by layer, bars with intervals.

One style for all: light ground, labels that can be read on a slide, colours
that colour-blind readers can tell apart (light to dark in maps; the hues of
Okabe and Ito in bars).
matplotlib is imported when a figure is drawn, always with the Agg canvas, so no
display is needed and the user's own backend stays as it is.
"""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecrit.files import atomic, write_text
from safecrit.layout import COMPONENTS
from safecrit.statistics import Rate
from safecrit.tables import Group, ScoreGroup

if TYPE_CHECKING:
    from matplotlib import colors
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito, without yellow and black
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure everywhere
    "font.size": 11.0,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
}
MAX_PRINTED_CELLS = 150  # above it the numbers in the cells would be too small to read
MAX_TICKS = 24
OUTSIDE = "no layer"
NAMES = {"asr": "ASR", "asr_coherent": "ASR, coherent answers", "over_refusal": "over-refusal"}
LOG_RANGE = 100.0  # a map whose positive values span more than this gets a logarithmic colour scale


def mask_map(path: str | Path, groups: Sequence[Group], *, title: str | None = None) -> None:
    """Map of the share selected, in percent of each group's weights: layer x component, or layer x expert.

    `groups` come from `tables.mask_by_layer_component` or `mask_by_layer_expert`.
    Groups without eligible weights are left out or blank. Writes `path` (PNG) and
    its CSV.
    """
    shown = [group for group in groups if group.eligible]
    by_expert = any(group.expert is not None for group in shown)
    cells = {_place(group): 100 * group.share for group in shown if group.share is not None}
    default = f"Share of the weights selected, by layer and {'expert' if by_expert else 'component'}"
    _map(Path(path), cells, title or default, "selected, % of the cell's weights", by_expert, logarithmic=False)
    _write_groups(Path(path), Group, groups)


def score_map(path: str | Path, groups: Sequence[ScoreGroup], *, title: str | None = None) -> None:
    """Map of the mean |score| (ESI): layer x component, or layer x expert. Writes `path` (PNG) and its CSV.

    `groups` come from `tables.scores_by_layer_component` or `scores_by_layer_expert`.
    """
    by_expert = any(group.expert is not None for group in groups)
    cells = {_place(group): group.mean for group in groups}
    default = f"Mean ESI of a weight, by layer and {'expert' if by_expert else 'component'}"
    _map(Path(path), cells, title or default, "mean |ESI| of a weight", by_expert, logarithmic=True)
    _write_groups(Path(path), ScoreGroup, groups)


def rate_bars(
    path: str | Path, rates: Mapping[str, Mapping[str, Rate]], *, title: str, labels: Mapping[str, str] | None = None
) -> None:
    """Bars with Wilson intervals, in percent: one group of bars a model, one bar a figure, its value printed above.

    `rates` holds model name -> figure name -> Rate; a share of nothing is shown
    as "none". `labels` gives figures their names in the legend. Writes `path`
    (PNG) and its CSV.
    """
    figures = list(dict.fromkeys(name for of_model in rates.values() for name in of_model))
    models = list(rates)
    width = 0.8 / max(len(figures), 1)
    slot = max(1.2, 0.46 * len(figures))  # inches a model: room for a value above each bar
    total = max(6.0, 1.2 + slot * len(models))
    with drawing(Path(path), total, 4.4) as figure:
        axes = figure.add_subplot()
        for number, name in enumerate(figures):
            label: str | None = {**NAMES, **(labels or {})}.get(name, name.replace("_", " "))
            for position, model in enumerate(models):
                if rate := rates[model].get(name):
                    x = position + (number - (len(figures) - 1) / 2) * width
                    _bar(axes, x, width, rate, COLOURS[number % len(COLOURS)], label)
                    label = None  # the legend names each figure once
        axes.set_ylim(0, 112)  # room for the value above a full bar
        axes.set_yticks(range(0, 101, 20))
        axes.spines.left.set_bounds(0, 100)
        axes.set_ylabel("% of prompts")
        axes.set_xticks(range(len(models)), [_wrapped(model, slot) for model in models])
        axes.set_xlim(-0.6, len(models) - 0.4)
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_title(_broken(title, total), loc="left", pad=34 if len(figures) > 1 else 12)
        if len(figures) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(figures), frameon=False, borderaxespad=0.2)
        figure.supxlabel("whiskers: Wilson interval", x=0.99, ha="right", fontsize=9, color="#555555")
    header = ("model", "figure", "count", "n", "rate", "low", "high", "denominator")
    rows = [
        [model, name, *(getattr(rate, field) for field in header[2:])]
        for model, of_model in rates.items()
        for name, rate in of_model.items()
    ]
    write_rows(Path(path), header, rows)


def _bar(axes: Axes, x: float, width: float, rate: Rate, colour: str, label: str | None) -> None:
    if rate.rate is None or rate.low is None or rate.high is None:
        axes.bar(x, 0, width * 0.92, color=colour, label=label)
        axes.text(x, 1.5, "none", ha="center", va="bottom", fontsize=9, color="#555555")
        return
    value, low, high = 100 * rate.rate, 100 * rate.low, 100 * rate.high
    axes.bar(x, value, width * 0.92, color=colour, label=label)
    whiskers = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
    axes.errorbar(x, value, yerr=whiskers, color="#222222", linewidth=1.2, capsize=3, fmt="none")
    axes.text(x, high + 1.2, "100" if value == 100 else f"{value:.1f}", ha="center", va="bottom", fontsize=9.5)


def _place(group: Group | ScoreGroup) -> tuple[int | None, str | int]:
    if group.expert is not None:
        return group.layer, group.expert
    return group.layer, group.component or "other"


def _map(
    path: Path,
    cells: Mapping[tuple[int | None, str | int], float],
    title: str,
    unit: str,
    by_expert: bool,
    *,
    logarithmic: bool,
) -> None:
    """Draw `cells` (layer, component or expert) -> value, layer 0 at the top, the rest of the model at the bottom."""
    import numpy as np

    layers = sorted({layer for layer, _ in cells}, key=lambda layer: (layer is None, layer or 0))
    found = {column for _, column in cells}
    columns: list[Any] = sorted(found) if by_expert else [name for name in COMPONENTS if name in found]
    values = np.full((len(layers), len(columns)), np.nan)
    for (layer, column), value in cells.items():
        values[layers.index(layer), columns.index(column)] = value
    printed = 0 < values.size <= MAX_PRINTED_CELLS
    across = 0.72 if len(columns) <= 14 else 9.0 / len(columns)
    down = 0.42 if printed else min(0.34, 8.0 / max(len(layers), 1))
    width, height = max(5.6, 2.4 + across * len(columns)), max(3.2, 1.5 + down * len(layers))
    with drawing(path, width, height) as figure:
        axes = figure.add_subplot()
        axes.set_title(_broken(title, width), loc="left", pad=12)
        if not cells:
            axes.text(0.5, 0.5, "nothing to show", ha="center", va="center", transform=axes.transAxes)
            axes.set_axis_off()
            return
        norm = _scale(values, logarithmic)
        image = axes.imshow(np.ma.masked_invalid(values), cmap="YlGnBu", norm=norm, aspect="auto")
        bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=height / 0.2)  # a bar 0.2 inches wide
        bar.set_label(unit)
        bar.outline.set_visible(False)
        _ticks(axes, layers, columns)
        axes.set_xlabel("expert" if by_expert else "component")
        axes.set_ylabel("layer")
        if printed:
            _print_values(axes, values, norm, _scientific if logarithmic else _percent)


def _scale(values: Any, logarithmic: bool) -> colors.Normalize:
    """Colours from 0 up, or `logarithmic` if the positive values (NaN: no value) span a wide range."""
    import numpy as np
    from matplotlib import colors

    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return colors.Normalize(0.0, 1.0)
    bottom, top = float(positive.min()), float(positive.max())
    if logarithmic and top / bottom > LOG_RANGE:
        return colors.LogNorm(max(bottom, top * 1e-6), top, clip=True)
    return colors.Normalize(0.0, top)


def _ticks(axes: Axes, layers: Sequence[int | None], columns: Sequence[Any]) -> None:
    names = [OUTSIDE if layer is None else str(layer) for layer in layers]
    for axis, labels in ((axes.yaxis, names), (axes.xaxis, [str(column) for column in columns])):
        step = 2 ** max(math.ceil(math.log2(len(labels) / MAX_TICKS)), 0)
        places = list(range(0, len(labels), step))
        if labels[-1] == OUTSIDE and places[-1] != len(labels) - 1:
            places[-1] = len(labels) - 1
        axis.set_ticks(places, [labels[place] for place in places])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _print_values(axes: Axes, values: Any, norm: colors.Normalize, form: Callable[[float], str]) -> None:
    """Print each cell's value in the tone that stands out from the cell."""
    for (row, column), value in _finite(values):
        shade = float(norm(value)) if value > 0 else 0.0
        tone = "white" if shade > 0.55 else "black"
        axes.text(column, row, form(value), ha="center", va="center", fontsize=9.5, color=tone)


def _percent(value: float) -> str:
    """One decimal, and what would round to nothing is still told from nothing."""
    if value == 0:
        return "0"
    return "<0.1" if value < 0.05 else f"{value:.1f}"


def _scientific(value: float) -> str:
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def _broken(title: str, width: float) -> str:
    """`title` on as many lines as a figure `width` inches wide needs; a bold letter takes a ninth of an inch."""
    return "\n".join(textwrap.wrap(title, max(int((width - 0.8) * 9), 20)))


def _finite(values: Any) -> list[tuple[tuple[int, int], float]]:
    rows, columns = values.shape
    return [((r, c), float(values[r, c])) for r in range(rows) for c in range(columns) if math.isfinite(values[r, c])]


def _wrapped(name: str, slot: float) -> str:
    """A model's name broken to fit `slot` inches, so that neighbours do not run into each other."""
    return "\n".join(textwrap.wrap(name.replace("_", " ").replace("/", "/ "), max(int(slot * 9), 8))) or name


@contextmanager
def drawing(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of `width` x `height` inches in our style; then write it to `path`.

    No pyplot: its global state, and the backend that the user chose, stay untouched.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})


def _write_groups(path: Path, kind: type[Group | ScoreGroup], groups: Sequence[Group] | Sequence[ScoreGroup]) -> None:
    names = [field.name for field in fields(kind)]
    write_rows(path, names, [[getattr(group, name) for name in names] for group in groups])


def write_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write the numbers of the figure at `path` as CSV of the same stem; what is unknown is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    write_text(path.with_suffix(".csv"), text.getvalue())

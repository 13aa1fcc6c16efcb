"""Figures as HTML and SVG: they follow the reader's theme, scale to a phone, and carry their numbers.

Every mark has the number it stands for in `data-v`, written as in the figure's
CSV. Colours are variables of the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from safecrit.layout import COMPONENTS
from safecrit.statistics import Rate

MANY_CELLS = 1500  # above it a map's cells are small and bare, or the page would not stay below 2 MB
OUTSIDE = "none"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table that scrolls by itself where the screen is narrow; the first column on the left."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in header)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    """A cell; one with a word longer than a line of a phone may break anywhere."""
    text = "" if value is None else str(value)
    long = any(len(word) > 30 for word in text.split())
    return f"<td{' class=long' if long else ''}>{escape(text)}</td>"


def heat_map(
    cells: Mapping[tuple[int | None, str | int], float], *, unit: str, percent: bool, logarithmic: bool = False
) -> str:
    """Layer x component, or layer x expert: a cell's ink is its value (`percent`: shares, shown times 100)."""
    if not cells:
        return "<p>nothing to show</p>"
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: (layer is None, layer or 0))
    found = {column for _, column in cells}
    by_expert = any(isinstance(column, int) for column in found)
    columns: list[Any] = sorted(found, key=lambda c: c if by_expert else COMPONENTS.index(str(c)))
    bare = len(cells) > MANY_CELLS
    wide, high, left, top = (9, 9, 44, 24) if bare else (54, 24, 44, 24)
    ink = _inks(list(cells.values()), logarithmic)
    step = max(1, math.ceil(len(columns) / 32)) if bare else 1
    parts = [
        f'<text x="{left + wide * i + wide / 2:g}" y="{top - 8}" class="m">{escape(str(name))}</text>'
        for i, name in enumerate(columns)
        if i % step == 0
    ]
    for j, layer in enumerate(layers):
        y = top + high * j
        if not bare or j % 2 == 0:
            name = OUTSIDE if layer is None else layer
            parts.append(f'<text x="{left - 8}" y="{y + high / 2 + 4:g}" class="e">{name}</text>')
        for i, column in enumerate(columns):
            if (value := cells.get((layer, column))) is None:
                continue
            x, shade = left + wide * i, ink(value)
            if bare:
                parts.append(f'<rect x="{x}" y="{y}" width="8" height="8" opacity="{shade:.2f}"/>')
                continue
            text = f"{100 * value:.2g}" if percent else f"{value:.1e}".replace("e-0", "e-")
            tone = "on" if shade > 0.55 else "m"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{wide - 1}" height="{high - 1}" opacity="{shade:.3f}" data-v="{value}"/>'
                f'<text x="{x + wide / 2:g}" y="{y + high / 2 + 4:g}" class="{tone}">{text}</text>'
            )
    width, height = left + wide * len(columns) + 4, top + high * len(layers) + 4
    axis = "expert" if by_expert else "component"
    return (
        f'<div class="scroll"><svg class="map" role="img" aria-label="{escape(unit)} by layer and {axis}" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{"".join(parts)}</svg></div>'
        f'<p class="note">{escape(unit)}; rows are layers, columns {axis}s.</p>'
    )


def rate_bars(rates: Mapping[str, Mapping[str, Rate]], labels: Mapping[str, str]) -> str:
    """Before and after: one block a figure, one bar a model, whiskers are Wilson intervals."""
    names = list(dict.fromkeys(name for of_model in rates.values() for name in of_model))
    blocks = []
    for name in names:
        rows = [
            _bar(model, rate.rate, rate.low, rate.high, f"of {rate.n}")
            for model, of_model in rates.items()
            if (rate := of_model.get(name)) is not None
        ]
        blocks.append(f"<h4>{escape(labels.get(name, name.replace('_', ' ')))}</h4>{''.join(rows)}")
    return f'<div class="bars">{"".join(blocks)}</div>'


def pair_bars(rows: Sequence[tuple[str, float | None, float | None]], first: str, second: str) -> str:
    """Two bars a row, shares in [0, 1], on one scale that ends at the largest."""
    top = max([value for _, *values in rows for value in values if value], default=1.0)
    parts = []
    for name, one, two in rows:
        parts.append(_bar(name, one, None, None, first, top))
        parts.append(_bar("", two, None, None, second, top, "other"))
    return f'<div class="bars">{"".join(parts)}</div>'


def _bar(
    label: str,
    value: float | None,
    low: float | None,
    high: float | None,
    note: str,
    top: float = 1.0,
    kind: str = "",
) -> str:
    if value is None:
        return f'<div class="bar"><span>{escape(label)}</span><span>not measured</span></div>'
    whisker = ""
    text = f"{100 * value:.1f} %"
    if low is not None and high is not None:
        whisker = f'<b style="left:{100 * low / top:.2f}%;width:{100 * max(high - low, 0) / top:.2f}%"></b>'
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return (
        f'<div class="bar"><span>{escape(label)}</span><span class="track {kind}" data-v="{value}">'
        f'<i style="width:{100 * value / top:.2f}%"></i>{whisker}</span><span>{text} {escape(note)}</span></div>'
    )


def histogram(bins: Sequence[tuple[float, float, int]], threshold: float | None) -> str:
    """Weights by |score| over decades, and where the mask's threshold lies."""
    if not bins:
        return "<p>nothing to show</p>"
    wide, high, left, foot = 380, 170, 18, 24
    start, stop = math.log10(bins[0][0]), math.log10(bins[-1][1])
    most = max(count for _, _, count in bins)

    def across(value: float) -> float:
        return left + (math.log10(value) - start) / (stop - start) * (wide - 2 * left)

    parts = []
    for low, top, count in bins:
        x, tall = across(low), count / most * (high - 20)
        parts.append(
            f'<rect x="{x:.1f}" y="{high - tall:.1f}" width="{across(top) - x - 0.6:.1f}" height="{tall:.1f}" '
            f'data-v="{count}"><title>{low:.2e} to {top:.2e}: {count:,} weights</title></rect>'
        )
    for power in range(math.ceil(start), math.floor(stop) + 1):
        parts.append(f'<text x="{across(10.0**power):.1f}" y="{high + 15}" class="m">1e{power}</text>')
    if threshold and start <= math.log10(threshold) <= stop:
        x = across(threshold)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{high}" class="mark"/>')
        parts.append(f'<text x="{x - 5:.1f}" y="16" class="e">threshold {threshold:.3g}</text>')
    return _small("distribution of |score|", wide, high + foot, parts)


def curves(
    series: Mapping[str, Sequence[tuple[float, float | None, float | None, float | None]]],
    *,
    title: str,
    across: str,
    logarithmic: bool = False,
) -> str:
    """Lines over a common axis: (x, share, low, high) a point, shares in [0, 1]; means are joined."""
    wide, high, left, foot = 340, 190, 34, 34
    xs = sorted({point[0] for points in series.values() for point in points})
    place = (lambda x: math.log10(x)) if logarithmic else (lambda x: x)
    first, last = (place(xs[0]), place(xs[-1])) if xs else (0.0, 1.0)

    def at(x: float, y: float) -> tuple[float, float]:
        share = (place(x) - first) / (last - first) if last > first else 0.5
        return left + 8 + share * (wide - left - 20), 12 + (1 - y) * (high - 20)

    parts = []
    for percent in (0, 50, 100):
        _, y = at(xs[0] if xs else 0, percent / 100)
        parts.append(f'<line x1="{left}" x2="{wide - 6}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" class="e">{percent}</text>')
    for x in xs:
        parts.append(f'<text x="{at(x, 0)[0]:.1f}" y="{high + 8}" class="m">{x:g}</text>')
    parts.append(f'<text x="{wide / 2}" y="{high + foot - 9}" class="m">{escape(across)}</text>')
    for number, points in enumerate(series.values()):
        known = [(x, y, low, top) for x, y, low, top in points if y is not None]
        shift = 2.5 * (number - 1)
        means = {x: [y for other, y, _, _ in known if other == x] for x, *_ in known}
        joined = [at(x, sum(ys) / len(ys)) for x, ys in sorted(means.items())]
        path = " ".join(f"{cx + shift:.1f},{cy:.1f}" for cx, cy in joined)
        parts.append(f'<polyline points="{path}" class="c{number}"/>')
        for x, y, low, top in known:
            cx, cy = at(x, y)
            if low is not None and top is not None:
                parts.append(
                    f'<line x1="{cx + shift:.1f}" x2="{cx + shift:.1f}" y1="{at(x, top)[1]:.1f}" '
                    f'y2="{at(x, low)[1]:.1f}" class="w c{number}"/>'
                )
            parts.append(f'<circle cx="{cx + shift:.1f}" cy="{cy:.1f}" r="3" class="d{number}" data-v="{y}"/>')
    legend = "".join(f'<span class="k{n}">{escape(name)}</span>' for n, name in enumerate(series))
    body = _small(title, wide, high + foot, parts)
    caption = f"<figcaption>{escape(title)}</figcaption>"
    return f'<figure class="curve">{caption}{body}<div class="legend">{legend}</div></figure>'


def _small(label: str, width: int, height: int, parts: Sequence[str]) -> str:
    named = f'role="img" aria-label="{escape(label)}"'
    return f'<svg class="plot" {named} viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'


def _inks(values: Sequence[float], logarithmic: bool) -> Any:
    """From a value to how much ink its cell gets, 0 to 1."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if not positive:
        return lambda value: 0.0
    bottom, top = min(positive), max(positive)
    if logarithmic and top / bottom > 100:
        low = math.log10(max(bottom, top * 1e-6))
        span = math.log10(top) - low
        return lambda value: min(1.0, max(0.03, (math.log10(value) - low) / span)) if value > 0 else 0.0
    return lambda value: min(1.0, value / top) if value > 0 else 0.0

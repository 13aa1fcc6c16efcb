"""Pictures of whole runs: perturbation curves, the distribution of ESI, shares by component, stability.

Style and CSV are those of `figures.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecrit.figures import COLOURS, NAMES, drawing, write_rows
from safecrit.tables import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from safecrit.distribution import Distribution


def perturbation_curves(path: str | Path, results: Mapping[str, Any]) -> None:
    """Attack success, refusal and utility against the size of the noise, one line for top, random and bottom.

    `results`: the results.json of `safecrit perturb`. Lines join the means over
    draws; every draw is a point with its Wilson interval. Writes `path` (PNG) and
    its CSV.
    """
    rows = curve_rows(results)
    shown = list(dict.fromkeys(row[0] for row in rows))
    width = max(6.0, 3.6 * len(shown))
    with drawing(Path(path), width, 3.9) as figure:
        for place, name in enumerate(shown):
            axes = figure.add_subplot(1, max(len(shown), 1), place + 1)
            own = [row for row in rows if row[0] == name]
            for number, kind in enumerate(k for k in CURVES if any(row[1] == k for row in own)):
                _curve(axes, [row for row in own if row[1] == kind], kind, COLOURS[number], 0.02 * (number - 1))
            axes.set_ylim(-3, 103)
            axes.set_xlabel("noise r (sigma)")
            axes.set_ylabel("% of prompts")
            axes.set_title(NAMES.get(name, name.replace("_", " ")), loc="left")
            axes.grid(axis="y", color="#dddddd", linewidth=0.7)
            if place == 0:
                axes.legend(frameon=False)
    write_rows(Path(path), CURVE_FIELDS, rows)


CURVES = ("top", "random", "bottom")
CURVE_FIELDS = ("figure", "kind", "r", "draw", "count", "n", "rate", "low", "high", "predicted", "measured")


def curve_rows(results: Mapping[str, Any]) -> list[list[Any]]:
    """The numbers of `perturbation_curves`, columns as in CURVE_FIELDS; r = 0 is the unperturbed model."""
    base = results["models"]["unperturbed"]
    kinds = [kind for kind in CURVES if any(arm["kind"] == kind for arm in results["arms"])]
    rows: list[list[Any]] = []
    for name in ("asr", "refusal", "over_refusal", "utility"):
        if name in base:
            fields_ = ("count", "n", "rate", "low", "high")
            for kind in kinds:
                rows.append([name, kind, 0.0, 0, *(base[name][key] for key in fields_), None, None])
                for arm in results["arms"]:
                    if arm["kind"] == kind:
                        rate = results["models"][arm["name"]][name]
                        tail = (arm["predicted"], arm["S"]["difference"])
                        rows.append([name, kind, arm["r"], arm["draw"], *(rate[key] for key in fields_), *tail])
    return rows


def _curve(axes: Axes, rows: Sequence[Sequence[Any]], label: str, colour: str, shift: float) -> None:
    """One line: `rows` of one figure and kind; `shift` keeps the whiskers of the kinds apart."""
    known = [row for row in rows if row[6] is not None]
    sizes = sorted({row[2] for row in known})
    means = [math.fsum(100 * row[6] for row in known if row[2] == r) / sum(row[2] == r for row in known) for r in sizes]
    axes.plot([r + shift for r in sizes], means, color=colour, label=label, linewidth=1.8)
    low = [100 * max(row[6] - row[7], 0.0) for row in known]
    high = [100 * max(row[8] - row[6], 0.0) for row in known]
    places, values = [row[2] + shift for row in known], [100 * row[6] for row in known]
    axes.errorbar(places, values, yerr=[low, high], color=colour, fmt="o", markersize=4, capsize=2, linewidth=1)


def distribution_plot(path: str | Path, found: Distribution, threshold: float | None) -> None:
    """Weights by |score| on a logarithmic axis, and the threshold of the mask. Writes `path` (PNG) and its CSV."""
    with drawing(Path(path), 6.4, 3.6) as figure:
        axes = figure.add_subplot()
        edges = [low for low, _, _ in found.bins] + [found.bins[-1][1]] if found.bins else [1e-9, 1.0]
        axes.stairs([count for _, _, count in found.bins] or [0], edges, fill=True, color=COLOURS[0])
        axes.set_xscale("log")
        axes.set_xlabel("|score| of a weight")
        axes.set_ylabel("weights")
        if threshold:
            axes.axvline(threshold, color=COLOURS[5], linewidth=1.8, label=f"threshold {threshold:.3g}")
            axes.legend(frameon=False)
        axes.set_title("Distribution of the scores", loc="left")
    write_rows(Path(path), ("low", "high", "weights"), found.bins)


def component_shares(path: str | Path, groups: Sequence[Group]) -> None:
    """Each component's share of the selected weights beside its share of all weights, in percent, as bars."""
    shown = [group for group in groups if group.eligible]
    with drawing(Path(path), max(5.6, 1.6 + 0.8 * len(shown)), 3.6) as figure:
        axes = figure.add_subplot()
        for place, (field, label) in enumerate((("of_selected", "of the selected"), ("of_all", "of all weights"))):
            heights = [100 * (getattr(group, field) or 0.0) for group in shown]
            axes.bar(
                [i + 0.4 * place - 0.2 for i in range(len(shown))], heights, 0.38, color=COLOURS[place], label=label
            )
        axes.set_xticks(range(len(shown)), [str(group.component) for group in shown])
        axes.set_ylabel("share, %")
        axes.set_title("Selected weights by component", loc="left")
        axes.legend(frameon=False)
    rows = [[g.component, g.selected, g.weights, g.share, g.of_selected, g.of_all] for g in shown]
    write_rows(Path(path), ("component", "selected", "weights", "share", "of_selected", "of_all"), rows)


STABILITY_FIELDS = ("between", "share", "k", "iou", "chance")


def stability_rows(stability: Mapping[str, Any]) -> list[list[Any]]:
    """score.json's stability as rows of STABILITY_FIELDS: halves of the prompts, and seeds of the noise."""
    names = {"halves": "halves of the prompts", "seeds": "seeds of the noise"}
    return [
        [names.get(kind, kind), *(row[field] for field in STABILITY_FIELDS[1:])]
        for kind, found in stability.items()
        for row in found["shares"]
    ]


def stability_plot(path: str | Path, stability: Mapping[str, Any]) -> None:
    """IoU of the masks of two halves (or seeds) at several shares, beside chance."""
    rows = stability_rows(stability)
    with drawing(Path(path), 6.0, 3.6) as figure:
        axes = figure.add_subplot()
        for number, kind in enumerate(dict.fromkeys(row[0] for row in rows)):
            own = [row for row in rows if row[0] == kind]
            axes.plot([100 * r[1] for r in own], [r[3] for r in own], marker="o", color=COLOURS[number], label=kind)
        if rows:
            axes.plot([100 * r[1] for r in own], [r[4] for r in own], "--", color="#777777", label="chance")
            axes.set_xscale("log")
            axes.legend(frameon=False)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("share selected, %")
        axes.set_ylabel("intersection over union")
        axes.set_title("Stability", loc="left")
    write_rows(Path(path), STABILITY_FIELDS, rows)

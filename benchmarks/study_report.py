"""The study's results file, table and figure, from its finished arms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timing import write

from safecrit.figures import COLOURS, drawing
from safecrit.statistics import paired

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARMS = {
    "set": {
        "untouched": "base model",
        "top": "ESI top",
        "random": "random, matched",
        "gradient": "gradient",
        "snip": "SNIP",
        "wanda": "Wanda",
        "magnitude": "magnitude",
        "bottom": "ESI bottom",
        "lora": "LoRA",
        "full": "all weights",
    },
    "spa": {
        "untouched": "aligned model",
        "none": "nothing frozen",
        "top_1": "ESI top 1 %",
        "random_1": "random 1 %, matched",
        "top_3": "ESI top 3 %",
        "random_3": "random 3 %, matched",
        "top_10": "ESI top 10 %",
        "random_10": "random 10 %, matched",
    },
}
"""Every arm by the name it has in arms.jsonl, in the order of the table."""
CURVES = {"top": 0, "random": 1, "gradient": 2, "wanda": 3, "bottom": 5}  # arms in the figure, and their colours
SEED: Any = {"linewidth": 0.7, "markersize": 3.5, "alpha": 0.7}
PICTURE = Path(__file__).parent.parent / "docs" / "study.png"

Rows = Sequence[Mapping[str, Any]]


def report(rows: Rows, settings: Mapping[str, Any]) -> None:
    """Write results/study.json and docs/study.png, and print the tables as Markdown."""
    tests = comparisons(rows)
    commits = sorted({row["commit"] for row in rows})
    write("study", "cpu", commit=", ".join(commits), settings=settings, paired=tests, arms=list(rows))
    draw(rows)
    models = [name for name in ("dense", "moe") if any(row["model"] == name for row in rows)]
    print(table(rows, models, SHORT))
    for model in models:
        print(f"\n{model}\n{table(rows, [model], list(COLUMNS))}\n")
    for test in tests:
        name = f"{test['model']} {test['seed']} {test['part']} {test['first']} - {test['second']}"
        print(
            f"{name}: {100 * test['difference']:+.1f} points "
            f"[{100 * test['low']:+.1f}, {100 * test['high']:+.1f}], p = {test['p']:.2g}"
        )


def comparisons(rows: Rows) -> list[dict[str, Any]]:
    """McNemar's exact test of every ESI top arm against its matched random one, on the test prompts, seed by seed."""
    served = {(row["model"], row["seed"], row["part"], row["arm"]): row["test"]["served"] for row in rows}
    pairs = [("set", "top", "random"), *(("spa", f"top_{s}", f"random_{s}") for s in (1, 3, 10))]
    found = []
    for model, seed in dict.fromkeys((row["model"], row["seed"]) for row in rows):
        for part, first, second in pairs:
            one, other = (served.get((model, seed, part, arm)) for arm in (first, second))
            if one and other:
                test = paired([mark == "1" for mark in one], [mark == "1" for mark in other])
                about = {"model": model, "seed": seed, "part": part, "first": first, "second": second}
                found.append(about | test.to_json())
    return found


COLUMNS: dict[str, tuple[int, Callable[[Mapping[str, Any]], float | None]]] = {
    "ASR, %": (1, lambda row: 100 * float(row["test"]["rates"]["asr"]["rate"])),
    "ASR at 1e-3, %": (1, lambda row: None if at(row, 1e-3) is None else 100 * float(at(row, 1e-3))),
    "utility, %": (1, lambda row: 100 * float(row["test"]["rates"]["utility"]["rate"])),
    "over-refusal, %": (1, lambda row: 100 * float(row["test"]["rates"]["over_refusal"]["rate"])),
    "task loss": (3, lambda row: float(row["test"]["task_loss"])),
    "unseen kind, loss": (3, lambda row: float(row["test"]["unseen_loss"])),
    "moved inside, sigma": (2, lambda row: float(row["moved"]["inside_sigma"]) if "moved" in row else None),
    "moved outside": (0, lambda row: float(row["moved"]["outside"]) if "moved" in row else None),
    "outside, sigma": (3, lambda row: float(row["moved"]["outside_sigma"]) if "moved" in row else None),
}
"""What the tables say of an arm: digits, and the value of one finished arm."""
SHORT = ("ASR, %", "ASR at 1e-3, %", "utility, %")


def table(rows: Rows, models: Sequence[str], columns: Sequence[str]) -> str:
    """Markdown, one row an arm, every column once for each of `models`; a cell holds the range over seeds."""
    names = [f"{model}: {column}" if len(models) > 1 else column for column in columns for model in models]
    lines = [f"| arm | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    for part, arms in ARMS.items():
        for arm, label in arms.items():
            cells = []
            for column in columns:
                digits, value = COLUMNS[column]
                for model in models:
                    own = [row for row in rows if (row["model"], row["part"], row["arm"]) == (model, part, arm)]
                    cells.append(spread([found for row in own if (found := value(row)) is not None], digits))
            name = f"{part.upper()}, {label}" if arm != "untouched" else label
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def at(row: Mapping[str, Any], rate: float) -> Any:
    """Attack success on the validation part at one learning rate; None where the arm was not trained at it."""
    return next((tried["asr"] for tried in row.get("tried", ()) if tried["rate"] == rate), None)


def spread(values: Sequence[float], digits: int) -> str:
    """`low to high`, or the one value."""
    if not values:
        return ""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def draw(rows: Rows) -> None:
    """Left: validation ASR of SET against the learning rate. Right: test ASR after task tuning, ESI against random."""
    models = [m for m in ("dense", "moe") if any(row["model"] == m for row in rows)]
    with drawing(PICTURE, 10.0, 3.6 * len(models)) as figure:
        for place, model in enumerate(models):
            own = [row for row in rows if row["model"] == model]
            name = {"dense": "Dense model", "moe": "Mixture of experts"}[model]
            left = figure.add_subplot(len(models), 2, 2 * place + 1)
            _rates(left, own, f"{name}, SET on 1 %", place == 0)
            right = figure.add_subplot(len(models), 2, 2 * place + 2)
            _shares(right, own, f"{name}, task tuning", place == 0)
            if place == 0:
                for axes in (left, right):
                    axes.legend(
                        frameon=False,
                        fontsize=9.5,
                        ncols=3,
                        loc="lower left",
                        bbox_to_anchor=(0, 1.0),
                        borderaxespad=0.1,
                    )
        figure.supxlabel("thick: mean of three seeds; thin: each seed", x=0.99, ha="right", fontsize=9, color="#555555")


def _rates(axes: Axes, rows: Rows, title: str, legend: bool) -> None:
    for arm, colour in CURVES.items():
        own = [row for row in rows if (row["part"], row["arm"]) == ("set", arm)]
        grid = [rate for rate in (1e-3, 3e-3, 1e-2) if own]
        means = [statistics.mean(100 * at(row, rate) for row in own) for rate in grid]
        axes.plot(grid, means, color=COLOURS[colour], label=ARMS["set"][arm], linewidth=2.2)
        for row in own:
            axes.plot(grid, [100 * at(row, rate) for rate in grid], "o-", color=COLOURS[colour], **SEED)
    axes.set_xscale("log")
    axes.set_xticks([1e-3, 3e-3, 1e-2], ["0.001", "0.003", "0.01"])
    axes.set_xticks([], minor=True)
    _finish(axes, title, "learning rate (validation prompts)", legend)


def _shares(axes: Axes, rows: Rows, title: str, legend: bool) -> None:
    spa = {(row["seed"], row["arm"]): 100 * row["test"]["rates"]["asr"]["rate"] for row in rows if row["part"] == "spa"}
    seeds = sorted({seed for seed, arm in spa if arm == "random_10"})
    for kind, label, colour in (("top", "ESI top frozen", 0), ("random", "random frozen, matched", 1)):
        arms = ("none", f"{kind}_1", f"{kind}_3", f"{kind}_10")
        found = [[spa[seed, arm] for arm in arms] for seed in seeds]
        means = [statistics.mean(values) for values in zip(*found, strict=True)] or [math.nan] * 4
        axes.plot(range(4), means, color=COLOURS[colour], label=label, linewidth=2.2)
        for values in found:
            axes.plot(range(4), values, "o-", color=COLOURS[colour], **SEED)
    axes.set_xticks(range(4), ["none", "1 %", "3 %", "10 %"])
    _finish(axes, title, "weights frozen (test prompts)", legend)


def _finish(axes: Axes, title: str, label: str, legend: bool) -> None:
    axes.set_ylim(-3, 103)
    axes.set_xlabel(label)
    axes.set_ylabel("ASR, %")
    axes.set_title(title, loc="left", pad=40 if legend else 8)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)

"""The README's demo table and picture, from finished demo folders of several seeds.

    .venv/bin/python benchmarks/demo_table.py safecrit-demo-0 safecrit-demo-1 safecrit-demo-2

Prints, for each model, the range of every figure over the folders, as Markdown.
With --picture FILE, joins the first folder's pictures into one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safecrit.api.demo_report import LABELS


def spread(results: list[dict[str, Any]], name: str, key: str, scale: float, digits: int) -> str:
    """`low to high` over the runs, or the one value."""
    values = [f"{scale * result[name][key]:.{digits}f}" for result in sorted(results, key=lambda r: r[name][key])]
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, one row a model."""
    lines = ["| model | ASR, % | utility, % | over-refusal, % | task loss |", "|---|---|---|---|---|"]
    for name, label in LABELS.items():
        cells = [
            spread(results, name, key, scale, digits)
            for key, scale, digits in (
                ("asr", 100, 1),
                ("utility", 100, 1),
                ("over_refusal", 100, 1),
                ("task_loss", 1, 3),
            )
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def join(folder: Path, out: Path) -> None:
    """SET's and SPA's bars side by side."""
    from PIL import Image

    pictures = [Image.open(folder / "figures" / f"{name}.png").convert("RGB") for name in ("set", "spa")]
    height = max(picture.height for picture in pictures)
    canvas = Image.new("RGB", (sum(picture.width for picture in pictures), height), "white")
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, height - picture.height))
        left += picture.width
    canvas.resize((canvas.width * 3 // 5, canvas.height * 3 // 5)).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DEMO")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    results = [json.loads((folder / "results.json").read_text()) for folder in arguments.folders]
    print(table(results))
    print("work, s:", ", ".join(f"{sum(result['timings'].values()):.0f}" for result in results))
    if arguments.picture:
        join(arguments.folders[0], arguments.picture)


if __name__ == "__main__":
    main()

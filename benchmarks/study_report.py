"""The study's table, figure and results file, from its finished arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
        "random_1": "random 1 %",
        "top_3": "ESI top 3 %",
        "random_3": "random 3 %",
        "top_10": "ESI top 10 %",
        "random_10": "random 10 %",
    },
}
"""Every arm by the name it has in arms.jsonl, in the order of the table."""


def report(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Write results/study.json and docs/study.png, and print the table as Markdown."""

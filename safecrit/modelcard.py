"""The model card (README.md) of a model that SET or SPA made: what it is, where from, what moved, what it is not."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safecrit import __version__
from safecrit.movement import Moved

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LIMITS = "## Intended use and limits"
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card says. `base`: Hub id or folder of the base model. `mask_note`: one line on the mask.

    `steps` and `learning_rate` are None where an adapter trained elsewhere was merged. `peak_memory` in bytes, 0 where
    not known.
    """

    mode: str
    base: str
    revision: str | None
    licence: str | None
    fingerprint: str
    mask_note: str
    headline: str
    steps: int | None
    learning_rate: float | None
    final_loss: float | None
    mean_sigma: float
    changed: int
    moved: Sequence[Moved]
    warnings: Sequence[str]
    delta_only: bool = False
    tokens_per_second: float = 0.0
    peak_memory: int = 0


def base_licence(folder: Path) -> str | None:
    """The `license` that the base model's own card declares in its front matter, if it does."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = FRONT_MATTER.match(text)
    declared = re.search(r"^license:[ \t]*(\S+)[ \t]*$", front.group(1), re.MULTILINE) if front else None
    return declared.group(1).strip("'\"") if declared else None


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with the Hub's front matter."""
    hub = bool(_HUB_ID.fullmatch(facts.base)) and not Path(facts.base).exists()
    name = facts.base if hub else Path(facts.base).name
    front = ["---", "library_name: transformers"]
    if hub:
        front.append(f"base_model: {facts.base}")
    if facts.licence:
        front.append(f"license: {json.dumps(facts.licence)}")
    front += ["tags:", "- safecrit", f"- safecrit-{facts.mode}", "---"]
    revision = f", revision `{facts.revision}`" if facts.revision else ""
    loss = f", last loss {facts.final_loss:.4g}" if facts.final_loss is not None else ""
    steps = "" if facts.steps is None else f" {facts.steps} steps, learning rate {facts.learning_rate:g}{loss}."
    if facts.tokens_per_second:
        memory = f", {facts.peak_memory / 2**30:.2f} GiB of memory at the peak" if facts.peak_memory else ""
        steps += f" {facts.tokens_per_second:,.0f} tokens a second{memory}."
    parts = [
        "\n".join(front),
        f"# {name}, {'safety-tuned (SET)' if facts.mode == 'set' else 'adapted with protected weights (SPA)'}",
        _purpose(facts, name),
        "## Provenance",
        "\n".join(
            [
                f"- Base model: `{name}`{revision}, fingerprint `{facts.fingerprint}`.",
                f"- Licence: {facts.licence or 'not declared by the base model'}; the base model's terms apply.",
                f"- {facts.mask_note}",
                f"- {facts.headline}.{steps}",
                f"- Made with safecrit {__version__}. All settings: `safecrit/training.json`.",
                "- Check: `safecrit verify THIS_FOLDER --base BASE --mask MASK "
                f"--mode {facts.mode}` compares the files bit by bit.",
            ]
        ),
        "## What moved",
        f"{facts.changed:,} weights changed; the trained ones moved by {facts.mean_sigma:.3g} sigma in the mean "
        "(sigma: standard deviation of the weight's matrix in the base model).",
        moved_table(facts.moved),
        *[f"> **Warning:** {warning}" for warning in facts.warnings],
        LIMITS,
        "For research on where safety behaviour sits in a model's weights. Measure it on your own prompts before use: "
        "attack success, over-refusal and utility (`safecrit eval`). Freezing or tuning safety-critical weights does "
        "not stop a determined attack by fine-tuning, and a mask also shows what to remove.",
    ]
    return "\n\n".join(parts) + "\n"


def _purpose(facts: CardFacts, name: str) -> str:
    if facts.mode == "spa":
        return (
            f"`{name}` fine-tuned on a task; the weights that its mask selects are bit-identical to the base model's."
        )
    stored = "This folder holds only the changed values; `safecrit apply` puts them into the base model. "
    return (
        f"`{name}` with only the weights that its mask selects trained, on refusals; all others are bit-identical to "
        f"the base model's. {stored if facts.delta_only else ''}".rstrip()
    )


def moved_table(rows: Sequence[Moved]) -> str:
    """A Markdown table of the movement, by layer and component."""
    lines = ["| layer | component | trained | changed | mean change (sigma) | largest (sigma) |"]
    lines.append("|---|---|--:|--:|--:|--:|")
    for row in rows:
        layer = "-" if row.layer is None else str(row.layer)
        mean = "-" if row.mean_sigma is None else f"{row.mean_sigma:.3g}"
        largest = "-" if row.max_sigma is None else f"{row.max_sigma:.3g}"
        lines.append(f"| {layer} | {row.component} | {row.trained:,} | {row.changed:,} | {mean} | {largest} |")
    return "\n".join(lines)

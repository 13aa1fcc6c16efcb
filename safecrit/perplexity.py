"""Perplexity of a text under a model: a check that an intervention left ordinary language alone.

Non-overlapping windows, each token predicted once from what precedes it in its
window. Perplexities of models with other tokenizers differ in unit; bits per
byte do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safecrit.errors import SafecritError
from safecrit.models import context_window

if TYPE_CHECKING:
    from safecrit.models import LoadedModel

WINDOW = 2048  # tokens; no more than the model's own


@torch.no_grad()
def text_perplexity(
    loaded: LoadedModel, path: str | Path, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """`file`, `tokens` predicted, `nats` a token, `perplexity`, `bits_per_byte` of a UTF-8 text file.

    Every window begins with the tokenizer's BOS where it has one, else its first
    token is given and not predicted. SafecritError where the file cannot be read
    or is too short to predict anything.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SafecritError(f"--text {path}: cannot be read as UTF-8 text ({type(error).__name__}).") from error
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = loaded.tokenizer.bos_token_id
    first = [bos] if bos is not None else []
    size = min(WINDOW, context_window(loaded.model) or WINDOW) - len(first)
    total, count = 0.0, 0
    for start in range(0, len(ids), size):
        window = torch.tensor([first + ids[start : start + size]], device=loaded.model.device)
        if window.shape[1] < 2:
            continue
        logits = loaded.model(input_ids=window).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
        count += window.shape[1] - 1
        if progress is not None:
            progress(min(start + size, len(ids)), len(ids))
    if not count:
        raise SafecritError(f"--text {path}: is too short, there is no token to predict.")
    return {
        "file": Path(path).name,
        "tokens": count,
        "nats": total / count,
        "perplexity": math.exp(min(total / count, 700.0)),
        "bits_per_byte": total / math.log(2) / len(text.encode()),
    }

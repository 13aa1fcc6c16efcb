"""Run by torchrun: masks of the same scores made by all ranks together, written to the folder that is given."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from safecrit import distributed
from safecrit.errors import SafecritError
from safecrit.maskfile import Mask
from safecrit.selection import SelectionSettings, select_from
from safecrit.selection_together import PURPOSE

CASES = ("spread", "ties", "zeros", "holes", "one-tensor", "bfloat16", "random", "matched", "too-many")


def scores_of(case: str) -> dict[str, torch.Tensor]:
    """Scores that are hard to select from, in tensors of unequal sizes, one of them empty."""
    generator = torch.Generator().manual_seed(len(case))
    shapes = {"a": (301, 17), "b": (1, 3), "c": (0, 4), "d": (5000,), "e": (40, 40)}
    if case == "one-tensor":
        shapes = {"a": (77, 13)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if case == "ties":
        found = {name: tensor.round() for name, tensor in found.items()}
    elif case == "zeros":
        found = {name: torch.where(tensor > 2.5, tensor, 0.0) for name, tensor in found.items()}
    elif case == "holes":
        found["d"][::7], found["e"][3] = torch.nan, torch.inf
    elif case == "bfloat16":
        found = {name: tensor.bfloat16() for name, tensor in found.items()}
    return found


def masks(folder: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Write every case's masks; what was refused instead, and the bytes that selection sent, both by case."""
    refused, sent = {}, {}
    for case in CASES:
        scores = scores_of(case)
        total = sum(tensor.numel() for tensor in scores.values())
        count = total + 1 if case == "too-many" else None
        match = Mask.load(folder / "ties-top.safetensors") if case == "matched" else None
        for mode in ("random",) if case in ("random", "matched") else ("top", "bottom"):
            share = None if count or match else "3%"
            before = distributed.sent_bytes().get(PURPOSE, 0)
            settings = SelectionSettings(mode=mode, share=share, count=count, match=match, allow_zero=True, seed=4)
            try:
                mask = select_from(scores, settings)
            except SafecritError as error:
                refused[f"{case}-{mode}"] = str(error)
                continue
            sent[f"{case}-{mode}"] = distributed.sent_bytes().get(PURPOSE, 0) - before
            mask.save(folder / f"{case}-{mode}.safetensors")
            if case == "spread":
                mask.save(folder / f"sharded-{mode}.safetensors", shard_bytes=200)
    return refused, sent


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.start(60)
    refused, sent = masks(folder)
    report = {"refused": refused, "sent": sent, "rank": distributed.current().rank}
    reports = distributed.gather(report)
    if distributed.current().first:
        print(json.dumps(reports))
    distributed.finish()


if __name__ == "__main__":
    main()

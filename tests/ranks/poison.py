"""Run by torchrun or called: `score`, with one prompt whose gradient is finite before the model's weights alone."""

from __future__ import annotations

import sys
from typing import Any

import torch

from safecrit import distributed
from safecrit.cli.app import app
from safecrit.estimators import Item, RelaxedEstimator
from safecrit.scoring import Scorer

ROW = 3


def poisoned(command: list[str]) -> None:
    """Run the command line; what is dropped is not too much."""
    inner, check = RelaxedEstimator.backward, Scorer._check_dropped

    def backward(self: Any, item: Item, logits: torch.Tensor, judged: Any, out: torch.Tensor) -> float:
        norm = inner(self, item, logits, judged, out)
        if item.row == ROW:
            out.fill_(torch.inf)
        return norm

    RelaxedEstimator.backward, Scorer._check_dropped = backward, lambda self: None  # type: ignore[method-assign]
    try:
        app(command, standalone_mode=False)
    finally:
        RelaxedEstimator.backward, Scorer._check_dropped = inner, check  # type: ignore[method-assign]


if __name__ == "__main__":
    distributed.start(60)
    poisoned(sys.argv[1:])
    distributed.finish()

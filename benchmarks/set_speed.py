"""Time that SET's step and SPA's protection add on the CPU, beside the passes of a step.

A float32 Llama of about 0.3 B weights, a random mask. SET, 1 %: what SparseAdamW adds to a forward and a backward
with gradients of the same weights. SPA, 1 % and 10 %: what `protect` adds to a step with torch's fused AdamW (saving
the protected values, once a run, does not count), and what a step of MaskedAdamW under `protect` takes more. None
depends on the number of tokens, so they are measured over 1 x 8 tokens, where they show best: the median of pairs,
each kind first as often as the other. They are then set against the passes over 8 x 128 tokens, for SPA with
AdamW's own time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from set_memory import SIZES, VOCABULARY, make_model, random_mask
from timing import machine, write
from transformers import PreTrainedModel

from safecrit.masked import MaskedAdamW
from safecrit.protection import protect
from safecrit.sparse import SparseAdamW

SIZES["0.3B"] = {"hidden_size": 1024, "num_hidden_layers": 20, "intermediate_size": 3584, "num_attention_heads": 16}
ROWS, TOKENS = 8, 128


def compare(ours: Callable[[], float], plain: Callable[[], float], pairs: int) -> tuple[float, float]:
    """Medians of the seconds that ours takes beyond plain, and of plain; one call of each does not count."""
    plain(), ours()
    times: list[tuple[float, float]] = []
    for number in range(pairs):
        if number % 2:
            one = ours()
            times.append((one, plain()))
        else:
            other = plain()
            times.append((ours(), other))
    return median(a - b for a, b in times), median(b for _, b in times)


def compare_set(model: PreTrainedModel, passes: Callable[[], None], pairs: int) -> float:
    """Seconds that SparseAdamW adds to a forward and a backward pass."""
    optimizer = SparseAdamW(model, random_mask(model, 0.01), lr=1e-5)
    needed = [parameter.requires_grad for parameter in model.parameters()]

    def ours() -> float:
        for parameter, need in zip(model.parameters(), needed, strict=True):
            parameter.requires_grad_(need)
        optimizer.attach()
        start = time.perf_counter()
        passes()
        optimizer.step()
        spent = time.perf_counter() - start
        optimizer.close()
        return spent

    def plain() -> float:
        for parameter, need in zip(model.parameters(), needed, strict=True):
            parameter.requires_grad_(need)
        start = time.perf_counter()
        passes()
        spent = time.perf_counter() - start
        model.zero_grad()
        return spent

    added, _ = compare(ours, plain, pairs)
    return added


def compare_spa(
    model: PreTrainedModel, passes: Callable[[], None], pairs: int, share: float, *, masked: bool
) -> tuple[float, float]:
    """Seconds that a protected step takes beyond one with torch's fused AdamW, and those of that optimizer alone."""
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    held = MaskedAdamW(model.parameters(), lr=1e-5) if masked else optimizer
    mask = random_mask(model, share)
    stepped: list[float] = []

    def step(used: torch.optim.Optimizer) -> tuple[float, float]:
        start = time.perf_counter()
        passes()
        before = time.perf_counter()
        used.step()
        after = time.perf_counter()
        used.zero_grad()
        return time.perf_counter() - start, after - before

    def plain() -> float:
        spent, alone = step(optimizer)
        stepped.append(alone)
        return spent

    def ours() -> float:
        protection = protect(model, mask, held)
        spent, _ = step(held)
        protection.remove()
        return spent

    added, _ = compare(ours, plain, pairs)
    return added, median(stepped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="0.3B")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    model = make_model(options.size).float()
    weights = sum(parameter.numel() for parameter in model.parameters())
    ids = torch.randint(300, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))

    def passes(ids: torch.Tensor = ids[:1, :8]) -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    passes()
    start = time.perf_counter()
    passes(ids)
    whole = time.perf_counter() - start
    model.zero_grad()
    added = compare_set(model, passes, options.pairs)
    found: dict[str, Any] = {
        "passes_s": whole,
        "set": {"added_s": added, "of_passes": 1 + added / whole, "bound": 1.05},
    }
    model.requires_grad_(True)
    kinds = (
        ("spa-1", 0.01, False),
        ("spa-10", 0.1, False),
        ("spa-1-MaskedAdamW", 0.01, True),
        ("spa-10-MaskedAdamW", 0.1, True),
    )
    for name, share, masked in kinds:
        added, stepped = compare_spa(model, passes, options.pairs, share, masked=masked)
        found[name] = {"added_s": added, "adamw_s": stepped, "of_step": 1 + added / (whole + stepped), "bound": 1.03}
    print(f"{machine('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}, {weights:,} weights")
    print(json.dumps(found, indent=2))
    if options.save:
        print(write("set-speed", "cpu", weights=weights, rows=ROWS, tokens=TOKENS, **found))


if __name__ == "__main__":
    main()

"""Time of a SET step and of SPA's protection on the CPU, in one process, pair by pair.

A float32 Llama of about 0.3 B weights, 8 x 128 tokens, a random mask. SET, 1 %: forward, backward and SparseAdamW's
step, against the forward and backward alone, of the same model with gradients of the same weights. SPA, 1 % and
10 %: forward, backward and torch's fused AdamW under `protect`, against the same without. Saving the protected
values, once a run, does not count. The median of the pairs' ratios does; each kind goes first as often as the other.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from set_memory import SIZES, VOCABULARY, make_model, random_mask
from timing import machine, write
from transformers import PreTrainedModel

from safecrit.protection import protect
from safecrit.sparse import SparseAdamW

SIZES["0.3B"] = {"hidden_size": 1024, "num_hidden_layers": 20, "intermediate_size": 3584, "num_attention_heads": 16}
ROWS, TOKENS = 8, 128


def compare(ours: Callable[[], float], plain: Callable[[], float], pairs: int) -> dict[str, Any]:
    """Seconds that each says it took, and the ratio, over `pairs` pairs after one call of each that does not count."""
    plain(), ours()
    times: list[tuple[float, float]] = []
    for number in range(pairs):
        if number % 2:
            one = ours()
            times.append((one, plain()))
        else:
            other = plain()
            times.append((ours(), other))
    ratios = [a / b for a, b in times]
    cuts = quantiles(ratios, n=5, method="inclusive")
    return {
        "ours_s": median(a for a, _ in times),
        "plain_s": median(b for _, b in times),
        "ratio": median(ratios),
        "p20": cuts[0],
        "p80": cuts[-1],
    }


def compare_set(model: PreTrainedModel, passes: Callable[[], None], pairs: int) -> dict[str, Any]:
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

    found = compare(ours, plain, pairs)
    optimizer.close()
    return found


def compare_spa(model: PreTrainedModel, passes: Callable[[], None], pairs: int, share: float) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    mask = random_mask(model, share)

    def plain() -> float:
        start = time.perf_counter()
        passes()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    def ours() -> float:
        protection = protect(model, mask, optimizer)
        spent = plain()
        protection.remove()
        return spent

    return compare(ours, plain, pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="0.3B")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--part", choices=("set", "spa-1", "spa-10"), help="this one alone")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    model = make_model(options.size).float()
    weights = sum(parameter.numel() for parameter in model.parameters())
    ids = torch.randint(300, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))

    def passes() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    found: dict[str, Any] = {}
    if options.part in (None, "set"):
        found["set"] = compare_set(model, passes, options.pairs)
    for name, share in (("spa-1", 0.01), ("spa-10", 0.1)):
        if options.part in (None, name):
            found[name] = compare_spa(model, passes, options.pairs, share)
    print(f"{machine('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}, {weights:,} weights")
    print(json.dumps(found, indent=2))
    if options.save:
        print(write("set-speed", "cpu", weights=weights, rows=ROWS, tokens=TOKENS, **found))


if __name__ == "__main__":
    main()

"""The cost model of the ops: seconds = fixed + moved(N, k) / copy, with `copy` in bytes a second, read and written.

The constants are the fit of `benchmarks/cost_model.py` (results/cost-model.json): bytes that a plain copy
moves in the same time. They hold on a CPU and for weights that no cache holds; on a GPU they are an estimate.
"""

from __future__ import annotations

LINE = 64  # bytes that a CPU fetches and writes back at once

# op -> bytes of a copy for each entry (N), each selected entry (k), each line of the weight that holds one (lines)
FITTED: dict[str, dict[str, float]] = {
    "esi_accumulate_": {"N": 4.498},
    "masked_adamw_": {"N": 15.04},
    "matrix_std": {"N": 3.606},
    "select_random": {"N": 23.4, "k": 54.17},
    "select_top": {"N": 5.166, "k": 141.5},
    "sparse_adamw_": {"lines": 157.7},
}


def counts(numel: float, k: float, itemsize: int = 4) -> dict[str, float]:
    """N, k and the lines of a weight of `itemsize` bytes an entry that hold one of k entries drawn at random."""
    in_line = LINE // itemsize
    share = min(1.0, k / numel) if numel else 0.0
    return {"N": float(numel), "k": float(k), "lines": numel / in_line * (1 - (1 - share) ** in_line)}


def moved(op: str, numel: float, k: float = 0.0, itemsize: int = 4) -> float:
    """Bytes that a copy moves in the time that `op` takes for `numel` entries, `k` of them selected."""
    found = counts(numel, k, itemsize)
    return sum(size * found[name] for name, size in FITTED[op].items())

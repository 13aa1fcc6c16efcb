"""Time and memory of each op as a function of N (entries) and k (of them selected): fitted, and what that foretells.

    seconds = fixed + (n N + k_ k) / copy        n, k_: bytes that a plain copy moves in the same time

Fitted by non-negative least squares on the relative errors, over sizes that no cache holds, three shares each where
k counts. The largest size is left out of the fit and foretold. The copy is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from bandwidth import bandwidth
from scipy.optimize import nnls
from select_top import AnonymousPeak
from timing import measure, report, write

from safecrit import ops

SIZES = tuple(1 << power for power in (23, 24, 25, 26, 27))
HELD_OUT = 1 << 28
SHARES = (0.001, 0.01, 0.1)
ADAMW: dict[str, Any] = {"step": 9, "lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
MODELS = {"8 B": 8e9, "70 B": 70e9, "1 T": 1e12}


def esi(numel: int, _: int) -> Callable[[], object]:
    """A bfloat16 gradient into float32 sums."""
    acc, grad = torch.zeros(numel), torch.randn(numel).bfloat16()
    return lambda: ops.esi_accumulate_(acc, grad, 0.1)


def std(numel: int, _: int) -> Callable[[], object]:
    """One float32 matrix."""
    weight = torch.randn(numel)
    return lambda: ops.matrix_std(weight)


def top(numel: int, k: int) -> Callable[[], object]:
    """float32 scores."""
    scores = [torch.randn(numel)]
    return lambda: ops.select_top(scores, k)


def random(numel: int, k: int) -> Callable[[], object]:
    """The random control of a mask."""
    return lambda: ops.select_random([numel], k, 0)


def some(numel: int, k: int) -> torch.Tensor:
    """`k` indices drawn at random, ascending."""
    return ops.select_random([numel], k, 1)[0]


def sparse(numel: int, k: int) -> Callable[[], object]:
    """A float32 weight, its gradient gathered already."""
    indices, weight = some(numel, k), torch.randn(numel)
    state = [torch.zeros(k) for _ in range(3)]
    grad = torch.randn(k)
    return lambda: ops.sparse_adamw_(weight, indices, grad, *state, **ADAMW)


def masked(numel: int, _: int) -> Callable[[], object]:
    """A float32 weight, 1 % of it frozen."""
    bits = ops.bits_from_indices(some(numel, numel // 100), numel)
    weight, grad, state = torch.randn(numel), torch.randn(numel), [torch.zeros(numel) for _ in range(2)]
    return lambda: ops.masked_adamw_(weight, grad, state[0], state[1], bits, **ADAMW)


@dataclass
class Op:
    """An op: what makes a call of it; bytes an entry and a selected entry that it must move; whether k counts."""

    make: Callable[[int, int], Callable[[], object]]
    n_bytes: float
    k_bytes: float = 0.0
    points: list[tuple[int, int, float]] = field(default_factory=list)
    fixed_s: float = 0.0
    n_equivalent: float = 0.0
    k_equivalent: float = 0.0

    def fit(self, copy: float) -> None:
        """The constants from `points`, with `copy` in bytes a second."""
        points = [point for point in self.points if point[0] != HELD_OUT]
        rows = [
            [1 / seconds, n / copy / seconds, k / copy / seconds if self.k_bytes else 0] for n, k, seconds in points
        ]
        (self.fixed_s, self.n_equivalent, self.k_equivalent), _ = nnls(rows, [1.0] * len(rows))

    def seconds(self, numel: float, k: float, copy: float) -> float:
        """What the fit says."""
        return self.fixed_s + (self.n_equivalent * numel + self.k_equivalent * k) / copy


OPS = {
    "esi_accumulate_": Op(esi, 10),
    "matrix_std": Op(std, 4),
    "select_top": Op(top, 4, 8),
    "select_random": Op(random, 0, 8),
    "sparse_adamw_": Op(sparse, 0, 40),
    "masked_adamw_": Op(masked, 28 + 1 / 8),
}


def extra_memory(op: str, numel: int, k: int) -> int:
    """Bytes of anonymous memory that the first call in a process of its own takes, its result included."""
    found = subprocess.run(
        [sys.executable, __file__, "--memory", op, str(numel), str(k)], check=True, capture_output=True, text=True
    )
    return int(found.stdout)


def memory_fits(sizes: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Bytes a call takes beside its arguments, as fixed + n N + k_ k; without those that take no MiB."""
    fits = {}
    for name, op in OPS.items():
        points = [
            (n, k, extra_memory(name, n, k)) for n in sizes for k in ((n // 1000, n // 100) if op.k_bytes else (0,))
        ]
        if max(size for _, _, size in points) < 1 << 20:
            continue
        (fixed, n_bytes, k_bytes), _ = nnls([[1 / s, n / s, k / s] for n, k, s in points], [1.0] * len(points))
        fits[name] = {"fixed_bytes": fixed, "n_bytes": n_bytes, "k_bytes": k_bytes}
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", nargs=3, metavar=("OP", "N", "K"), help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.memory:
        name, numel, k = options.memory[0], int(options.memory[1]), int(options.memory[2])
        OPS[name].make(1000, 10)()
        call = OPS[name].make(numel, k)
        with AnonymousPeak() as peak:
            kept = call()
        del kept
        print(int(peak.mib * (1 << 20)))
        return
    rows = bandwidth("cpu", SIZES[-1])
    copy = rows[0].gigabytes_per_second * 1e9
    for name, op in OPS.items():
        for numel in (*SIZES, HELD_OUT):
            for share in SHARES if op.k_bytes else (0.0,):
                k = int(share * numel)
                moved = int(op.n_bytes * numel + op.k_bytes * k)
                call = op.make(numel, k)
                rows.append(measure(f"{name} 2^{numel.bit_length() - 1} {share:g}", moved, call, "cpu", 9))
                op.points.append((numel, k, rows[-1].milliseconds / 1e3))
        op.fit(copy)
    report(rows, "cpu", rows[0])
    found: dict[str, Any] = {}
    for name, op in OPS.items():
        errors = {
            held: [op.seconds(n, k, copy) / s - 1 for n, k, s in op.points if (n == HELD_OUT) == held]
            for held in (False, True)
        }
        worst, foretold = (max(map(abs, errors[held])) for held in (False, True))
        found[name] = {
            "fixed_s": op.fixed_s,
            "n_bytes": op.n_bytes,
            "k_bytes": op.k_bytes,
            "n_equivalent": op.n_equivalent,
            "k_equivalent": op.k_equivalent,
            "worst_error_in_fit": worst,
            "worst_error_held_out": foretold,
            "predicted": {
                label: {
                    "bytes": op.n_bytes * n + op.k_bytes * n / 100,
                    "copies_of_the_weight": (op.n_equivalent * n + op.k_equivalent * n / 100) / (8 * n),
                    "minutes": op.seconds(n, n / 100, copy) / 60,
                }
                for label, n in MODELS.items()
            },
        }
        print(
            f"{name:18} {op.fixed_s * 1e3:.3f} ms + ({op.n_equivalent:.2f} N + {op.k_equivalent:.1f} k) bytes / copy;  "
            f"{op.n_bytes:g} N + {op.k_bytes:g} k moved;  "
            f"off by {worst:.0%} at most, on the held-out size by {foretold:.0%};  "
            + ", ".join(f"{label} {found[name]['predicted'][label]['minutes']:.2f} min" for label in MODELS)
        )
    memory = memory_fits(SIZES[1:])
    print(json.dumps(memory, indent=2))
    if options.save:
        rates = {"copy_bytes_per_second": copy, "sizes": SIZES, "held_out": HELD_OUT, "shares": SHARES}
        print(write("cost-model", "cpu", **rates, ops=found, memory=memory, rows=[asdict(row) for row in rows]))


if __name__ == "__main__":
    main()

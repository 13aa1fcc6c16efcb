"""Time and memory of each op as a function of N (entries) and k (of them selected): fitted, and what that foretells.

    seconds = fixed + (a N + b k + c lines) / copy       a, b, c: bytes that a plain copy moves in the same time

`lines` are the 64-byte lines of a float32 weight that hold one of the k entries. Fitted by non-negative least squares
on the relative errors, over sizes that no cache holds, two shares each where k counts. A larger size is left out of
the fit and foretold. A copy is timed before and after every point, as what a shared machine gives changes within
minutes. `safecrit.costs` holds the result.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from scipy.optimize import nnls
from select_top import AnonymousPeak
from timing import Row, measure, report, write

from safecrit import ops
from safecrit.costs import LINE, counts

SIZES = (3 << 24, 1 << 26, 3 << 25, 1 << 27, 3 << 26, 1 << 28)
HELD_OUT = 1 << 29
SHARES = (0.01, 0.1)
CACHED = 64 << 20  # points that touch fewer bytes are left out
COPIED = 1 << 26
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


@dataclass(frozen=True)
class Point:
    """One measurement: entries, selected ones, seconds, and what a copy beside it moved in a second."""

    numel: int
    k: int
    seconds: float
    copy: float


@dataclass
class Op:
    """An op: what makes a call of it, and the bytes that it must move for each of `costs.counts`."""

    make: Callable[[int, int], Callable[[], object]]
    formula: dict[str, float]
    points: list[Point] = field(default_factory=list)
    fixed_s: float = 0.0
    fitted: dict[str, float] = field(default_factory=dict)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the entries, selected."""
        return SHARES if self.formula.keys() - {"N"} else (0.0,)

    def moved(self, numel: float, k: float) -> float:
        """Bytes, by the formula."""
        found = counts(numel, k)
        return sum(size * found[name] for name, size in self.formula.items())

    def fit(self) -> None:
        """The constants from `points`."""
        points = [point for point in self.points if point.numel != HELD_OUT]
        rows = [
            [1 / p.seconds, *(counts(p.numel, p.k)[name] / p.copy / p.seconds for name in self.formula)] for p in points
        ]
        (self.fixed_s, *sizes), _ = nnls(rows, [1.0] * len(rows))
        self.fitted = dict(zip(self.formula, map(float, sizes), strict=True))

    def seconds(self, numel: float, k: float, copy: float) -> float:
        """What the fit says."""
        found = counts(numel, k)
        return self.fixed_s + sum(size * found[name] for name, size in self.fitted.items()) / copy

    def worst(self, *, held_out: bool) -> float:
        """The largest error of the fit, relative to what was measured."""
        points = [point for point in self.points if (point.numel == HELD_OUT) == held_out]
        return max(abs(self.seconds(p.numel, p.k, p.copy) / p.seconds - 1) for p in points)


OPS = {
    "esi_accumulate_": Op(esi, {"N": 10}),
    "matrix_std": Op(std, {"N": 4}),
    "select_top": Op(top, {"N": 4, "k": 8}),
    "select_random": Op(random, {"N": 0, "k": 8}),
    "sparse_adamw_": Op(sparse, {"k": 36, "lines": 2 * LINE}),
    "masked_adamw_": Op(masked, {"N": 28 + 1 / 8}),
}


def time_all() -> list[Row]:
    """Every op at every size and share; returns the copies beside them."""
    source, target = torch.randn(COPIED), torch.zeros(COPIED)
    copies, rows = [], []
    for name, op in OPS.items():
        for numel in (*SIZES, HELD_OUT):
            for share in op.shares:
                k = int(share * numel)
                moved = int(op.moved(numel, k))
                if op.formula.get("N") != 0 and moved < CACHED:
                    continue
                call = op.make(numel, k)
                before = measure("copy", 8 * COPIED, lambda: target.copy_(source), "cpu", 5)
                rows.append(measure(f"{name} {numel / 1e6:.0f} M {share:g}", moved, call, "cpu", 7))
                after = measure("copy", 8 * COPIED, lambda: target.copy_(source), "cpu", 5)
                copies += [before, after]
                copy = (before.gigabytes_per_second + after.gigabytes_per_second) / 2 * 1e9
                op.points.append(Point(numel, k, rows[-1].milliseconds / 1e3, copy))
                del call
        op.fit()
    copies.sort(key=lambda row: row.milliseconds)
    report(rows, "cpu", copies[len(copies) // 2], "of median copy")
    return copies


def extra_memory(op: str, numel: int, k: int) -> int:
    """Bytes of anonymous memory that the first call in a process of its own takes, its result included."""
    command = [sys.executable, __file__, "--memory", op, str(numel), str(k)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory_of_one(op: str, numel: int, k: int) -> int:
    """The same in this process."""
    OPS[op].make(1000, 10)()
    call = OPS[op].make(numel, k)
    with AnonymousPeak() as peak:
        kept = call()
    del kept
    return int(peak.mib * (1 << 20))


def memory_fit(op: str) -> dict[str, float]:
    """Bytes a call takes beside its arguments, as fixed + b k; nothing for an op that never takes a MiB."""
    points = [(n, k, extra_memory(op, n, k)) for n in SIZES[::2] for k in (n // 100, n // 10)]
    if max(size for _, _, size in points) < 1 << 20:
        return {}
    found, _ = nnls([[1 / s, k / s] for _, k, s in points], [1.0] * len(points))
    return dict(zip(("fixed", "k"), map(float, found), strict=True))


def outcome(name: str, op: Op, copy: float) -> dict[str, Any]:
    """The fit of one op and what it foretells for whole models at 1 %, with `copy` bytes a second; printed as well."""
    predicted = {
        label: {
            "bytes": op.moved(n, n / 100),
            "copies_of_the_weight": (op.seconds(n, n / 100, copy) - op.fixed_s) * copy / (8 * n),
            "minutes": op.seconds(n, n / 100, copy) / 60,
        }
        for label, n in MODELS.items()
    }
    worst, held_out, memory = op.worst(held_out=False), op.worst(held_out=True), memory_fit(name)
    print(f"{name}: {op.fixed_s * 1e3:.2f} ms + ", end="")
    print(" + ".join(f"{size:.2f} {count}" for count, size in op.fitted.items()), end=" bytes; ")
    print(f"off by {worst:.0%} at most, on the held-out size by {held_out:.0%}; memory ", end="")
    print(" + ".join(f"{size:.3g} {count}" for count, size in memory.items()) or "none", end="; ")
    print(", ".join(f"{label} {found['minutes']:.2f} min" for label, found in predicted.items()))
    return {
        "fixed_s": op.fixed_s,
        "formula_bytes": op.formula,
        "fitted_bytes": op.fitted,
        "worst_error": worst,
        "held_out_error": held_out,
        "memory_bytes": memory,
        "predicted": predicted,
        "points": [asdict(point) for point in op.points],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", nargs=3, metavar=("OP", "N", "K"), help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.memory:
        print(memory_of_one(options.memory[0], int(options.memory[1]), int(options.memory[2])))
        return
    copies = [row.gigabytes_per_second * 1e9 for row in time_all()]
    copy = copies[len(copies) // 2]
    print(
        f"copy: {min(copies) / 1e9:.1f} to {max(copies) / 1e9:.1f} GB/s; foretold with {copy / 1e9:.1f}, 1 % selected"
    )
    found = {name: outcome(name, op, copy) for name, op in OPS.items()}
    if options.save:
        print(write("cost-model", "cpu", copy_bytes_per_second=copy, held_out=HELD_OUT, ops=found))


if __name__ == "__main__":
    main()

"""matrix_std on every backend of a device, against torch.std, and against a bare read of the weight."""

from __future__ import annotations

import argparse

import torch
from bandwidth import bandwidth, read
from timing import Row, measure, ratio, report, save

from safecrit import ops
from safecrit.strided import Strided

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COLUMNS = 4096  # of the weight whose two column blocks are measured as matrices of their own


def rows_of(device: str, numel: int) -> list[Row]:
    """One row a backend and dtype, of the whole weight, and one of two column blocks as in a fused tensor."""
    rows = []
    names = [row.backend for row in ops.backends(device) if row.op == "matrix_std" and row.available]
    base = torch.randn(numel // COLUMNS, COLUMNS, device=device)
    rows.append(read(base))
    for dtype in DTYPES:
        weight = base.to(dtype)
        moved = weight.numel() * weight.element_size()
        short = str(dtype).removeprefix("torch.")
        half = COLUMNS // 2
        blocks = [Strided(start, (weight.shape[0], half), (COLUMNS, 1)) for start in (0, half)]
        expected = exact(weight)
        rows.append(measure(f"torch.std {short}", moved, lambda w=weight: w.std(), device, 5))  # type: ignore[misc]
        for name in names:
            found = float(ops.matrix_std(weight, backend=name)[0])  # type: ignore[arg-type]
            if not abs(found - expected) <= 1e-7 * expected:
                raise SystemExit(f"{name} gives {found}, float64 {expected} on {dtype}")
            for label, patterns in (("", None), (", 2 column blocks", blocks)):
                rows.append(
                    measure(
                        f"{name} {short}{label}",
                        moved,
                        lambda w=weight, n=name, p=patterns: ops.matrix_std(w, p, backend=n),  # type: ignore[misc]
                        device,
                        15 if name != "reference" else 3,
                    )
                )
    return rows


def exact(weight: torch.Tensor) -> float:
    """The standard deviation by two passes in float64, a slice of rows at a time."""
    slices = weight.split(max(1, (1 << 22) // COLUMNS))
    mean = sum(float(part.double().sum()) for part in slices) / weight.numel()
    squares = sum(float((part.double() - mean).square_().sum()) for part in slices)
    return float((squares / (weight.numel() - 1)) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--numel", type=int, default=1 << 27, help=f"a multiple of {COLUMNS}")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    rows = bandwidth(options.device, options.numel)
    rows += rows_of(options.device, options.numel)
    report(rows, options.device, rows[0])
    named = {row.name: row for row in rows}
    kernel = "cuda" if options.device == "cuda" else "native"
    for dtype in ("float32", "bfloat16", "float16"):
        if f"{kernel} {dtype}" in named:
            ours = named[f"{kernel} {dtype}"]
            print(f"{dtype}: {ratio(named[f'torch.std {dtype}'], ours)} x torch.std, "
                  f"{ours.gigabytes_per_second / rows[2].gigabytes_per_second:.0%} of the best read")  # fmt: skip
    if options.save:
        print(save(rows, options.device, "matrix-std"))


if __name__ == "__main__":
    main()

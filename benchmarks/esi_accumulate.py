"""esi_accumulate_ on every backend of a device, against torch's own acc.add_(grad, alpha=sigma)."""

from __future__ import annotations

import argparse

import torch
from bandwidth import bandwidth
from timing import Row, measure, report, save

from safecrit import ops

SIGMA = 0.02
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rows_of(device: str, numel: int) -> list[Row]:
    """One row a backend and dtype; a pass reads the accumulator and the gradient and writes the accumulator."""
    rows = []
    acc = torch.zeros(numel, device=device)
    names = [row.backend for row in ops.backends(device) if row.op == "esi_accumulate_" and row.available]
    for dtype in DTYPES:
        grad = torch.randn(numel, device=device).to(dtype)
        moved = numel * (8 + grad.element_size())
        short = str(dtype).removeprefix("torch.")
        rows.append(measure(f"torch add_ {short}", moved, lambda g=grad: acc.add_(g, alpha=SIGMA), device, 5))  # type: ignore[misc]
        for name in names:
            verify(acc, grad, name)
            rows.append(
                measure(
                    f"{name} {short}",
                    moved,
                    lambda g=grad, n=name: ops.esi_accumulate_(acc, g, SIGMA, backend=n),  # type: ignore[misc]
                    device,
                )
            )
    return rows


def verify(acc: torch.Tensor, grad: torch.Tensor, backend: str) -> None:
    """Stop unless `backend` gives the reference's bits on this data."""
    acc.zero_()
    ops.esi_accumulate_(acc, grad, SIGMA, backend=backend)  # type: ignore[arg-type]
    if not torch.equal(acc, grad.float() * SIGMA):
        raise SystemExit(f"{backend} differs from the reference on {grad.dtype}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--numel", type=int, default=1 << 27)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    rows = bandwidth(options.device, options.numel)
    rows += rows_of(options.device, options.numel)
    report(rows, options.device, rows[0])
    if options.save:
        print(save(rows, options.device, "esi-accumulate"))


if __name__ == "__main__":
    main()

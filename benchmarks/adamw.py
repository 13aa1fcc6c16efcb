"""sparse_adamw_ and masked_adamw_ on every backend of a device, against torch.optim.AdamW on the dense weight."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from bandwidth import bandwidth
from timing import Row, measure, ratio, report, save

from safecrit import ops

SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
SHARE = 0.01  # of the weight, selected (sparse) or frozen (masked)


class Data:
    """One float32 weight, its gradient and the two moments, and the selected entries."""

    def __init__(self, device: str, numel: int) -> None:
        """`numel` entries; a share of them, drawn at random, selected."""
        generator = torch.Generator().manual_seed(0)
        self.device, self.numel, self.k = device, numel, int(SHARE * numel)
        self.weight = torch.randn(numel, device=device)
        self.grad = torch.randn(numel, device=device).mul_(1e-3)
        self.moments = (torch.zeros(numel, device=device), torch.zeros(numel, device=device))
        self.indices = torch.randint(numel, (self.k,), generator=generator).unique().to(device)
        self.k = self.indices.numel()
        self.bits = ops.bits_from_indices(self.indices, numel, backend="reference")

    def optimizer(self, **kind: Any) -> torch.optim.Optimizer:
        """torch.optim.AdamW on this weight, its state in `moments`."""
        parameter = torch.nn.Parameter(self.weight)
        parameter.grad = self.grad
        optimizer = torch.optim.AdamW([parameter], **SETTINGS, **kind)
        step = torch.tensor(0.0, device=self.device if kind.get("fused") else "cpu")
        optimizer.state[parameter] = {"step": step, "exp_avg": self.moments[0], "exp_avg_sq": self.moments[1]}
        return optimizer


def sparse_rows(data: Data, names: list[str]) -> list[Row]:
    """The step alone, from a float32 and a bfloat16 weight, and with gathering the gradient first."""
    rows = []
    master = data.weight[data.indices]
    first, second = torch.zeros(data.k, device=data.device), torch.zeros(data.k, device=data.device)
    some = data.grad[data.indices]
    for dtype in (torch.float32, torch.bfloat16):
        weight = data.weight.to(dtype)
        # Indices and gradient are read, the state read and written, the weight written.
        moved = data.k * (8 + 4 + 3 * 8 + weight.element_size())
        for name in names:

            def step(w: torch.Tensor = weight, g: torch.Tensor = some, n: str = name) -> None:
                ops.sparse_adamw_(w, data.indices, g, master, first, second, step=1, **SETTINGS, backend=n)  # type: ignore[arg-type]

            def both(run: Any = step, n: str = name) -> None:
                gathered = torch.empty_like(some)
                ops.gather_(gathered, data.grad, data.indices, backend=n)  # type: ignore[arg-type]
                run(g=gathered)

            short = str(dtype).removeprefix("torch.")
            rows.append(measure(f"sparse {name} {short}", moved, step, data.device))
            rows.append(measure(f"sparse {name} {short}, with gather", moved + data.k * 8, both, data.device))
    return rows


def masked_rows(data: Data, names: list[str]) -> list[Row]:
    """Weight and moments read and written, gradient and bits read."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        weight, grad = data.weight.to(dtype), data.grad.to(dtype)
        moved = data.numel * (16 + 3 * weight.element_size()) + data.bits.numel()
        for name in names:

            def step(w: torch.Tensor = weight, g: torch.Tensor = grad, n: str = name) -> None:
                ops.masked_adamw_(w, g, *data.moments, data.bits, step=9, **SETTINGS, backend=n)  # type: ignore[arg-type]

            short = str(dtype).removeprefix("torch.")
            rows.append(measure(f"masked {name} {short}", moved, step, data.device, 9 if name != "reference" else 2))
    return rows


def dense_rows(data: Data) -> list[Row]:
    """torch's fused step, and the naive way: gradient times mask, the default step, frozen entries put back."""
    dense = data.numel * 28
    rows = [measure("torch AdamW fused", dense, data.optimizer(fused=True).step, data.device, 9)]
    plain = data.optimizer()
    mask = torch.ones(data.numel, device=data.device)
    mask[data.indices] = 0
    kept = data.weight[data.indices]

    def naive() -> None:
        data.grad.mul_(mask)
        plain.step()
        data.weight.index_copy_(0, data.indices, kept)

    rows.append(measure("torch AdamW, mask multiplied", dense, naive, data.device, 3))
    return rows


def verify(device: str, names: list[str]) -> None:
    """Stop unless every backend gives torch's result, and leaves the rest as it was, on a smaller weight."""
    for name in names:
        data = Data(device, 1 << 20)
        chosen = torch.zeros(data.numel, dtype=torch.bool, device=device)
        chosen[data.indices] = True
        start = data.weight.clone()
        sparse, masked = start.clone(), start.clone()
        master, some = start[data.indices], data.grad[data.indices]
        settings = {**SETTINGS, "step": 1, "backend": name}
        ops.sparse_adamw_(
            sparse, data.indices, some, master, torch.zeros_like(some), torch.zeros_like(some), **settings
        )
        zeros = (torch.zeros_like(start), torch.zeros_like(start))
        ops.masked_adamw_(masked, data.grad, *zeros, data.bits, **settings)
        data.optimizer().step()
        expected = data.weight
        for label, ours, free in (("sparse", sparse, chosen), ("masked", masked, ~chosen)):
            if not torch.equal(ours[~free], start[~free]):
                raise SystemExit(f"{label} {name}: an entry moved that must not")
            if not torch.allclose(ours[free], expected[free], rtol=2e-6, atol=1e-7):
                raise SystemExit(f"{label} {name} differs from torch.optim.AdamW")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--numel", type=int, default=1 << 27)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    usable = [row for row in ops.backends(options.device) if row.available]
    sparse = [row.backend for row in usable if row.op == "sparse_adamw_"]
    masked = [row.backend for row in usable if row.op == "masked_adamw_"]
    verify(options.device, sparse)
    rows = bandwidth(options.device, options.numel)
    data = Data(options.device, options.numel)
    rows += sparse_rows(data, sparse) + masked_rows(data, masked) + dense_rows(data)
    report(rows, options.device, rows[0])
    named = {row.name: row for row in rows}
    kernel = "cuda" if options.device == "cuda" else "native"
    for base in ("torch AdamW, mask multiplied", "torch AdamW fused"):
        for ours in (f"sparse {kernel} float32", f"sparse {kernel} float32, with gather", f"masked {kernel} float32"):
            if ours in named:
                print(f"{ours}: {ratio(named[base], named[ours])} x {base}")
    if options.save:
        print(save(rows, options.device, "adamw"))


if __name__ == "__main__":
    main()

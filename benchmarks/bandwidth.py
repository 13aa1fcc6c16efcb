"""What the machine's memory gives, as the other benchmarks' yardstick: a copy (read + write), a read of float32."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from timing import Row, measure, report, save

from safecrit.ops import native


def bandwidth(device: str, numel: int) -> list[Row]:
    """Copy and read bandwidth over `numel` float32 elements; counted bytes are those the program names."""
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    if not torch.equal(source, target):
        raise SystemExit("the copy differs from its source")
    return [
        measure("copy float32", 8 * numel, lambda: target.copy_(source), device),
        measure("read float32 (max)", 4 * numel, lambda: source.max(), device),
    ]


def read(source: torch.Tensor) -> Row:
    """The best plain read of `source`, float32: on the CPU exclusive ors, four streams a thread; else a maximum."""
    module, _ = native.cpu_module()
    moved = 4 * source.numel()
    if source.device.type != "cpu" or module is None:
        return measure("read float32 (max)", moved, lambda: source.max(), source.device.type)
    address, threads = source.data_ptr(), torch.get_num_threads()
    found = module.read_memory(address, moved, threads)
    if found != int(np.bitwise_xor.reduce(source.numpy().reshape(-1).view(np.uint64))):
        raise SystemExit("the read did not see every word")
    name = "best read (xor, 4 streams a thread)"
    return measure(name, moved, lambda: module.read_memory(address, moved, threads), "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--numel", type=int, default=1 << 27)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    rows = bandwidth(options.device, options.numel)
    rows.append(read(torch.randn(options.numel, device=options.device)))
    report(rows, options.device, rows[0])
    if options.save:
        print(save(rows, options.device, "bandwidth"))


if __name__ == "__main__":
    main()

"""Processes of the scaling benchmarks: torchrun starts them, their link is timed, what FSDP2 sends is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any


def others(ranks: int) -> float:
    """The share of a tensor that is another rank's."""
    return (ranks - 1) / ranks


def _names() -> tuple[str, str]:
    """The gather and the scatter that FSDP2 calls, in torch.distributed; their names depend on torch's version."""
    import torch.distributed as dist

    named = ("all_gather_into_tensor", "reduce_scatter_tensor")
    return ("all_gather_single", "reduce_scatter_single") if hasattr(dist, "all_gather_single") else named


def counter(world: int) -> dict[str, float]:
    """Count from here on, under "bytes", what FSDP2 sends."""
    import torch
    import torch.distributed as dist

    sent = {"bytes": 0.0}
    for name in _names():
        inner = getattr(dist, name)

        def counted(*rest: Any, inner: Any = inner, **more: Any) -> Any:
            tensors = [value for value in (*rest, *more.values()) if isinstance(value, torch.Tensor)]
            sent["bytes"] += others(world) * max(tensor.nbytes for tensor in tensors)
            return inner(*rest, **more)

        setattr(dist, name, counted)
    return sent


def link_rate(world: int) -> float:
    """Bytes/s that this rank sends in a sum over all ranks; 0 where it is alone."""
    import torch

    from safecrit import distributed

    values = torch.zeros(1 << 22)
    distributed.sum_(values)
    start = time.perf_counter()
    distributed.sum_(values)
    return 2 * others(world) * values.nbytes / (time.perf_counter() - start)


def divided_rate(world: int, repeats: int = 4) -> float:
    """Bytes/s that this rank sends where it gathers tensors twice and scatters a sum once; 0 where it is alone."""
    import torch
    import torch.distributed as dist

    if world == 1:
        return 0.0
    whole = torch.zeros(1 << 22)
    part = torch.zeros(len(whole) // world)
    gather, scatter = (getattr(dist, name) for name in _names())
    for number in range(repeats + 1):
        if number == 1:  # one round does not count
            start = time.perf_counter()
        for _ in range(2):
            gather(whole, part)
        scatter(part, whole)
    return repeats * 3 * others(world) * whole.nbytes / (time.perf_counter() - start)


def launch(file: str, ranks: int, *arguments: str) -> Any:
    """What `file` prints as JSON on its last line, on `ranks` processes of one thread each; one needs no torchrun."""
    place = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--nproc-per-node={ranks}"]
    torchrun = ["-m", "torch.distributed.run", *place] if ranks > 1 else []
    line = [sys.executable, *torchrun, file, "--worker", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])

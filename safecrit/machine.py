"""What a machine has: free memory of a device and of the host, and rates measured in less than a second."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from safecrit.errors import SafecritError

PROBE_S = 0.1  # how long each rate is measured
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does in a second: products in the model's dtype and in float32 (FLOPs), bytes moved.

    memory: bytes read and written in its own memory. link: bytes between host and device.
    """

    flops: float
    flops32: float
    memory: float
    link: float


def host_free() -> int:
    """Bytes of RAM that a new process can have."""
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_free(device: torch.device) -> int:
    """Bytes that can still be had on a device; on a CPU the host's."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host_free()


def parse_bytes(text: str) -> int:
    """`24GiB` (2^30), `80GB` (10^9) and the like; SafecritError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, flags=re.IGNORECASE)
    if match is None or not float(match[1]):
        raise SafecritError(f"--gpu-memory {text}: is no amount of memory. Write 24GiB or 80GB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def probe(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure a device for less than a second: square matrix products, a copy in its memory, a copy to it."""
    size = 512 if device.type == "cpu" else 4096
    one = torch.ones(size, size, device=device, dtype=dtype)
    one32 = one.float()
    here = torch.ones(1 << 24)
    there = here.to(device)
    copy = torch.empty_like(there)
    memory = 2 * here.nbytes * _per_second(device, lambda: copy.copy_(there))
    return Rates(
        flops=2.0 * size**3 * _per_second(device, lambda: one @ one),
        flops32=2.0 * size**3 * _per_second(device, lambda: one32 @ one32),
        memory=memory,
        link=memory if device.type == "cpu" else here.nbytes * _per_second(device, lambda: there.copy_(here)),
    )


def _per_second(device: torch.device, function: Callable[[], object]) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    function()
    wait()
    start, times = time.perf_counter(), 0
    while time.perf_counter() - start < PROBE_S:
        function()
        wait()
        times += 1
    return times / (time.perf_counter() - start)

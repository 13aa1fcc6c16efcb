"""How every benchmark measures: verified first, then timed; median with the 20th and 80th percentile."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One measurement: milliseconds (median, p20, p80) and GB/s (10^9 bytes) at the median."""

    name: str
    bytes: int
    milliseconds: float
    p20: float
    p80: float
    gigabytes_per_second: float


def measure(name: str, moved: int, function: Callable[[], object], device: str, repeats: int = 15) -> Row:
    """Time `function`, which reads and writes `moved` bytes, after one untimed call."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    function()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    cuts = statistics.quantiles(times, n=5, method="inclusive")
    median = statistics.median(times)
    return Row(name, moved, median * 1e3, cuts[0] * 1e3, cuts[-1] * 1e3, moved / median / 1e9)


def report(rows: list[Row], device: str, yardstick: Row, column: str = "of copy") -> None:
    """Print a table; the last column compares with the copy, or another yardstick, measured in the same run."""
    print(f"{machine(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':36}{'ms':>10}{'p20':>10}{'p80':>10}{'GB/s':>10}{column:>10}")
    for row in rows:
        share = row.gigabytes_per_second / yardstick.gigabytes_per_second
        print(
            f"{row.name:36}{row.milliseconds:10.3f}{row.p20:10.3f}{row.p80:10.3f}{row.gigabytes_per_second:10.1f}"
            f"{share:10.0%}"
        )


def ratio(baseline: Row, ours: Row) -> str:
    """How many times faster `ours` is, by the medians."""
    return f"{baseline.milliseconds / ours.milliseconds:.2f}"


def save(rows: list[Row], device: str, benchmark: str) -> Path:
    """Write the rows to results/, one file a machine."""
    name = f"{benchmark}-{re.sub('[^a-z0-9]+', '-', machine(device).lower()).strip('-')}"
    return write(name, device, benchmark=benchmark, rows=[asdict(row) for row in rows])


def write(name: str, device: str, **values: Any) -> Path:
    """Write `values` with machine, versions, commit and date to results/NAME.json."""
    value = {
        "benchmark": name,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        **values,
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def machine(device: str) -> str:
    """The name of the GPU or the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*: (.*)", text)
    return found.group(1).strip() if found else platform.machine()


def _commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None

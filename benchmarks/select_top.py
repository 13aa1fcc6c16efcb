"""select_top on every backend of a device against torch.topk, easy and hard inputs, and from mapped files."""

from __future__ import annotations

import argparse
import tempfile
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from bandwidth import bandwidth
from safetensors.torch import load_file, save_file
from timing import Row, measure, ratio, report, save

from safecrit import ops

SHARE = 100  # one entry in so many is selected
CHUNK = 1 << 24  # bytes of a read from a file
LARGE = 8_000_000_000  # entries on a GPU, as many as an 8 B model has


def reads(device: str, scores: torch.Tensor) -> list[Row]:
    """Reductions by torch that only read, the fastest first: the yardstick of this benchmark."""
    moved = scores.nbytes
    rows = [
        measure("read (max)", moved, scores.max, device),
        measure("read (sum)", moved, scores.sum, device),
        measure("read (max of int32)", moved, scores.view(torch.int32).max, device),
    ]
    rows.sort(key=lambda row: row.milliseconds)
    return [replace(rows[0], name=f"{rows[0].name}, best of 3"), *rows[1:]]


def inputs(device: str, numel: int) -> dict[str, list[torch.Tensor]]:
    """Lists of tensors with `numel` entries in all; hard cases for a method that samples."""
    torch.manual_seed(0)
    normal = torch.randn(numel, device=device)
    tiny = [torch.randn(1000, device=device) for _ in range(1000)]
    family = [part * (4 if place % 8 == 0 else 1) for place, part in enumerate(normal.chunk(64))]
    ascending = torch.arange(numel, device=device, dtype=torch.float32)
    two = torch.full((numel,), 0.25, device=device)
    two[::SHARE] = 0.5
    return {
        "normal": [normal],
        "all equal": [torch.full((numel,), 0.5, device=device)],
        "two values": [two],
        "ascending": [ascending],
        "descending": [ascending.flip(0)],
        "1 huge, 1000 tiny": [*tiny[:500], normal[: numel - 1_000_000], *tiny[500:]],
        "1 in 8 tensors 4 x larger": family,
    }


def rows_of(device: str, numel: int) -> list[Row]:
    """torch.topk and every backend; the bytes counted are one read of the scores."""
    lists = inputs(device, numel)
    normal, k = lists["normal"][0], numel // SHARE
    rows = reads(device, normal)
    rows.append(measure("torch.topk of abs", normal.nbytes, lambda: torch.topk(normal.abs(), k), device, 3))
    names = [row.backend for row in ops.backends(device) if row.op == "select_top" and row.available]
    expected = torch.topk(normal.abs(), k, sorted=False).indices.sort().values
    for name in names:
        found = ops.select_top([normal], k, backend=name)  # type: ignore[arg-type]
        if not torch.equal(found.indices[0], expected):
            raise SystemExit(f"{name} differs from torch.topk")
        repeats = 3 if name == "reference" else 15
        cases = [("normal", 4, lists["normal"])] if name == "reference" else [(n, 4, s) for n, s in lists.items()]
        if name != "reference":
            cases += [(f"normal {str(dtype)[6:]}", 2, [normal.to(dtype)]) for dtype in (torch.bfloat16, torch.float16)]
        for label, size, scores in cases:
            run = partial(ops.select_top, scores, k, backend=name)  # type: ignore[arg-type]
            rows.append(measure(f"{name} {label}", size * numel, run, device, repeats))
    if device == "cpu":
        rows.append(measure("select_random", 4 * numel, lambda: ops.select_random([numel], k, 0), device, 5))
    return rows


def large_rows(numel: int) -> list[Row]:
    """On a GPU: a copy, select_top in CUDA, and both sides at the largest size, halved from `numel`, topk can do."""
    rows = bandwidth("cuda", numel)
    copied = rows[0].gigabytes_per_second
    torch.manual_seed(0)
    scores, k = torch.randn(numel, device="cuda"), numel // SHARE
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = ops.select_top([scores], k, backend="cuda")
    output, peak = 8 * k / (1 << 20), (torch.cuda.max_memory_allocated() - before) / (1 << 20)
    print(f"device memory: {output:.0f} MiB of output and {peak - output:.0f} MiB beside it")
    expected = ops.select_top([scores], k, backend="reference")
    if not torch.equal(found.indices[0], expected.indices[0]) or found.tied != expected.tied:
        raise SystemExit("cuda differs from the reference")
    del found, expected
    ours = measure(f"cuda, {numel:.3g}", 4 * numel, lambda: ops.select_top([scores], k, backend="cuda"), "cuda")
    print(f"{ours.milliseconds / 1e3 * copied / (ours.bytes / 1e9):.2f} reads at the copy's {copied:.0f} GB/s")
    rows.append(ours)
    size = numel
    while True:
        part = scores[:size]
        try:
            theirs = measure(
                f"torch.topk of abs, {size:.3g}",
                4 * size,
                lambda part=part: torch.topk(part.abs(), len(part) // SHARE, sorted=False),  # type: ignore[misc]
                "cuda",
                3,
            )
            break
        except RuntimeError as error:  # too large for it, or for the memory it takes
            print(f"torch.topk of {size}: {str(error).splitlines()[0]}")
            size //= 2
    same = measure(f"cuda, {size:.3g}", 4 * size, lambda: ops.select_top([part], size // SHARE, backend="cuda"), "cuda")
    print(f"{ratio(theirs, same)} x torch.topk on {size:.3g} entries")
    return [*rows, theirs, same]


class AnonymousPeak:
    """The greatest growth of this process's anonymous memory while in scope, in MiB, looked at every millisecond."""

    def __enter__(self) -> AnonymousPeak:
        """Start looking."""
        self._start, self.mib, self._stop = self._now(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.mib = max(self.mib, (self._now() - self._start) / 1024)

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def extra_memory(numel: int) -> None:
    """Print what the first call in this process takes beside its output: later ones find memory to use again."""
    normal, k = torch.randn(numel), numel // SHARE
    ops.select_top([normal[:1000]], 10)
    with AnonymousPeak() as peak:
        ops.select_top([normal], k)
    output = 8 * k / (1 << 20)
    print(f"anonymous memory: {output:.1f} MiB of output and {peak.mib - output:.1f} MiB beside it")


def mapped_rows(folder: Path, numel: int) -> list[Row]:
    """Files of 2^27 float32 each: a sequential read of all of them, then select_top of them, mapped anew each time."""
    files, size, k = [], 1 << 27, numel // SHARE
    for place in range(0, numel, size):
        files.append(folder / f"{place}.safetensors")
        save_file({"scores": torch.randn(min(size, numel - place))}, files[-1])
    buffer = bytearray(CHUNK)

    def read() -> None:
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    def select() -> ops.Selection:
        return ops.select_top([load_file(file)["scores"] for file in files], k)

    rows = [measure("one sequential read of the files", 4 * numel, read, "cpu", 5)]
    with AnonymousPeak() as peak:
        total = sum(len(indices) for indices in select().indices)
    if total != k:
        raise SystemExit(f"{total} entries selected instead of {k}")
    name = f"mapped, {peak.mib:.0f} MiB anonymous"
    return [*rows, measure(name, 4 * numel, select, "cpu", 5)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--numel", type=int, help="default: 2^27; with --mapped 2,000,000,000")
    parser.add_argument("--mapped", type=Path, metavar="FOLDER", help="select from files, 8 GB written to FOLDER")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    if options.mapped:
        with tempfile.TemporaryDirectory(dir=options.mapped) as folder:
            rows = mapped_rows(Path(folder), options.numel or 2_000_000_000)
    else:
        if options.device == "cpu":
            extra_memory(options.numel or 1 << 27)
        rows = rows_of(options.device, options.numel or 1 << 27)
        torch.cuda.empty_cache()
        if options.device == "cuda" and any(row.name.startswith("cuda") for row in rows):
            rows += large_rows(min(LARGE, torch.cuda.mem_get_info()[0] // 12))
    report(rows, options.device, rows[0], "of read")
    if options.save:
        print(save(rows, options.device, "select-top-mapped" if options.mapped else "select-top"))


if __name__ == "__main__":
    main()

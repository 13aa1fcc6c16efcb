"""The vocabulary matrix between real tokenizers: time to build and to read from the cache, memory, kinds of rows.

Every repetition is a fresh process. `build` counts reading both vocabularies, not
loading the tokenizers; `cached` counts making the key. Both are the best of the
repetitions. `peak` is the process's peak minus what it held before the build
(the highest of the repetitions; Linux only).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import write

NAMES = ("llama3", "qwen2", "gpt2", "llama2")
KINDS = ("exact", "split", "bytes", "dead")


def once(folder: Path, model: str, judge: str) -> dict[str, Any]:
    """Figures of one pair, from one process."""
    from transformers import AutoTokenizer

    from safecrit import bridge

    made, other = (AutoTokenizer.from_pretrained(folder / name) for name in (model, judge))
    sizes = len(made), len(other)
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    start = time.perf_counter()
    a, b = bridge.vocabulary(made), bridge.vocabulary(other)
    built = bridge.vocabulary_matrix(a, b, other, *sizes)
    build_s = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held
    with tempfile.TemporaryDirectory() as cache:
        bridge.cached_vocabulary_matrix(made, other, *sizes, cache)
        start = time.perf_counter()
        cached = bridge.cached_vocabulary_matrix(made, other, *sizes, cache)
        cached_s = time.perf_counter() - start
    verify(built, cached)
    kinds = np.bincount([kind(a.pieces[i], b.pieces, row) for i, row in enumerate(rows_of(built))], minlength=4)
    return {"build_s": build_s, "cached_s": cached_s, "peak_mb": peak / 1e6} | dict(
        zip(KINDS, kinds.tolist(), strict=True)
    )


def verify(built: Any, cached: Any) -> None:
    """Stop unless the stored matrix is the built one and every row sums to one or is zero."""
    same = torch.equal(built.matrix.indices(), cached.matrix.indices())
    if not (same and torch.equal(built.matrix.values(), cached.matrix.values())):
        raise SystemExit("the stored matrix differs from the built one")
    torch.testing.assert_close(torch.sparse.sum(built.matrix, 1).to_dense(), built.live.float())


def rows_of(built: Any) -> list[np.ndarray]:
    """The judge tokens of every row."""
    rows, columns = built.matrix.indices().numpy()
    return np.split(columns, np.searchsorted(rows, np.arange(1, len(built.live))))


def kind(piece: bytes, judge: tuple[bytes, ...], row: np.ndarray) -> int:
    """Index in KINDS: the same bytes; text cut by the judge; bytes that are no UTF-8; nothing."""
    if not len(row):
        return 3
    if len(row) == 1 and judge[row[0]] == piece:
        return 0
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        return 2
    return 1


def figures(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """One row a pair of tokenizers, printed as it comes."""
    print(f"{'model -> judge':20}{'rows':>9}{'build s':>9}{'peak MB':>9}{'cached s':>10}{'live':>9}", end="")
    print("".join(f"{name:>9}" for name in KINDS))
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for model, judge in itertools.permutations(NAMES, 2):
            runs = pool.starmap(once, [(folder, model, judge)] * repeats, chunksize=1)
            row = runs[0] | {
                "model": model,
                "judge": judge,
                "build_s": min(run["build_s"] for run in runs),
                "cached_s": min(run["cached_s"] for run in runs),
                "peak_mb": max(run["peak_mb"] for run in runs),
            }
            total = sum(row[name] for name in KINDS)
            row |= {"rows": total, "live": 1 - row["dead"] / total}
            rows.append(row)
            print(
                f"{model + ' -> ' + judge:20}{total:9}{row['build_s']:9.2f}{row['peak_mb']:9.0f}{row['cached_s']:10.3f}"
                f"{row['live']:9.3%}" + "".join(f"{row[name]:9}" for name in KINDS)
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help=f"holds tokenizers named {', '.join(NAMES)}")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = figures(options.folder, options.repeats)
    tokenizers = importlib.metadata.version("tokenizers")
    print(write("bridge", "cpu", tokenizers=tokenizers, repeats=options.repeats, rows=rows))


if __name__ == "__main__":
    main()

"""Starts torchrun, for tests: a module of ours on several processes, with the store on a free port."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def torchrun(ranks: int, module: str, *arguments: object) -> list[str]:
    """The command line."""
    place = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--nproc-per-node={ranks}"]
    return [sys.executable, "-m", "torch.distributed.run", *place, "-m", module, *map(str, arguments)]


def start(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def run(command: Sequence[str], timeout: float = 120, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    return finish(start(command, **environment), timeout)


def finish(started: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of what `start` started."""
    with started as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"still running after {timeout} s:\n{out}\n{err}") from None
    return process.returncode, out, err

"""The CUDA kernels compiled for the CPU: `_cuda`'s own sources with tests/emulated in place of CUDA's headers.

Only `kernel<<<...>>>(...)`, which no C++ compiler reads, is rewritten. The module is kept in build/emulated under a
hash of all it is made of, so that only a change compiles it again, in one of the processes of a run.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
CSRC, HEADERS, BUILT = ROOT / "csrc", ROOT / "tests" / "emulated", ROOT / "build" / "emulated"
LAUNCH = re.compile(r"(\w+(?:<[\w:, ]+>)?)<<<(.*?)>>>\(", re.DOTALL)
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"]


def emulated_cuda() -> ModuleType:
    """The module; skips the test where there is no compiler for it."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no g++, or not Linux, to compile the CUDA kernels for the CPU")
    pytest.importorskip("pybind11")
    parts = sorted([*CSRC.iterdir(), *HEADERS.iterdir(), Path(__file__)])
    key = hashlib.sha256(b"\0".join(part.read_bytes() for part in parts)).hexdigest()[:16]
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        module = BUILT / f"{key}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not module.exists():
            for old in BUILT.glob("*.so"):
                old.unlink()
            _compile(compiler, module)
    spec = importlib.util.spec_from_file_location("_cuda", module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _compile(compiler: str, module: Path) -> None:
    import pybind11

    folder = BUILT / "objects"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    includes = [HEADERS, CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    command = [compiler, *FLAGS, "-DSAFECRIT_MINIMUM_CAPABILITY=80", *(f"-I{path}" for path in includes)]
    running = []
    for source in [*CSRC.glob("*.cu"), *CSRC.glob("*module_cuda.cpp")]:
        text = LAUNCH.sub(r"emulated::launch(\1, \2)(", source.read_text(encoding="utf-8"))
        rewritten = folder / f"{source.name}.cpp"
        rewritten.write_text(f'#line 1 "{source}"\n{text}', encoding="utf-8")
        call = [*command, "-c", str(rewritten), "-o", f"{rewritten}.o"]
        running.append(subprocess.Popen(call, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    objects = [str(path) for path in folder.glob("*.o")]
    partial = module.with_suffix(".partial")
    subprocess.run([compiler, "-shared", *objects, "-o", str(partial)], check=True)
    partial.rename(module)

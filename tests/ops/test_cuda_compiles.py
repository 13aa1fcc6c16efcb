from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("source", sorted(CSRC.glob("*.cu")), ids=lambda path: path.name)
def test_compiles(source, tmp_path):
    command = [NVCC, "-std=c++17", "-ptx", "-arch=compute_80", "--Werror", "all-warnings", "-o", "out.ptx", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ptx = (tmp_path / "out.ptx").read_text()
    assert ".entry" in ptx
    assert "fma.rn.f32" not in ptx  # product and sum are rounded separately

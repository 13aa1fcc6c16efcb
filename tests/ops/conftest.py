"""One parametrisation for all ops: `target` is each (device, backend) that has a kernel for the module's OP.

A module's BACKEND, where it has one, leaves the others out.

Without a GPU the CUDA kernels run too, compiled for the CPU (tests/emulated_cuda.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from safecrit import ops
from safecrit.ops import dispatch, native
from tests.emulated_cuda import emulated_cuda


class Target(NamedTuple):
    device: str
    backend: str


EMULATED = Target("cpu", "cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" not in metafunc.fixturenames:
        return
    params, only = [], getattr(metafunc.module, "BACKEND", None)
    for device, absent in (("cpu", "cuda"), ("cuda", "native")):
        for row in ops.backends(device):
            if row.op != metafunc.module.OP or row.backend == absent or row.reason == "no such kernel":
                continue
            if only not in (None, row.backend):
                continue
            if device == "cpu" and row.backend == "triton" and torch.cuda.is_available():
                continue
            marks = [pytest.mark.gpu] if device == "cuda" else []
            usable = row.available and (device == "cpu" or torch.cuda.is_available())
            if not usable:
                marks.append(pytest.mark.skip(reason=f"{row.backend}: {row.reason}"))
            params.append(pytest.param(Target(device, row.backend), id=f"{device}-{row.backend}", marks=marks))
    if "cuda" in dispatch._OPS[metafunc.module.OP]:
        params.append(pytest.param(EMULATED, id="cpu-cuda"))
    metafunc.parametrize("target", params)


@pytest.fixture(scope="session")
def cuda_on_cpu() -> ModuleType:
    return emulated_cuda()


@pytest.fixture(autouse=True)
def _emulate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CUDA backend take the CPU's tensors in tests of the emulated target."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or callspec.params.get("target") != EMULATED:
        return
    module = request.getfixturevalue("cuda_on_cpu")
    real = dispatch._availability

    def availability(
        op: str, backend: str, device: torch.device, dtypes: Sequence[torch.dtype] = ()
    ) -> tuple[bool, str]:
        if backend == "cuda" and "cuda" in dispatch._OPS[op] and all(dtype in native.DTYPE_CODES for dtype in dtypes):
            return True, "emulated"
        return real(op, backend, device, dtypes)

    monkeypatch.setattr(dispatch, "_availability", availability)
    monkeypatch.setattr(native, "cuda_module", lambda: (module, "emulated"))
    monkeypatch.setattr(native, "queue", lambda device: (0, 0))

"""One parametrisation for all ops: `target` is each (device, backend) that has a kernel for the module's OP."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from safecrit import ops


class Target(NamedTuple):
    device: str
    backend: str


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" not in metafunc.fixturenames:
        return
    params = []
    for device, absent in (("cpu", "cuda"), ("cuda", "native")):
        for row in ops.backends(device):
            if row.op != metafunc.module.OP or row.backend == absent or row.reason == "no such kernel":
                continue
            if device == "cpu" and row.backend == "triton" and torch.cuda.is_available():
                continue
            marks = [pytest.mark.gpu] if device == "cuda" else []
            usable = row.available and (device == "cpu" or torch.cuda.is_available())
            if not usable:
                marks.append(pytest.mark.skip(reason=f"{row.backend}: {row.reason}"))
            params.append(pytest.param(Target(device, row.backend), id=f"{device}-{row.backend}", marks=marks))
    metafunc.parametrize("target", params)

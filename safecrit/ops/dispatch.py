"""Which backend an op runs on, and why.

Order of preference: CUDA kernels where they were compiled, Triton on any other
GPU, C++ on the CPU, the torch reference anywhere. A backend that was asked for
and is missing raises; an automatic fallback from C++ or a GPU kernel to the
reference is logged once.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from safecrit.errors import SafecritError
from safecrit.ops import native

Backend = Literal["auto", "cuda", "triton", "native", "reference"]
PREFERENCE: tuple[str, ...] = ("cuda", "triton", "native", "reference")

# op -> backend -> "module:function". The module is imported when the backend is first used.
_OPS: dict[str, dict[str, str]] = {
    "esi_accumulate_": {
        "cuda": "safecrit.ops.native:esi_accumulate_cuda",
        "triton": "safecrit.kernels.esi_accumulate:esi_accumulate",
        "native": "safecrit.ops.native:esi_accumulate_cpu",
        "reference": "safecrit.ops.reference.esi_accumulate:esi_accumulate",
    },
    "matrix_std": {
        "cuda": "safecrit.ops.native_std:matrix_std_cuda",
        "triton": "safecrit.kernels.matrix_std:matrix_std",
        "native": "safecrit.ops.native_std:matrix_std_cpu",
        "reference": "safecrit.ops.reference.matrix_std:matrix_std",
    },
    "select_top": {
        "cuda": "safecrit.ops.native_select:select_top_cuda",
        "native": "safecrit.ops.native_select:select_top_cpu",
        "reference": "safecrit.ops.reference.select_top:select_top",
    },
    "rank_counts": {
        "native": "safecrit.ops.native_select:rank_counts_cpu",
        "reference": "safecrit.ops.reference.select_top:rank_counts",
    },
    "select_random": {
        "native": "safecrit.ops.native_select:select_random_cpu",
        "reference": "safecrit.ops.reference.select_random:select_random",
    },
    "gather_": {
        "cuda": "safecrit.ops.native_gather:gather_cuda",
        "triton": "safecrit.kernels.gather:gather",
        "native": "safecrit.ops.native_gather:gather_cpu",
        "reference": "safecrit.ops.reference.gather:gather",
    },
    "sparse_adamw_": {
        "cuda": "safecrit.ops.native_adamw:sparse_adamw_cuda",
        "triton": "safecrit.kernels.adamw:sparse_adamw",
        "native": "safecrit.ops.native_adamw:sparse_adamw_cpu",
        "reference": "safecrit.ops.reference.sparse_adamw:sparse_adamw",
    },
    "masked_adamw_": {
        "cuda": "safecrit.ops.native_adamw:masked_adamw_cuda",
        "triton": "safecrit.kernels.adamw:masked_adamw",
        "native": "safecrit.ops.native_adamw:masked_adamw_cpu",
        "reference": "safecrit.ops.reference.masked_adamw:masked_adamw",
    },
    "bits_from_indices": {
        "native": "safecrit.ops.native_bits:bits_from_indices_cpu",
        "reference": "safecrit.ops.reference.bits:bits_from_indices",
    },
    "indices_from_bits": {
        "native": "safecrit.ops.native_bits:indices_from_bits_cpu",
        "reference": "safecrit.ops.reference.bits:indices_from_bits",
    },
}

_log = logging.getLogger("safecrit.ops")


class BackendError(SafecritError, RuntimeError):
    """A backend that was asked for and cannot serve the op, the device or this installation."""


@dataclass(frozen=True)
class Choice:
    """The backend an op runs on, the reason it was taken, and its function."""

    backend: str
    reason: str
    function: Callable[..., Any]


@dataclass(frozen=True)
class BackendRow:
    """One line of the table of backends."""

    op: str
    backend: str
    available: bool
    reason: str


def choose(op: str, device: torch.device, backend: str = "auto", dtypes: Sequence[torch.dtype] = ()) -> Choice:
    """The backend that runs `op` on tensors of `device`; `dtypes`: those that not every backend takes.

    Raises BackendError where `backend` is not "auto" and cannot run it; the message lists what can.
    """
    if op not in _OPS:
        raise ValueError(f"unknown op {op!r}; there are {', '.join(_OPS)}")
    if backend != "auto" and backend not in PREFERENCE:
        raise BackendError(f"{op}: unknown backend {backend!r}; there are auto, {', '.join(PREFERENCE)}.")
    if backend == "auto":
        refused: list[str] = []
        for name in PREFERENCE:
            if _passed_over(op, name, device):
                continue
            available, reason = _availability(op, name, device, dtypes)
            if available:
                if name == "reference" and refused:
                    _notice(device.type, refused[0])
                return Choice(name, f"{reason}; not {'; not '.join(refused)}" if refused else reason, _load(op, name))
            refused.append(f"{name} ({reason})")
    available, reason = _availability(op, backend, device, dtypes)
    if not available:
        usable = [name for name in PREFERENCE if _availability(op, name, device, dtypes)[0]]
        raise BackendError(f"{op}: no backend {backend!r} for {device}: {reason}. Usable here: {', '.join(usable)}.")
    return Choice(backend, f"asked for; {reason}", _load(op, backend))


def backends(device: str | torch.device | None = None) -> list[BackendRow]:
    """Every op and backend: whether it is usable on `device` (default: each backend's own device), and why."""
    rows = []
    for op in _OPS:
        for name in PREFERENCE:
            target = torch.device(device) if device is not None else _own_device(name)
            rows.append(BackendRow(op, name, *_availability(op, name, target)))
    return rows


def _own_device(backend: str) -> torch.device:
    if backend in ("native", "reference"):
        return torch.device("cpu")
    if backend == "triton" and not torch.cuda.is_available() and hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu")
    return torch.device("cuda")


def _passed_over(op: str, backend: str, device: torch.device) -> bool:
    """Backends that "auto" does not even consider, so that they are no part of a fallback's reason."""
    if backend not in _OPS[op]:
        return True
    return backend in ("cuda", "triton") if device.type == "cpu" else backend == "native"


def _availability(op: str, backend: str, device: torch.device, dtypes: Sequence[torch.dtype] = ()) -> tuple[bool, str]:
    """Whether `backend` can run `op` on `device`, and the reason."""
    if backend not in _OPS[op]:
        return False, "no such kernel"
    if backend == "reference":
        return True, "torch, any device"
    others = [str(dtype) for dtype in dtypes if dtype not in native.DTYPE_CODES]
    if others:
        return False, f"takes float32, bfloat16 and float16, not {others[0]}"
    if backend == "native":
        if device.type != "cpu":
            return False, f"C++ kernels run on the CPU, the tensors are on {device.type}"
        module, reason = native.cpu_module()
        return module is not None, reason
    if backend == "cuda":
        if device.type != "cuda":
            return False, f"CUDA kernels need an NVIDIA GPU, the tensors are on {device.type}"
        return native.cuda_usable(device)
    return _triton_usable(device)


@functools.cache
def _triton_usable(device: torch.device) -> tuple[bool, str]:
    try:
        importlib.import_module("triton")
        importlib.import_module("safecrit.kernels.esi_accumulate")
    except ImportError as error:
        return False, f"{error.name or error} is not installed"
    interpreted = importlib.import_module("triton").knobs.runtime.interpret
    if device.type == "cpu":
        return interpreted, "Triton's interpreter" if interpreted else "Triton on the CPU needs TRITON_INTERPRET=1"
    if device.type == "cuda" and not torch.cuda.is_available():
        return False, "torch sees no GPU"
    if device.type not in ("cuda", "xpu"):
        return False, f"Triton does not serve {device.type}"
    return True, "Triton, compiled at first use"


@functools.cache
def _load(op: str, backend: str) -> Callable[..., Any]:
    module, _, name = _OPS[op][backend].partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


@functools.cache
def _notice(device_type: str, refused: str) -> None:
    _log.warning(
        "safecrit.ops: no compiled kernels on %s: %s. Using torch: same results, slower.", device_type, refused
    )

"""The compiled modules: finding them, and calling them with plain numbers.

`_native` (C++) and `_cuda` know no torch: they take pointers, 64-bit sizes and
strides in elements, a dtype code, and for CUDA the device index and the current
stream. Everything has been checked before (see each op).
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from safecrit.ops.views import Plane

# The values of `Dtype` and `Reduction` in csrc/esi_accumulate.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
REDUCTION_CODES = {"signed": 0, "abs": 1, "square": 2}


@functools.cache
def cpu_module() -> tuple[ModuleType | None, str]:
    """The C++ module, or None, and the reason."""
    module, problem = _import("safecrit.ops._native", "no C++ compiler at installation, or SAFECRIT_NATIVE=OFF")
    if module is None:
        return None, problem
    return module, f"C++, {module.variant()}"


@functools.cache
def cuda_module() -> tuple[ModuleType | None, str]:
    """The CUDA module, or None, and the reason."""
    module, problem = _import("safecrit.ops._cuda", "no nvcc at installation, or SAFECRIT_CUDA=OFF")
    return (module, "CUDA") if module is not None else (None, problem)


@functools.cache
def cuda_usable(device: torch.device) -> tuple[bool, str]:
    """Whether the CUDA module's kernels run on `device`, and the reason."""
    if not torch.cuda.is_available():
        return False, "torch sees no GPU"
    if torch.version.hip is not None:
        return False, "an AMD GPU"
    module, reason = cuda_module()
    if module is None:
        return False, reason
    major, minor = torch.cuda.get_device_capability(device)
    if major * 10 + minor < module.MINIMUM_CAPABILITY:
        return False, f"compiled for compute capability {module.MINIMUM_CAPABILITY / 10:.1f} and later"
    return True, f"CUDA kernels, compute capability {major}.{minor}"


def queue(device: torch.device) -> tuple[int, int]:
    """Index of a CUDA device and its current stream: the last arguments of every CUDA kernel."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def esi_accumulate_cpu(plane: Plane, sigma: float, reduction: str) -> int:
    """C++ kernel of `safecrit.ops.esi_accumulate_`."""
    module, _ = cpu_module()
    assert module is not None, "chosen only where it can be imported"
    return int(module.esi_accumulate(*_plain(plane, sigma, reduction), torch.get_num_threads()))


def esi_accumulate_cuda(plane: Plane, sigma: float, reduction: str) -> int:
    """CUDA kernel of `safecrit.ops.esi_accumulate_`; reading the count waits for the device."""
    module, _ = cuda_module()
    assert module is not None, "chosen only where it can be imported"
    device = plane.acc.device
    skipped = torch.zeros(1, dtype=torch.int64, device=device)
    module.esi_accumulate(*_plain(plane, sigma, reduction), skipped.data_ptr(), *queue(device))
    return int(skipped.item())


def _plain(plane: Plane, sigma: float, reduction: str) -> tuple[int | float, ...]:
    return (
        plane.acc.data_ptr(),
        plane.grad.data_ptr(),
        plane.rows,
        plane.cols,
        *plane.acc_strides,
        *plane.grad_strides,
        sigma,
        DTYPE_CODES[plane.grad.dtype],
        REDUCTION_CODES[reduction],
    )


def _import(name: str, absent: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError:
        return None, f"{name.rpartition('.')[2]} is not built: {absent}"
    except ImportError as error:  # built for another system: say what the loader says
        return None, f"{name.rpartition('.')[2]} does not load: {error}"

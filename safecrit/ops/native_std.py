"""matrix_std on the compiled modules: matrices as pointers, shapes and strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from safecrit.ops import native

CUDA_DIMS = 4  # of `CudaMatrix` in csrc/matrix_std.h


def matrix_std_cpu(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """C++ kernel of `safecrit.ops.matrix_std`; `parts` are the matrices, views of one weight."""
    module, _ = native.cpu_module()
    assert module is not None, "chosen only where it can be imported"
    if not parts:
        return torch.empty(0, dtype=torch.float64)
    plain = [(part.data_ptr(), list(part.shape), list(part.stride())) for part in parts]
    found = module.matrix_std(plain, native.DTYPE_CODES[parts[0].dtype], torch.get_num_threads())
    return torch.tensor(found, dtype=torch.float64)


def matrix_std_cuda(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """CUDA kernel of `safecrit.ops.matrix_std`; bringing the result to the CPU waits for the device."""
    module, _ = native.cuda_module()
    assert module is not None, "chosen only where it can be imported"
    if not parts:
        return torch.empty(0, dtype=torch.float64)
    device = parts[0].device
    result = torch.zeros(len(parts), dtype=torch.float64, device=device)
    for position, part in enumerate(parts):
        shape, strides = merged(part)
        if len(shape) > CUDA_DIMS:
            shape, strides = merged(part := part.contiguous())
        scratch = torch.empty(2 * module.matrix_std_blocks(part.numel()), dtype=torch.float64, device=device)
        module.matrix_std(
            part.data_ptr(),
            shape,
            strides,
            native.DTYPE_CODES[part.dtype],
            scratch.data_ptr(),
            result[position:].data_ptr(),
            *native.queue(device),
        )
    return result.cpu()


def merged(part: torch.Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides with dimensions by descending stride, those that follow one another made one."""
    shape: list[int] = []
    strides: list[int] = []
    for stride, size in sorted(zip(part.stride(), part.shape, strict=True), reverse=True):
        if size == 1:
            continue
        if shape and strides[-1] == size * stride:
            shape[-1] *= size
            strides[-1] = stride
        else:
            shape.append(size)
            strides.append(stride)
    return shape, strides

"""gather_ on the compiled modules."""

from __future__ import annotations

import torch

from safecrit.ops import native


def gather_cpu(out: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, add: bool) -> None:
    """C++ kernel of `safecrit.ops.gather_`; it checks that `indices` are in range."""
    module, _ = native.cpu_module()
    assert module is not None, "chosen only where it can be imported"
    module.gather(*_plain(out, values, indices, add), torch.get_num_threads())


def gather_cuda(out: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, add: bool) -> None:
    """CUDA kernel of `safecrit.ops.gather_`."""
    module, _ = native.cuda_module()
    assert module is not None, "chosen only where it can be imported"
    stream = torch.cuda.current_stream(out.device)
    module.gather(*_plain(out, values, indices, add), stream.device_index, stream.cuda_stream)


def _plain(
    out: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, add: bool
) -> tuple[int, int, int, int, int, int, bool, bool]:
    pointers = out.data_ptr(), values.data_ptr(), indices.data_ptr()
    wide = indices.dtype == torch.int64
    return *pointers, values.numel(), out.numel(), native.DTYPE_CODES[values.dtype], wide, add

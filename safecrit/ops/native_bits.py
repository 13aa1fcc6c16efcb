"""The mask encodings in C++."""

from __future__ import annotations

import torch

from safecrit.ops import native


def bits_from_indices_cpu(indices: torch.Tensor, numel: int) -> torch.Tensor:
    """C++ kernel of `safecrit.ops.bits_from_indices`."""
    module, _ = native.cpu_module()
    assert module is not None, "chosen only where it can be imported"
    indices = indices.contiguous()
    bits = torch.empty((numel + 7) // 8, dtype=torch.uint8)
    module.bits_from_indices(indices.data_ptr(), indices.numel(), numel, bits.data_ptr(), torch.get_num_threads())
    return bits


def indices_from_bits_cpu(bits: torch.Tensor) -> torch.Tensor:
    """C++ kernel of `safecrit.ops.indices_from_bits`: two reads, to count and to write."""
    module, _ = native.cpu_module()
    assert module is not None, "chosen only where it can be imported"
    threads = torch.get_num_threads()
    indices = torch.empty(module.count_bits(bits.data_ptr(), bits.numel(), threads), dtype=torch.int64)
    module.indices_from_bits(bits.data_ptr(), bits.numel(), indices.data_ptr(), indices.numel(), threads)
    return indices

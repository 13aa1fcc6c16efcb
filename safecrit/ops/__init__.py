"""The performance-critical parts, each with a torch reference and, where it pays, compiled kernels.

Every op checks its arguments once, then runs on the backend that `choose` names
with its reason; `backends()` lists all of them.
"""

from __future__ import annotations

from safecrit.ops.bits import bits_from_indices, indices_from_bits
from safecrit.ops.dispatch import BackendError, BackendRow, Choice, backends, choose
from safecrit.ops.esi_accumulate import esi_accumulate_
from safecrit.ops.gather import gather_
from safecrit.ops.masked_adamw import masked_adamw_
from safecrit.ops.matrix_std import matrix_std
from safecrit.ops.rank_counts import rank_counts
from safecrit.ops.select_random import select_random, select_random_matched
from safecrit.ops.select_top import Selection, select_top
from safecrit.ops.sparse_adamw import sparse_adamw_

__all__ = [
    "BackendError",
    "BackendRow",
    "Choice",
    "Selection",
    "backends",
    "bits_from_indices",
    "choose",
    "esi_accumulate_",
    "gather_",
    "indices_from_bits",
    "masked_adamw_",
    "matrix_std",
    "rank_counts",
    "select_random",
    "select_random_matched",
    "select_top",
    "sparse_adamw_",
]

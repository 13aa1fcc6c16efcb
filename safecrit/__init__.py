"""Find the weights of a language model that carry its safety, and act on exactly those.

Everything here is loaded when first used, so that `import safecrit` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safecrit.api.memory import MemoryScores as MemoryScores
    from safecrit.api.memory import score as score
    from safecrit.masked import MaskedAdamW as MaskedAdamW
    from safecrit.maskfile import Mask as Mask
    from safecrit.protection import ProtectCallback as ProtectCallback
    from safecrit.protection import protect as protect
    from safecrit.scorefile import Scores as Scores
    from safecrit.sparse import SparseAdamW as SparseAdamW
    from safecrit.verification import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "Mask": "safecrit.maskfile",
    "MaskedAdamW": "safecrit.masked",
    "MemoryScores": "safecrit.api.memory",
    "ProtectCallback": "safecrit.protection",
    "Scores": "safecrit.scorefile",
    "SparseAdamW": "safecrit.sparse",
    "protect": "safecrit.protection",
    "score": "safecrit.api.memory",
    "verify": "safecrit.verification",
}
__all__ = [
    "Mask",
    "MaskedAdamW",
    "MemoryScores",
    "ProtectCallback",
    "Scores",
    "SparseAdamW",
    "__version__",
    "protect",
    "score",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'safecrit' has no attribute {name!r}")

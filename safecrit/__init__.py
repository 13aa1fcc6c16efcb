"""Find, mask and act on the safety-critical weights of a language model."""

from __future__ import annotations

__version__ = "0.1.0"

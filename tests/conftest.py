"""Fixtures shared by all tests: material beside the checkout, and a cache of our own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.chatserver import Server, serving

# Triton reads this when a kernel is defined. With a GPU its compiled kernels are tested there instead.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # as the command line does
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The same examples in every run: a suite that passes does so again.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, tokenizers and a small real model beside the checkout; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared material at {SHARED}")
    return SHARED


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep fingerprint and bridge caches of a test inside its own folder."""
    monkeypatch.setenv("SAFECRIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "SAFECRIT_JUDGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as made:
        yield made

"""Runs the command line in this process, and small models on disk to run it on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from safecrit import scoring
from safecrit.cli import main
from safecrit.scorefile import Scores
from tests import tiny


@dataclass
class Ran:
    code: int
    out: str
    err: str


Cli = Callable[..., Ran]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["safecrit", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@dataclass
class World:
    """A model, a guard with another tokenizer, and data files."""

    folder: Path
    model: Path
    guard: Path
    prompts: Path
    refusals: Path
    task: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    reads, judges = tiny.tokenizer("byte-level", tiny.CHAT), tiny.tokenizer("metaspace")
    tiny.loaded(tiny.llama(len(reads), hidden=32), reads, folder / "model")
    tiny.loaded(tiny.llama(len(judges), seed=1), judges, folder / "guard")
    prompts = ["How do I bake a loaf?", "Tell me a story", "Where is the keeper?", "What is flour?", "Is it warm?"]
    (folder / "prompts.csv").write_text("goal\n" + "\n".join(prompts) + "\n")
    rows = [{"prompt": prompt, "completion": "I cannot help with that."} for prompt in prompts]
    (folder / "refusals.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = [{"question": prompt, "answer": "First warm the oven."} for prompt in prompts]
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, task)))
    return World(
        folder,
        folder / "model",
        folder / "guard",
        folder / "prompts.csv",
        folder / "refusals.jsonl",
        folder / "task.jsonl",
    )


def score(world: World, out: Path, **changes: Any) -> list[Any]:
    """`safecrit score` on the world's model (or `model`); True for a switch, None for a flag to leave out."""
    flags = {"judge": world.guard, "prompts": world.prompts, "max-new-tokens": 4, "output": out}
    arguments: list[Any] = ["score", changes.pop("model", world.model)]
    for key, value in (flags | {key.replace("_", "-"): value for key, value in changes.items()}).items():
        if value is not None:
            arguments += [f"--{key}", *([] if value is True else [value])]
    return arguments


def scores_of(folder: Path) -> dict[str, torch.Tensor]:
    """The signed scores of a folder by checkpoint name."""
    found = Scores.load(folder)
    return {name: found.tensor(name).clone() for name in found.names}


def assert_same_output(one: Path, other: Path) -> None:
    """Every file that two runs of `score` left is the same, but for the flags they were given."""
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in other.iterdir())
    for name in files:
        if name != "config.yaml":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[None]:
    """Ctrl-C when `score` takes its batch number `at`, counted from 1."""
    inner, calls = scoring.forward_logits, []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return inner(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "forward_logits", counted)
        yield


@pytest.fixture(scope="session")
def mask_file(world: World) -> Path:
    """A 1 % mask of the model, made by the command line."""
    scores, mask = world.folder / "scores", world.folder / "mask.safetensors"
    for arguments in (
        [
            "score",
            world.model,
            "--judge",
            world.guard,
            "--prompts",
            world.prompts,
            "--max-new-tokens",
            12,
            "-o",
            scores,
            "-q",
        ],
        ["mask", scores, "--top", "1%", "-o", mask],
    ):
        saved, sys.argv = sys.argv, ["safecrit", *map(str, arguments)]
        try:
            main()
        except SystemExit as end:
            assert not end.code
        finally:
            sys.argv = saved
    return mask

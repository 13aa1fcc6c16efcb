"""What can go wrong while `score` runs: it is killed, memory or disk run out. Nothing is lost, no result changes."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safecrit import generation, scoring
from safecrit.api import answering
from safecrit.gradients import GradientStream
from safecrit.judges.guard import GuardJudge
from safecrit.tensorfile import TensorWriter
from tests import tiny
from tests.cli.conftest import Cli, World, assert_same_output, score, scores_of

FLAGS = {"batch_size": 2, "save_every": 2, "draws": 2, "max_new_tokens": 6}
Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("kept", [1, 2])
def test_answers_that_were_kept_are_not_made_again(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    assert cli(*score(world, tmp_path / "whole", **FLAGS)).code == 0
    inner, batches = generation._generate_batch, []

    def counted(model: Any, tokenizer: Any, encoded: Any, *rest: Any) -> Any:
        if len(batches) == kept:
            raise KeyboardInterrupt
        batches.append(len(encoded))
        return inner(model, tokenizer, encoded, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "_generate_batch", counted)
        assert cli(*score(world, tmp_path / "cut", **FLAGS)).code == 130
    assert batches == [2, 2][:kept]
    with open(tmp_path / "cut" / ".answers.jsonl", "a") as file:
        file.write('[4, [{"te')  # a line that the kill broke off
    kept, batches = 3 - kept, []
    with monkeypatch.context() as patch:
        patch.setattr(generation, "_generate_batch", counted)
        assert cli(*score(world, tmp_path / "cut", **FLAGS)).code == 0
    assert batches == [2, 2, 1][3 - kept :]
    assert_same_output(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("place", ["host", "disk"])
def test_sums_elsewhere_are_the_same_bit_for_bit(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    made: list[GradientStream] = []
    inner = GradientStream.__enter__

    def seen(self: GradientStream) -> GradientStream:
        made.append(self)
        assert len(list((tmp_path / place).glob("accumulator-*"))) == (len(self.accumulators) if place == "disk" else 0)
        return inner(self)

    assert cli(*score(world, tmp_path / "device", accumulate_on="device", **FLAGS)).code == 0
    monkeypatch.setattr(GradientStream, "__enter__", seen)
    assert cli(*score(world, tmp_path / place, accumulate_on=place, **FLAGS)).code == 0
    assert len(made) == 1
    for name in ("scores-00001-of-00001.safetensors", "samples.jsonl"):
        assert (tmp_path / place / name).read_bytes() == (tmp_path / "device" / name).read_bytes()
    info = json.loads((tmp_path / place / "score.json").read_text())
    assert info["placement"]["accumulate_on"] == place
    assert not list((tmp_path / place).glob("accumulator-*"))


def _no_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("simulated")


def _in_forward(patch: pytest.MonkeyPatch) -> None:
    inner = scoring.forward_logits
    patch.setattr(scoring, "forward_logits", lambda m, items: (inner if len(items) < 3 else _no_memory)(m, items))


def _in_backward(patch: pytest.MonkeyPatch) -> None:
    inner, folds = GradientStream._fold, []

    def fold(self: GradientStream, *arguments: Any) -> None:
        folds.append(1)
        if len(folds) == 5:
            _no_memory()
        inner(self, *arguments)

    patch.setattr(GradientStream, "_fold", fold)


def _at_the_judge(patch: pytest.MonkeyPatch) -> None:
    inner = GuardJudge.verdicts
    patch.setattr(GuardJudge, "verdicts", lambda self, n, e: inner(self, n, e) if len(n) < 4 else _no_memory())


def _in_answering(patch: pytest.MonkeyPatch) -> None:
    inner = generation._generate_batch
    patch.setattr(generation, "_generate_batch", lambda m, t, e, *r: (inner if len(e) < 3 else _no_memory)(m, t, e, *r))


@pytest.mark.parametrize("where", [_in_forward, _in_backward, _at_the_judge, _in_answering])
def test_memory_that_runs_out_makes_batches_smaller_and_changes_nothing(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Patch
) -> None:
    # The world's model, with weights of a usual size: its large ones magnify float32's rounding to 1e-4.
    reads = tiny.tokenizer("byte-level", tiny.CHAT)
    model = tiny.llama(len(reads), hidden=32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5 if weight.dim() == 2 else 1)
    tiny.loaded(model, reads, tmp_path / "model")
    flags = FLAGS | {"batch_size": 5, "model": tmp_path / "model"}
    assert cli(*score(world, tmp_path / "whole", **flags)).code == 0
    with monkeypatch.context() as patch:
        where(patch)
        ran = cli(*score(world, tmp_path / "scarce", **flags))
    assert ran.code == 0, ran.err
    whole, scarce = (
        torch.cat([tensor.flatten() for tensor in scores_of(tmp_path / name).values()]) for name in ("whole", "scarce")
    )
    assert float((whole - scarce).norm() / whole.norm()) <= 1e-5
    answers = [
        [json.loads(line)["ids"] for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        for name in ("whole", "scarce")
    ]
    assert answers[0] == answers[1]
    assert json.loads((tmp_path / "scarce" / "score.json").read_text())["prompts"]["used"] == 5


def _full() -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _FullFile:
    """A file on a disk with room for three lines."""

    def __init__(self, path: Path, mode: str, encoding: str) -> None:
        self.file, self.lines = path.open(mode, encoding=encoding), 0

    def __enter__(self) -> _FullFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, text: str) -> None:
        self.lines += 1
        if self.lines > 3:
            _full()
        self.file.write(text)

    def flush(self) -> None:
        self.file.flush()


def _while_answering(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(answering, "open", _FullFile, raising=False)


def _while_saving(patch: pytest.MonkeyPatch) -> None:
    inner, saved = TensorWriter.write, []

    def write(self: TensorWriter, name: str, tensor: torch.Tensor) -> None:
        saved.append(name)
        if len(saved) > 20:  # in the second state that is saved
            _full()
        inner(self, name, tensor)

    patch.setattr(TensorWriter, "write", write)


def _while_writing_scores(patch: pytest.MonkeyPatch) -> None:
    inner = os.replace
    patch.setattr(os, "replace", lambda a, b: _full() if Path(b).name.startswith("scores-") else inner(a, b))


def _at_the_last_file(patch: pytest.MonkeyPatch) -> None:
    inner = os.replace
    patch.setattr(os, "replace", lambda a, b: _full() if Path(b).name == "score.json" else inner(a, b))


def _while_making_room_for_sums(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "posix_fallocate", lambda *_: _full())


@pytest.mark.parametrize(
    "when",
    [_while_answering, _while_saving, _while_writing_scores, _at_the_last_file, _while_making_room_for_sums],
)
def test_a_full_disk_is_told_and_the_run_goes_on_later(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: Patch
) -> None:
    flags = FLAGS | {"accumulate_on": "disk", "quiet": True}
    assert cli(*score(world, tmp_path / "whole", **flags)).code == 0
    with monkeypatch.context() as patch:
        when(patch)
        ran = cli(*score(world, tmp_path / "full", **flags))
    assert ran.code == 1 and ran.err.startswith("error: ") and ran.err.count("\n") == 1
    assert "No space left on device" in ran.err
    assert not (tmp_path / "full" / "score.json").exists() and not list((tmp_path / "full").glob("*.part"))
    again = cli(*score(world, tmp_path / "full", **flags))
    assert again.code == 0, again.err
    assert_same_output(tmp_path / "whole", tmp_path / "full")


def test_a_judge_that_says_the_same_of_everything_is_told(cli: Cli, world: World, tmp_path: Path) -> None:
    judges = tiny.tokenizer("metaspace")
    guard = tiny.llama(len(judges), seed=1)
    torch.nn.init.zeros_(guard.lm_head.weight)
    tiny.loaded(guard, judges, tmp_path / "guard")
    ran = cli(*score(world, tmp_path / "out", judge=tmp_path / "guard", stability=True))
    warning = "the judge says the same for every answer: these scores mean nothing; use another judge"
    assert ran.code == 0 and f"warning: {warning}" in ran.err
    assert warning in json.loads((tmp_path / "out" / "score.json").read_text())["warnings"]
    assert "Stability, halves: no share has enough scores; rank correlation undefined." in ran.out
    usual = cli(*score(world, tmp_path / "usual"))
    assert usual.code == 0 and "says the same" not in usual.err

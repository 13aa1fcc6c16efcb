"""`kill -9` in the middle of `set` and of `spa`; run again, the files are those of the undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, World

RUN = ["--steps", 20, "--lr", "1e-2", "--batch-size", 2, "--gradient-accumulation-steps", 1, "--save-steps", 3]
PATIENCE = 120.0  # seconds until a run that saves nothing counts as hanging


def killed(arguments: list[str], checkpoints: Path) -> None:
    """Start a run and kill it as soon as its second checkpoint begins to be written."""
    process = subprocess.Popen(
        [sys.executable, "-m", "safecrit", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + PATIENCE
    while len(list(checkpoints.glob("checkpoint-*"))) < 2 and process.poll() is None and time.monotonic() < until:
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize("mode", ["set", "spa", pytest.param("spa --use-peft", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(cli: Cli, world: World, mask_file: Path, tmp_path: Path, mode: str) -> None:
    command, *flags = mode.split()
    data = world.refusals if command == "set" else world.task
    arguments = [command, world.model, "--mask", mask_file, "--data", data, *RUN, *flags, "-o"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli(*arguments, whole).code == 0
    killed([str(argument) for argument in (*arguments, cut)], cut / "safecrit" / "checkpoints")
    assert not (cut / "config.json").exists()
    ran = cli(*arguments, cut)
    assert ran.code == 0, ran.err
    assert "resuming the interrupted run" in ran.err
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

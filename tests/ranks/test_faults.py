from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import world as worlds
from tests.ranks.launch import run, torchrun
from tests.ranks.world import World

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return worlds.make(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raise", "rank 1 of 2: it went wrong"),
        ("memory", "rank 1 of 2: out of memory while scoring one answer"),
        ("stop", r"fell silent: killed, out of memory, or frozen"),
        ("hang", "hangs: it did not reach where the others wait"),
    ],
)
@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_a_failing_rank_ends_the_job_and_is_named(
    how: str, said: str, parallel: str, world: World, tmp_path: Path
) -> None:
    timeout = ["--dist-timeout", 15] if how in ("stop", "hang") else []  # elsewhere nobody waits so long
    command = world.score("dense", tmp_path / "out", "--batch-size", 1, "--parallel", parallel, *timeout)
    code, out, err = run(torchrun(2, "tests.ranks.dying", 1, 2, how, *command), 180)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if how == "memory" and parallel == "shard":
        said = "rank 1 of 2: out of memory while scoring. Lower"
    assert code == 1 and out == "" and len(errors) == 1
    assert "rank 1 of 2" in errors[0] and said in errors[0]
    assert not list((tmp_path / "out").glob(".*.part"))


def test_mistakes_are_told_once(world: World, tmp_path: Path) -> None:
    code, _, err = run(torchrun(2, "safecrit", "mask", tmp_path / "nothing", "--top", "1%", "-o", tmp_path / "m"))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "holds no score.json" in errors[0]


def test_commands_of_one_process_say_so(tmp_path: Path) -> None:
    code, _, err = run(torchrun(2, "safecrit", "report", tmp_path))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "`safecrit report` runs in one process" in errors[0]

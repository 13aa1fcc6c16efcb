from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from safecrit import distributed, faults
from safecrit.api.placing import place
from safecrit.api.scorejob import ScoreJob, ScoreSettings
from safecrit.distributed import Ranks
from safecrit.errors import SafecritError
from safecrit.files import atomic, remove_parts


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretend to be one rank of several, where nothing is sent."""

    def pretend(rank: int, world: int) -> None:
        monkeypatch.setattr(distributed, "_current", Ranks(rank, world, rank, world))

    return pretend


def test_one_process_is_the_first_of_one_and_joins_nothing() -> None:
    assert distributed.start(1) == Ranks(0, 1, 0, 1) and not faults.watching()
    assert distributed.divided([1, 2, 3], lambda n: n * n, together=True) == [1, 4, 9]
    assert distributed.gather("x") == ["x"] and distributed.from_first(lambda: 5) == 5
    assert distributed.owners([3, 0, 9]) == [0, 0, 0]


@pytest.mark.parametrize("world", [2, 3, 7])
def test_owners_are_neighbours_of_about_equal_size(world: int, ranks: Callable[[int, int], None]) -> None:
    ranks(0, world)
    for sizes in ([1] * 100, [5, 1, 1, 1, 90, 2, 2], [0, 0, 1], [], [7] * world):
        owners = distributed.owners(sizes)
        assert owners == sorted(owners) and all(0 <= owner < world for owner in owners)
        own = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(world)]
        assert max(own) <= sum(sizes) / world + max(sizes, default=0)


def test_every_piece_is_one_ranks(ranks: Callable[[int, int], None]) -> None:
    found = []
    for rank in range(3):
        ranks(rank, 3)
        found += distributed.mine(range(10))
    assert sorted(found) == list(range(10))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (ScoreSettings(method="wanda"), "--method wanda needs whole weights"),
        (ScoreSettings(method="fisher", objective="refusal-nll"), "cannot be told apart"),
        (ScoreSettings(reduction="abs", objective="refusal-nll"), "cannot be told apart"),
    ],
)
def test_what_cannot_be_sharded_is_refused_and_by_itself_replicated(
    settings: ScoreSettings, why: str, ranks: Callable[[int, int], None]
) -> None:
    ranks(0, 2)
    asked = ScoreJob(model="m", prompts="p", device="cpu", scoring=settings, parallel="shard")
    with pytest.raises(SafecritError, match=f"{why}.*: use --parallel replicate"):
        place(asked)
    found = place(ScoreJob(model="m", prompts="p", device="cpu", scoring=settings))
    assert found.parallel == "replicate" and why in found.parallel_reason


def test_a_failed_write_leaves_no_part(tmp_path: Path) -> None:
    with atomic(tmp_path / "file") as part:
        part.write_text("half")
        remove_parts()
        assert not part.exists()
        part.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"

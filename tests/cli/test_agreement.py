"""Scores of the same answers, whatever the batches, the order of the prompts and the number of threads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from safecrit.comparison import agreement
from tests.cli.conftest import Cli, World, score, scores_of

TEXT = "First warm the oven, then mix flour and water and tell me a story about it."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve prompts with answers of 5 to 75 characters, in two orders."""
    folder = tmp_path_factory.mktemp("answers")
    rows = [
        {
            "prompt": f"How do I bake loaf {n}{' for my neighbour' * (n % 3)}?",
            "answer": TEXT[: 5 + 35 * n % 71],
        }
        for n in range(12)
    ]
    for name, order in (("in-order", rows), ("shuffled", rows[7:] + rows[6::-1])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
    return folder


def test_batches_order_and_threads_change_nothing_that_matters(
    cli: Cli, world: World, files: Path, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    runs = {"whole": (16, "in-order", 1), "batch-1": (1, "in-order", 1), "batch-4": (4, "in-order", 1)}
    runs |= {"shuffled": (5, "shuffled", 1), "threads": (4, "in-order", 2)}
    found = {}
    for name, (batch, file, count) in runs.items():
        given = files / f"{file}.jsonl"
        try:
            torch.set_num_threads(count)
            ran = cli(*score(world, tmp_path / name, prompts=given, answers=given, batch_size=batch, draws=1))
        finally:
            torch.set_num_threads(threads)
        assert ran.code == 0, ran.err
        found[name] = scores_of(tmp_path / name)
    info = json.loads((tmp_path / "whole" / "score.json").read_text())
    assert info["prompts"]["used"] == 12 and info["batch_plan"] == [12]
    whole = torch.cat([tensor.flatten() for tensor in found["whole"].values()])
    for name in ("batch-1", "batch-4", "shuffled", "threads"):
        other = torch.cat([tensor.flatten() for tensor in found[name].values()])
        assert float((other - whole).norm() / whole.norm()) <= 1e-5, name
        masks = agreement(found[name], found["whole"], total=info["total"], shares=[0.01])["shares"][0]
        assert masks["k"] == info["total"] // 100 and masks["iou"] >= 0.999, name

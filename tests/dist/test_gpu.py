"""One rank with NCCL on one device: the commands of `test_ranks` that run the collectives of a sharded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safecrit.cli.app import app
from tests.dist import world as worlds
from tests.dist.launch import run, torchrun
from tests.dist.test_ranks import flat

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("model", ["tied", "moe"])
def test_a_sharded_model_on_one_device_scores_as_a_whole_one(model: str, tmp_path: Path) -> None:
    world, device = worlds.make(tmp_path), ["--device", "cuda", "--judge-device", "cuda"]
    app(world.score(model, tmp_path / "whole", *device), standalone_mode=False)
    sharded = world.score(model, tmp_path / "sharded", *device, "--parallel", "shard")
    mask = ["mask", str(tmp_path / "sharded"), "--top", "1%", "-o", str(tmp_path / "mask.safetensors")]
    code, _, err = run(torchrun(1, "tests.dist.commands", json.dumps([sharded, mask])))
    assert code == 0, err
    one, other = flat(tmp_path / "whole"), flat(tmp_path / "sharded")
    assert float((one - other).norm() / one.norm()) <= 1e-5

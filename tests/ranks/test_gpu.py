"""One rank with NCCL on one device: commands that run the collectives of a model that FSDP2 divides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safecrit.cli.app import app
from tests.ranks import world as worlds
from tests.ranks.launch import run, torchrun
from tests.ranks.test_ranks import flat
from tests.ranks.test_training import assert_same_weights, train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("model", ["tied", "moe"])
def test_a_sharded_model_on_one_device_scores_as_a_whole_one(model: str, tmp_path: Path) -> None:
    world, device = worlds.make(tmp_path), ["--device", "cuda", "--judge-device", "cuda"]
    app(world.score(model, tmp_path / "whole", *device), standalone_mode=False)
    sharded = world.score(model, tmp_path / "sharded", *device, "--parallel", "shard")
    mask = ["mask", str(tmp_path / "sharded"), "--top", "1%", "-o", str(tmp_path / "mask.safetensors")]
    code, _, err = run(torchrun(1, "tests.ranks.commands", json.dumps([sharded, mask])))
    assert code == 0, err
    one, other = flat(tmp_path / "whole"), flat(tmp_path / "sharded")
    assert float((one - other).norm() / one.norm()) <= 1e-5


@pytest.mark.parametrize("model", ["tied", "moe"])
@pytest.mark.parametrize("mode", ["set", "spa"])
def test_a_sharded_model_on_one_device_trains_as_a_whole_one(mode: str, model: str, tmp_path: Path) -> None:
    world = worlds.make(tmp_path)
    app(world.score(model, tmp_path / "scores", "--method", "magnitude"), standalone_mode=False)
    mask = ["mask", str(tmp_path / "scores"), "--top", "20%", "-o", str(tmp_path / f"{model}.safetensors")]
    app(mask, standalone_mode=False)
    rows = [json.loads(line) for line in world.answers.read_text().splitlines()]
    data = [json.dumps({"prompt": row["prompt"], "completion": row["answer"]}) for row in rows]
    (tmp_path / "data.jsonl").write_text("\n".join(data))
    app(train(world, mode, model, tmp_path / "whole", 1, "--device", "cuda"), standalone_mode=False)
    sharded = train(world, mode, model, tmp_path / "sharded", 1, "--device", "cuda", "--parallel", "shard")
    code, _, err = run(torchrun(1, "tests.ranks.commands", json.dumps([sharded])))
    assert code == 0 and "1 rank: shard" in err, err
    assert_same_weights(world, mode, model, tmp_path / "whole", tmp_path / "sharded")

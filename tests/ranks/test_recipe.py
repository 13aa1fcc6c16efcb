"""A recipe's stages by two processes, and what is for one process left to one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from safecrit.cli.app import app
from safecrit.maskfile import Mask
from tests.ranks import world as worlds
from tests.ranks.launch import run, torchrun


@pytest.mark.slow
def test_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFECRIT_CACHE", str(tmp_path / "cache"))
    world = worlds.make(tmp_path)
    data = str(tmp_path / "data.jsonl")
    (tmp_path / "data.jsonl").write_text(world.answers.read_text().replace('"answer"', '"completion"'))
    score = {"judge": str(world.guard), "prompts": str(world.prompts), "answers": str(world.answers), "draws": 2}
    stages = {"score": score, "mask": {"top": "10%"}, "set": {"data": data, "steps": 4}, "report": {}}
    recipe, names = tmp_path / "recipe.yaml", {"model": str(world.models["tied"]), "output": str(tmp_path / "two")}
    recipe.write_text(yaml.safe_dump({**names, **stages}))
    for finished in ([], ["score", "mask", "set"]):
        code, out, err = run(torchrun(2, "safecrit", "run", recipe))
        assert code == 0, err
        assert out.splitlines()[-1].startswith("report runs in one process") and "Everything is in" not in out
        assert [line.partition(":")[0] for line in err.splitlines() if line.endswith("finished before")] == finished
    assert (tmp_path / "two/model/config.json").is_file() and not (tmp_path / "two/report").exists()
    app(["run", str(recipe)], standalone_mode=False)
    assert (tmp_path / "two/report/report.html").is_file()
    app(["run", str(recipe), "-o", str(tmp_path / "one")], standalone_mode=False)
    one, two = (Mask.load(tmp_path / name / "mask.safetensors") for name in ("one", "two"))
    assert one.iou(two) >= 0.999

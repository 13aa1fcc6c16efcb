"""eval --tasks against the harness's own command line, on a local task file."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, World

TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def without_harness() -> bool:
    return importlib.util.find_spec("lm_eval") is None


@pytest.mark.slow
@pytest.mark.skipif(without_harness(), reason="needs lm-evaluation-harness: pip install '.[eval]'")
@pytest.mark.filterwarnings("ignore")
def test_the_figure_is_that_of_the_harness(cli: Cli, world: World, tmp_path: Path) -> None:
    words = ["oven", "flour", "water", "bread", "story", "keeper", "lighthouse"]
    rows = [
        {"question": f"What is {a}?", "choices": [a, b], "label": (i + j) % 2}
        for i, a in enumerate(words)
        for j, b in enumerate(words)
        if a != b
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "toy.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    ran = cli(
        "eval", world.model, "--tasks", tmp_path / "toy.yaml", "--batch-size", 8, "-o", tmp_path / "ours", "-q",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    ours = json.loads((tmp_path / "ours" / "results.json").read_text())["models"]["model"]["tasks"]
    done = subprocess.run(
        [
            Path(sys.executable).parent / "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8",
            "--model_args", f"pretrained={world.model}", "--tasks", tmp_path / "toy.yaml",
            "--output_path", tmp_path / "theirs",
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]["toy_choice"]
    own = ours["results"]["toy_choice"]
    assert own["acc,none"] == theirs["acc,none"] and own["acc_stderr,none"] == pytest.approx(theirs["acc_stderr,none"])
    assert 0 < own["acc,none"] < 1 and own["examples"] == len(rows)


@pytest.mark.slow
@pytest.mark.skipif(without_harness(), reason="needs lm-evaluation-harness: pip install '.[eval]'")
@pytest.mark.filterwarnings("ignore")
def test_unknown_tasks_are_refused(cli: Cli, world: World, tmp_path: Path) -> None:
    for task, message in (("no_such_task", "knows no such task"), ("none.yaml", "no such file")):
        ran = cli("eval", world.model, "--tasks", task, "-o", tmp_path / "r")
        assert ran.code == 1 and message in ran.err


def test_without_the_harness_it_says_what_to_install(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    ran = cli("eval", world.model, "--tasks", "arc_easy", "-o", tmp_path / "r")
    assert ran.code == 1 and "pip install 'safecrit[eval]'" in ran.err

"""Mistakes get one clear line and the right exit code, and lose nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli, World, interrupted, score


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "foo,bar\n1,2\n", "no known prompt column. Found: foo, bar."),
        ("p.jsonl", "", "is empty"),
        ("p.json", '{"goal":"x"', "broken JSON at line 1"),
        ("none.csv", None, "no such file"),
    ],
)
def test_prompt_files(cli: Cli, world: World, tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    ran = cli(*score(world, tmp_path / "out", prompts=tmp_path / name))
    assert ran.code == 1 and message in ran.err and ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_models(cli: Cli, world: World, tmp_path: Path) -> None:
    for model, message in (
        ("/no/such/model", "no such folder"),
        (tmp_path, "is no model folder"),
        (world.prompts, "is a file"),
    ):
        ran = cli("score", model, "--judge", world.guard, "--prompts", world.prompts, "-o", tmp_path / "out")
        assert ran.code == 1 and message in ran.err and "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ("0", "selects nothing"),
        ("1", "did you mean 1%?"),
        ("150%", "more than there is"),
        ("abc", "no share"),
        ("-1%", "negative"),
    ],
)
def test_shares(cli: Cli, world: World, mask_file: Path, tmp_path: Path, share: str, message: str) -> None:
    ran = cli("mask", world.folder / "scores", f"--top={share}", "-o", tmp_path / "m.safetensors")
    assert ran.code == 1 and message in ran.err and not (tmp_path / "m.safetensors").exists()


def test_mask_flags(cli: Cli, world: World, mask_file: Path, tmp_path: Path) -> None:
    scores, out = world.folder / "scores", tmp_path / "m.safetensors"
    for flags, message in (
        ([], "say which weights"),
        (["--top", "1%", "--bottom", "1%"], "exclude each other"),
        (["--top", "1%", "--match", mask_file], "goes with --random"),
        (["--top", "1%", "--judge", world.guard], "needs both --judge and --prompts"),
    ):
        ran = cli("mask", scores, *flags, "-o", out)
        assert ran.code == 1 and message in ran.err
    assert "holds no score.json" in cli("mask", tmp_path, "--top", "1%", "-o", out).err


def test_a_mask_of_another_model_stops_before_training(cli: Cli, world: World, mask_file: Path, tmp_path: Path) -> None:
    flags = ["--data", world.refusals, "--steps", 1, "-o", tmp_path / "out"]
    other = cli("set", world.guard, "--mask", mask_file, *flags)
    assert other.code == 1 and "the mask is of" in other.err and not (tmp_path / "out").exists()
    (tmp_path / "junk.safetensors").write_bytes(b"\x13" * 500)
    for command in (
        ["set", world.model, "--mask", tmp_path / "junk.safetensors", *flags],
        ["inspect", tmp_path / "junk.safetensors"],
    ):
        ran = cli(*command)
        assert ran.code == 1 and "not a safetensors file" in ran.err


def test_a_typed_wrong_option_or_command(cli: Cli, world: World) -> None:
    ran = cli("score", world.model, "--judge", world.guard, "--promts", world.prompts)
    assert ran.code == 2 and "--prompts" in ran.err
    assert cli("scor").code == 2
    assert cli("score", world.model).code == 2


def test_judges(cli: Cli, world: World, tmp_path: Path) -> None:
    assert "has no gradient" in cli(*score(world, tmp_path / "a", judge="refusal")).err
    ran = cli("eval", world.model, "--prompts", world.prompts, "--judge", "nosuchjudge", "-o", tmp_path / "b")
    assert ran.code == 1 and "unknown judge" in ran.err
    handled = cli(*score(world, tmp_path / "c", **{"safe-word": "quite harmless", "unsafe-word": "not harmless"}))
    assert handled.code == 0, handled.err


def test_output_folder_of_another_run(cli: Cli, world: World, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    assert cli(*score(world, out)).code == 0
    finished = cli(*score(world, out))
    assert finished.code == 1 and "already holds the finished run" in finished.err
    different = cli(*score(world, out, draws=2))
    assert different.code == 1 and "draws: 8 -> 2" in different.err
    assert cli(*score(world, out, draws=2), "--overwrite").code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for flags in ([], ["--overwrite"]):
        foreign = cli(*score(world, tmp_path / "mine"), *flags)
        assert foreign.code == 1 and "is no output of" in foreign.err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_ctrl_c_says_so_and_the_run_resumes(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"batch-size": 2, "save-every": 2}
    assert cli(*score(world, tmp_path / "whole", **flags)).code == 0
    with interrupted(monkeypatch, at=2):
        ran = cli(*score(world, tmp_path / "cut", **flags))
    assert ran.code == 130 and "interrupted" in ran.err and "Traceback" not in ran.err
    resumed = cli(*score(world, tmp_path / "cut", **flags))
    assert resumed.code == 0 and "resuming" in resumed.err
    again = cli(*score(world, tmp_path / "cut", **flags))
    assert again.code == 0 and "is finished" in again.err
    name = "scores-00001-of-00001.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_answers_made_elsewhere(cli: Cli, world: World, tmp_path: Path) -> None:
    prompts = world.prompts.read_text().splitlines()[1:]
    file = tmp_path / "answers.jsonl"
    file.write_text(
        "\n".join(json.dumps({"prompt": p, "response": f"the answer {n}"}) for n, p in enumerate(prompts[::-1]))
    )
    assert cli(*score(world, tmp_path / "a", answers=file)).code == 0
    rows = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [f"the answer {4 - n}" for n in range(5)]
    file.write_text(json.dumps({"prompt": prompts[0], "response": "x"}))
    short = cli(*score(world, tmp_path / "b", answers=file))
    assert short.code == 1 and "has no answer to 4 prompts" in short.err
    file.write_text(json.dumps({"prompt": prompts[0], "words": "x"}))
    assert "no known answer column. Found: prompt, words" in cli(*score(world, tmp_path / "c", answers=file)).err


def test_full_disk_loses_nothing(
    cli: Cli, world: World, mask_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        ran = cli("mask", world.folder / "scores", "--top", "1%", "-o", tmp_path / "m.safetensors")
    assert ran.code == 1 and "No space left on device" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_work_of_other_prompts_at_the_same_path_is_not_resumed(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "p.csv"
    prompts.write_text(world.prompts.read_text())
    flags = {"batch-size": 2, "save-every": 2, "prompts": prompts}
    with interrupted(monkeypatch, at=2):
        assert cli(*score(world, tmp_path / "cut", **flags)).code == 130
    prompts.write_text(world.prompts.read_text().replace("loaf", "cake"))
    assert cli(*score(world, tmp_path / "cut", **flags)).code == 0
    assert cli(*score(world, tmp_path / "whole", **flags)).code == 0
    name = "scores-00001-of-00001.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [
        "config.yaml", "samples.jsonl", "score.json", name,
    ]  # fmt: skip


def test_objectives_count_safe_answers_alike(cli: Cli, world: World, tmp_path: Path) -> None:
    found = []
    for objective in ("log-odds", "prob", "logit"):
        assert cli(*score(world, tmp_path / objective, objective=objective)).code == 0
        found.append(json.loads((tmp_path / objective / "score.json").read_text())["judged"])
    # Relaxed tokens differ by nothing but the objective's own gradient.
    assert found[0] == found[1] == found[2]


def test_damaged_weights_and_odd_paths(cli: Cli, world: World, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(world.model, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    (tmp_path / "file").write_text("x")
    (tmp_path / "bad.yaml").write_text("config: [1]")
    for arguments in (
        ["score", broken, "--judge", world.guard, "--prompts", world.prompts, "-o", tmp_path / "a"],
        score(world, tmp_path / "file" / "x"),
        score(world, tmp_path / "b", device="meta9"),
        score(world, tmp_path / "c", config=tmp_path / "bad.yaml"),
        score(world, tmp_path / "d", **{"safe-word": "x", "unsafe-word": "x"}),
    ):
        ran = cli(*arguments)
        assert ran.code == 1 and ran.err.splitlines()[-1].startswith("error: ") and "Traceback" not in ran.err


def test_debug_keeps_the_exit_code(cli: Cli, world: World, mask_file: Path) -> None:
    check = ["verify", world.guard, "--base", world.model, "--mask", mask_file, "--mode", "set"]
    plain, debug = cli(*check), cli(*check, "--debug")
    assert plain.code == debug.code != 0 and "Traceback" in debug.err and "Traceback" not in plain.err


def test_repeated_prompts_keep_their_own_answers(cli: Cli, world: World, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "a"}')
    rows = [("a", "first one"), ("b", "other"), ("a", "second one")]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"prompt": p, "answer": t}) for p, t in rows))
    ran = cli(*score(world, tmp_path / "o", prompts=tmp_path / "p.jsonl", answers=tmp_path / "x.jsonl"))
    assert ran.code == 0, ran.err
    stored = [json.loads(line)["answer"] for line in (tmp_path / "o" / "samples.jsonl").read_text().splitlines()]
    assert stored == [text for _, text in rows]

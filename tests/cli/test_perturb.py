from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy.stats import binomtest, ttest_rel

import safecrit.api.perturb as stage
from safecrit.maskfile import Mask
from safecrit.perturbation import first_order
from safecrit.scorefile import Scores
from tests.cli.conftest import Cli, World


def arguments(world: World, mask: Path, out: Path, *more: object) -> list[object]:
    return [
        "perturb", world.model, "--mask", mask, "--prompts", world.prompts, "--judge", world.guard, "--noise", "0.5,4",
        "--max-new-tokens", 6, "-o", out, *more,
    ]  # fmt: skip


@pytest.fixture
def ran(cli: Cli, world: World, mask_file: Path, tmp_path: Path) -> tuple[Path, str]:
    done = cli(*arguments(world, mask_file, tmp_path / "p", "--scores", world.folder / "scores", "--draws", 2))
    assert done.code == 0, done.err
    return tmp_path / "p", done.out


def test_every_arm_its_intervals_and_the_picture(ran: tuple[Path, str], world: World, mask_file: Path) -> None:
    folder, shown = ran
    results = json.loads((folder / "results.json").read_text())
    assert [(a["kind"], a["r"], a["draw"]) for a in results["arms"]] == [
        (kind, r, draw) for kind in ("top", "random", "bottom") for r in (0.5, 4.0) for draw in (0, 1)
    ]
    assert "restored bit for bit" in shown and "dS predicted" in shown
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.yaml", "perturbation.csv", "perturbation.png", "results.json", "samples.jsonl"
    ]  # fmt: skip
    rows = pd.read_json(folder / "samples.jsonl", lines=True, dtype=False)
    base = rows[rows.model == "unperturbed"].set_index("row")
    for arm in results["arms"]:
        own = rows[rows.model == arm["name"]].set_index("row")
        rate = results["models"][arm["name"]]["asr"]
        interval = binomtest(int((own.verdict == "unsafe").sum()), len(own)).proportion_ci(method="wilson")
        assert (rate["low"], rate["high"]) == (interval.low, interval.high)
        assert arm["S"]["difference"] == pytest.approx((own.score - base.score).mean(), abs=1e-9)
        if (own.score != base.score).any():
            interval = ttest_rel(own.score, base.score).confidence_interval()
            assert (arm["S"]["low"], arm["S"]["high"]) == pytest.approx((interval.low, interval.high))
    with open(folder / "perturbation.csv", encoding="utf-8", newline="") as file:
        drawn = [row for row in csv.DictReader(file) if row["figure"] == "asr" and row["r"] == "4.0"]
    assert [float(row["low"]) for row in drawn] == [
        results["models"][a["name"]]["asr"]["low"] for a in results["arms"] if a["r"] == 4.0
    ]


def test_predictions_scale_with_r_and_are_next_to_nothing_at_the_bottom(ran: tuple[Path, str]) -> None:
    arms = json.loads((ran[0] / "results.json").read_text())["arms"]
    by = {(a["kind"], a["r"], a["draw"]): a["predicted"] for a in arms}
    for kind in ("top", "random", "bottom"):
        assert by[kind, 4.0, 0] == pytest.approx(8 * by[kind, 0.5, 0], rel=1e-3)
        assert abs(by["bottom", 4.0, 0]) < 1e-2 * abs(by[kind, 4.0, 0]) or kind == "bottom"


def test_gradients_are_scores_over_sigma(world: World, mask_file: Path) -> None:
    scores, mask = Scores.load(world.folder / "scores"), Mask.load(mask_file)
    sigma = {row["name"]: row["sigma"] for row in scores.info["matrices"]}
    for name, gradient in first_order(scores, mask).items():
        stored = scores.tensor(name).reshape(-1)[mask.indices[name]]
        assert (gradient * sigma[name]).tolist() == pytest.approx(stored.tolist())


def test_a_killed_run_asks_only_the_arms_that_are_left(
    cli: Cli, world: World, mask_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: tuple[Path, str]
) -> None:
    asked: list[str] = []
    real = stage.ask_all

    def stop_after_three(name: str, *rest: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(name)
        return real(name, *rest)

    command = arguments(world, mask_file, tmp_path / "q", "--scores", world.folder / "scores", "--draws", 2)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "ask_all", stop_after_three)
        assert cli(*command).code == 130
    first, asked[:] = list(asked), []
    monkeypatch.setattr(stage, "ask_all", lambda name, *rest: (asked.append(name), real(name, *rest))[1])
    assert cli(*command).code == 0
    assert len(first) == 3 and not set(first) & set(asked) and len(first) + len(asked) == 13
    for name in ("results.json", "samples.jsonl"):
        assert (tmp_path / "q" / name).read_bytes() == (ran[0] / name).read_bytes()


def test_without_scores_there_is_no_bottom_and_mistakes_are_named(
    cli: Cli, world: World, mask_file: Path, tmp_path: Path
) -> None:
    done = cli(*arguments(world, mask_file, tmp_path / "p", "--limit", 2))
    assert done.code == 0 and "No bottom arms" in done.err
    results = json.loads((tmp_path / "p" / "results.json").read_text())
    assert {a["kind"] for a in results["arms"]} == {"top", "random"}
    assert all(a["predicted"] is None for a in results["arms"])
    for noise in ("0", "1,1", "x", "nan"):
        wrong = cli(*arguments(world, mask_file, tmp_path / "n"), "--noise", noise)
        assert wrong.code == 1 and "--noise" in wrong.err
    assert not (tmp_path / "n").exists()
    other = cli(
        *arguments(world, mask_file, tmp_path / "o")[:1], world.guard, *arguments(world, mask_file, tmp_path / "o")[2:]
    )
    assert other.code == 1 and "mask" in other.err

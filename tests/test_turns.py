from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from safecrit import scoring
from safecrit.api import score as api
from safecrit.api.judging import JudgeChoice, load_differentiable
from safecrit.api.placing import Placed
from safecrit.api.scorejob import ScoreJob, ScoreSettings
from safecrit.generation import GenerationSettings
from safecrit.models import load_model
from safecrit.prompts import prompts_from_texts
from safecrit.relaxation import RelaxationSettings
from safecrit.scorefile import Scores
from safecrit.turns import Guest, Turns
from tests import tiny

PROMPTS = ["How do I bake a loaf?", "Tell me a story", "Where is the keeper?", "What is flour?", "Is it warm?"]
CPU = torch.device("cpu")
AWAY: Any = torch.float64  # stands for another device: what visits it is converted to it, which shows


def _away(tensor: torch.Tensor) -> bool:
    return tensor.dtype == AWAY


def test_a_guest_leaves_with_its_very_weights() -> None:
    model = tiny.llama(40, tied=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    guest = Guest(model, AWAY)
    guest.enter()
    assert all(_away(tensor) for tensor in (*model.parameters(), *model.buffers()))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    guest.leave()
    after = model.state_dict()
    assert all(
        tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]) for name, tensor in before.items()
    )


def test_only_one_is_present() -> None:
    model, judge = tiny.llama(40), tiny.llama(40, seed=1)
    turns = Turns(model, judge, AWAY)
    for name in ("model", "judge", "judge", "model"):
        turns.to(name)
        there = {"model": _away(model.lm_head.weight), "judge": _away(judge.lm_head.weight)}
        assert there == {"model": name == "model", "judge": name == "judge"}
    still = Turns(model, judge, None)
    still.to("judge")
    assert not still.active and not _away(judge.lm_head.weight)


@pytest.mark.parametrize("ahead", [1, 2 << 30])
def test_by_turns_equals_together_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """`ahead`: room for what lies between the turns, of one batch or of all."""
    reads, judges = tiny.tokenizer("byte-level", tiny.CHAT), tiny.tokenizer("metaspace")
    tiny.loaded(tiny.llama(len(reads), hidden=32), reads, tmp_path / "model")
    tiny.loaded(tiny.llama(len(judges), seed=1), judges, tmp_path / "guard")
    made: list[Turns] = []
    order: list[str] = []

    class Watched(Turns):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

        def to(self, name: str) -> None:
            order.append(name)
            super().to(name)

    monkeypatch.setattr(api, "Turns", Watched)
    monkeypatch.setattr(scoring, "SENT_BYTES", ahead)
    job = ScoreJob(
        model=str(tmp_path / "model"),
        judge=JudgeChoice(name=str(tmp_path / "guard")),
        prompts="",
        generation=GenerationSettings(max_new_tokens=6),
        scoring=ScoreSettings(relaxation=RelaxationSettings(draws=2), batch_size=2),
    )
    for name, turns in (("together", None), ("turns", CPU)):
        loaded, judge = (
            load_model(job.model, device="cpu"),
            load_differentiable(JudgeChoice(name=str(tmp_path / "guard"))),
        )
        if turns is not None:
            loaded.model.register_forward_pre_hook(lambda *_: _assert_present(made[0], "model"))
            judge.model.register_forward_pre_hook(lambda *_: _assert_present(made[0], "judge"))
        placed = Placed(model_device="cpu", judge_device="cpu", turns=turns)
        api.score_loaded(loaded, judge, prompts_from_texts(PROMPTS), job, tmp_path / name, placed=placed)
    assert len(made) == 1 and order.count("judge") == (3 if ahead == 1 else 1)
    for file in ("scores-00001-of-00001.safetensors", "samples.jsonl"):
        assert (tmp_path / "together" / file).read_bytes() == (tmp_path / "turns" / file).read_bytes()
    assert Scores.load(tmp_path / "turns").info["placement"]["judge"] == "sequential"
    assert json.loads((tmp_path / "turns" / "score.json").read_text())["prompts"]["used"] == 5


def _assert_present(turns: Turns, name: str) -> None:
    assert turns._present == name

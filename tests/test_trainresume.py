"""Going on with an interrupted training run: how many examples a step takes, whatever the number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from safecrit import distributed
from safecrit.api.trainresume import as_begun, checkpoints_of, resumption, same_examples_a_step
from safecrit.errors import SafecritError
from safecrit.trainloop import TrainSettings

BEGUN = TrainSettings(per_device_train_batch_size=2, gradient_accumulation_steps=6, save_steps=3)


def given(size: int, accumulation: int) -> dict[str, object]:
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "seed": 1}


def test_settings_of_as_many_examples_a_step_are_those_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert as_begun(given(2, 6), tmp_path) == given(2, 6)
    assert same_examples_a_step(BEGUN, tmp_path) == BEGUN
    monkeypatch.setattr(distributed, "_current", distributed.Ranks(world=3))
    assert as_begun(given(2, 2), tmp_path) == given(2, 6)
    assert as_begun(given(2, 6), tmp_path) == given(2, 6)  # the same command, which `same_examples_a_step` adjusts
    assert as_begun(given(2, 3), tmp_path) == given(2, 3)


def test_a_number_that_cannot_be_divided_names_those_that_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_examples_a_step(BEGUN, tmp_path)
    wider = TrainSettings(per_device_train_batch_size=3, gradient_accumulation_steps=1, save_steps=3)
    assert same_examples_a_step(wider, tmp_path).gradient_accumulation_steps == 4
    monkeypatch.setattr(distributed, "_current", distributed.Ranks(world=5))
    monkeypatch.setattr(distributed, "from_first", lambda make: make())
    with pytest.raises(SafecritError, match=r"took 12 examples a step, which 5 ranks .* Resume it on 1, 2, 3, 6 ranks"):
        same_examples_a_step(BEGUN, tmp_path)


def test_what_is_resumed_is_said(tmp_path: Path) -> None:
    assert "had saved nothing (--save-steps), and starts anew" in resumption(tmp_path)
    for step in (4, 12, 8):
        folder = checkpoints_of(tmp_path) / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    assert resumption(tmp_path).endswith("after step 12")

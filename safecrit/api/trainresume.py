"""Going on with an interrupted `set` or `spa`, on as many ranks as there are now: with as many examples a step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safecrit import distributed
from safecrit.errors import SafecritError
from safecrit.files import write_json
from safecrit.trainloop import TrainSettings, last_checkpoint

_ACCUMULATION, _SIZE = "gradient_accumulation_steps", "per_device_train_batch_size"


def checkpoints_of(folder: Path) -> Path:
    """Where a run with the output `folder` saves itself."""
    return folder / "safecrit" / "checkpoints"


def as_begun(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`settings`, with the accumulation that the run in `folder` began with where both give as many examples a step."""
    begun = _begun(folder)
    if begun is None or settings[_SIZE] * settings[_ACCUMULATION] * distributed.current().world != begun["examples"]:
        return settings
    return settings | {_ACCUMULATION: begun["accumulation"]}


def resumption(folder: Path) -> str:
    """What resuming the run in `folder` means, in words."""
    found = last_checkpoint(checkpoints_of(folder))
    if found is None:
        return f"the interrupted run in {folder} had saved nothing (--save-steps), and starts anew"
    return f"resuming the interrupted run in {folder} after step {found.rpartition('-')[2]}"


def same_examples_a_step(settings: TrainSettings, folder: Path) -> TrainSettings:
    """`settings`, or with another accumulation where the run in `folder` began on another number of ranks.

    Rank 0 notes the number of examples a step there, so that a resumed run takes the steps that it would have taken.
    Raises SafecritError where the ranks of now cannot divide it.
    """
    if not settings.save_steps:
        return settings
    ranks, size = distributed.current().world, settings.per_device_train_batch_size

    def known() -> int:
        begun = _begun(folder)
        if begun is None:
            steps = settings.gradient_accumulation_steps
            begun = {"examples": ranks * size * steps, "accumulation": steps}
            write_json(_file(folder), begun)
        return begun["examples"]

    wanted = distributed.from_first(known)
    if wanted % (ranks * size):
        fitting = [str(n) for n in range(1, wanted + 1) if wanted % (n * size) == 0]
        raise SafecritError(
            f"{folder}: the interrupted run took {wanted} examples a step, which {ranks} ranks with {size} at once "
            f"cannot divide. Resume it on {', '.join(fitting)} ranks, or --overwrite it."
        )
    return replace(settings, gradient_accumulation_steps=wanted // (ranks * size))


def _file(folder: Path) -> Path:
    return checkpoints_of(folder) / "batch.json"


def _begun(folder: Path) -> dict[str, int] | None:
    """Examples a step and accumulation of the run in `folder`; None where it is none, or saves nothing."""
    try:
        found = json.loads(_file(folder).read_text(encoding="utf-8"))
        return {name: int(found[name]) for name in ("examples", "accumulation")}
    except (OSError, ValueError, KeyError, TypeError):
        return None

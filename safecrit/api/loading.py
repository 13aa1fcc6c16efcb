"""Model and judge of a score job: whole, or divided over the ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from safecrit.anatomy import Anatomy, read_anatomy
from safecrit.api.judging import LoadGuard, load_differentiable, load_judge
from safecrit.divided import load_model_divided
from safecrit.fsdp import all_ranks, shard
from safecrit.judges import Judge
from safecrit.models import LoadedModel, load_model, pick_device
from safecrit.sharding import sigmas

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from safecrit.api.placing import Placed
    from safecrit.api.scorejob import ScoreJob


@dataclass(frozen=True)
class Divided:
    """What is known of the whole of a model that is divided: its anatomy, and sigma by checkpoint name."""

    anatomy: Anatomy
    sigma: dict[str, torch.Tensor]


def load_whole(job: ScoreJob, placed: Placed) -> LoadedModel:
    """The model where it was placed."""
    return load_model(
        job.model,
        revision=job.revision,
        device=placed.model_device,
        dtype=job.dtype,
        trust_remote_code=job.trust_remote_code,
    )


def load_whole_judge(job: ScoreJob, placed: Placed, load_guard: LoadGuard = load_model) -> Judge | None:
    """The judge where it was placed, if the job has one."""
    if not job.judged:
        return None
    assert job.judge is not None
    choice = replace(job.judge, device=placed.judge_device)
    return load_judge(choice, load_guard) if job.sampled else load_differentiable(choice, load_guard)


def load_divided(job: ScoreJob, placed: Placed) -> tuple[LoadedModel, Judge | None, Divided]:
    """Model and judge, divided over the ranks as they are loaded; a judge that is no guard is whole on each."""
    mesh, anatomies = all_ranks(pick_device(job.device)), []

    def divide(model: PreTrainedModel) -> None:
        anatomies.append(read_anatomy(model, include=job.include, exclude=job.exclude))
        shard(model, mesh, {entry.parameter for entry in anatomies[-1].eligible})

    def guard(model: str, *, device: str, **how: Any) -> LoadedModel:
        return load_model_divided(model, mesh, lambda made: shard(made, mesh, set(), embedding=False), **how)

    loaded = load_model_divided(
        job.model, mesh, divide, revision=job.revision, dtype=job.dtype, trust_remote_code=job.trust_remote_code
    )
    judge = load_whole_judge(job, placed, guard)
    return loaded, judge, Divided(anatomies[-1], sigmas(loaded, anatomies[-1]))

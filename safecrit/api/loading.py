"""Model and judge of a score job: whole, or divided over the ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from safecrit import distributed
from safecrit.anatomy import Anatomy, read_anatomy
from safecrit.api.judging import load_differentiable, load_judge
from safecrit.fsdp import all_ranks, in_turn, shard
from safecrit.judges import Judge
from safecrit.judges.guard import GuardJudge
from safecrit.models import LoadedModel, load_model, pick_device
from safecrit.sharding import sigmas

if TYPE_CHECKING:
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


def load_whole_judge(job: ScoreJob, placed: Placed) -> Judge | None:
    """The judge where it was placed, if the job has one."""
    if not job.judged:
        return None
    assert job.judge is not None
    choice = replace(job.judge, device=placed.judge_device)
    return load_judge(choice) if job.sampled else load_differentiable(choice)


def load_divided(job: ScoreJob, placed: Placed) -> tuple[LoadedModel, Judge | None, Divided]:
    """Model and judge, divided over the ranks as they are loaded; a judge that is no guard is whole on each."""
    mesh = all_ranks(pick_device(job.device))

    def model() -> tuple[LoadedModel, Anatomy, dict[str, torch.Tensor]]:
        loaded = load_whole(job, replace(placed, model_device="cpu"))
        anatomy = read_anatomy(loaded.model, include=job.include, exclude=job.exclude)
        sigma = sigmas(loaded.model, anatomy)
        shard(loaded.model, mesh, {entry.parameter for entry in anatomy.eligible})
        return loaded, anatomy, sigma

    def reader() -> Judge | None:
        judge = load_whole_judge(job, replace(placed, judge_device="cpu"))
        if isinstance(judge, GuardJudge):
            shard(judge.model, mesh, set(), embedding=False)
        return judge

    loaded, anatomy, own = in_turn(model)
    sigma = {name: values for part in distributed.gather(own) for name, values in part.items()}
    return loaded, in_turn(reader), Divided(anatomy, sigma)

"""Where model, judge and accumulators go for a score job, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from safecrit import distributed, faults
from safecrit.errors import SafecritError
from safecrit.gradients import Place
from safecrit.models import pick_device

if TYPE_CHECKING:
    from safecrit.api.scorejob import ScoreJob
    from safecrit.api.survey import Survey


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where everything lies.

    turns: the device that model and judge enter by turns (both wait on the host), or None.
    parallel: shard or replicate, of several ranks.
    """

    model_device: str
    judge_device: str
    turns: torch.device | None = None
    accumulate_on: Place = "device"
    checkpoint: bool = False
    reason: str = ""
    parallel: str | None = None
    parallel_reason: str = ""

    @classmethod
    def here(cls, job: ScoreJob) -> Placed:
        """For models in memory: both stay where they are, `auto` is the simplest choice."""
        s = job.scoring
        place: Place = "device" if s.accumulate_on == "auto" else _accumulate(s.accumulate_on)
        return cls(model_device="", judge_device="", accumulate_on=place, checkpoint=s.checkpoint == "on")

    def record(self) -> dict[str, Any]:
        """For score.json."""
        return {
            "judge": "sequential" if self.turns is not None else self.judge_device or "in memory",
            "accumulate_on": self.accumulate_on,
            "checkpointed": self.checkpoint,
            "reason": self.reason,
            **({} if self.parallel is None else {"parallel": self.parallel, "ranks": distributed.current().world}),
        }


def place(job: ScoreJob) -> Placed:
    """The job's placement; `auto` settings are decided by the account of what fits (`--dry-run` shows it)."""
    s = job.scoring
    device = pick_device(job.device)
    judge_device = job.judge.device if job.judge is not None else "auto"
    placement, accumulate, checkpoint, reason = s.placement, s.accumulate_on, s.checkpoint, "as asked for"
    if job.judged and not job.sampled and "auto" in (placement, accumulate, checkpoint):
        from safecrit.api.survey import settled

        found = settled(job)
        placement = found.placement if placement == "auto" else placement
        accumulate, checkpoint = found.accumulate_on, found.checkpointed
        reason = "the first that fits"
    if placement == "sequential" and device.type == "cpu":
        placement, reason = "together", "on a CPU model and judge share the host's memory in any case"
    parallel, parallel_reason = _parallel(job)
    if parallel == "shard":
        if placement not in ("auto", "together", "sequential"):
            raise SafecritError("--judge-placement on a device of its own goes with --parallel replicate only.")
        placement, reason = "together", "divided over the ranks"
        accumulate = "device" if s.accumulate_on == "auto" else s.accumulate_on
    turns = device if placement == "sequential" and job.judged and not job.sampled else None
    if placement not in ("auto", "together", "sequential", "separate"):
        judge_device = str(pick_device(placement))
    elif placement != "separate" and judge_device == "auto":
        judge_device = str(device)
    return Placed(
        model_device="cpu" if turns is not None else str(device),
        judge_device="cpu" if turns is not None else judge_device,
        turns=turns,
        accumulate_on="device" if accumulate == "auto" else _accumulate(accumulate),
        checkpoint=checkpoint == "on",
        reason=reason,
        parallel=parallel,
        parallel_reason=parallel_reason,
    )


def _parallel(job: ScoreJob) -> tuple[str | None, str]:
    """Whether each of several ranks has the whole model, and why."""
    ranks = distributed.current()
    if ranks.world == 1 and not (faults.watching() and job.parallel == "shard"):
        return None, ""
    return parallel_mode(job)


def parallel_mode(job: ScoreJob, found: Survey | None = None) -> tuple[str, str]:
    """replicate or shard, for `found` or for the ranks that run now, and why."""
    whole = ""
    if job.scoring.method in ("wanda", "magnitude"):
        whole = f"--method {job.scoring.method} needs whole weights"
    elif job.scoring.reduction != "signed" or job.scoring.method == "fisher":
        whole = "gradients of several prompts, which ranks that share a model add up, cannot be told apart"
    if job.parallel == "shard" and whole:
        raise SafecritError(f"{whole}: use --parallel replicate.")
    if whole:
        return "replicate", whole
    if job.parallel != "auto":
        return job.parallel, "as asked for"
    from safecrit.api.survey import survey

    found = found or survey(job)
    room, need = found.available, found.account
    if need.fits(room["device"], room["host"]):
        return "replicate", "model, judge and sums fit every rank whole"
    return "shard", "model, judge and sums do not fit a rank whole"


def _accumulate(name: str) -> Place:
    if name not in ("device", "host", "disk"):
        raise SafecritError(f"--accumulate-on {name}: use auto, device, host or disk.")
    return name  # type: ignore[return-value]

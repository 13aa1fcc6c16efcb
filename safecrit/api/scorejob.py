"""What `score` is asked to do, and whether it can be done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safecrit.api.judging import REFUSAL, JudgeChoice, find_judge
from safecrit.errors import SafecritError, UsageError
from safecrit.generation import GenerationSettings
from safecrit.gradients import Reduction
from safecrit.models import pick_device, resolve_folder
from safecrit.prompts import read_prompts, read_rows
from safecrit.relaxation import RelaxationSettings
from safecrit.traindata import read_examples

Method = Literal["esi", "gradient", "snip", "fisher", "wanda", "magnitude"]
Objective = Literal["log-odds", "prob", "logit", "refusal-nll", "answer-nll"]
LIKELIHOODS = ("refusal-nll", "answer-nll")
REFUSAL_TEXT = "I'm sorry, but I can't help with that."


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How scores are made; batch sizes in answers (model) and conversations (judge), `max_dropped` a share.

    placement: auto, together, sequential, or the judge's device. accumulate_on: auto, device, host, disk.
    checkpoint: auto, on, off. stability: score halves of the prompts and a second noise seed too.
    """

    method: Method = "esi"
    objective: Objective = "log-odds"
    estimator: Literal["relaxed", "score-function"] = "relaxed"
    reduction: Reduction = "signed"
    relaxation: RelaxationSettings = RelaxationSettings()
    batch_size: int = 16
    judge_batch_size: int = 64
    max_dropped: float = 0.05
    placement: str = "auto"
    accumulate_on: str = "auto"
    checkpoint: str = "auto"
    stability: bool = False


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """All that `score` needs to know.

    answers: a file of answers made elsewhere, instead of generating them. data: training
    examples for `answer-nll`. refusal: the text of `refusal-nll`. samples: answers a prompt of
    the score function. parallel: auto, shard, replicate: how ranks divide the work.
    """

    model: str
    judge: JudgeChoice | None = None
    prompts: str | None = None
    answers: str | None = None
    data: str | None = None
    refusal: str = REFUSAL_TEXT
    samples: int = 8
    limit: int | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    include: str | None = None
    exclude: str | None = None
    score_dtype: str = "float32"
    save_every: int = 256
    parallel: str = "auto"
    generation: GenerationSettings = GenerationSettings()
    scoring: ScoreSettings = ScoreSettings()

    @property
    def sampled(self) -> bool:
        """Whether answers are sampled."""
        return self.scoring.estimator == "score-function"

    @property
    def judged(self) -> bool:
        """Whether a judge reads answers."""
        return self.scoring.objective not in LIKELIHOODS and self.scoring.method not in ("wanda", "magnitude")


def check_settings(job: ScoreJob) -> None:
    """UsageError that names every setting that is missing or contradicts another."""
    scoring, likelihood = job.scoring, job.scoring.objective in LIKELIHOODS
    faults: list[str] = []
    if scoring.objective == "answer-nll" and job.data is None:
        faults.append("--objective answer-nll needs --data FILE with prompts and answers")
    if scoring.objective != "answer-nll" and job.data is not None:
        faults.append("--data belongs to --objective answer-nll")
    if scoring.objective != "answer-nll" and scoring.method != "magnitude" and job.prompts is None:
        faults.append("--prompts FILE is missing")
    if job.judged and job.judge is None:
        faults.append("--judge JUDGE is missing (only --objective refusal-nll and answer-nll need none)")
    if likelihood and job.sampled:
        faults.append("--estimator score-function needs a judge's verdicts; leave --objective out")
    if job.sampled and job.samples < 2:
        faults.append("--samples must be at least 2")
    if scoring.stability and scoring.method in ("wanda", "magnitude"):
        faults.append(f"--stability has no meaning for --method {scoring.method}")
    if scoring.method == "fisher" and scoring.reduction == "abs":
        faults.append("--method fisher is the mean of squares; leave --reduction out")
    if faults:
        raise UsageError("; ".join(faults) + ".")


def check_inputs(job: ScoreJob) -> None:
    """Find the user's mistakes before an output folder is made: settings, unreadable files, no such model or judge."""
    check_settings(job)
    if job.prompts is not None:
        read_prompts(job.prompts, job.limit)
    if job.answers is not None:
        read_rows(job.answers)
    if job.data is not None:
        read_examples(job.data, job.limit)
    resolve_folder(job.model, revision=job.revision)
    pick_device(job.device)
    if job.judged and job.judge is not None:
        if job.judge.name == REFUSAL and not job.sampled:
            raise SafecritError(
                "--judge refusal has no gradient to score with. Name a guard model's folder or Hub id, or use "
                "--estimator score-function."
            )
        find_judge(job.judge, differentiable=not job.sampled)

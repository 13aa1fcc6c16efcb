"""eval: models -> answers -> judge -> figures with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safecrit.api.judging import JudgeChoice, find_judge, load_judge
from safecrit.errors import SafecritError
from safecrit.evaluation import EvalPrompts, evaluate_model
from safecrit.fingerprint import fingerprint
from safecrit.generation import Answer, GenerationSettings, generate
from safecrit.judges.refusal import RefusalJudge
from safecrit.models import LoadedModel, load_model, resolve_folder
from safecrit.progress import Reporter, quiet_reporter
from safecrit.prompts import Prompt, read_prompts
from safecrit.results import EvalSettings, Evaluation


@dataclass(frozen=True, kw_only=True)
class EvalJob:
    """All that `eval` needs to know.

    `prompts`: harmful ones. `benign`: prompts that ought to be answered. `task`: prompts with
    reference answers, for utility; without it those of `benign` that have one.
    """

    models: tuple[str, ...]
    judge: JudgeChoice
    prompts: str | None = None
    benign: str | None = None
    task: str | None = None
    baseline: str | None = None
    limit: int | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    generation: GenerationSettings = GenerationSettings()
    settings: EvalSettings = EvalSettings()


def read_eval_prompts(job: EvalJob) -> EvalPrompts:
    """Prompt sets of a job; benign prompts that hold answers are tasks too.

    Benign prompts that their own file labels unsafe (XSTest's contrast prompts) are left out.
    """
    if job.prompts is None and job.benign is None and job.task is None:
        raise SafecritError(
            "nothing to evaluate: give --prompts (harmful), --benign (harmless) or --task (with answers)."
        )
    harmful = read_prompts(job.prompts, job.limit) if job.prompts else []
    benign = read_prompts(job.benign) if job.benign else []
    benign = [prompt for prompt in benign if prompt.label != "unsafe"][: job.limit]
    if job.benign and not benign:
        raise SafecritError(f"{job.benign}: every prompt is labelled unsafe; --benign wants harmless ones.")
    task = read_prompts(job.task, job.limit) if job.task else [prompt for prompt in benign if prompt.answer is not None]
    return EvalPrompts(harmful=harmful, benign=benign, task=task)


def check_inputs(job: EvalJob) -> None:
    """Find the user's mistakes before an output folder is made: unreadable prompts, no such model or judge."""
    read_eval_prompts(job)
    for name in _names(job).values():
        resolve_folder(name, revision=job.revision)
    find_judge(job.judge)


def run_eval(job: EvalJob, report: Reporter = quiet_reporter) -> Evaluation:
    """Evaluate every model of the job on the same prompts, one model in memory at a time."""
    prompts = read_eval_prompts(job)
    judge = load_judge(job.judge)
    names = _names(job)
    results = []
    for name, model in names.items():
        loaded = load_model(
            model, revision=job.revision, device=job.device, dtype=job.dtype, trust_remote_code=job.trust_remote_code
        )
        answers = _Answers(name, loaded, job.generation, report)
        results.append(evaluate_model(name, prompts, answers, judge, RefusalJudge(), job.settings))
        del loaded, answers
    files = {
        key: Path(value).name
        for key, value in (("prompts", job.prompts), ("benign", job.benign), ("task", job.task))
        if value
    }
    models = {name: {"id": model, "fingerprint": _fingerprint(model, job.revision)} for name, model in names.items()}
    return Evaluation(
        models=results,
        settings=job.settings,
        judge=judge.describe(),
        baseline=next((name for name, model in names.items() if model == job.baseline), None) if job.baseline else None,
        extra={"files": files, "models": models, "max_new_tokens": job.generation.max_new_tokens},
    )


class _Answers:
    """A loaded model as evaluation sees it; a prompt that stands in two sets is answered once."""

    def __init__(self, name: str, loaded: LoadedModel, settings: GenerationSettings, report: Reporter) -> None:
        self.name, self.loaded, self.settings, self.report = name, loaded, settings, report
        self.known: dict[str, Answer] = {}

    def __call__(self, asked: Sequence[Prompt]) -> list[Answer]:
        fresh = list({prompt.hash: prompt for prompt in asked if prompt.hash not in self.known}.values())
        if fresh:
            with self.report(f"{self.name}: answering", "prompts") as progress:
                made = generate(self.loaded.model, self.loaded.tokenizer, fresh, self.settings, progress)
            self.known.update(zip((prompt.hash for prompt in fresh), made, strict=True))
        return [self.known[prompt.hash] for prompt in asked]


def _fingerprint(model: str, revision: str | None) -> str:
    return fingerprint(resolve_folder(model, revision=revision))


def _names(job: EvalJob) -> dict[str, str]:
    """A short name for each model: its last path element, or the whole where two share it."""
    models = list(dict.fromkeys([*((job.baseline,) if job.baseline else ()), *job.models]))
    short = [Path(model).name for model in models]
    return {name if short.count(name) == 1 else model: model for name, model in zip(short, models, strict=True)}

"""eval: models (or answers made elsewhere) -> answers -> judges -> figures with intervals.

All answers come first, one model in memory at a time, then the judges, one at a
time: an 8 B model and an 8 B guard never meet on the card. Answers are kept, so
a killed run asks nobody twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safecrit import distributed
from safecrit.api.asking import (
    AnswerSets,
    Ask,
    KeptAnswers,
    answer_nats,
    ask_all,
    given_answers,
    model_asker,
    most_nats,
    read_sets,
    server_asker,
)
from safecrit.api.judging import OPENAI, JudgeChoice, find_judge, load_judge
from safecrit.api.reused import reuse_warnings
from safecrit.chatserver import ChatServer
from safecrit.errors import SafecritError
from safecrit.evaluation import EvalPrompts, evaluate_model, judged_by
from safecrit.fingerprint import fingerprint
from safecrit.generation import GenerationSettings
from safecrit.harness import check_tasks, run_tasks
from safecrit.judges.refusal import RefusalJudge
from safecrit.models import LoadedModel, load_model, resolve_folder
from safecrit.perplexity import text_perplexity
from safecrit.progress import Reporter, quiet_reporter
from safecrit.results import EvalSettings, Evaluation, SetName


@dataclass(frozen=True, kw_only=True)
class EvalJob:
    """All that `eval` needs to know.

    `prompts`: harmful ones. `benign`: prompts that ought to be answered. `task`: prompts with
    reference answers, for utility; without it those of `benign` that have one. `answers`: files
    of answers made elsewhere, in place of models. `others`: judges beside the first. `used`: masks
    and score folders whose prompts and judge had better not be used again. `text`: a file whose
    perplexity is measured. `tasks`: of lm-evaluation-harness, names or files. `base_url`: the
    server of models called openai:NAME.
    """

    models: tuple[str, ...]
    judge: JudgeChoice
    others: tuple[JudgeChoice, ...] = ()
    answers: tuple[str, ...] = ()
    prompts: str | None = None
    benign: str | None = None
    task: str | None = None
    text: str | None = None
    tasks: tuple[str, ...] = ()
    baseline: str | None = None
    base_url: str | None = None
    used: tuple[Path, ...] = ()
    limit: int | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    generation: GenerationSettings = GenerationSettings()
    settings: EvalSettings = EvalSettings()


@dataclass
class _Asked:
    """What the models gave: answers by set, their likelihood under the baseline, and other measures."""

    answers: dict[str, AnswerSets] = field(default_factory=dict)
    nats: dict[str, dict[SetName, list[list[float | None]]]] = field(default_factory=dict)
    most_nats: float = float("inf")
    measures: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, dict[str, str]] = field(default_factory=dict)


def read_eval_prompts(job: EvalJob) -> EvalPrompts:
    """Prompt sets of a job; those of an answer file where only that is given."""
    if not (job.prompts or job.benign or job.task):
        if job.answers:
            return given_answers(job.answers[0], None, job.limit)[0]
        if job.text or job.tasks:
            return EvalPrompts()
        raise SafecritError(
            "nothing to evaluate: give --prompts (harmful), --benign (harmless), --task (with answers), --text or "
            "--tasks."
        )
    return read_sets(job.prompts, job.benign, job.task, job.limit)


def check_inputs(job: EvalJob) -> None:
    """Find the user's mistakes before an output folder is made: unreadable prompts, no such model or judge."""
    if bool(job.models) == bool(job.answers):
        raise SafecritError("give models to ask, or --answers FILE with answers made elsewhere, one of the two.")
    if job.answers and (job.generation.samples or job.generation.prefill or job.text or job.tasks):
        raise SafecritError("--samples, --prefill, --text and --tasks need a model; --answers has answers already.")
    if job.tasks:
        check_tasks(job.tasks)
        if distributed.current().world > 1:
            raise SafecritError("--tasks runs in one process: start it without torchrun, or leave --tasks out.")
    prompts = read_eval_prompts(job)
    for source in _names(job).values():
        if job.answers:
            given_answers(source, prompts)
        else:
            _find_model(job, source)
    for judge in (job.judge, *job.others):
        find_judge(judge)
    if repeated := [c.name for n, c in enumerate(job.others) if c in (job.judge, *job.others[:n])]:
        raise SafecritError(f"--judge {repeated[0]}: is given twice. Name each judge once.")


def find_cards(job: EvalJob) -> dict[str, Path]:
    """The model cards of those models of the job that set, spa or merge made, by the model's name in the results."""
    found = {
        name: Path(source) / "README.md"
        for name, source in _names(job).items()
        if (Path(source) / "safecrit" / "training.json").is_file() and (Path(source) / "README.md").is_file()
    }
    if not found:
        raise SafecritError("--card: none of the models is an output folder of set, spa or merge with its README.md.")
    return found


def run_eval(job: EvalJob, report: Reporter = quiet_reporter, folder: Path | None = None) -> Evaluation:
    """Evaluate every model of the job on the same prompts; `folder` keeps the answers of an unfinished run.

    Several ranks, each with whole models, divide the prompts; the result is the same on all of them.
    """
    prompts = read_eval_prompts(job)
    kept = KeptAnswers(folder, prompts, job.generation)
    asked = _given(job, prompts) if job.answers else _ask_models(job, prompts, kept, report)
    judge, refusals = load_judge(job.judge), RefusalJudge(job.judge.patterns)
    results = {
        name: evaluate_model(
            name,
            prompts,
            answers,
            judge,
            refusals,
            job.settings,
            nats=asked.nats.get(name),
            most_nats=asked.most_nats,
            measures=asked.measures.get(name, {}),
        )
        for name, answers in asked.answers.items()
    }
    described, others = judge.describe(), []
    warnings = reuse_warnings(job, prompts, described)
    del judge
    for choice in job.others:
        other = load_judge(choice)
        others.append(other.describe())
        results = {name: judged_by(result, prompts.harmful, other, job.settings) for name, result in results.items()}
        del other
    files = {
        key: Path(value).name
        for key, value in (("prompts", job.prompts), ("benign", job.benign), ("task", job.task), ("text", job.text))
        if value
    }
    names = _names(job)
    evaluation = Evaluation(
        models=[results[name] for name in names],
        settings=job.settings,
        judge=described,
        baseline=next((name for name, source in names.items() if source == job.baseline), None),
        extra={
            "files": files,
            "models": asked.models,
            "other_judges": others,
            "max_new_tokens": job.generation.max_new_tokens,
            "samples": job.generation.samples,
            "prefill": job.generation.prefill,
            "seed": job.generation.seed,
            **({"refusal_patterns": list(job.judge.patterns)} if job.judge.patterns else {}),
        },
        warnings=warnings,
    )
    kept.clear()
    return evaluation


def _given(job: EvalJob, prompts: EvalPrompts) -> _Asked:
    found = _Asked()
    for name, source in _names(job).items():
        found.answers[name] = given_answers(source, prompts)[1]
        found.models[name] = {"answers": Path(source).name}
    return found


def _ask_models(job: EvalJob, prompts: EvalPrompts, kept: KeptAnswers, report: Reporter) -> _Asked:
    """Every model's answers, the baseline last: what the others said is then read by it too."""
    found, names = _Asked(), _names(job)
    for name, source in sorted(names.items(), key=lambda item: item[1] == job.baseline):
        model = _Once(job, source)
        identity = _identity(job, source)
        found.models[name] = {"id": source, "fingerprint": identity}
        found.answers[name] = kept.get(
            name,
            identity,
            lambda name=name, model=model: ask_all(name, model.ask(), prompts, job.generation, report),  # type: ignore[misc]
        )
        measures: dict[str, Any] = {}
        if job.text is not None:
            with report(f"{name}: reading {Path(job.text).name}", "tokens") as progress:
                measures["text"] = text_perplexity(model(), job.text, progress)
        if job.tasks:
            batch = job.generation.batch_size
            measures["tasks"] = run_tasks(model(), job.tasks, limit=job.limit, batch_size=batch)
        found.measures[name] = measures
        if source == job.baseline and not source.startswith(OPENAI):
            found.most_nats = most_nats(model())
            for other, answers in found.answers.items():
                found.nats[other] = answer_nats(model(), prompts, answers, job.generation.chat)
        del model
    return found


class _Once:
    """A model that is loaded when it is needed: kept answers need none."""

    def __init__(self, job: EvalJob, source: str) -> None:
        self.job, self.source = job, source
        self.loaded: LoadedModel | None = None

    def ask(self) -> Ask:
        """The model as something to ask; behind an endpoint nothing is loaded."""
        if not self.source.startswith(OPENAI):
            return model_asker(self())
        return server_asker(_server(self.job, self.source))

    def __call__(self) -> LoadedModel:
        if self.loaded is None:
            self.loaded = load_model(
                self.source,
                revision=self.job.revision,
                device=self.job.device,
                dtype=self.job.dtype,
                trust_remote_code=self.job.trust_remote_code,
            )
        return self.loaded


def _identity(job: EvalJob, source: str) -> str:
    if source.startswith(OPENAI):
        return f"{_server(job, source).host} {source}"
    return distributed.from_first(lambda: fingerprint(resolve_folder(source, revision=job.revision)))


def _server(job: EvalJob, source: str) -> ChatServer:
    if job.base_url is None:
        raise SafecritError(f"{source}: needs --base-url, such as http://localhost:8000/v1.")
    return ChatServer(
        source.removeprefix(OPENAI),
        job.base_url,
        role="model",
        flag="--base-url",
        max_tokens=job.generation.max_new_tokens,
        workers=min(8, job.generation.batch_size),
        timeout=600.0,
        cut=True,
    )


def _find_model(job: EvalJob, source: str) -> None:
    if not source.startswith(OPENAI):
        resolve_folder(source, revision=job.revision)
        return
    _server(job, source)
    if job.generation.prefill or job.generation.chat.template_kwargs or job.text or job.tasks:
        raise SafecritError(
            f"{source}: a model behind an endpoint takes no --prefill, --chat-template-kwargs, --text or --tasks. "
            "Leave them out, or evaluate the model's folder."
        )


def _names(job: EvalJob) -> Mapping[str, str]:
    """A short name for each model or answer file: its last path element, or the whole where two share it."""
    sources = list(dict.fromkeys([*((job.baseline,) if job.baseline else ()), *(job.models or job.answers)]))
    short = [Path(source).stem if job.answers else Path(source).name for source in sources]
    return {name if short.count(name) == 1 else source: source for name, source in zip(short, sources, strict=True)}

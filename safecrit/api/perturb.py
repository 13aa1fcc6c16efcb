"""perturb: noise on the top, matched random and bottom weights at several sizes, each arm asked and judged.

All answers come first and are kept arm by arm, then the model goes and the judge
comes, so the two never share a device. The figures are eval's: every arm is
compared with the unperturbed model prompt by prompt.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safecrit.anatomy import read_anatomy
from safecrit.api.asking import KeptAnswers, ask_all, model_asker, read_sets
from safecrit.api.judging import JudgeChoice, find_judge, load_judge
from safecrit.errors import MismatchError, SafecritError
from safecrit.evaluation import EvalPrompts, evaluate_model
from safecrit.files import canonical_json, write_json
from safecrit.fingerprint import accepted_fingerprints
from safecrit.generation import GenerationSettings
from safecrit.judges import Judge
from safecrit.judges.refusal import RefusalJudge
from safecrit.maskfile import Mask
from safecrit.models import load_model, resolve_folder
from safecrit.perturbation import first_order, matched_random, perturbed
from safecrit.progress import Reporter, quiet_reporter
from safecrit.results import EvalSettings, Evaluation, ModelResult, Sample, results_json, write_samples
from safecrit.scorefile import Scores
from safecrit.selection import SelectionSettings, select
from safecrit.statistics import mean_difference

Kind = Literal["top", "random", "bottom"]
BASELINE = "unperturbed"
NOISE = (0.38, 1.0, 2.0)
FORMAT, VERSION = "safecrit-perturbation", 1


@dataclass(frozen=True, kw_only=True)
class PerturbJob:
    """All that `perturb` needs to know.

    `noise`: sizes r, in sigma. `draws`: of the noise (and of the random weights) at each r. `bottom`: a
    mask for the bottom arms; without it they come from `scores`, which also predict the change of S.
    """

    model: str
    mask: Path
    judge: JudgeChoice
    prompts: str
    noise: tuple[float, ...] = NOISE
    scores: Path | None = None
    bottom: Path | None = None
    benign: str | None = None
    task: str | None = None
    draws: int = 1
    seed: int = 0
    limit: int | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    allow_other_weights: bool = False
    generation: GenerationSettings = GenerationSettings()
    settings: EvalSettings = EvalSettings()


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model to ask: noise of `factor` sigma on the weights of `kind`, draw number `draw`."""

    kind: Kind
    factor: float
    draw: int

    @property
    def name(self) -> str:
        """`top r=0.38 draw 0`, as in samples.jsonl."""
        return f"{self.kind} r={self.factor:g} draw {self.draw}"


def check_inputs(job: PerturbJob) -> None:
    """Find the user's mistakes before an output folder is made."""
    if not job.noise or any(not (math.isfinite(r) and r > 0) for r in job.noise):
        raise SafecritError("--noise: give positive sizes in sigma, such as 0.38,1,2.")
    if len(set(job.noise)) < len(job.noise):
        raise SafecritError("--noise: names a size twice.")
    read_sets(job.prompts, job.benign, job.task, job.limit)
    resolve_folder(job.model, revision=job.revision)
    masks = _masks(job)
    if job.scores is not None:
        first_order(Scores.load(job.scores), Mask({}, masks["top"].info))  # scores without a sign are refused
    find_judge(job.judge)


def run_perturb(
    job: PerturbJob,
    folder: Path,
    report: Reporter = quiet_reporter,
    judges: Callable[[], tuple[Judge, Judge]] | None = None,
) -> dict[str, Any]:
    """Run or finish all arms and write results.json and samples.jsonl to `folder`; the content of results.json.

    `judges` gives a judge and a judge of refusals in place of the job's. Raises
    MismatchError where mask or scores are another model's, CheckFailed where
    weights did not come back.
    """
    prompts = read_sets(job.prompts, job.benign, job.task, job.limit)
    masks = _masks(job)
    source = resolve_folder(job.model, revision=job.revision)
    prints = accepted_fingerprints(source)
    arms = [Arm(kind=kind, factor=r, draw=n) for kind in masks for r in job.noise for n in range(job.draws)]
    kept = KeptAnswers(folder, prompts, job.generation)
    facts: dict[str, dict[str, Any]] = {}
    answers = _answers(job, masks, arms, prompts, kept, prints, facts, report)
    judge, refusals = judges() if judges is not None else (load_judge(job.judge), RefusalJudge(job.judge.patterns))
    models = []
    with report("judging", "arms") as progress:
        for number, (name, given) in enumerate(answers.items(), 1):
            models.append(evaluate_model(name, prompts, given, judge, refusals, job.settings))
            progress(number, len(answers))
    evaluation = Evaluation(
        models=models,
        settings=job.settings,
        judge=judge.describe(),
        baseline=BASELINE,
        extra={
            "model": {"id": job.model, "fingerprint": prints[0]},
            "mask": {"count": masks["top"].count, "total": masks["top"].info.total, "mode": masks["top"].info.mode},
            "noise": list(job.noise),
            "draws": job.draws,
            "seed": job.seed,
            "max_new_tokens": job.generation.max_new_tokens,
            **({"refusal_patterns": list(job.judge.patterns)} if job.judge.patterns else {}),
        },
    )
    results = _results(job, arms, evaluation, facts, prompts)
    write_samples(folder / "samples.jsonl", evaluation)
    write_json(folder / "results.json", results)
    kept.clear()
    return results


def table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for people: every arm's shares with their intervals, predicted and measured change of S."""
    models = results["models"]
    columns = (("asr", "ASR"), ("refusal", "refusal"), ("over_refusal", "over-refusal"), ("utility", "utility"))
    measured = [(key, label) for key, label in columns if key in models[BASELINE]]
    predicts = any(arm["predicted"] is not None for arm in results["arms"])

    def shares(name: str) -> list[str]:
        found = [_share(models[name][key]) for key, _ in measured]
        return [*found, f"{100 * (models[name]['incoherent']['rate'] or 0):.1f} %"]

    header = ["weights", "r", *(label for _, label in measured), "incoherent"]
    rows = [[BASELINE, "", *shares(BASELINE), *(["", ""] if predicts else [])]]
    for arm in results["arms"]:
        draw = f" ({arm['draw'] + 1})" if results["settings"]["draws"] > 1 else ""
        change = [_number(arm["predicted"]), _number(arm["S"]["difference"])] if predicts else []
        rows.append([arm["kind"] + draw, f"{arm['r']:g}", *shares(arm["name"]), *change])
    return header + (["dS predicted", "dS measured"] if predicts else []), rows


def _share(rate: Mapping[str, Any]) -> str:
    if rate["rate"] is None:
        return "-"
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3g}"


def _masks(job: PerturbJob) -> dict[Kind, Mask]:
    """The masks by kind; random ones are drawn arm by arm and stand here for their count alone."""
    top = Mask.load(job.mask)
    masks: dict[Kind, Mask] = {"top": top, "random": top}
    if job.bottom is not None:
        masks["bottom"] = Mask.load(job.bottom)
    elif job.scores is not None:
        settings = SelectionSettings(mode="bottom", count=top.count)
        masks["bottom"] = select(Scores.load(job.scores), settings)
    return masks


def _answers(
    job: PerturbJob,
    masks: Mapping[Kind, Mask],
    arms: Sequence[Arm],
    prompts: EvalPrompts,
    kept: KeptAnswers,
    prints: Sequence[str],
    facts: dict[str, dict[str, Any]],
    report: Reporter,
) -> dict[str, Any]:
    """Answers of the unperturbed model and of every arm, by name; what each arm did goes to `facts`."""
    loaded = load_model(
        job.model, revision=job.revision, device=job.device, dtype=job.dtype, trust_remote_code=job.trust_remote_code
    )
    anatomy, ask = read_anatomy(loaded.model), model_asker(loaded)
    scores = Scores.load(job.scores) if job.scores is not None else None
    for mask in masks.values():
        mask.check(anatomy, fingerprints=prints, allow_other_weights=job.allow_other_weights)
    if scores is not None and scores.fingerprint not in prints and not job.allow_other_weights:
        raise MismatchError(
            f"{job.scores}: are scores of other weights ({scores.fingerprint}). Score this model, leave --scores out, "
            "or use --allow-other-weights if you mean it."
        )
    found = {BASELINE: kept.get(BASELINE, prints[0], lambda: ask_all(BASELINE, ask, prompts, job.generation, report))}
    for arm in arms:
        seed = 1_000_003 * job.seed + arm.draw
        mask = matched_random(masks["top"], seed) if arm.kind == "random" else masks[arm.kind]
        gradients = first_order(scores, mask) if scores is not None else None
        with perturbed(loaded.model, anatomy, mask, factor=arm.factor, seed=seed, gradients=gradients) as done:
            facts[arm.name] = asdict(done)
            identity = canonical_json([prints[0], job.seed, _digest(mask)])
            found[arm.name] = kept.get(
                arm.name,
                identity,
                lambda name=arm.name: ask_all(name, ask, prompts, job.generation, report),  # type: ignore[misc]
            )
    return found


def _digest(mask: Mask) -> str:
    digest = hashlib.sha256()
    for name, flat in mask.indices.items():
        digest.update(name.encode())
        digest.update(flat.numpy().data)
    return digest.hexdigest()


def _results(
    job: PerturbJob,
    arms: Sequence[Arm],
    evaluation: Evaluation,
    facts: Mapping[str, Mapping[str, Any]],
    prompts: EvalPrompts,
) -> dict[str, Any]:
    base, *others = evaluation.models
    objective, scored = "log-odds", 0
    if job.scores is not None:
        info = Scores.load(job.scores).info
        objective = info.get("objective") or "log-odds"
        hashes = set((info.get("prompts") or {}).get("hashes") or [])
        scored = sum(prompt.hash in hashes for prompt in prompts.harmful)
    rows = [
        {
            "name": arm.name,
            "kind": arm.kind,
            "r": arm.factor,
            "draw": arm.draw,
            **facts[arm.name],
            "S": _measured(model, base, objective),
        }
        for arm, model in zip(arms, others, strict=True)
    ]
    whole = results_json(evaluation) | {"format": FORMAT, "version": VERSION, "arms": rows}
    whole["S"] = {"objective": objective, "unperturbed": _mean(base, objective), "prompts_scored": scored}
    whole["restored"] = "every arm's weights came back bit for bit (sha256 of all tensors in memory)"
    return whole


def _measured(model: ModelResult, base: ModelResult, objective: str) -> dict[str, Any]:
    """Mean S minus that of the unperturbed model over the prompts on which the judge gave both a number."""
    pairs = [(_value(a, objective), _value(b, objective)) for a, b in zip(model.samples, base.samples, strict=True)]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return mean_difference([a for a, _ in known], [b for _, b in known])


def _mean(model: ModelResult, objective: str) -> float | None:
    values = [value for sample in model.samples if (value := _value(sample, objective)) is not None]
    return math.fsum(values) / len(values) if values else None


def _value(sample: Sample, objective: str) -> float | None:
    """s of one judged answer in the scores' objective; None where the judge's log-odds do not give it."""
    if sample.score is None or sample.verdict == "error":
        return None
    if objective == "prob":
        return 1 / (1 + math.exp(-max(-700.0, min(700.0, sample.score))))
    return sample.score if objective == "log-odds" else None

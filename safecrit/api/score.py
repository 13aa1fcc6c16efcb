"""score: prompts -> answers -> judge -> gradient stream -> score folder.

An interrupted run goes on where it was: answers lie in `samples.jsonl`, the
accumulators in `partial.safetensors` every `save_every` prompts. The plan of
batches depends on the answers alone, so a resumed run's scores equal an
undisturbed run's bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from safecrit.anatomy import Anatomy, read_anatomy
from safecrit.api.judging import JudgeChoice, describe_judge, load_guard
from safecrit.chat import encode_prompt
from safecrit.errors import SafecritError
from safecrit.files import atomic, canonical_json, read_header, write_text
from safecrit.fingerprint import fingerprint
from safecrit.generation import Answer, GenerationSettings, answers_from_texts, generate
from safecrit.judges.guard import GuardJudge
from safecrit.models import NO_FOLDER, LoadedModel, context_window, load_model, resolve_folder
from safecrit.progress import Reporter, quiet_reporter
from safecrit.prompts import Prompt, read_prompts, read_rows
from safecrit.scorefile import Scores, write_scores
from safecrit.scoring import Item, Scorer, ScoreSettings, ScoreState

SAMPLES, PARTIAL, ANSWERS_KEY = "samples.jsonl", "partial.safetensors", ".answers-key"


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """All that `score` needs to know. `answers`: a file of answers made elsewhere, instead of generating them."""

    model: str
    judge: JudgeChoice
    prompts: str
    answers: str | None = None
    limit: int | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    include: str | None = None
    exclude: str | None = None
    score_dtype: str = "float32"
    save_every: int = 256
    generation: GenerationSettings = GenerationSettings()
    scoring: ScoreSettings = ScoreSettings()


def run_score(job: ScoreJob, folder: Path, report: Reporter = quiet_reporter) -> Scores:
    """Score a model into `folder` and open the result; takes up what an interrupted run left there."""
    prompts = read_prompts(job.prompts, job.limit)
    loaded = load_model(
        job.model,
        revision=job.revision,
        device=job.device,
        dtype=job.dtype,
        trust_remote_code=job.trust_remote_code,
    )
    judge = load_guard(job.judge)
    return score_loaded(loaded, judge, prompts, job, folder, report)


def score_loaded(
    loaded: LoadedModel,
    judge: GuardJudge,
    prompts: Sequence[Prompt],
    job: ScoreJob,
    folder: Path,
    report: Reporter = quiet_reporter,
) -> Scores:
    """The same with model, judge and prompts at hand."""
    anatomy = read_anatomy(loaded.model, include=job.include, exclude=job.exclude)
    answers = _answers(loaded, prompts, job, folder, report)
    items, cut = _items(loaded, prompts, answers)
    scorer = Scorer(loaded.model, loaded.tokenizer, judge, anatomy, items, job.scoring)
    partial = folder / PARTIAL
    judged_by = (_fingerprint(judge.loaded), asdict(judge.settings), asdict(job.scoring))
    key = _key(_fingerprint(loaded), judged_by, [asdict(item) for item in items])

    def save(state: ScoreState, accumulators: Mapping[str, torch.Tensor]) -> None:
        with atomic(partial) as temporary:
            tensors = {name: tensor.cpu() for name, tensor in accumulators.items()}
            save_file(tensors, temporary, metadata={"safecrit": canonical_json(asdict(state)), "key": key})

    def restore(accumulators: Mapping[str, torch.Tensor]) -> ScoreState | None:
        if not partial.is_file():
            return None
        _, metadata = read_header(partial)
        if metadata.get("key") != key:
            return None  # of other prompts, answers, model or judge at the same paths
        for name, tensor in load_file(partial).items():
            accumulators[name].copy_(tensor)
        return ScoreState(**json.loads(metadata["safecrit"]))

    with report("scoring", "prompts") as progress:
        means = scorer.run(save, restore, job.save_every, progress)
    _write_samples(folder, prompts, answers, scorer.state)
    info = _info(loaded, judge, prompts, answers, job, scorer, means, anatomy, cut)
    dtype = torch.bfloat16 if job.score_dtype == "bfloat16" else torch.float32
    write_scores(folder, ((name, means[name].cpu()) for name in sorted(means)), anatomy.layouts, info, dtype)
    partial.unlink(missing_ok=True)
    (folder / ANSWERS_KEY).unlink(missing_ok=True)
    return Scores.load(folder)


def _answers(
    loaded: LoadedModel, prompts: Sequence[Prompt], job: ScoreJob, folder: Path, report: Reporter
) -> list[Answer]:
    made_by = [_fingerprint(loaded), asdict(job.generation), _content(job.answers)]
    key = _key(made_by, [prompt.hash for prompt in prompts])
    key_file = folder / ANSWERS_KEY
    if key_file.is_file() and key_file.read_text(encoding="utf-8").strip() == key:
        return _read_samples(folder)
    if job.answers is not None:
        answers = answers_from_file(loaded, prompts, job.answers)
    else:
        with report("answering", "prompts") as progress:
            answers = generate(loaded.model, loaded.tokenizer, prompts, job.generation, progress)
    _write_samples(folder, prompts, answers, None)
    write_text(key_file, key + "\n")
    return answers


def answers_from_file(loaded: LoadedModel, prompts: Sequence[Prompt], source: str) -> list[Answer]:
    """Answers made elsewhere: by their `prompt` column where there is one, else in the prompts' order."""
    rows = read_rows(source)
    column = next((name for name in ("answer", "completion", "response", "output") if rows and name in rows[0]), None)
    if column is None:
        found = ", ".join(rows[0]) if rows else "none"
        raise SafecritError(
            f"{source}: no known answer column. Found: {found}. Known: answer, completion, response, output."
        )
    if rows and "prompt" in rows[0]:
        by_text: dict[str, list[str]] = {}
        for row in reversed(rows):
            by_text.setdefault(str(row["prompt"]).strip(), []).append(str(row[column] or ""))
        missing = [prompt for prompt in prompts if prompt.text.strip() not in by_text]
        if missing:
            raise SafecritError(
                f"{source}: has no answer to {len(missing)} prompts, the first in row {missing[0].row + 1}."
            )
        waiting = [by_text[prompt.text.strip()] for prompt in prompts]
        texts = [found.pop() if len(found) > 1 else found[0] for found in waiting]
    elif len(rows) < len(prompts):
        raise SafecritError(f"{source}: holds {len(rows)} answers for {len(prompts)} prompts. Use --limit {len(rows)}.")
    else:
        texts = [str(row[column] or "") for row in rows[: len(prompts)]]
    return answers_from_texts(loaded.tokenizer, texts)


def _items(loaded: LoadedModel, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> tuple[list[Item], int]:
    window, cut, items = context_window(loaded.model), 0, []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = encode_prompt(loaded.tokenizer, list(prompt.messages))
        own = answer.ids
        if window is not None and len(ids) + len(own) > window:
            if len(ids) >= window:
                raise SafecritError(
                    f"prompt in row {prompt.row + 1}: {len(ids)} tokens, the model's window is {window}."
                )
            own, cut = own[: window - len(ids)], cut + 1
        shown = prompt.conversation
        items.append(Item(prompt_ids=tuple(ids), answer_ids=tuple(own), prompt=shown, hash=prompt.hash, row=prompt.row))
    return items, cut


def _write_samples(
    folder: Path, prompts: Sequence[Prompt], answers: Sequence[Answer], state: ScoreState | None
) -> None:
    dropped = {entry["row"]: entry["reason"] for entry in state.dropped} if state else {}
    lines = []
    for prompt, answer in zip(prompts, answers, strict=True):
        line: dict[str, Any] = {"row": prompt.row, "hash": prompt.hash, "prompt": prompt.text, "answer": answer.text}
        line |= {"ids": answer.ids, "finished": answer.finished}
        if state is not None:
            line |= state.values.get(str(prompt.row), {})
            line |= {"dropped": dropped[prompt.row]} if prompt.row in dropped else {}
        lines.append(json.dumps(line, ensure_ascii=False))
    write_text(folder / SAMPLES, "\n".join(lines) + "\n")


def _key(*parts: Any) -> str:
    """What says whether an interrupted run's work belongs to this one: a hash of JSON values."""
    return hashlib.sha256(canonical_json(list(parts)).encode()).hexdigest()


def _content(file: str | None) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else str(file)


def _read_samples(folder: Path) -> list[Answer]:
    """The answers of an interrupted run."""
    rows = [json.loads(line) for line in (folder / SAMPLES).read_text(encoding="utf-8").split("\n") if line]
    return [Answer(text=row["answer"], ids=tuple(row["ids"]), finished=row["finished"]) for row in rows]


def _info(
    loaded: LoadedModel,
    judge: GuardJudge,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    job: ScoreJob,
    scorer: Scorer,
    means: Mapping[str, torch.Tensor],
    anatomy: Anatomy,
    cut: int,
) -> dict[str, Any]:
    state, settings = scorer.state, job.scoring
    values = [entry["log_odds"] for entry in state.values.values()]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
    unfinished = sum(not answer.finished for answer in answers)
    warnings = []
    if len(values) > 1 and spread < 1e-4 * max(1.0, abs(mean)):
        warnings.append("the judge says the same for every answer: these scores mean nothing; use another judge")
    if job.answers is None and unfinished:
        warnings.append(
            f"{unfinished} of {len(answers)} answers were cut at --max-new-tokens {job.generation.max_new_tokens}"
        )
    if cut:
        warnings.append(f"{cut} answers were cut at the model's window")
    flat = [
        f"{name} ({matrix.component})"
        for name, sigmas in scorer.stream.sigma.items()
        for matrix, sigma in zip(anatomy.tensors[name].layout.matrices, sigmas.tolist(), strict=True)
        if sigma == 0
    ]
    if flat:
        warnings.append(f"{len(flat)} matrices have no spread and score 0, the first {flat[0]}")
    relaxation = settings.relaxation
    return {
        "model": {"id": loaded.id, "revision": loaded.revision, "fingerprint": _fingerprint(loaded)},
        "judge": describe_judge(judge),
        "method": settings.method,
        "reduction": settings.reduction,
        "objective": judge.settings.objective,
        "relaxation": relaxation.kind,
        "tau": relaxation.tau,
        "draws": relaxation.effective_draws,
        "seed": relaxation.seed,
        "prompts": {
            "source": Path(job.prompts).name,
            "used": state.used,
            "dropped": state.dropped,
            "hashes": [prompt.hash for prompt in prompts],
        },
        "judged": {
            "mean": mean,
            "std": spread,
            "min": min(values),
            "max": max(values),
            "safe": sum(value > 0 for value in values),
        },
        "answers": {"unfinished": unfinished, "tokens": sum(len(answer.ids) for answer in answers)},
        "batch_plan": [len(batch) for batch in scorer.plan],
        "equal_tokenizers": scorer.bridge.equal,
        "total": anatomy.total,
        "matrices": _matrix_table(anatomy, scorer, means),
        "warnings": warnings,
    }


def _fingerprint(loaded: LoadedModel) -> str:
    return fingerprint(loaded.folder) if loaded.folder != NO_FOLDER else ""


def _matrix_table(anatomy: Anatomy, scorer: Scorer, means: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    table = []
    for entry in anatomy.eligible:
        for matrix, sigma in zip(entry.layout.matrices, scorer.stream.sigma[entry.name].tolist(), strict=True):
            score = matrix.where.of(means[entry.name]).abs()
            table.append(
                {
                    "name": entry.name,
                    "component": matrix.component,
                    "layer": matrix.layer,
                    "expert": matrix.expert,
                    "numel": score.numel(),
                    "sigma": sigma,
                    "mean_abs": float(score.double().mean()),
                    "max_abs": float(score.max()),
                    "nonzero": int((score > 0).sum()),
                }
            )
    return table


def check_inputs(job: ScoreJob) -> None:
    """Find the user's mistakes before an output folder is made: unreadable prompts, no such model or judge."""
    read_prompts(job.prompts, job.limit)
    if job.answers is not None:
        read_rows(job.answers)
    resolve_folder(job.model, revision=job.revision)
    if job.judge.name == "refusal":
        load_guard(job.judge)
    resolve_folder(job.judge.name, revision=job.judge.revision)

"""score: prompts -> answers -> judge -> gradient stream -> score folder.

An interrupted run goes on where it was: answers are kept as they are made, the
accumulators every `save_every` answers. The plan of batches depends on the answers
alone, so a resumed run's scores equal an undisturbed run's bit for bit. Several ranks
share the batches of the same plan; each sums, writes and resumes its part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from safecrit import distributed
from safecrit.anatomy import Anatomy, read_anatomy
from safecrit.api import partial as kept
from safecrit.api.answering import (
    KEPT,
    KEY,
    Answers,
    answer_prompts,
    data_items,
    fingerprint_of,
    hash_of,
    items_of,
    write_samples,
)
from safecrit.api.loading import Divided, load_divided, load_whole, load_whole_judge
from safecrit.api.placing import Placed, place
from safecrit.api.scoreinfo import score_info
from safecrit.api.scorejob import LIKELIHOODS, ScoreJob, check_settings
from safecrit.comparison import agreement
from safecrit.errors import SafecritError
from safecrit.estimators import Estimator, Item, LikelihoodEstimator, RelaxedEstimator, advantages
from safecrit.files import atomic
from safecrit.gradients import GradientStream
from safecrit.judges import DifferentiableJudge, Judge
from safecrit.judges.rubric import verdict_value
from safecrit.models import LoadedModel
from safecrit.progress import Reporter, quiet_reporter
from safecrit.prompts import Prompt, read_prompts
from safecrit.relaxation import RelaxationSettings
from safecrit.scorefile import Scores, write_scores
from safecrit.scoring import Scorer, ScoreState, owners
from safecrit.sharding import ShardedScorer, ShardedStream
from safecrit.turns import Turns
from safecrit.weightscores import InputNorms, magnitude

VERDICTS = ".verdicts.json"


def run_score(
    job: ScoreJob, folder: Path, report: Reporter = quiet_reporter, note: Callable[[str], None] = lambda _: None
) -> Scores:
    """Score a model into `folder` and open the result; takes up what an interrupted run left there.

    `note` hears how several ranks divide the work, and why.
    """
    check_settings(job)
    prompts = read_prompts(job.prompts, job.limit) if job.prompts is not None else []
    placed = distributed.from_first(lambda: place(job))
    if placed.parallel is not None:
        note(f"{distributed.current()}: {placed.parallel} ({placed.parallel_reason})")
    if placed.parallel == "shard":
        loaded, judge, divided = load_divided(job, placed)
    else:
        loaded, judge, divided = load_whole(job, placed), load_whole_judge(job, placed), None
    return score_loaded(loaded, judge, prompts, job, folder, report, placed, divided)


def score_loaded(
    loaded: LoadedModel,
    judge: Judge | None,
    prompts: Sequence[Prompt],
    job: ScoreJob,
    folder: Path,
    report: Reporter = quiet_reporter,
    placed: Placed | None = None,
    divided: Divided | None = None,
) -> Scores:
    """The same with model, judge and prompts at hand; `placed` None: both stay where they are.

    divided: what is known of the whole of a sharded model.
    """
    run = _Run(loaded, judge, list(prompts), job, folder, report, placed or Placed.here(job), divided)
    scores, state = run.scores()
    ranks = distributed.current()
    own = sorted(entry.name for _, entries, owner in owners(run.anatomy) if owner == ranks.rank for entry in entries)
    info = run.info({name: scores[name] for name in own}, state)
    dropped = {entry["row"]: entry["reason"] for entry in state.dropped}
    if ranks.first:
        write_samples(folder, run.prompts, run.answers, state.values, dropped, run.values)
    dtype = torch.bfloat16 if job.score_dtype == "bfloat16" else torch.float32
    write_scores(folder, ((name, scores[name].cpu()) for name in own), run.anatomy.layouts, info, dtype)
    run.clean()
    return Scores.load(folder)


class _Run:
    """One run of `score`, from answers to sums."""

    def __init__(
        self,
        loaded: LoadedModel,
        judge: Judge | None,
        prompts: list[Prompt],
        job: ScoreJob,
        folder: Path,
        report: Reporter,
        placed: Placed,
        divided: Divided | None,
    ) -> None:
        self.divided = divided
        self.loaded, self.judge, self.job, self.folder, self.report = loaded, judge, job, folder, report
        self.placed, self.settings = placed, job.scoring
        self.anatomy: Anatomy = (
            read_anatomy(loaded.model, include=job.include, exclude=job.exclude) if divided is None else divided.anatomy
        )
        self.turns: Turns | None = None
        if placed.turns is not None:
            assert judge is not None
            self.turns = Turns(loaded.model, judge.model, placed.turns)  # type: ignore[attr-defined]
            self.turns.to("model")
        self.prompts, self.cut = [] if self.settings.method == "magnitude" else prompts, 0  # it reads weights alone
        self.answers: Answers = []
        self.items: list[Item] = []
        self.values: list[list[float | None]] | None = None
        self.stream: GradientStream | None = None
        self.estimator: Estimator | None = None
        self.stability: dict[str, Any] | None = None
        self._read_items()

    def _read_items(self) -> None:
        job, chat = self.job, self.job.generation.chat
        if self.settings.method == "magnitude":
            return
        if self.settings.objective == "answer-nll":
            assert job.data is not None
            self.prompts, self.answers, self.items, self.cut = data_items(self.loaded, job.data, job.limit, chat)
            return
        self.answers = answer_prompts(self.loaded, self.prompts, job, self.folder, self.report)
        if distributed.current().first:
            write_samples(self.folder, self.prompts, self.answers, {}, {})
        weights = None
        if job.sampled:
            self.values = self._verdicts()
            weights = advantages(self.values)
        closed = job.sampled or self.settings.objective == "refusal-nll"
        self.items, self.cut = items_of(self.loaded, self.prompts, self.answers, chat, weights, closed)
        if weights is not None:
            if not self.items:
                raise SafecritError(
                    "the judge says the same of every sampled answer to a prompt, so nothing can be differentiated. "
                    "Use more --samples, other prompts or another judge."
                )
            scale = len(self.items) / len(self.prompts)  # the mean over items is a mean over prompts then
            self.items = [replace(item, weight=item.weight * scale) for item in self.items]

    def _verdicts(self) -> list[list[float | None]]:
        assert self.judge is not None
        pairs = [
            (prompt.conversation, answer.text)
            for prompt, own in zip(self.prompts, self.answers, strict=True)
            for answer in own
        ]
        file = self.folder / VERDICTS
        key = hash_of(self.judge.describe(), pairs)

        def known() -> list[float | None] | None:
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            return found["values"] if found.get("key") == key else None

        values = distributed.from_first(known)
        if values is None:
            values = [verdict_value(verdict) for verdict in self.judge.judge(pairs)]
            if distributed.current().first:
                with atomic(file) as temporary:
                    temporary.write_text(json.dumps({"key": key, "values": values}), encoding="utf-8")
        failed = sum(value is None for value in values)
        if failed > self.settings.max_dropped * len(values):
            raise SafecritError(
                f"the judge could not judge {failed} of {len(values)} answers, more than "
                f"{self.settings.max_dropped:.0%}. Look at the answers in samples.jsonl, or use another judge."
            )
        rest = iter(values)
        return [[next(rest) for _ in own] for own in self.answers]

    def scores(self) -> tuple[Mapping[str, torch.Tensor], ScoreState]:
        """The mean score of every eligible tensor, by checkpoint name, and what happened on the way."""
        if self.settings.method == "magnitude":
            return dict(magnitude(self.loaded.model, self.anatomy)), ScoreState()
        if self.settings.method == "wanda":
            return self._wanda()
        self.stream = (GradientStream if self.divided is None else ShardedStream)(
            self.loaded.model,
            self.anatomy,
            scaled=self.settings.method == "esi" and self.settings.reduction != "square",
            reduction="square" if self.settings.method == "fisher" else self.settings.reduction,
            place=self.placed.accumulate_on,
            folder=self.folder,
            device=self.placed.turns,
            sigma=None if self.divided is None else self.divided.sigma,
        )
        self.estimator, relaxation = self._estimator(), self.settings.relaxation
        if not self.settings.stability:
            scorer = self._pass("all", self.items, relaxation)
            return scorer.scores(self.settings.method), scorer.state
        order = sorted(self.items, key=lambda item: (item.row, item.sample))
        rows = sorted({item.row for item in order})
        first = {row for place, row in enumerate(rows) if place % 2 == 0}
        halves = [
            self._stored("half-1", [item for item in order if item.row in first], relaxation),
            self._stored("half-2", [item for item in order if item.row not in first], relaxation),
        ]
        whole = _Merged(*halves)
        report = {"halves": agreement(halves[0][0], halves[1][0], total=self.anatomy.total)}
        if relaxation.kind != "softmax" and self.job.judged and not self.job.sampled:
            other = self._stored("seed", self.items, replace(relaxation, seed=relaxation.seed + 1))
            report["seeds"] = agreement(whole, other[0], total=self.anatomy.total)
        self.stability = report
        return whole, whole.state

    def _estimator(self) -> Estimator:
        if self.settings.objective in LIKELIHOODS or self.job.sampled:
            return LikelihoodEstimator()
        assert self.judge is not None
        judge: DifferentiableJudge = self.judge  # type: ignore[assignment]
        return RelaxedEstimator(
            self.loaded.model,
            self.loaded.tokenizer,
            judge,
            self.settings.relaxation,
            self.settings.judge_batch_size,
            self.placed.checkpoint,
        )

    def _pass(self, name: str, items: Sequence[Item], relaxation: RelaxationSettings) -> Scorer:
        """Sums over `items`, resumed where a killed run saved them."""
        assert self.stream is not None and self.estimator is not None
        if isinstance(self.estimator, RelaxedEstimator):
            self.estimator.relaxation = relaxation
        shared = isinstance(self.stream, ShardedStream)
        key, file = self._key(items, relaxation), kept.own_file(self.folder, name, shared=shared)
        earlier, current = kept.find(self.folder, name, key), distributed.gather(file)
        scorer = (ShardedScorer if shared else Scorer)(
            self.loaded.model,
            self.estimator,
            self.stream,
            items,
            batch_size=self.settings.batch_size,
            max_dropped=self.settings.max_dropped,
            checkpoint=self.placed.checkpoint,
            turns=self.turns,
            bases=[found for found in earlier if found.file not in current],
        )

        save = partial(kept.save, file, key)
        if isinstance(self.stream, ShardedStream):
            save = partial(kept.save_rows, file, key, self.stream)
        restore = partial(kept.restored, file, key, self.stream)
        what = "scoring" if name == "all" else f"scoring {name}"
        with self.report(what, "answers" if self.job.sampled else "prompts") as progress:
            scorer.run(save, lambda _: restore(), self.job.save_every, progress)
        return scorer

    def _key(self, items: Sequence[Item], relaxation: RelaxationSettings) -> str:
        """Of all that decides the sums, but for where they are made."""
        settings = asdict(self.settings) | {"relaxation": asdict(relaxation)}
        for without in ("stability", "accumulate_on", "checkpoint", "placement"):
            del settings[without]
        judged_by = self.judge.describe() if self.judge is not None else None
        return hash_of(fingerprint_of(self.loaded), judged_by, settings, [asdict(item) for item in items])

    def _stored(
        self, name: str, items: Sequence[Item], relaxation: RelaxationSettings
    ) -> tuple[Mapping[str, torch.Tensor], ScoreState]:
        """Means over `items`, in a file of their own; a pass that an earlier run finished is not made again."""
        file = self.folder / f"partial-{name}-done.safetensors"
        key = self._key(items, relaxation)
        if not distributed.from_first(lambda: kept.load(file, key) is not None):
            scorer = self._pass(name, items, relaxation)
            scores = scorer.scores(self.settings.method)
            shapes = {entry.name: entry.layout.shape for entry in self.anatomy.eligible}
            kept.save_together(file, key, scorer.state, shapes, scores)
        found = kept.load(file, key)
        assert found is not None
        return found.tensors, found.state

    def _wanda(self) -> tuple[Mapping[str, torch.Tensor], ScoreState]:
        state = ScoreState(used=len(self.items))
        items = sorted(self.items, key=lambda item: (-item.tokens, item.row))
        with torch.no_grad(), InputNorms(self.loaded.model, self.anatomy) as norms:
            for start in distributed.mine(range(0, len(items), self.settings.batch_size)):
                batch = items[start : start + self.settings.batch_size]
                longest = batch[0].tokens
                tokens = torch.zeros((len(batch), longest), dtype=torch.long)
                mask = torch.zeros((len(batch), longest), dtype=torch.bool)
                for row, item in enumerate(batch):
                    tokens[row, : item.tokens] = torch.tensor([*item.prompt_ids, *item.answer_ids])
                    mask[row, : item.tokens] = True
                device = self.loaded.model.device
                norms.count(mask.to(device))
                self.loaded.model(input_ids=tokens.to(device), attention_mask=mask.long().to(device), use_cache=False)
        norms.merge()
        return dict(norms.scores()), state

    def info(self, scores: Mapping[str, torch.Tensor], state: ScoreState) -> dict[str, Any]:
        """The document score.json."""
        sigma = self.stream.sigma if self.stream is not None else {}
        return score_info(
            self.loaded,
            self.judge,
            self.prompts,
            self.answers,
            self.job,
            state,
            scores,
            self.anatomy,
            sigma=sigma,
            cut=self.cut,
            values=self.values,
            extra={
                "batch_plan": state.plan,
                "equal_tokenizers": self.estimator.equal if isinstance(self.estimator, RelaxedEstimator) else None,
                "placement": self.placed.record(),
                **({"stability": self.stability} if self.stability is not None else {}),
            },
        )

    def clean(self) -> None:
        """Remove what only an interrupted run needs."""
        if self.stream is not None:
            self.stream.close()
        distributed.barrier()
        if distributed.current().first:
            for pattern in (kept.PATTERN, KEY, KEPT, VERDICTS):
                for file in self.folder.glob(pattern):
                    file.unlink()


class _Merged(Mapping[str, torch.Tensor]):
    """Mean scores of two halves as one, made tensor by tensor."""

    def __init__(
        self, a: tuple[Mapping[str, torch.Tensor], ScoreState], b: tuple[Mapping[str, torch.Tensor], ScoreState]
    ) -> None:
        self.a, self.b, used = a[0], b[0], a[1].used + b[1].used
        self.shares = (a[1].used / used, b[1].used / used)
        dropped, values = a[1].dropped + b[1].dropped, a[1].values | b[1].values
        self.state = ScoreState(plan=a[1].plan + b[1].plan, used=used, dropped=dropped, values=values)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.a[name] * self.shares[0] + self.b[name] * self.shares[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.a)

    def __len__(self) -> int:
        return len(self.a)

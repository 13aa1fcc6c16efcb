"""demo: the whole method on small harmless models made on the spot, with the public commands' own code.

    data -> base, guard -> score -> masks -> SET (top, random, bottom)
            aligned     -> score -> masks -> task tuning: unprotected, SPA 1 %, SPA 10 %, random 10 % frozen

Every stage leaves files that say it is finished, so a second run takes up where the
first stopped. Success is read by the grammar's parser, never by the guard.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safecrit.api.demo_report import ParserJudge, draw, guard_agreement, measure, print_table
from safecrit.api.judging import JudgeChoice, load_differentiable
from safecrit.api.perturb import PerturbJob, run_perturb, table
from safecrit.api.report import write_report
from safecrit.api.score import run_score
from safecrit.api.scorejob import ScoreJob, ScoreSettings
from safecrit.api.train import TrainJob, run_training
from safecrit.demo import zoo
from safecrit.demo.grammar import data_files
from safecrit.demo.guard import guard_tokenizer, train_guard
from safecrit.demo.settings import DemoSettings
from safecrit.files import write_json, write_text
from safecrit.generation import GenerationSettings
from safecrit.judges import Judge
from safecrit.maskfile import Mask
from safecrit.mixture import mix
from safecrit.models import load_model
from safecrit.outputs import open_output
from safecrit.progress import Progress
from safecrit.relaxation import RelaxationSettings
from safecrit.scorefile import Scores
from safecrit.selection import SelectionSettings, select
from safecrit.traindata import read_examples
from safecrit.trainloop import TrainSettings, train

DISCLAIMER = "This checks the mechanics; it is no evidence about your model."


class Output(Protocol):
    """Where the demo speaks: the command line's sink."""

    def note(self, message: str) -> None: ...  # noqa: D102
    def line(self, text: str = "") -> None: ...  # noqa: D102
    def table(self, title: str, columns: Any, rows: Any) -> None: ...  # noqa: D102
    def progress(self, what: str, unit: str) -> Progress: ...  # noqa: D102
    def result(self, value: dict[str, Any]) -> None: ...  # noqa: D102


def run_demo(folder: Path, *, settings: DemoSettings, program: str, overwrite: bool, sink: Output) -> dict[str, Any]:
    """Run or finish the demo in `folder`; the content of its results.json.

    `program` is how the user calls safecrit, for the command printed at the end.
    """
    config = json.loads(json.dumps(asdict(settings)))
    output = open_output(folder, "demo", config, overwrite=overwrite, reuse_finished=True)
    demo = Demo(output.path, settings, sink)
    demo.prepare()
    demo.enhance()
    demo.adapt()
    demo.explain()
    results = demo.report()
    output.finish()
    sink.line()
    sink.line(f"Everything is in {folder}: models/, data/, scores/, masks/, figures/, results.json, page/report.html.")
    sink.line(DISCLAIMER)
    models = folder / "models"
    sink.line(
        f"Next: {program} eval {models / 'set_top'} --baseline {models / 'base'} --judge {models / 'guard'} "
        f"--prompts {folder / 'data' / 'harmful_test.jsonl'} --limit 200 --max-new-tokens 40"
    )
    sink.result(results)
    return results


class Demo:
    """One run of the demo in its folder."""

    def __init__(self, folder: Path, settings: DemoSettings, sink: Output) -> None:
        self.folder, self.settings, self.sink = folder, settings, sink
        self.models, self.data = folder / "models", folder / "data"
        self.scores, self.masks = folder / "scores", folder / "masks"
        self.figures: dict[str, dict[str, Any]] = {}

    def prepare(self) -> None:
        """Data files, base model and guard; then the first figure."""
        self.stage("data", self.data / "task.jsonl", self._write_data)
        self._train_model("base", self._base)
        self._measure("base", base="base", mask=None, mode=None)
        self._train_model("guard", self._guard)

    def enhance(self) -> None:
        """SET on the base: the top share by ESI against random and bottom ones."""
        self._score("base")
        for name in ("top", "random", "bottom"):
            self._mask("base", f"base_{name}", name, self.settings.small_share)
        for name in ("top", "random", "bottom"):
            job = TrainJob(
                mode="set",
                model=str(self.models / "base"),
                mask=self.masks / f"base_{name}.safetensors",
                data=str(self.data / "refusals.jsonl"),
                retain=str(self.data / "retain.jsonl"),
                retain_share=self.settings.retain_share,
                settings=self._training(self.settings.set_steps, self.settings.set_lr, self.settings.set_rows),
            )
            self._train(f"set_{name}", job)
            self._measure(f"set_{name}", base="base", mask=f"base_{name}", mode="set")

    def adapt(self) -> None:
        """Task tuning of the aligned model, with and without protection."""
        self._train_model("aligned", self._aligned)
        self._measure("aligned", base="aligned", mask=None, mode=None)
        self._score("aligned")
        small, large = self.settings.small_share, self.settings.large_share
        for name, mode, share in (("top_1", "top", small), ("top_10", "top", large), ("random_10", "random", large)):
            self._mask("aligned", f"aligned_{name}", mode, share)
        self.stage("tuned", self.models / "tuned" / "config.json", self._tune_unprotected)
        self._measure("tuned", base="aligned", mask=None, mode=None)
        for name, mask in (("spa_1", "top_1"), ("spa_10", "top_10"), ("tuned_random_10", "random_10")):
            job = TrainJob(
                mode="spa",
                model=str(self.models / "aligned"),
                mask=self.masks / f"aligned_{mask}.safetensors",
                data=str(self.data / "task.jsonl"),
                settings=self._task_training(),
            )
            self._train(name, job)
            self._measure(name, base="aligned", mask=f"aligned_{mask}", mode="spa")

    def explain(self) -> None:
        """The causal test on the aligned model, how stable its scores are, and the page."""
        self._score("aligned", into="aligned_stability", stability=True)
        mask = self.masks / "aligned_top_1.safetensors"
        guard = JudgeChoice(name=str(self.models / "guard"), device="cpu")
        job = PerturbJob(
            model=str(self.models / "aligned"),
            mask=mask,
            judge=guard,
            prompts=str(self.data / "harmful_test.jsonl"),
            task=str(self.data / "benign_test.jsonl"),
            scores=self.scores / "aligned",
            noise=self.settings.noise,
            limit=self.settings.perturbed_prompts,
            seed=self.settings.seed,
            device="cpu",
            generation=GenerationSettings(
                max_new_tokens=self.settings.max_new_tokens, batch_size=self.settings.eval_rows
            ),
        )

        def judges() -> tuple[Judge, Judge]:
            return ParserJudge(load_differentiable(guard)), ParserJudge()

        folder, page = self.folder / "perturbation", self.folder / "page"
        self.stage(
            "perturbation", folder / "results.json", lambda: run_perturb(job, folder, self.sink.progress, judges)
        )
        sources = [self.scores / "aligned_stability", mask, folder]
        self.stage("report", page / "report.html", lambda: write_report(sources, page))

    def report(self) -> dict[str, Any]:
        """Table, pictures and results.json."""
        agreement = guard_agreement(
            self.folder / "evaluations", load_differentiable(JudgeChoice(name=str(self.models / "guard"), device="cpu"))
        )
        timings = self._timings()
        results = {name: {k: v for k, v in row.items() if k != "answers"} for name, row in self.figures.items()}
        perturbation = json.loads((self.folder / "perturbation" / "results.json").read_text(encoding="utf-8"))
        stability = Scores.load(self.scores / "aligned_stability").info["stability"]
        results |= {
            "perturbation": {"arms": perturbation["arms"], "models": perturbation["models"]},
            "stability": stability,
            "timings": timings,
            "guard": agreement,
            "settings": asdict(self.settings),
        }
        draw(self.folder, self.figures)
        print_table(self.sink, self.figures, agreement, timings)
        self.sink.line()
        count = perturbation["settings"]["mask"]["count"]
        self.sink.table(f"Noise of r sigma on {count:,} weights of the aligned model", *table(perturbation))
        for kind, found in stability.items():
            for row in [row for row in found["shares"] if row["share"] == self.settings.small_share]:
                self.sink.line(
                    f"Stability between {kind}: at {100 * row['share']:g} % an overlap (IoU) of {row['iou']:.2f}, "
                    f"{row['chance']:.3f} by chance."
                )
        write_json(self.folder / "results.json", results)
        return results

    def stage(self, name: str, done: Path, make: Callable[[], object]) -> None:
        """Run `make` unless `done` exists, and keep the time it took in timings.json."""
        if done.exists():
            return
        start = time.monotonic()
        make()
        write_json(self.folder / "timings.json", self._timings() | {name: round(time.monotonic() - start, 2)})

    def _timings(self) -> dict[str, float]:
        file = self.folder / "timings.json"
        found: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return found

    def _write_data(self) -> None:
        for name, rows in sorted(data_files(self.settings.held_out).items()):  # task.jsonl, the stage's mark, last
            write_text(self.data / name, "\n".join(json.dumps(row) for row in rows) + "\n")

    def _base(self, progress: Progress) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        tokenizer = zoo.chat_tokenizer(self.settings)
        return zoo.train_base(self.settings, tokenizer, progress), tokenizer

    def _guard(self, progress: Progress) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        tokenizer = guard_tokenizer(self.settings)
        return train_guard(self.settings, tokenizer, progress), tokenizer

    def _aligned(self, progress: Progress) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        base = load_model(self.models / "base", device="cpu")
        return zoo.train_aligned(self.settings, base.tokenizer, base.model, progress), base.tokenizer

    def _training(self, steps: int, rate: float, rows: int) -> TrainSettings:
        return TrainSettings(
            max_steps=steps,
            learning_rate=rate,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=1,
            warmup_ratio=self.settings.warmup_share,
            seed=self.settings.seed,
        )

    def _task_training(self) -> TrainSettings:
        return self._training(self.settings.task_steps, self.settings.task_lr, self.settings.task_rows)

    def _train_model(
        self, name: str, make: Callable[[Progress], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    ) -> None:
        def run() -> None:
            with self.sink.progress(f"training {name}", "steps") as progress:
                model, tokenizer = make(progress)
            self._save(name, model, tokenizer)

        self.stage(name, self.models / name / "config.json", run)

    def _save(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write a model folder beside its place, then move it there whole."""
        unfinished = self.models / f".{name}.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        shutil.rmtree(self.models / name, ignore_errors=True)
        unfinished.rename(self.models / name)

    def _score(self, name: str, *, into: str | None = None, stability: bool = False) -> None:
        job = ScoreJob(
            model=str(self.models / name),
            judge=JudgeChoice(name=str(self.models / "guard"), device="cpu"),
            prompts=str(self.data / "harmful_train.jsonl"),
            limit=self.settings.score_prompts,
            device="cpu",
            generation=GenerationSettings(max_new_tokens=self.settings.max_new_tokens),
            scoring=ScoreSettings(
                stability=stability,
                relaxation=RelaxationSettings(
                    tau=self.settings.tau, draws=self.settings.draws, seed=self.settings.seed
                ),
            ),
        )
        folder = self.scores / (into or name)
        self.stage(f"score_{into or name}", folder / "score.json", lambda: run_score(job, folder, self.sink.progress))

    def _mask(self, scored: str, name: str, mode: str, share: float) -> None:
        file = self.masks / f"{name}.safetensors"
        settings = SelectionSettings(mode=mode, share=share, seed=self.settings.seed)
        self.stage(f"mask_{name}", file, lambda: select(Scores.load(self.scores / scored), settings).save(file))

    def _train(self, name: str, job: TrainJob) -> None:
        folder = self.models / name
        job = replace(job, device="cpu")
        self.stage(name, folder / "config.json", lambda: run_training(job, folder, self._named(name)))

    def _named(self, name: str) -> Callable[[str, str], Progress]:
        return lambda what, unit: self.sink.progress(f"{what} {name}", unit)

    def _tune_unprotected(self) -> None:
        """The same task tuning with nothing frozen: what SPA is compared with."""
        settings = self._task_training()
        loaded = load_model(self.models / "aligned", device="cpu")
        examples = read_examples(self.data / "task.jsonl").examples
        data = mix(
            loaded.tokenizer,
            examples,
            (),
            retain_share=0.0,
            count=settings.examples,
            max_length=settings.max_length,
            seed=self.settings.seed,
        )
        with self.sink.progress("training tuned", "steps") as progress:
            train(loaded, data, settings, lambda step, total, loss: progress(step, total, f"loss {loss:.3f}"), None)
        self._save("tuned", loaded.model, loaded.tokenizer)

    def _measure(self, name: str, *, base: str, mask: str | None, mode: Literal["set", "spa"] | None) -> None:
        file = self.folder / "evaluations" / f"{name}.json"

        def run() -> None:
            selected = Mask.load(self.masks / f"{mask}.safetensors") if mask else None
            row = measure(self.models / name, self.models / base, selected, mode, self.data, self.settings, self.sink)
            write_json(file, row)

        self.stage(f"eval_{name}", file, run)
        row: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        self.figures[name] = dict(row)
        self.sink.note(
            f"{name}: ASR {100 * row['asr']:.1f} %, utility {100 * row['utility']:.1f} %, "
            f"over-refusal {100 * row['over_refusal']:.1f} %, task loss {row['task_loss']:.3f}"
        )

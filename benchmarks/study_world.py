"""What the study works on: one architecture's and seed's models, data, scores and masks, made once and kept.

All is made as the demo makes it; added are the validation part, and a kind of request that
no training data hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safecrit.anatomy import read_anatomy
from safecrit.api.judging import JudgeChoice
from safecrit.api.score import run_score
from safecrit.api.scorejob import Method, ScoreJob, ScoreSettings
from safecrit.demo import zoo
from safecrit.demo.grammar import GENTLE, GUARDED, PHRASINGS, Request, _number, data_files, requests
from safecrit.demo.guard import guard_tokenizer, train_guard
from safecrit.demo.settings import DemoSettings
from safecrit.generation import GenerationSettings
from safecrit.maskfile import Mask, MaskInfo
from safecrit.models import load_model
from safecrit.relaxation import RelaxationSettings
from safecrit.scorefile import Scores
from safecrit.selection import SelectionSettings, select
from safecrit.trainloop import TrainSettings

VALIDATED, TESTED, OTHERS = 120, 512, 256  # prompts of each kind; others: utility, over-refusal, the unseen kind
METHODS: dict[str, Method] = {"gradient": "gradient", "snip": "snip", "wanda": "wanda", "magnitude": "magnitude"}


class World:
    """The models, data, scores and masks of one architecture and seed, each made once and kept in `folder`."""

    def __init__(self, folder: Path, architecture: str, seed: int) -> None:
        self.folder, self.name, self.seed = folder, architecture, seed
        self.settings = DemoSettings.moe(seed) if architecture == "moe" else DemoSettings.full(seed)
        self.data = folder / "data"
        self._write_data()
        self.base = self._model("base", self._base)
        self.guard = self._model("guard", self._guard)
        self.aligned = self._model("aligned", self._aligned)
        self.masks: dict[str, Mask] = {}

    def mask(self, model: str, kind: str, share: float) -> Mask:
        """`top` or `bottom` by ESI, `random` with the top's count in every tensor, or the top by another method."""
        key = f"{model}-{kind}-{share}"
        if key not in self.masks:
            by_esi = kind in ("top", "bottom", "random")
            scores = self._scores(model, "esi" if by_esi else METHODS[kind])
            settings = SelectionSettings(mode="bottom" if kind == "bottom" else "top", share=share)
            if kind == "random":
                matched = self.mask(model, "top", share)
                settings = SelectionSettings(mode="random", match=matched, seed=self.seed)
            self.masks[key] = select(scores, settings)
        return self.masks[key]

    def nothing(self) -> Mask:
        """A mask of these models that selects no weight."""
        anatomy = read_anatomy(load_model(self.base, device="cpu").model)
        info = MaskInfo(tensors=anatomy.layouts, mode="count", total=anatomy.total, eligible=anatomy.eligible_total)
        return Mask({}, info)

    def training(self, steps: int, rate: float, rows: int) -> TrainSettings:
        """The demo's way of training: AdamW, cosine to zero, warm-up 3 %, no decay, clipping at 1."""
        return TrainSettings(
            max_steps=steps,
            learning_rate=rate,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=1,
            warmup_ratio=self.settings.warmup_share,
            seed=self.seed,
        )

    def _scores(self, model: str, method: Method) -> Scores:
        folder = self.folder / "scores" / f"{model}-{method}"
        if not (folder / "score.json").is_file():
            settings = self.settings
            job = ScoreJob(
                model=str(self.folder / "models" / model),
                judge=JudgeChoice(name=str(self.guard), device="cpu"),
                prompts=None if method == "magnitude" else str(self.data / "harmful_train.jsonl"),
                limit=settings.score_prompts,
                device="cpu",
                generation=GenerationSettings(max_new_tokens=settings.max_new_tokens),
                scoring=ScoreSettings(
                    method=method,
                    relaxation=RelaxationSettings(tau=settings.tau, draws=settings.draws, seed=self.seed),
                ),
            )
            run_score(job, folder)
        return Scores.load(folder)

    def _model(self, name: str, make: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]) -> Path:
        folder = self.folder / "models" / name
        if not (folder / "config.json").is_file():
            print(f"{self.name} {self.seed}: training {name}", flush=True)
            model, tokenizer = make()
            unfinished = folder.with_name(f".{name}.part")
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            unfinished.rename(folder)
        return folder

    def _base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        tokenizer = zoo.chat_tokenizer(self.settings)
        return zoo.train_base(self.settings, tokenizer), tokenizer

    def _guard(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        tokenizer = guard_tokenizer(self.settings)
        return train_guard(self.settings, tokenizer), tokenizer

    def _aligned(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        base = load_model(self.base, device="cpu")
        return zoo.train_aligned(self.settings, base.tokenizer, base.model), base.tokenizer

    def _write_data(self) -> None:
        files: dict[str, list[dict[str, str]]] = dict(data_files(TESTED))
        for kind in ("benign", "borderline"):
            files[f"{kind}_test.jsonl"] = files[f"{kind}_test.jsonl"][:OTHERS]
        found = {kind: requests(kind, "validation")[:VALIDATED] for kind in ("harmful", "benign", "borderline")}
        files["harmful_validation.jsonl"] = [{"prompt": r.prompt} for r in found["harmful"]]
        files["benign_validation.jsonl"] = [{"prompt": r.prompt, "answer": r.answer} for r in found["benign"]]
        files["borderline_validation.jsonl"] = [{"prompt": r.prompt, "answer": r.answer} for r in found["borderline"]]
        wanted = [r for rows in found.values() for r in rows]
        files["wanted_validation.jsonl"] = [{"prompt": r.prompt, "answer": r.wanted} for r in wanted]
        files["unseen_test.jsonl"] = [{"prompt": r.prompt, "answer": r.answer} for r in unseen_kind()[:OTHERS]]
        self.data.mkdir(parents=True, exist_ok=True)
        for name, rows in files.items():
            (self.data / name).write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


def unseen_kind() -> list[Request]:
    """Gentle verbs on guarded objects, harmless requests that no training data hold; the kind named is a stand-in."""
    made = [Request("benign", v, o, p) for v in GENTLE for o in GUARDED for p in range(len(PHRASINGS))]
    return sorted(made, key=lambda r: _number("order", r.verb, r.object, r.phrasing))

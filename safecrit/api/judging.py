"""Judges by name: a preset, a guard's or classifier's folder or Hub id, or `refusal`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safecrit.errors import SafecritError
from safecrit.judges import DifferentiableJudge, Judge
from safecrit.judges.classifier import ClassifierJudge, ClassifierSettings
from safecrit.judges.endpoint import EndpointJudge
from safecrit.judges.guard import GuardJudge, GuardSettings
from safecrit.judges.labels import LabelFile
from safecrit.judges.presets import (
    PRESETS,
    GuardOptions,
    Preset,
    Side,
    find_preset,
    guard_settings,
    preset_named,
)
from safecrit.judges.refusal import RefusalJudge
from safecrit.models import LoadedModel, context_window, load_classifier, load_model, read_config, resolve_folder

LoadGuard = Callable[..., LoadedModel]
REFUSAL, LABELS, OPENAI = "refusal", "labels:", "openai:"


@dataclass(frozen=True, kw_only=True)
class JudgeChoice:
    """Which judge, and how it is asked.

    `preset`: the format by a preset's name, where `name` (a preset, folder or Hub id) does not tell it.
    `guard`: what wins over the preset's settings; a classifier takes its words as labels' names.
    `patterns`: further regular expressions of refusals, for `refusal` and wherever refusals are told.
    `controversial`: the side of a guard's third verdict. `threshold`: a reward model's zero point.
    """

    name: str
    preset: str | None = None
    kind: Literal["auto", "guard", "classifier"] = "auto"
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    guard: GuardOptions = GuardOptions()
    patterns: tuple[str, ...] = ()
    controversial: Side = "unsafe"
    threshold: float = 0.0
    base_url: str | None = None
    trust_remote_code: bool = False

    @property
    def format(self) -> Preset | None:
        """The preset that says how the judge is asked, if any."""
        return preset_named(self.preset) if self.preset is not None else find_preset(self.name)

    @property
    def is_model(self) -> bool:
        """Whether it is a model that is loaded here."""
        return self.name != REFUSAL and not self.name.startswith((LABELS, OPENAI))

    def settings(self) -> GuardSettings:
        """How a guard is asked; SafecritError for words that contradict one another."""
        return guard_settings(self.format, self.guard, self.controversial)

    @property
    def model(self) -> str:
        """The folder or Hub id; a preset's name is its first Hub id, unless a folder of that name is there."""
        if self.name in PRESETS and not Path(self.name).is_dir():
            return PRESETS[self.name].hub_ids[0]
        return self.name


def load_differentiable(choice: JudgeChoice, load_guard: LoadGuard = load_model) -> DifferentiableJudge:
    """A judge with a gradient; `refusal` has none and is refused here. load_guard: takes `load_model`'s place."""
    if choice.name == REFUSAL:
        raise SafecritError("--judge refusal has no gradient to score with. Name a guard model's folder or Hub id.")
    kind, preset, model = _kind(choice), choice.format, choice.model
    preset = preset if preset is not None and preset.kind == kind else None
    load = load_classifier if kind == "classifier" else load_guard
    loaded = load(
        model,
        revision=choice.revision,
        device=choice.device,
        dtype=choice.dtype,
        trust_remote_code=choice.trust_remote_code,
    )
    settings = guard_settings(preset, choice.guard, choice.controversial)
    if kind == "classifier":
        words = choice.guard if preset is None else settings
        return ClassifierJudge(loaded, _classifier_settings(settings, words, choice.threshold))
    if preset is not None and settings.template is None and loaded.tokenizer.chat_template is None:
        raise SafecritError(
            f"{model}: its tokenizer has no chat template, which is the format of {preset.name}. Download the whole "
            f"model again ({preset.hub_ids[0]}), or give the text with --judge-template."
        )
    _fill_attention_chunk(loaded)
    return GuardJudge(loaded, settings)


def load_judge(choice: JudgeChoice, load_guard: LoadGuard = load_model) -> Judge:
    """Any judge of answers. load_guard: takes `load_model`'s place for a guard."""
    if choice.name == REFUSAL:
        return RefusalJudge(choice.patterns)
    if choice.name.startswith(LABELS):
        return LabelFile(choice.name.removeprefix(LABELS))
    if choice.name.startswith(OPENAI):
        if choice.base_url is None:
            raise SafecritError(f"--judge {choice.name} needs --judge-base-url, such as http://localhost:8000/v1.")
        return EndpointJudge(choice.name.removeprefix(OPENAI), choice.base_url)
    return load_differentiable(choice, load_guard)


def find_judge(choice: JudgeChoice, *, differentiable: bool = False) -> None:
    """Raise SafecritError where there is no such judge (or none with a gradient), before anything is loaded."""
    if choice.name == REFUSAL:
        if differentiable:
            load_differentiable(choice)
        return
    if choice.name.startswith((LABELS, OPENAI)):
        if differentiable:
            raise SafecritError(
                f"--judge {choice.name} has no gradient to score with. Use --estimator score-function, or name a "
                "guard's or classifier's folder or Hub id."
            )
        load_judge(choice)
        return
    choice.settings()  # words that contradict one another are told before anything is loaded
    known = choice.format is not None
    try:
        resolve_folder(choice.model, revision=choice.revision)
    except SafecritError as error:
        if known:
            raise  # gated, say, or no network
        raise SafecritError(
            f"--judge {choice.name}: unknown judge. Use {'' if differentiable else 'refusal, '}a preset "
            f"({', '.join(PRESETS)}), or a guard's or classifier's folder or Hub id. ({error})"
        ) from error


def _kind(choice: JudgeChoice) -> str:
    """`guard` or `classifier`: as asked for, as the preset says, or as the model's own architecture says."""
    if choice.kind != "auto":
        return choice.kind
    if choice.format is not None:
        return choice.format.kind
    architectures = read_config(resolve_folder(choice.model, revision=choice.revision)).get("architectures") or []
    classifies = any(str(name).endswith("ForSequenceClassification") for name in architectures)
    return "classifier" if classifies else "guard"


def _classifier_settings(
    guard: GuardSettings, words: GuardSettings | GuardOptions, threshold: float
) -> ClassifierSettings:
    return ClassifierSettings(
        safe_words=words.safe_words or (),
        unsafe_words=words.unsafe_words or (),
        template=guard.template,
        template_kwargs=guard.template_kwargs,
        threshold=threshold,
        objective=guard.objective,
        batch_size=guard.batch_size,
    )


def _fill_attention_chunk(loaded: LoadedModel) -> None:
    """Llama Guard 4's file leaves the length of Llama 4's attention chunks empty: one chunk for the whole window."""
    text = loaded.model.config.get_text_config()
    if getattr(text, "attention_chunk_size", 0) is None:
        text.attention_chunk_size = context_window(loaded.model)

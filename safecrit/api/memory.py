"""score for models in memory: no files but a score folder, temporary unless asked for."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safecrit.api.judging import JudgeChoice, load_differentiable
from safecrit.api.score import score_loaded
from safecrit.api.scorejob import Method, ScoreJob, ScoreSettings
from safecrit.errors import SafecritError
from safecrit.generation import GenerationSettings
from safecrit.judges import DifferentiableJudge
from safecrit.judges.classifier import ClassifierJudge
from safecrit.judges.guard import GuardJudge
from safecrit.judges.presets import GuardOptions, guard_settings
from safecrit.maskfile import Mask
from safecrit.models import NO_FOLDER, LoadedModel
from safecrit.prompts import Prompt, prompts_from_texts
from safecrit.relaxation import RelaxationSettings
from safecrit.scorefile import Scores
from safecrit.selection import SelectionSettings, select

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class MemoryScores(Scores):
    """Scores with selection at hand."""

    def top(self, share: str) -> Mask:
        """The mask of the largest |scores|: a share of all weights such as "1%"."""
        return select(self, SelectionSettings(mode="top", share=share))

    def bottom(self, share: str) -> Mask:
        """The mask of the smallest |scores|."""
        return select(self, SelectionSettings(mode="bottom", share=share))

    def random(self, share: str, seed: int = 0) -> Mask:
        """A mask of eligible weights drawn uniformly: the control."""
        return select(self, SelectionSettings(mode="random", share=share, seed=seed))


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    judge: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase] | GuardJudge | ClassifierJudge,
    prompts: Sequence[str | Prompt],
    guard: GuardOptions | None = None,
    method: Method = "esi",
    relaxation: RelaxationSettings | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    output: str | Path | None = None,
) -> MemoryScores:
    """Expected Safety Impact of every eligible weight of a model in memory (docs/method.md, sections 1 and 2).

    judge: a guard's folder or Hub id, a (model, tokenizer) pair, or a judge; guard: how the former two are asked.
    prompts: user turns as texts, or Prompt objects. The judge is frozen. Scores are stored in `output`,
    or in a temporary folder that lives as long as the result. The mask carries no
    fingerprint, as nothing says that the weights in memory are those of a file.
    """
    reader: DifferentiableJudge
    if isinstance(judge, tuple):
        reader = GuardJudge(
            LoadedModel(model=judge[0], tokenizer=judge[1], folder=NO_FOLDER, id="memory", revision=None),
            guard_settings(None, guard or GuardOptions()),
        )
    elif not isinstance(judge, GuardJudge | ClassifierJudge):
        reader = load_differentiable(JudgeChoice(name=str(judge), guard=guard or GuardOptions()))
    else:
        reader = judge
    texts = prompts_from_texts([entry if isinstance(entry, str) else "" for entry in prompts])
    asked = [text if isinstance(entry, str) else entry for entry, text in zip(prompts, texts, strict=True)]
    name = str(getattr(model.config, "_name_or_path", "") or "memory")
    loaded = LoadedModel(model=model, tokenizer=tokenizer, folder=NO_FOLDER, id=name, revision=None)
    job = ScoreJob(
        model=name,
        judge=JudgeChoice(name=reader.name),
        prompts="",
        generation=GenerationSettings(max_new_tokens=max_new_tokens, batch_size=batch_size),
        scoring=ScoreSettings(method=method, relaxation=relaxation or RelaxationSettings(), batch_size=batch_size),
    )
    if output is not None and Path(output).exists() and any(Path(output).iterdir()):
        raise SafecritError(f"{output}: is not empty. Choose another output folder.")
    folder = Path(output) if output is not None else Path(tempfile.mkdtemp(prefix="safecrit-"))
    training = model.training
    model.eval()
    try:
        score_loaded(loaded, reader, asked, job, folder)
    except BaseException:
        if output is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        model.train(training)
    scores = MemoryScores.load(folder)
    if output is None:
        weakref.finalize(scores, shutil.rmtree, folder, ignore_errors=True)
    return scores

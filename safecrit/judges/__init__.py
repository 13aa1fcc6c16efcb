"""Judges: what says whether an answer is safe. One file a kind; this one holds what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from safecrit.bridge import Vocabulary
    from safecrit.judges.conversation import JudgeInput, JudgeSettings
    from safecrit.models import LoadedModel

Label = Literal["safe", "unsafe", "error"]


@dataclass(frozen=True)
class Verdict:
    """A judge's word on one answer.

    `label` is "error" where no verdict could be had: an error is never counted
    as safe. `refused` is None where the judge cannot tell. `raw` is what the
    judge said. `score`, where it gives a number, is larger for what is safer: a model's
    log-odds of safe (natural logarithm), a label file's own number, or 3 - a rubric's rating.
    """

    label: Label
    refused: bool | None
    raw: str
    score: float | None = None


class Judge(Protocol):
    """Anything that judges pairs of prompt text and answer text."""

    name: str

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """One verdict a pair, in order."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the judge was, for the record, as plain JSON values: `id`, `kind` and how it was asked."""
        ...


class DifferentiableJudge(Judge, Protocol):
    """A judge whose verdict has a gradient to the embeddings of what it reads."""

    loaded: LoadedModel
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary

    @property
    def settings(self) -> JudgeSettings:
        """How the judge is asked."""
        ...

    def read(self, prompt: str, answer: str, answer_ids: Sequence[int] | None = None) -> JudgeInput:
        """One conversation in the judge's tokens."""
        ...

    def fits(self, entry: JudgeInput) -> bool:
        """Whether it fits the judge's window."""
        ...

    def embed(self, entry: JudgeInput) -> torch.Tensor:
        """Its input embeddings, [len(ids), d], without graph."""
        ...

    def verdicts(self, inputs: Sequence[JudgeInput], embeddings: Sequence[torch.Tensor]) -> torch.Tensor:
        """Log p of safe and of unsafe, float32 (or wider) [n, 2], with a graph to `embeddings`."""
        ...

    def objective(self, verdicts: torch.Tensor) -> torch.Tensor:
        """s of each conversation, [n], from its verdicts."""
        ...

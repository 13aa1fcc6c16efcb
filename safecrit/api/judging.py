"""Judges by name: a guard's folder or Hub id, or `refusal`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safecrit.errors import SafecritError
from safecrit.fingerprint import fingerprint
from safecrit.judges import Judge
from safecrit.judges.guard import GuardJudge, GuardSettings
from safecrit.judges.refusal import RefusalJudge
from safecrit.models import NO_FOLDER, load_model, resolve_folder


@dataclass(frozen=True, kw_only=True)
class JudgeChoice:
    """Which judge, and how it is asked."""

    name: str
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    guard: GuardSettings = GuardSettings()
    trust_remote_code: bool = False


def load_guard(choice: JudgeChoice) -> GuardJudge:
    """A judge with a gradient; `refusal` has none and is refused here."""
    if choice.name == "refusal":
        raise SafecritError("--judge refusal has no gradient to score with. Name a guard model's folder or Hub id.")
    loaded = load_model(
        choice.name,
        revision=choice.revision,
        device=choice.device,
        dtype=choice.dtype,
        trust_remote_code=choice.trust_remote_code,
    )
    return GuardJudge(loaded, choice.guard)


def load_judge(choice: JudgeChoice) -> Judge:
    """Any judge of answers."""
    if choice.name == "refusal":
        return RefusalJudge()
    return load_guard(choice)


def find_judge(choice: JudgeChoice) -> None:
    """Raise SafecritError where there is no such judge, before anything is loaded."""
    if choice.name == "refusal":
        return
    try:
        resolve_folder(choice.name, revision=choice.revision)
    except SafecritError as error:
        raise SafecritError(
            f"--judge {choice.name}: unknown judge. Use refusal, a guard model's folder or a Hub id. ({error})"
        ) from error


def describe_judge(judge: Judge) -> dict[str, Any]:
    """What a judge was, for the record: name, fingerprint, how it was asked."""
    if not isinstance(judge, GuardJudge):
        return {"id": judge.name, "kind": "phrases"}
    settings = judge.settings
    folder = judge.loaded.folder
    return {
        "id": judge.name,
        "kind": "guard",
        "fingerprint": fingerprint(folder) if folder != NO_FOLDER else "",
        "safe_word": settings.safe_word,
        "unsafe_word": settings.unsafe_word,
        "verdict_prefix": settings.verdict_prefix,
        "objective": settings.objective,
    }

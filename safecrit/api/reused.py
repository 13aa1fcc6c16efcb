"""Warnings where an evaluation uses again what scoring used: its prompts, its judge.

A model that was changed with a mask is judged too kindly by the prompts and the
judge that the mask was made with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecrit.evaluation import EvalPrompts
from safecrit.maskfile import Mask
from safecrit.scorefile import Scores

if TYPE_CHECKING:
    from safecrit.api.evaluate import EvalJob


@dataclass(frozen=True)
class _Scoring:
    """Where it was read, the hashes of its prompts, the description of its judge."""

    where: str
    hashes: frozenset[str]
    judge: Mapping[str, Any]


def reuse_warnings(job: EvalJob, prompts: EvalPrompts, judge: Mapping[str, Any]) -> list[str]:
    """One sentence for each mask, score folder or model whose scoring used these prompts or this judge."""
    warnings = []
    for scoring in _scorings(job):
        for name in ("harmful", "benign", "task"):
            asked = prompts.of(name)
            shared = sum(prompt.hash in scoring.hashes for prompt in asked)
            if shared:
                warnings.append(
                    f"{shared} of {len(asked)} {name} prompts were used for scoring ({scoring.where}): "
                    "figures on them say little about others"
                )
        key = "fingerprint" if scoring.judge.get("fingerprint") and judge.get("fingerprint") else "id"
        if scoring.judge.get(key) and scoring.judge[key] == judge.get(key):
            warnings.append(
                f"the judge {judge.get('id')} was used for scoring too ({scoring.where}): "
                "its word alone says little; have another --judge beside it"
            )
    return list(dict.fromkeys(warnings))


def _scorings(job: EvalJob) -> list[_Scoring]:
    found = []
    for path in job.used:
        if (path / "score.json").is_file():
            info = Scores.load(path).info
            hashes = (info.get("prompts") or {}).get("hashes") or []
            found.append(_Scoring(path.name, frozenset(hashes), info.get("judge") or {}))
        else:
            mask = Mask.load(path).info
            found.append(_Scoring(path.name, frozenset(mask.prompt_hashes), mask.scoring.get("judge") or {}))
    for model in job.models:
        file = Path(model) / "safecrit" / "training.json"
        if file.is_file():
            mask_facts = json.loads(file.read_text(encoding="utf-8")).get("mask") or {}
            hashes = mask_facts.get("prompt_hashes") or []
            found.append(_Scoring(f"the mask of {Path(model).name}", frozenset(hashes), mask_facts.get("judge") or {}))
    return found

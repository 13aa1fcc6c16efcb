"""score.json: what was scored, by what, how, what was left out, and a table of every logical matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safecrit import distributed
from safecrit.anatomy import Anatomy
from safecrit.api.answering import Answers, fingerprint_of
from safecrit.judges import Judge
from safecrit.models import LoadedModel
from safecrit.prompts import Prompt
from safecrit.scoring import ScoreState

if TYPE_CHECKING:
    from safecrit.api.scorejob import ScoreJob

SAME = 1e-4  # a spread of log-odds, relative to their mean, below which a judge says nothing


def score_info(
    loaded: LoadedModel,
    judge: Judge | None,
    prompts: Sequence[Prompt],
    answers: Answers,
    job: ScoreJob,
    state: ScoreState,
    scores: Mapping[str, torch.Tensor],
    anatomy: Anatomy,
    *,
    sigma: Mapping[str, torch.Tensor],
    cut: int,
    values: Sequence[Sequence[float | None]] | None,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """The document; `sigma` holds float64 [matrices] by checkpoint name, `values` the verdicts on sampled answers.

    `scores` by checkpoint name: all of them, or of several ranks each its own.
    """
    settings, relaxation = job.scoring, job.scoring.relaxation
    flat = [answer for own in answers for answer in own]
    table = _matrix_table(anatomy, sigma, scores)
    idle = unrouted(table)
    judged = _judged(state, values)
    source = job.prompts or job.data
    return {
        "model": {"id": loaded.id, "revision": loaded.revision, "fingerprint": fingerprint_of(loaded)},
        "judge": judge.describe() if judge is not None else None,
        "method": settings.method,
        "estimator": settings.estimator,
        "reduction": settings.reduction,
        "objective": settings.objective,
        "relaxation": relaxation.kind,
        "tau": relaxation.tau,
        "draws": relaxation.effective_draws,
        "samples": job.samples if job.sampled else 1,
        "seed": relaxation.seed,
        "prompts": {
            "source": Path(source).name if source else "",
            "used": len({key.split("/")[0] for key in state.values}) or state.used,
            "dropped": state.dropped,
            "hashes": [prompt.hash for prompt in prompts],
        },
        "judged": judged,
        "answers": {
            "used": state.used,
            "unfinished": sum(not answer.finished for answer in flat),
            "tokens": sum(len(answer.ids) for answer in flat),
        },
        "total": anatomy.total,
        "matrices": table,
        "unrouted": [{"layer": layer, "expert": expert} for layer, expert in idle],
        "warnings": _warnings(job, judge, flat, judged, table, idle, cut),
        **extra,
    }


def _judged(state: ScoreState, values: Sequence[Sequence[float | None]] | None) -> dict[str, Any] | None:
    """Spread of the judge's verdicts: log-odds of safe, or the numbers that the score function used."""
    if values is not None:
        found = [value for own in values for value in own if value is not None]
    else:
        found = [entry["log_odds"] for entry in state.values.values()]
    if not found:
        return None
    mean = sum(found) / len(found)
    spread = math.sqrt(sum((value - mean) ** 2 for value in found) / max(1, len(found) - 1))
    middle = 0.5 if set(found) <= {0.0, 1.0} else 0.0
    return {
        "mean": mean,
        "std": spread,
        "min": min(found),
        "max": max(found),
        "count": len(found),
        "safe": sum(value > middle for value in found),
    }


def _warnings(
    job: ScoreJob,
    judge: Judge | None,
    answers: Sequence[Any],
    judged: Mapping[str, Any] | None,
    table: Sequence[Mapping[str, Any]],
    idle: Sequence[tuple[int, int]],
    cut: int,
) -> list[str]:
    warnings = []
    if judge is not None and judged and judged["count"] > 1 and judged["std"] < SAME * max(1.0, abs(judged["mean"])):
        warnings.append("the judge says the same for every answer: these scores mean nothing; use another judge")
    unfinished = [answer for answer in answers if not answer.finished]
    if job.answers is None and job.data is None and unfinished:
        warnings.append(
            f"{len(unfinished)} of {len(answers)} answers were cut at --max-new-tokens {job.generation.max_new_tokens}"
        )
    thoughts = sum(answer.start > 0 and answer.start == len(answer.ids) for answer in unfinished)
    if thoughts:
        warnings.append(f"{thoughts} answers were cut inside a thought and say nothing: raise --max-new-tokens")
    if cut:
        warnings.append(f"{cut} answers were cut at the model's window")
    flat = [row for row in table if row["sigma"] == 0]
    if flat:
        warnings.append(
            f"{len(flat)} matrices have no spread and score 0, the first {flat[0]['name']} ({flat[0]['component']})"
        )
    if idle:
        first = ", ".join(f"layer {layer} expert {expert}" for layer, expert in idle[:3])
        warnings.append(f"{len(idle)} experts were never routed to and score 0: {first}{', ...' if idle[3:] else ''}")
    return warnings


def unrouted(table: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """(layer, expert) of the experts of which no weight has a score."""
    live: dict[tuple[int, int], int] = {}
    for row in table:
        if row["expert"] is not None:
            place = (row["layer"], row["expert"])
            live[place] = live.get(place, 0) + row["nonzero"]
    return sorted(place for place, nonzero in live.items() if not nonzero)


def _matrix_table(
    anatomy: Anatomy, sigma: Mapping[str, torch.Tensor], scores: Mapping[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """One row a logical matrix, in order; of several ranks each makes those of the scores it has."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for entry in anatomy.eligible:
        if entry.name not in scores:
            continue
        whole, table = scores[entry.name], tables.setdefault(entry.name, [])
        spreads = sigma[entry.name].tolist() if entry.name in sigma else [None] * len(entry.layout.matrices)
        for matrix, spread in zip(entry.layout.matrices, spreads, strict=True):
            score = matrix.where.of(whole).abs()
            table.append(
                {
                    "name": entry.name,
                    "component": matrix.component,
                    "layer": matrix.layer,
                    "expert": matrix.expert,
                    "numel": score.numel(),
                    "sigma": spread,
                    "mean_abs": float(score.mean(dtype=torch.float64)),
                    "max_abs": float(score.max()),
                    "nonzero": int((score > 0).sum()),
                }
            )
    known = {name: rows for own in distributed.gather(tables) for name, rows in own.items()}
    return [row for entry in anatomy.eligible for row in known[entry.name]]

"""`safecrit set --dry-run` and `spa --dry-run`: what a run would take, as plain data and as lines of text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safecrit.api.dryrun import gib, table
from safecrit.api.train import TrainJob, headline
from safecrit.api.trainplacing import PLACES, parallel_mode, survey
from safecrit.lora import lora_headline
from safecrit.machine import probe
from safecrit.progress import duration
from safecrit.trainaccount import PHASES, flops

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from safecrit.mixture import Mixture


@dataclass(frozen=True, kw_only=True)
class TrainDryRun:
    """The outcome as plain data; bytes, seconds, tokens.

    headline: what would be trained. parts: name, bytes, place, phases. peaks, available: by place. examples: seen,
    of them retain, distinct, truncated. seconds: None for a GPU that is not here. first_example: as the model
    reads it, its answer between >>> and <<<. Of several ranks examples, tokens and seconds are of all, memory and
    what is available of one in the mode of `parallel`, which has `mode`, its `reason` and the `peaks` of either mode.
    """

    headline: str
    settings: dict[str, Any]
    parts: list[dict[str, Any]]
    peaks: dict[str, int]
    available: dict[str, int]
    fits: bool
    examples: dict[str, int]
    total_tokens: int
    seconds: float | None
    first_example: str
    ranks: int
    parallel: dict[str, Any]


def dry_run(job: TrainJob, *, ranks: int = 1, gpu_memory: str | None = None, output: Path = Path()) -> TrainDryRun:
    """The account of a job, of one of `ranks`: on a CPU all of this machine, GPUs eight a host.

    gpu_memory: of a GPU that is not here, such as 24GiB. output: the folder whose disk is looked at. Errors are
    `survey`'s.
    """
    found = survey(job, ranks=ranks, gpu_memory=gpu_memory, output=output)
    plan, mixed, available = found.plan, found.mixed, found.available
    mode, reason = parallel_mode(job, found)
    peaks = {kind: found.peaks(kind) for kind in ("replicate", "shard") if kind == mode or not plan.adapter}
    seconds = None
    if gpu_memory is None:
        rates = probe(found.device, {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[plan.itemsize])
        seconds = flops(found.shape, plan) / rates.flops / (1 if plan.cpu else ranks)
    return TrainDryRun(
        headline=headline(found.mask, job.mode) if job.lora is None else lora_headline(job.lora),
        settings=asdict(replace(plan, divided=mode == "shard")),
        parts=[asdict(part) for part in found.parts(mode)],
        peaks=peaks[mode],
        available=available,
        fits=all(peaks[mode][place] <= available[place] for place in PLACES),
        examples={
            "seen": len(mixed),
            "retain": mixed.retain,
            "distinct": mixed.distinct,
            "truncated": mixed.truncated,
            "cut_away": mixed.cut_away,
        },
        total_tokens=plan.total_tokens,
        seconds=seconds,
        first_example=_rendered(found.tokenizer, mixed),
        ranks=ranks,
        parallel={"mode": mode, "reason": reason, "peaks": peaks},
    )


def lines(found: TrainDryRun) -> list[str]:
    """The outcome as lines of text: parts, peaks, verdict, time, and the first example last."""
    s, e = found.settings, found.examples
    rows = [("part", "GiB", "place", "phases")]
    for part in found.parts:
        phases = "all" if len(part["phases"]) == len(PHASES) else ", ".join(part["phases"])
        rows.append((part["name"], gib(part["bytes"]), part["place"], "" if part["place"] == "disk" else phases))
    several = found.ranks > 1
    needs = found.parallel["peaks"] if several else {"needed": found.peaks}
    peaks = [("a rank's peak, GiB" if several else "peak, GiB", *needs, "available")]
    for place in PLACES:
        if found.peaks[place]:
            peaks.append((place, *(gib(need[place]) for need in needs.values()), gib(found.available[place])))
    choice = f"{found.ranks} ranks: {found.parallel['mode']} ({found.parallel['reason']}). " if several else ""
    of_all = " of all ranks" if several else ""
    advice = "Use --gradient-checkpointing, a smaller --batch-size or --max-length, or --use-peft with spa."
    spent = "not known; the rates of a GPU that is not here cannot be measured"
    if found.seconds is not None:
        spent = f"about {duration(found.seconds)} at this machine's measured rate of products"
    return [
        found.headline,
        f"{e['seen']} examples{of_all} ({e['retain']} of them retain), {e['distinct']} distinct, {e['truncated']} cut, "
        f"{e['cut_away']} left out; the largest batch {s['rows']} x {s['tokens']} tokens.",
        "",
        *table(rows),
        "",
        *table(peaks),
        "",
        choice + ("It fits." if found.fits else f"It does not fit. {advice}"),
        f"Time: {spent}; {found.total_tokens:,} tokens.",
        "",
        "The first example, as the model reads it, with what it learns between >>> and <<<:",
        found.first_example,
    ]


def _rendered(tokenizer: PreTrainedTokenizerBase, mixed: Mixture) -> str:
    """The first example's text, its trained parts marked."""
    example, text, start = mixed[0], "", 0
    for n in range(1, len(example.ids) + 1):
        if n == len(example.ids) or example.loss_mask[n] != example.loss_mask[start]:
            piece = str(tokenizer.decode(example.ids[start:n]))
            text += f">>>{piece}<<<" if example.loss_mask[start] else piece
            start = n
    return text

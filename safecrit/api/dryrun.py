"""`safecrit score --dry-run`: what a run would take, on this machine or another, as plain data and as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from safecrit.account import PHASES, Account, Place, Work, divided_account, largest_batches
from safecrit.api.placing import parallel_mode
from safecrit.api.scorejob import ScoreJob
from safecrit.api.survey import survey
from safecrit.costs import moved
from safecrit.machine import Rates, probe
from safecrit.metamodel import ModelShape
from safecrit.progress import duration

PLACES: tuple[Place, ...] = ("device", "judge device", "host", "disk")


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """The outcome as plain data (`dataclasses.asdict` gives JSON); bytes, seconds, tokens.

    settings: the plan with its automatic choices made. parts: name, bytes, place, phases. peaks: by place and
    phase. available: by place; a judge on a device of its own has what the model's has. lacking: of each place that
    is too small the fullest phase, its bytes, and its largest part. best: the largest batch sizes that fit, None
    where none does. advice: what to lower, "" where all fits. work: name, flops, bytes moved, seconds. `seconds` is
    None where the machine's rates are not known, and so is `mask_seconds`, of selecting the top 1 % of the scores on a
    CPU, from files that its memory holds. first_prompt: as the model reads it. Of several ranks work and seconds are
    of all, without what ranks send; memory and what is available are of one in the mode of `parallel`, which has
    `mode`, its `reason` and by either mode the `peaks` of the places.
    """

    model: str
    judge: str | None
    weights: dict[str, int]
    settings: dict[str, Any]
    prompt_percentile_95: int
    parts: list[dict[str, Any]]
    peaks: dict[str, dict[str, int]]
    available: dict[str, int]
    fits: bool
    lacking: list[dict[str, Any]]
    best: dict[str, int] | None
    advice: str
    work: list[dict[str, Any]]
    seconds: float | None
    mask_seconds: float | None
    first_prompt: str
    ranks: int
    parallel: dict[str, Any]


def dry_run(
    job: ScoreJob,
    *,
    ranks: int = 1,
    gpu_memory: str | None = None,
    output: Path = Path(),
    rates: Rates | None = None,
) -> DryRun:
    """The account of a score job, of one of `ranks`. Nothing is loaded but configurations and tokenizers.

    gpu_memory: of a GPU that is not here, such as 24GiB; its time is known only with `rates`. output: the folder
    whose disk is looked at. Raises SafecritError as the job itself would for a missing model, judge or prompt
    file, and for settings that are unknown.
    """
    found = survey(job, ranks=ranks, gpu_memory=gpu_memory, output=output)
    model, judge, plan = found.model, found.judge, found.account.plan
    mode, reason = parallel_mode(job, found) if ranks > 1 or job.parallel == "shard" else ("replicate", "one rank")
    either = {"replicate": found.account, "shard": divided_account(model, judge, found.account, ranks)}
    account = either[mode]
    best, available, counts = found.best, found.available, found.prompt_tokens
    lacking = _lacking(account, available)
    if rates is None and gpu_memory is None:
        rates = probe(found.device, {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[plan.itemsize])
    at_once = 1 if plan.cpu else ranks
    spent = [_seconds(w, rates) / at_once for w in account.work] if rates is not None else None
    work = [
        {"name": w.name, "flops": w.flops + w.flops32, "moved": w.moved + w.linked, "seconds": spent and spent[n]}
        for n, w in enumerate(account.work)
    ]
    return DryRun(
        model=job.model,
        judge=job.judge.name if job.judge is not None and job.judged else None,
        weights={
            "model": model.parameters,
            "eligible": model.eligible,
            "judge": judge.parameters if judge is not None else 0,
        },
        settings=asdict(account.plan),
        prompt_percentile_95=counts[min(len(counts) - 1, int(0.95 * len(counts)))],
        parts=[asdict(part) for part in account.parts],
        peaks={place: {phase: account.in_phase(place, phase) for phase in PHASES} for place in PLACES},
        available=available,
        fits=not lacking,
        lacking=lacking,
        best={"batch_size": best.plan.batch_size, "judge_batch_size": best.plan.judge_batch_size} if best else None,
        advice=_advice(model, judge, account, best, available, divided=mode == "shard") if lacking else "",
        work=work,
        seconds=sum(spent) if spent is not None else None,
        mask_seconds=_mask_seconds(model, rates) if rates is not None and account.plan.cpu else None,
        first_prompt=found.first_prompt,
        ranks=ranks,
        parallel={
            "mode": mode,
            "reason": reason,
            "peaks": {name: {place: each.peak(place) for place in PLACES} for name, each in either.items()},
        },
    )


def lines(found: DryRun) -> list[str]:
    """The outcome as lines of text: parts, peaks, verdict, disk, work, and the first prompt last."""
    s = found.settings
    rows = [("part", "GiB", "place", "phases")]
    for part in sorted(found.parts, key=lambda part: PLACES.index(part["place"])):
        phases = "all" if len(part["phases"]) == len(PHASES) else ", ".join(part["phases"])
        rows.append((part["name"], gib(part["bytes"]), part["place"], "" if part["place"] == "disk" else phases))
    out = [
        f"Model {found.model}: {found.weights['model']:,} weights, {found.weights['eligible']:,} of them to be scored. "
        + (f"Judge {found.judge}: {found.weights['judge']:,}." if found.weights["judge"] else "No judge model."),
        f"{s['prompts']} prompts of {s['mean_prompt_tokens']:.0f} tokens on average, 95 % up to "
        f"{found.prompt_percentile_95}, longest {s['prompt_tokens']}; answers of up to {s['answer_tokens']}; "
        f"{s['batch_size']} prompts and {s['judge_batch_size']} conversations at once.",
        f"Placement {s['placement']}, accumulators on {'host' if s['cpu'] else s['accumulate_on']}, "
        f"checkpointed layers {s['checkpointed']}.",
        "",
        *table(rows),
        "",
    ]
    peaks: list[tuple[str, ...]] = [("peak, GiB", *PHASES, "available")]
    for place in PLACES[:3]:
        if any(found.peaks[place].values()):
            room = gib(_room(place, found.available))
            peaks.append((place, *(gib(found.peaks[place][phase]) for phase in PHASES), room))
    disk = max(found.peaks["disk"].values())
    share = ", a rank's share of the host's" if found.ranks > 1 else ""
    out += [*table(peaks), "", f"Disk: {gib(disk)} GiB needed, {gib(found.available['disk'])} GiB free{share}."]
    for lack in found.lacking:
        out.append(
            f"The {lack['place']} is too small: {lack['phase']} needs {gib(lack['bytes'])} GiB, the largest part of "
            f"them, {lack['part']}, {gib(lack['part_bytes'])}."
        )
    if found.ranks > 1:
        modes: list[tuple[str, ...]] = [("a rank's peak, GiB", *found.parallel["peaks"])]
        for place in PLACES[:3]:
            if any(found.peaks[place].values()):
                modes.append((place, *(gib(need[place]) for need in found.parallel["peaks"].values())))
        out += ["", *table(modes), f"{found.ranks} ranks: {found.parallel['mode']} ({found.parallel['reason']})."]
    out += ["It fits." if found.fits else f"It does not fit. {found.advice}", ""]
    work = [("work", "TFLOP", "GB moved", "time")]
    for entry in found.work:
        spent = "" if entry["seconds"] is None else duration(entry["seconds"])
        work.append((entry["name"], f"{entry['flops'] / 1e12:,.1f}", f"{entry['moved'] / 1e9:,.1f}", spent))
    out += table(work)
    if found.seconds is None:
        out.append("Time: not known; the rates of a GPU that is not here cannot be measured.")
    else:
        out.append(
            f"Time: about {duration(found.seconds)} at this machine's measured rates; answers as long as "
            "allowed. Runs have taken up to twice that."
        )
    if found.mask_seconds is not None:
        spent = duration(max(1.0, found.mask_seconds))
        out.append(f"`mask --top 1%` of these scores then takes about {spent} where memory holds their files.")
    return [*out, "", "The first prompt, as the model reads it:", found.first_prompt]


def _lacking(account: Account, available: dict[str, int]) -> list[dict[str, Any]]:
    """Each place that is too small: its fullest phase, and the largest part there."""
    found = []
    for place in PLACES:
        if account.peak(place) > _room(place, available):
            phase = max(PHASES, key=lambda phase: account.in_phase(place, phase))
            there = [part for part in account.parts if part.place == place and phase in part.phases]
            part = max(there, key=lambda part: part.bytes)
            found.append(
                {
                    "place": place,
                    "phase": phase,
                    "bytes": account.in_phase(place, phase),
                    "part": part.name,
                    "part_bytes": part.bytes,
                }
            )
    return found


def _room(place: Place, available: dict[str, int]) -> int:
    return available["device" if place == "judge device" else place]


def _advice(
    model: ModelShape,
    judge: ModelShape | None,
    account: Account,
    best: Account | None,
    available: dict[str, int],
    divided: bool,
) -> str:
    """What to change so that it fits."""
    if account.peak("disk") > available["disk"]:
        return "Give an --output on a larger disk, or --score-dtype bfloat16."
    if divided:
        return "Use more ranks, or smaller --batch-size and --judge-batch-size."
    if best is not None:
        return f"Use --batch-size {best.plan.batch_size} --judge-batch-size {best.plan.judge_batch_size}."
    if judge is not None and account.plan.placement == "together" and not account.plan.cpu:
        turns = replace(account.plan, placement="sequential", accumulate_on="auto", checkpointed="auto")
        found = largest_batches(model, judge, turns, available["device"], available["host"])
        if found is not None:
            return (
                f"Use --judge-placement sequential --batch-size {found.plan.batch_size} "
                f"--judge-batch-size {found.plan.judge_batch_size}."
            )
    if account.plan.itemsize > 2:
        return "Not even one prompt at a time does. Use --dtype bfloat16 and --accumulate-on disk, or a smaller model."
    return "Not even one prompt at a time does. Use --accumulate-on disk, a smaller judge or a larger device."


def _seconds(work: Work, rates: Rates) -> float:
    """Products and memory traffic of one kind of work overlap; copies over the link are taken not to."""
    products = work.flops / rates.flops + work.flops32 / rates.flops32
    return max(products, work.moved / rates.memory) + work.linked / rates.link


def _mask_seconds(model: ModelShape, rates: Rates) -> float:
    """Of `select_top` at 1 %, by the cost model."""
    return moved("select_top", model.eligible, model.eligible / 100) / rates.memory


def gib(size: float) -> str:
    """Bytes in GiB, two decimals."""
    return f"{size / 2**30:,.2f}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first on the left, the rest on the right."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if not n else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]

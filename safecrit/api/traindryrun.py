"""`safecrit set --dry-run` and `spa --dry-run`: what a run would take, as plain data and as lines of text."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safecrit.anatomy import read_anatomy
from safecrit.api.dryrun import gib, table
from safecrit.api.survey import description_folder
from safecrit.api.train import TrainJob, headline, read_data
from safecrit.lora import adapt, lora_headline
from safecrit.machine import device_free, host_free, parse_bytes, probe
from safecrit.maskfile import Mask
from safecrit.metamodel import meta_model, shape_of
from safecrit.mixture import mix
from safecrit.models import DTYPES, load_tokenizer, pick_device
from safecrit.progress import duration
from safecrit.trainaccount import PHASES, TrainPlan, flops, peak, train_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from safecrit.mixture import Mixture

PLACES = ("device", "host", "disk")


@dataclass(frozen=True, kw_only=True)
class TrainDryRun:
    """The outcome as plain data; bytes, seconds, tokens.

    headline: what would be trained. parts: name, bytes, place, phases. peaks, available: by place. examples: seen,
    of them retain, distinct, truncated. seconds: None for a GPU that is not here. first_example: as the model
    reads it, its answer between >>> and <<<.
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


def dry_run(job: TrainJob, *, gpu_memory: str | None = None, output: Path = Path()) -> TrainDryRun:
    """The account of a job. Of the model, its configuration and tokenizer are read, and no weight.

    gpu_memory: of a GPU that is not here, such as 24GiB. output: the folder whose disk is looked at. Raises
    SafecritError as the job would for a missing model, mask or data file, and for a mask of another model.
    """
    folder = description_folder(job.model, job.revision)
    model = meta_model(folder, trust_remote_code=job.trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=job.trust_remote_code)
    mask, (data, retain) = Mask.load(job.mask), read_data(job)
    mask.check(read_anatomy(model))
    shape, settings = shape_of(model), job.settings
    device = torch.device("cuda") if gpu_memory else pick_device(job.device)
    mixed = mix(
        tokenizer,
        data.examples,
        retain.examples if retain else (),
        retain_share=job.retain_share,
        count=settings.examples,
        max_length=min(settings.max_length, shape.window or settings.max_length),
        seed=settings.seed,
    )
    rows, tokens, total = _batches(mixed, settings.per_device_train_batch_size)
    stored = shape.itemsize
    loaded = stored if job.dtype == "auto" else DTYPES[job.dtype].itemsize
    adapter = 0
    if job.lora is not None:
        adapter = sum(p.numel() for p in adapt(model, job.lora, settings.seed).parameters() if p.requires_grad)
    dense = job.mode == "spa" and job.lora is None
    plan = TrainPlan(
        mode=job.mode,
        selected=mask.count,
        itemsize=4 if dense else loaded,
        rows=rows,
        tokens=tokens,
        total_tokens=total,
        largest=shape.largest,
        optim=settings.optim,
        adapter=adapter,
        checkpointed=settings.gradient_checkpointing,
        accumulation=settings.gradient_accumulation_steps,
        cpu=device.type == "cpu",
        saved=stored * shape.parameters if job.save != "delta" else mask.count * (4 + 2 * stored),
    )
    parts = train_parts(shape, plan)
    own = parse_bytes(gpu_memory) if gpu_memory else device_free(device)
    above = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    available = {"device": own, "host": host_free(), "disk": shutil.disk_usage(above).free}
    peaks = {place: peak(parts, place) for place in PLACES}  # type: ignore[arg-type]
    seconds = None
    if gpu_memory is None:
        rates = probe(device, {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[plan.itemsize])
        seconds = flops(shape, plan) / rates.flops
    return TrainDryRun(
        headline=headline(mask, job.mode) if job.lora is None else lora_headline(job.lora),
        settings=asdict(plan),
        parts=[asdict(part) for part in parts],
        peaks=peaks,
        available=available,
        fits=all(peaks[place] <= available[place] for place in PLACES),
        examples={
            "seen": len(mixed),
            "retain": mixed.retain,
            "distinct": mixed.distinct,
            "truncated": mixed.truncated,
            "cut_away": mixed.cut_away,
        },
        total_tokens=total,
        seconds=seconds,
        first_example=_rendered(tokenizer, mixed),
    )


def lines(found: TrainDryRun) -> list[str]:
    """The outcome as lines of text: parts, peaks, verdict, time, and the first example last."""
    s, e = found.settings, found.examples
    rows = [("part", "GiB", "place", "phases")]
    for part in found.parts:
        phases = "all" if len(part["phases"]) == len(PHASES) else ", ".join(part["phases"])
        rows.append((part["name"], gib(part["bytes"]), part["place"], "" if part["place"] == "disk" else phases))
    peaks = [("peak, GiB", "needed", "available")]
    peaks += [(place, gib(found.peaks[place]), gib(found.available[place])) for place in PLACES if found.peaks[place]]
    advice = "Use --gradient-checkpointing, a smaller --batch-size or --max-length, or --use-peft with spa."
    spent = "not known; the rates of a GPU that is not here cannot be measured"
    if found.seconds is not None:
        spent = f"about {duration(found.seconds)} at this machine's measured rate of products"
    return [
        found.headline,
        f"{e['seen']} examples ({e['retain']} of them retain), {e['distinct']} distinct, {e['truncated']} cut, "
        f"{e['cut_away']} left out; the largest batch {s['rows']} x {s['tokens']} tokens.",
        "",
        *table(rows),
        "",
        *table(peaks),
        "",
        "It fits." if found.fits else f"It does not fit. {advice}",
        f"Time: {spent}; {found.total_tokens:,} tokens.",
        "",
        "The first example, as the model reads it, with what it learns between >>> and <<<:",
        found.first_example,
    ]


def _batches(mixed: Mixture, size: int) -> tuple[int, int, int]:
    """Rows and tokens of the largest micro-batch, and the tokens of all, padding included."""
    shapes = []
    for start in range(0, len(mixed), size):
        lengths = [len(mixed[n].ids) for n in range(start, min(start + size, len(mixed)))]
        shapes.append((len(lengths), max(lengths)))
    rows, tokens = max(shapes, key=lambda shape: shape[0] * shape[1])
    return rows, tokens, sum(rows * tokens for rows, tokens in shapes)


def _rendered(tokenizer: PreTrainedTokenizerBase, mixed: Mixture) -> str:
    """The first example's text, its trained parts marked."""
    example, text, start = mixed[0], "", 0
    for n in range(1, len(example.ids) + 1):
        if n == len(example.ids) or example.loss_mask[n] != example.loss_mask[start]:
            piece = str(tokenizer.decode(example.ids[start:n]))
            text += f">>>{piece}<<<" if example.loss_mask[start] else piece
            start = n
    return text

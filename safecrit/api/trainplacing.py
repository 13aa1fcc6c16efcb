"""Whether each of several ranks that train has the whole model or a part, and the account that decides it.

Of the model, configuration and tokenizer are read, and no weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from safecrit import distributed
from safecrit.anatomy import read_anatomy
from safecrit.api.survey import available_bytes, description_folder, sharers
from safecrit.errors import SafecritError
from safecrit.lora import adapt
from safecrit.maskfile import Mask
from safecrit.metamodel import ModelShape, meta_model, shape_of
from safecrit.mixture import mix
from safecrit.models import DTYPES, load_tokenizer, pick_device
from safecrit.trainaccount import TrainPart, TrainPlan, peak, train_parts
from safecrit.traindata import read_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from safecrit.api.train import TrainJob
    from safecrit.mixture import Mixture

Mode = Literal["replicate", "shard"]
PLACES = ("device", "host", "disk")


@dataclass(frozen=True, kw_only=True)
class TrainSurvey:
    """What a job asks of each of its ranks: `plan` is that of a whole model. available: bytes by place, of a rank."""

    shape: ModelShape
    plan: TrainPlan
    mask: Mask
    mixed: Mixture
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    available: dict[str, int]

    def parts(self, mode: str) -> list[TrainPart]:
        """A rank's parts, `replicate` or `shard`."""
        return train_parts(self.shape, replace(self.plan, divided=mode == "shard"))

    def peaks(self, mode: str) -> dict[str, int]:
        """A rank's peak bytes by place."""
        parts = self.parts(mode)
        return {place: peak(parts, place) for place in PLACES}  # type: ignore[arg-type]


def check_parallel(job: TrainJob, parallel: str) -> None:
    """SafecritError where an adapter, or an optimizer that needs whole weights, is to be trained on a divided base."""
    if parallel == "shard" and job.lora is not None:
        raise SafecritError("--parallel shard: --use-peft keeps the whole base on every rank. Use replicate.")
    if parallel == "shard" and job.mode == "spa" and job.settings.optim == "adafactor":
        raise SafecritError(
            "--optim adafactor: its statistics of rows and columns cannot follow weights that are divided by rows. "
            "Use --parallel replicate, or --optim adamw_torch."
        )


def parallel_mode(job: TrainJob, found: TrainSurvey | None = None) -> tuple[str, str]:
    """replicate or shard, for `found` or for the ranks that run now, and why.

    It looks at this rank's memory, so rank 0 decides for all: `distributed.from_first(lambda: parallel_mode(job))`,
    before a model is loaded. Errors are those of `check_parallel` and `survey`.
    """
    check_parallel(job, job.parallel)
    if job.lora is not None:
        return "replicate", "an adapter trains beside the whole base"
    if job.parallel != "auto":
        return job.parallel, "as asked for"
    ranks = distributed.current()
    if (found.plan.ranks if found is not None else ranks.world) == 1:
        return "replicate", "there is one rank"
    found = found or survey(job, ranks=ranks.world, local=ranks.local_world)
    need = found.peaks("replicate")
    if all(need[place] <= found.available[place] for place in ("device", "host")):
        return "replicate", "model and state fit every rank whole"
    check_parallel(job, "shard")
    return "shard", "model and state do not fit a rank whole"


def survey(
    job: TrainJob,
    *,
    ranks: int = 1,
    local: int | None = None,
    gpu_memory: str | None = None,
    output: Path = Path(),
) -> TrainSurvey:
    """Read all but weights. local: ranks of a host, which share its memory; None: as many as there can be.

    gpu_memory: of a GPU that is not here, such as 24GiB. output: the folder whose disk is looked at. Raises
    SafecritError as the job would for a missing model, mask or data file, and for a mask of another model.
    """
    folder = description_folder(job.model, job.revision)
    model = meta_model(folder, trust_remote_code=job.trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=job.trust_remote_code)
    mask = Mask.load(job.mask)
    mask.check(read_anatomy(model))
    shape, settings = shape_of(model), job.settings
    device = torch.device("cuda") if gpu_memory else pick_device(job.device)
    cpu = device.type == "cpu"
    mixed = mix(
        tokenizer,
        read_examples(job.data, job.limit).examples,
        read_examples(job.retain).examples if job.retain else (),
        retain_share=job.retain_share,
        count=settings.examples * ranks,
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
        cpu=cpu,
        saved=stored * shape.parameters if job.save != "delta" else mask.count * (4 + 2 * stored),
        ranks=ranks,
    )
    available = available_bytes(device, gpu_memory, output, sharers(device, ranks) if local is None else local)
    return TrainSurvey(
        shape=shape, plan=plan, mask=mask, mixed=mixed, tokenizer=tokenizer, device=device, available=available
    )


def _batches(mixed: Mixture, size: int) -> tuple[int, int, int]:
    """Rows and tokens of the largest micro-batch, and the tokens of all, padding included."""
    shapes = []
    for start in range(0, len(mixed), size):
        lengths = [len(mixed[n].ids) for n in range(start, min(start + size, len(mixed)))]
        shapes.append((len(lengths), max(lengths)))
    rows, tokens = max(shapes, key=lambda shape: shape[0] * shape[1])
    return rows, tokens, sum(rows * tokens for rows, tokens in shapes)

"""set and spa: model + mask + examples -> training -> model folder or delta -> verification of what was written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from safecrit import distributed, faults
from safecrit.adapter import Merged, merge_adapter, peft_module
from safecrit.anatomy import read_anatomy
from safecrit.api.trainplacing import check_parallel
from safecrit.api.trainresume import checkpoints_of, same_examples_a_step
from safecrit.cardfigures import add_evaluation, evaluated, read_results
from safecrit.delta import Delta, apply_delta
from safecrit.divided import load_model_divided
from safecrit.files import checkpoint_tensors
from safecrit.fingerprint import accepted_fingerprints
from safecrit.fsdp import all_ranks, from_first_whole, shard
from safecrit.lora import LoraSettings, merged_result, train_adapter
from safecrit.maskfile import Mask
from safecrit.models import LoadedModel, load_model, pick_device, resolve_folder
from safecrit.placement import place
from safecrit.progress import Reporter, quiet_reporter
from safecrit.traindata import TrainData, read_examples
from safecrit.training import TrainResult, headline, run_set, run_spa
from safecrit.training_output import write_set_output, write_spa_output
from safecrit.trainloop import TrainSettings
from safecrit.verification import VerifyReport, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LoraSettings", "TrainJob", "TrainOutcome", "check_inputs", "headline", "run_training"]


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """All that `set` and `spa` need to know. `save`: for set, what is written: model, delta or both.

    With `lora`, spa trains an adapter and merges it under the mask. `results`: an
    evaluation of the base, a folder, for the model card. `parallel`: auto, replicate or shard, of several ranks.
    """

    mode: Literal["set", "spa"]
    model: str
    mask: Path
    data: str
    retain: str | None = None
    retain_share: float = 0.5
    limit: int | None = None
    save: str = "both"
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    allow_other_weights: bool = False
    settings: TrainSettings = TrainSettings()
    lora: LoraSettings | None = None
    results: Path | None = None
    parallel: str = "auto"


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """What training did, and what `verify` says of the files."""

    result: TrainResult
    verified: VerifyReport
    skipped: int


def check_inputs(job: TrainJob) -> Mask:
    """Find the user's mistakes before an output folder is made; the mask, checked to be this model's."""
    check_parallel(job, job.parallel)
    folder = resolve_folder(job.model, revision=job.revision)
    mask = Mask.load(job.mask)
    if job.lora is not None:
        peft_module()
    read_data(job)
    if job.results is not None:
        evaluated(read_results(job.results), accepted_fingerprints(folder)[0], job.results)
    shapes = {name: tensor.shape for name, tensor in checkpoint_tensors(folder).items()}
    mask.check(shapes, fingerprints=accepted_fingerprints(folder), allow_other_weights=job.allow_other_weights)
    return mask


def read_data(job: TrainJob) -> tuple[TrainData, TrainData | None]:
    """The training examples and the retain examples; SafecritError where a file is missing or broken."""
    return read_examples(job.data, job.limit), read_examples(job.retain) if job.retain else None


def run_training(
    job: TrainJob,
    folder: Path,
    report: Reporter = quiet_reporter,
    parallel: str = "replicate",
    reason: str = "as asked for",
    note: Callable[[str], None] = lambda text: None,
) -> TrainOutcome:
    """Train, write `folder`, and verify the files written against the base; of several ranks the first does that.

    parallel: replicate, or shard, which divides the model over the ranks. note: hears of it, of its reason, and how
    many examples a step takes.
    """
    check_parallel(job, parallel)
    settings = same_examples_a_step(job.settings, folder)
    if faults.watching():
        each = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        note(f"{distributed.current()}: {parallel} ({reason}), {each * distributed.current().world} examples a step")
    job, mask = replace(job, settings=settings), Mask.load(job.mask)
    if job.lora is not None:
        outcome = _run_lora(job, job.lora, mask, folder, report)
    else:
        outcome = _run(job, mask, folder, report, parallel)
    if job.results is not None and distributed.current().first:
        results = read_results(job.results)
        base = accepted_fingerprints(resolve_folder(job.model, revision=job.revision))[0]
        add_evaluation(folder / "README.md", results, evaluated(results, base, job.results), "base model")
    return outcome


def _run(job: TrainJob, mask: Mask, folder: Path, report: Reporter, parallel: str) -> TrainOutcome:
    data, retain = read_data(job)
    loaded = _load(job, mask, parallel)
    run = run_set if job.mode == "set" else run_spa
    with report("training", "steps") as progress:
        result = run(
            loaded,
            mask,
            data.examples,
            retain.examples if retain else None,
            job.retain_share,
            job.settings,
            lambda step, total, loss: progress(step, total, f"loss {loss:.3f}"),
            checkpoints=checkpoints_of(folder),
            allow_other_weights=job.allow_other_weights,
        )

    def write(whole: Callable[[str], torch.Tensor]) -> VerifyReport:
        if job.mode == "spa":
            write_spa_output(loaded, mask, folder, result, whole=whole, overwrite=True)
            return verify(folder, loaded.folder, mask, "spa")
        write_set_output(loaded, mask, folder, result, job.save, overwrite=True)
        return _verify_set(job, folder, loaded.folder, mask)

    return TrainOutcome(result=result, verified=from_first_whole(loaded.model, write), skipped=data.empty)


def _load(job: TrainJob, mask: Mask, parallel: str) -> LoadedModel:
    """The model, whole or divided over the ranks; of spa in float32, since frozen weights must keep their bits."""
    dtype = "float32" if job.mode == "spa" else job.dtype
    source: dict[str, Any] = {"revision": job.revision, "dtype": dtype, "trust_remote_code": job.trust_remote_code}
    if parallel != "shard":
        return load_model(job.model, device=job.device, **source)
    mesh = all_ranks(pick_device(job.device))

    def divide(model: PreTrainedModel) -> None:
        if model.dtype == torch.float16:
            model.float()
        names = {name for name, _ in model.named_parameters()}
        wanted = set(place(mask, read_anatomy(model))) if job.mode == "set" else names
        shard(model, mesh, wanted, mean=True, compute=torch.bfloat16 if job.settings.bf16 else None)

    return load_model_divided(job.model, mesh, divide, **source)


def _run_lora(job: TrainJob, lora: LoraSettings, mask: Mask, folder: Path, report: Reporter) -> TrainOutcome:
    """Train an adapter, then merge it into the model loaded afresh, as `safecrit merge` does; rank 0 merges."""
    data, retain = read_data(job)
    source: dict[str, Any] = {
        "revision": job.revision,
        "device": job.device,
        "trust_remote_code": job.trust_remote_code,
    }
    with report("training", "steps") as progress:
        adapter = train_adapter(
            load_model(job.model, dtype=job.dtype, **source),
            data.examples,
            retain.examples if retain else None,
            job.retain_share,
            job.settings,
            lora,
            folder / "safecrit" / "adapter",
            lambda step, total, loss: progress(step, total, f"loss {loss:.3f}"),
            checkpoints=checkpoints_of(folder),
        )

    def merge() -> tuple[Merged, VerifyReport]:
        loaded = load_model(job.model, **source)
        merged = merge_adapter(loaded, adapter.folder, mask, allow_other_weights=job.allow_other_weights)
        result = merged_result(adapter, merged, mask.info.total)
        write_spa_output(loaded, mask, folder, result, weights=merged.weights, overwrite=True)
        return replace(merged, weights={}), verify(folder, loaded.folder, mask, "spa")

    merged, verified = distributed.from_first(merge)
    result = merged_result(adapter, merged, mask.info.total)
    return TrainOutcome(result=result, verified=verified, skipped=data.empty)


def _verify_set(job: TrainJob, folder: Path, base: Path, mask: Mask) -> VerifyReport:
    if job.save != "delta":
        return verify(folder, base, mask, "set")
    with tempfile.TemporaryDirectory(prefix="safecrit-") as work:
        model = Path(work) / "model"
        apply_delta(base, Delta.load(folder / "safecrit" / "delta.safetensors"), model)
        return verify(model, base, mask, "set")

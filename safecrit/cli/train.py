"""`safecrit set` and `safecrit spa`: train only the masked weights, or everything but them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from safecrit.cli import options as o
from safecrit.cli.sink import Sink

if TYPE_CHECKING:
    from safecrit.lora import LoraSettings

Data = Annotated[str, typer.Option("--data", metavar="FILE", help="Training examples: JSONL, JSON, CSV or a Hub id.")]
Retain = Annotated[
    str | None, typer.Option("--retain", metavar="FILE", help="Benign examples mixed in, to keep utility.")
]
RetainShare = Annotated[float, typer.Option("--retain-share", min=0, max=0.99, help="Share of retain examples.")]
Steps = Annotated[int, typer.Option("--max-steps", "--steps", min=1, help="Optimizer steps.")]
Rate = Annotated[float, typer.Option("--learning-rate", "--lr", min=0, help="Peak learning rate.")]
Batch = Annotated[int, typer.Option("--per-device-train-batch-size", "--batch-size", min=1, help="Examples at once.")]
Accumulation = Annotated[int, typer.Option("--gradient-accumulation-steps", min=1, help="Batches per optimizer step.")]
Scheduler = Annotated[str, typer.Option("--lr-scheduler-type", help="cosine, linear, constant, ...")]
Warmup = Annotated[float, typer.Option("--warmup-ratio", min=0, max=1, help="Share of the steps that warm up.")]
Decay = Annotated[float, typer.Option("--weight-decay", min=0, help="Decoupled weight decay of trained weights.")]
Norm = Annotated[float, typer.Option("--max-grad-norm", min=0, help="Clip the gradient's norm; 0 does not clip.")]
Length = Annotated[int, typer.Option("--max-length", min=8, help="Longest example, in tokens.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Recompute activations: less memory.")]
SaveSteps = Annotated[int, typer.Option("--save-steps", min=0, help="Save a checkpoint every N steps; 0 saves none.")]
ReportTo = Annotated[str, typer.Option("--report-to", help="none, or a tracker that transformers knows.")]
Results = Annotated[
    Path | None,
    typer.Option("--results", metavar="DIR", help="An output of eval on MODEL: its figures go into the model card."),
]
Save = Annotated[Literal["model", "delta", "both"], typer.Option("--save", help="What to write.")]


def set_(
    context: typer.Context,
    model: o.ModelArgument,
    mask: o.MaskFile,
    data: Data,
    output: o.OutputFolder = None,
    retain: Retain = None,
    retain_share: RetainShare = 0.5,
    limit: o.Limit = None,
    save: Save = "both",
    max_steps: Steps = 100,
    learning_rate: Rate = 3e-5,
    per_device_train_batch_size: Batch = 1,
    gradient_accumulation_steps: Accumulation = 4,
    lr_scheduler_type: Scheduler = "cosine",
    warmup_ratio: Warmup = 0.03,
    weight_decay: Decay = 0.0,
    max_grad_norm: Norm = 1.0,
    max_length: Length = 2048,
    gradient_checkpointing: Checkpointing = False,
    save_steps: SaveSteps = 0,
    report_to: ReportTo = "none",
    results: Results = None,
    seed: o.Seed = 0,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    allow_other_weights: o.AllowOtherWeights = False,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Safety-enhancing tuning (SET): train only the masked weights, on harmful prompts with refusals.

    Every other weight keeps its bits; the files written are verified at the end.
    The default learning rate is the paper's; it moves weights very little.
    """
    _run("set", o.resolved(context), output, overwrite, Sink(as_json=as_json, quiet=quiet))


def spa(
    context: typer.Context,
    model: o.ModelArgument,
    mask: o.MaskFile,
    data: Data,
    output: o.OutputFolder = None,
    retain: Retain = None,
    retain_share: RetainShare = 0.5,
    limit: o.Limit = None,
    max_steps: Steps = 1000,
    learning_rate: Rate = 3e-5,
    per_device_train_batch_size: Batch = 1,
    gradient_accumulation_steps: Accumulation = 4,
    lr_scheduler_type: Scheduler = "cosine",
    warmup_ratio: Warmup = 0.03,
    weight_decay: Decay = 0.0,
    max_grad_norm: Norm = 1.0,
    max_length: Length = 2048,
    optim: Annotated[str, typer.Option("--optim", help="Any optimizer that TrainingArguments knows.")] = "adamw_torch",
    use_peft: Annotated[
        bool, typer.Option("--use-peft", help="Train a LoRA adapter, and merge it all but the masked weights.")
    ] = False,
    lora_r: Annotated[int | None, typer.Option("--lora-r", min=1, help="Rank. [default: 16]")] = None,
    lora_alpha: Annotated[int | None, typer.Option("--lora-alpha", min=1, help="Scale x rank. [default: 32]")] = None,
    lora_dropout: Annotated[
        float | None, typer.Option("--lora-dropout", min=0, max=0.99, help="Adapter's dropout. [default: 0]")
    ] = None,
    lora_target_modules: Annotated[
        str | None,
        typer.Option("--lora-target-modules", metavar="NAMES", help="q_proj,v_proj, ... [default: all-linear]"),
    ] = None,
    gradient_checkpointing: Checkpointing = False,
    save_steps: SaveSteps = 0,
    report_to: ReportTo = "none",
    results: Results = None,
    seed: o.Seed = 0,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    allow_other_weights: o.AllowOtherWeights = False,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Safety-preserving adaptation (SPA): fine-tune on a task with the masked weights frozen, bit for bit.

    The files written are verified at the end. Freezing slows the loss of safety
    down; it does not stop somebody who fine-tunes in order to break it.
    """
    _run("spa", o.resolved(context), output, overwrite, Sink(as_json=as_json, quiet=quiet))


def _run(
    mode: Literal["set", "spa"], settings: dict[str, Any], output: Path | None, overwrite: bool, sink: Sink
) -> None:
    from dataclasses import fields

    from safecrit.api.train import TrainJob, check_inputs, headline, run_training
    from safecrit.errors import CheckFailed
    from safecrit.outputs import default_output, open_output
    from safecrit.trainloop import TrainSettings

    lora = _lora(settings)
    names = {field.name for field in fields(TrainSettings)}
    training = TrainSettings(**{key: value for key, value in settings.items() if key in names})
    own = {field.name for field in fields(TrainJob)} - {"mode", "settings", "mask", "lora", "results"}
    job = TrainJob(
        mode=mode,
        settings=training,
        mask=Path(settings["mask"]),
        lora=lora,
        results=Path(settings["results"]) if settings["results"] is not None else None,
        **{key: value for key, value in settings.items() if key in own},
    )
    mask = check_inputs(job)
    path = output or default_output(mode, job.model)
    folder = open_output(path, mode, settings, overwrite=overwrite, inside="safecrit")
    if folder.resumed:
        sink.note(f"resuming the interrupted run in {folder.path}")
    sink.line(headline(mask, mode) if lora is None else f"Training a LoRA adapter of rank {lora.r}, base frozen")
    outcome = run_training(job, folder.path, sink.progress)
    result, report = outcome.result, outcome.verified
    if outcome.skipped:
        sink.warn(f"{outcome.skipped} rows without prompt or answer were left out")
    for warning in result.warnings:
        sink.warn(warning)
    sink.line(
        f"{len(result.losses)} steps, loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}, "
        f"{result.tokens_per_second:,.0f} tokens/s; "
        f"{result.changed:,} weights changed, by {result.mean_sigma:.3g} sigma in the mean."
    )
    if result.headline:
        sink.line(f"{result.headline}.")
    sink.result(
        {
            "output": str(folder.path),
            "changed": result.changed,
            "verified": report.to_json(),
            "warnings": result.warnings,
        }
    )
    if not report.ok:
        raise CheckFailed(report.message())
    folder.finish()
    sink.line(report.message())
    sink.line(f"Output: {folder.path}")


def _lora(settings: dict[str, Any]) -> LoraSettings | None:
    """The adapter that `--use-peft` and the `--lora-` flags describe; an error where the flags stand alone."""
    from safecrit.errors import SafecritError
    from safecrit.lora import LoraSettings

    given = {
        name: settings[f"lora_{name}"]
        for name in ("r", "alpha", "dropout", "target_modules")
        if settings.get(f"lora_{name}") is not None
    }
    if not settings.get("use_peft"):
        if given:
            raise SafecritError(f"--lora-{next(iter(given)).replace('_', '-')}: does nothing without --use-peft.")
        return None
    defaults = LoraSettings()
    targets = given.get("target_modules")
    return LoraSettings(
        r=given.get("r", defaults.r),
        lora_alpha=given.get("alpha", defaults.lora_alpha),
        lora_dropout=given.get("dropout", defaults.lora_dropout),
        target_modules=tuple(name.strip() for name in targets.split(",")) if targets else defaults.target_modules,
    )

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
Batch = Annotated[
    int, typer.Option("--per-device-train-batch-size", "--batch-size", min=1, help="Examples at once, on each rank.")
]
Accumulation = Annotated[
    int, typer.Option("--gradient-accumulation-steps", min=1, help="Batches per optimizer step, on each rank.")
]
Scheduler = Annotated[str, typer.Option("--lr-scheduler-type", help="cosine, linear, constant, ...")]
Warmup = Annotated[float, typer.Option("--warmup-ratio", min=0, max=1, help="Share of the steps that warm up.")]
Decay = Annotated[float, typer.Option("--weight-decay", min=0, help="Decoupled weight decay of trained weights.")]
Norm = Annotated[float, typer.Option("--max-grad-norm", min=0, help="Clip the gradient's norm; 0 does not clip.")]
Length = Annotated[int, typer.Option("--max-length", min=8, help="Longest example, in tokens.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16; weights and state stay as they are.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Recompute activations: less memory.")]
SaveSteps = Annotated[int, typer.Option("--save-steps", min=0, help="Save a checkpoint every N steps; 0 saves none.")]
ReportTo = Annotated[str, typer.Option("--report-to", help="none, or a tracker that transformers knows.")]
Results = Annotated[
    Path | None,
    typer.Option("--results", metavar="DIR", help="An output of eval on MODEL: its figures go into the model card."),
]
Parallel = Annotated[
    Literal["auto", "replicate", "shard"],
    typer.Option("--parallel", help="Under torchrun: the model whole on every rank, or divided (FSDP2)."),
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
    bf16: Bf16 = False,
    gradient_checkpointing: Checkpointing = False,
    save_steps: SaveSteps = 0,
    report_to: ReportTo = "none",
    results: Results = None,
    dry_run: o.DryRun = False,
    gpu_memory: o.GpuMemory = None,
    ranks: o.Ranks = 1,
    push_to_hub: o.PushToHub = None,
    public: o.Public = False,
    seed: o.Seed = 0,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    allow_other_weights: o.AllowOtherWeights = False,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    parallel: Parallel = "auto",
    dist_timeout: o.DistTimeout = o.DIST_TIMEOUT_S,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Safety-enhancing tuning (SET): train only the masked weights, on harmful prompts with refusals.

    Every other weight keeps its bits; the files written are verified at the end.
    The default learning rate is the paper's; it moves weights very little.
    """
    _run("set", o.resolved(context), output, overwrite, Sink(as_json=as_json, quiet=quiet), context)


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
    lora_target_parameters: Annotated[
        str | None,
        typer.Option("--lora-target-parameters", metavar="NAMES", help="Outside linear layers: fused experts."),
    ] = None,
    use_rslora: Annotated[bool, typer.Option("--use-rslora", help="Scale by alpha / sqrt(rank).")] = False,
    use_dora: Annotated[bool, typer.Option("--use-dora", help="Weight-decomposed LoRA (DoRA).")] = False,
    bf16: Bf16 = False,
    gradient_checkpointing: Checkpointing = False,
    save_steps: SaveSteps = 0,
    report_to: ReportTo = "none",
    results: Results = None,
    dry_run: o.DryRun = False,
    gpu_memory: o.GpuMemory = None,
    ranks: o.Ranks = 1,
    push_to_hub: o.PushToHub = None,
    public: o.Public = False,
    seed: o.Seed = 0,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    allow_other_weights: o.AllowOtherWeights = False,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    parallel: Parallel = "auto",
    dist_timeout: o.DistTimeout = o.DIST_TIMEOUT_S,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Safety-preserving adaptation (SPA): fine-tune on a task with the masked weights frozen, bit for bit.

    With --use-peft the base stays as it is while a LoRA adapter trains, and the merge leaves the masked weights out.
    The files written are verified at the end. Freezing slows the loss of safety
    down; it does not stop somebody who fine-tunes in order to break it.
    """
    _run("spa", o.resolved(context), output, overwrite, Sink(as_json=as_json, quiet=quiet), context)


def _run(
    mode: Literal["set", "spa"],
    settings: dict[str, Any],
    output: Path | None,
    overwrite: bool,
    sink: Sink,
    context: typer.Context,
) -> None:
    from dataclasses import fields

    from safecrit import distributed, faults
    from safecrit.api.train import TrainJob, check_inputs, headline, run_training
    from safecrit.api.trainplacing import parallel_mode
    from safecrit.api.trainresume import as_begun, resumption
    from safecrit.errors import CheckFailed
    from safecrit.hub import push
    from safecrit.lora import lora_headline
    from safecrit.outputs import default_output, open_output
    from safecrit.trainloop import TrainSettings

    lora = _lora(settings)
    names = {field.name for field in fields(TrainSettings)}
    training = TrainSettings(**{key: value for key, value in settings.items() if key in names})
    own = {field.name for field in fields(TrainJob)} - {"mode", "settings", "mask", "lora", "results", "parallel"}
    job = TrainJob(
        mode=mode,
        settings=training,
        mask=Path(settings["mask"]),
        lora=lora,
        results=Path(settings["results"]) if settings["results"] is not None else None,
        parallel=context.params["parallel"],
        **{key: value for key, value in settings.items() if key in own},
    )
    path = output or default_output(mode, job.model)
    if not context.params["dry_run"]:
        o.check_dry(context)
    if context.params["dry_run"]:
        from dataclasses import asdict

        from safecrit.api.traindryrun import dry_run, lines

        found = dry_run(job, ranks=o.asked_ranks(context), gpu_memory=context.params["gpu_memory"], output=path)
        for line in lines(found):
            sink.line(line)
        sink.result(asdict(found))
        return
    distributed.start(context.params["dist_timeout"])

    def checked() -> tuple[str, tuple[str, str]]:
        mask = check_inputs(job)
        line = headline(mask, mode) if lora is None else lora_headline(lora)
        return line, parallel_mode(job) if faults.watching() else ("replicate", "")

    training_line, (parallel, reason) = distributed.from_first(checked)
    settings = distributed.from_first(lambda: as_begun(settings, path))
    folder = distributed.from_first(lambda: open_output(path, mode, settings, overwrite=overwrite, inside="safecrit"))
    for place in (folder.path, folder.path / "safecrit"):
        distributed.writes_in(place)
    if folder.resumed:
        sink.note(distributed.from_first(lambda: resumption(folder.path)))
    sink.line(training_line)
    outcome = run_training(job, folder.path, sink.progress, parallel, reason, sink.note)
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
    if distributed.current().first:
        folder.finish()
    sink.line(report.message())
    sink.line(f"Output: {folder.path}")
    if distributed.current().first and context.params["push_to_hub"]:
        sink.line(f"Uploaded: {push(folder.path, context.params['push_to_hub'], public=context.params['public'])}")


def _lora(settings: dict[str, Any]) -> LoraSettings | None:
    """The adapter that `--use-peft` and the `--lora-` flags describe; an error where the flags stand alone."""
    from safecrit.errors import SafecritError
    from safecrit.lora import LoraSettings

    names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters")
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    given |= {name: True for name in ("use_rslora", "use_dora") if settings.get(name)}
    if not settings.get("use_peft"):
        if given:
            raise SafecritError(f"--{next(iter(given)).replace('_', '-')}: does nothing without --use-peft.")
        return None
    given["r"] = given.pop("lora_r", LoraSettings.r)
    for name in ("target_modules", "target_parameters"):
        if f"lora_{name}" in given:
            given[name] = tuple(part.strip() for part in given.pop(f"lora_{name}").split(","))
    return LoraSettings(**given)

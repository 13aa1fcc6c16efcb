"""One training run through transformers' Trainer: settings in, losses and figures out, the model changed in place.

Trainer's own printing is off, a loss or gradient that is no number stops the run, and
the data come in the order they were laid out in.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from safecrit import distributed
from safecrit.errors import SafecritError
from safecrit.masked import MaskedAdamW
from safecrit.mixture import Mixture, collate
from safecrit.models import LoadedModel
from safecrit.protection import ProtectCallback
from safecrit.sparse import SparseAdamW
from safecrit.traincheckpoint import GO_ON, load_state, save_state

_SCHEDULER = "scheduler.pt"
Progress = Callable[[int, int, float], None]
"""Called after every step with its number, the number of steps, and the step's loss."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train; the names and meanings are TrainingArguments'. `max_length` in tokens."""

    learning_rate: float = 3e-5
    max_steps: int = 100
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.03
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 2048
    optim: str = "adamw_torch"
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    save_steps: int = 0
    report_to: str = "none"

    @property
    def examples(self) -> int:
        """Examples that each process sees in a whole run, repeats included."""
        return self.max_steps * self.per_device_train_batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """Figures of a run: loss and gradient norm (before clipping) of every step, those before a resumption included.

    `tokens` and `seconds` are of this call, the tokens of all ranks; `peak_memory` in bytes, of the largest rank.
    `sent`: bytes that this rank sent by itself, by purpose, without those of DistributedDataParallel and FSDP2.
    """

    losses: list[float]
    grad_norms: list[float]
    tokens: int
    seconds: float
    peak_memory: int
    sent: dict[str, int]


class _Report(TrainerCallback):
    """Passes every step's loss on, and stops a run whose gradient is no number."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        if not math.isfinite(logs["grad_norm"]):
            raise SafecritError(f"the gradient is not finite at step {state.global_step}. Lower --learning-rate.")
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps, float(logs["loss"]))


class _Trainer(Trainer):
    """Trainer that counts tokens, stops at a loss that is no number before the step is taken, and saves what it trains.

    Its checkpoints are those of `safecrit.traincheckpoint`.
    """

    sparse: SparseAdamW | None = None
    tokens = 0

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens += int(inputs["attention_mask"].sum())
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not bool(torch.isfinite(loss)):
            raise SafecritError(
                f"the loss is not finite at step {self.state.global_step + 1}. "
                "Lower --learning-rate, or train in float32."
            )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            # Trainer sees no gradients beside SparseAdamW, and would log 0.
            logs["grad_norm"] = self.sparse.grad_norm if self.sparse is not None else float(logs.get("grad_norm", 0.0))
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights are saved with the optimizer's state."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights are loaded with the optimizer's state."""

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        assert isinstance(inner, torch.optim.Optimizer)
        return inner

    def _save_checkpoint(self, *arguments: Any, **more: Any) -> None:
        """SafecritError where the disk is full, of which torch.save tells in a RuntimeError of its file writer."""
        try:
            super()._save_checkpoint(*arguments, **more)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            raise SafecritError(f"{self.args.output_dir}: a checkpoint cannot be written ({error}). {GO_ON}") from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.model is not None and self.lr_scheduler is not None
        save_state(Path(output_dir), self.model, self._inner_optimizer())
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.model is not None and self.lr_scheduler is not None
        load_state(Path(checkpoint), self.model, self._inner_optimizer())
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True))
        for group, rate in zip(self._inner_optimizer().param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate


def train(
    loaded: LoadedModel,
    data: Mixture,
    settings: TrainSettings,
    progress: Progress | None,
    checkpoints: Path | None,
    *,
    optimizer: SparseAdamW | None = None,
    callback: TrainerCallback | None = None,
) -> TrainRecord:
    """Train `loaded.model` on `data`, in place: by `optimizer`, or by the one `settings.optim` names.

    With `checkpoints` (a folder) and `settings.save_steps`, the run saves itself there
    and continues from the last save it finds there. Raises SafecritError for settings
    that Trainer refuses, and where loss or gradient is not finite.
    """
    device = loaded.model.device
    with ExitStack() as stack:
        folder = checkpoints or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="safecrit-")))
        saving = checkpoints is not None and settings.save_steps > 0
        try:
            arguments = TrainingArguments(
                output_dir=str(folder),
                max_steps=settings.max_steps,
                learning_rate=settings.learning_rate,
                lr_scheduler_type=settings.lr_scheduler_type,
                warmup_steps=settings.warmup_ratio,  # transformers 5 reads a value below 1 as a share of the steps
                per_device_train_batch_size=settings.per_device_train_batch_size,
                gradient_accumulation_steps=settings.gradient_accumulation_steps,
                adam_beta1=settings.adam_beta1,
                adam_beta2=settings.adam_beta2,
                adam_epsilon=settings.adam_epsilon,
                weight_decay=settings.weight_decay,
                max_grad_norm=settings.max_grad_norm if optimizer is None else 0.0,  # SparseAdamW clips for itself
                optim=settings.optim,
                seed=settings.seed,
                bf16=settings.bf16,
                **(_checkpointing() if settings.gradient_checkpointing else {}),
                report_to=settings.report_to,
                disable_tqdm=True,
                logging_strategy="steps",
                logging_steps=1,
                logging_nan_inf_filter=False,
                save_strategy="steps" if saving else "no",
                save_steps=settings.save_steps if saving else 500,
                save_total_limit=2,
                train_sampling_strategy="sequential",
                remove_unused_columns=False,
                label_names=["labels"],
                dataloader_pin_memory=False,
                use_cpu=device.type == "cpu",
            )
        except ValueError as error:
            raise SafecritError(f"training settings: {str(error).splitlines()[0]}") from error
        one_pass = isinstance(callback, ProtectCallback) and settings.optim in ("adamw_torch", "adamw_torch_fused")
        pad = loaded.tokenizer.pad_token_id
        trainer = _Trainer(
            model=loaded.model,
            args=arguments,
            train_dataset=data,
            data_collator=partial(collate, pad=pad if pad is not None else 0),
            optimizers=(optimizer, None),
            optimizer_cls_and_kwargs=(MaskedAdamW, _adamw(settings)) if one_pass else None,
            callbacks=[_Report(progress)] if callback is None else [callback, _Report(progress)],
        )
        trainer.sparse = optimizer
        if optimizer is not None or distributed.is_sharded(loaded.model):
            # Gradients are averaged elsewhere; evaluation mode is to leave DDP away.
            trainer.accelerator.prepare_model = partial(trainer.accelerator.prepare_model, evaluation_mode=True)
        elif trainer.accelerator.ddp_handler is not None:
            trainer.accelerator.ddp_handler.gradient_as_bucket_view = True  # without it every gradient is kept twice
        trainer.remove_callback(PrinterCallback)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        start, before = time.perf_counter(), distributed.sent_bytes()
        last = distributed.from_first(lambda: last_checkpoint(folder)) if saving else None
        try:
            trainer.train(resume_from_checkpoint=last)
        finally:
            logging.set_verbosity(verbosity)
            loaded.model.eval()
        sent = distributed.sent_bytes()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return TrainRecord(
        losses=[float(entry["loss"]) for entry in steps],
        grad_norms=[float(entry["grad_norm"]) for entry in steps],
        tokens=sum(distributed.gather(trainer.tokens)),
        seconds=time.perf_counter() - start,
        peak_memory=distributed.most(_peak_memory(device)),
        sent={name: size - before.get(name, 0) for name, size in sent.items() if size > before.get(name, 0)},
    )


def _adamw(settings: TrainSettings) -> dict[str, Any]:
    """AdamW's arguments; Trainer divides the parameters into those with weight decay and those without."""
    return {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
    }


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in `folder`; Trainer writes `trainer_state.json` last, so a cut save lacks it."""
    found = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            found.append((int(json.loads(state.read_text(encoding="utf-8"))["global_step"]), str(state.parent)))
        except (ValueError, KeyError, TypeError):
            continue  # cut short while it was written
    return max(found)[1] if found else None


def _checkpointing() -> dict[str, Any]:
    """TrainingArguments for gradient checkpointing, which newer transformers call activation checkpointing."""
    kind = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
    # A reentrant checkpoint would fire a shared parameter's hook twice.
    return {f"{kind}_checkpointing": True, f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}


def _peak_memory(device: torch.device) -> int:
    """Bytes: what torch allocated on the GPU at most, or the process's largest resident set, 0 where not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

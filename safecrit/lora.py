"""Training a LoRA adapter with PEFT, for SPA: the base stands still, and the mask takes effect when it is merged.

Merging is `safecrit.adapter`'s. The adapter is saved as PEFT saves it, so that it can be
merged again, under another mask or none.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from safecrit import distributed
from safecrit.adapter import Merged, adapter_headline, peft_module
from safecrit.errors import SafecritError
from safecrit.mixture import Mixture
from safecrit.models import LoadedModel
from safecrit.traindata import TrainExample
from safecrit.training import TrainResult, check_ranks, training_data, training_warnings
from safecrit.trainloop import Progress, TrainRecord, TrainSettings, train


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The adapter; names and meanings are PEFT's. `target_modules`: names, or `("all-linear",)`.

    `target_parameters`: weights that belong to no linear layer, such as fused experts (`mlp.experts.gate_up_proj`).
    """

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    target_parameters: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainedAdapter:
    """A trained adapter, saved in `folder`; `trained` counts its weights."""

    folder: Path
    trained: int
    settings: TrainSettings
    record: TrainRecord
    data: Mixture


def lora_headline(lora: LoraSettings) -> str:
    """One line on an adapter that is to be trained."""
    targets = ", ".join((*lora.target_modules, *lora.target_parameters))
    return f"Training a {'DoRA' if lora.use_dora else 'LoRA'} adapter of rank {lora.r} on {targets}, base frozen"


def adapt(model: Any, lora: LoraSettings, seed: int) -> Any:
    """`model` with a fresh adapter, a PeftModel whose start is a function of `seed`.

    Raises SafecritError where PEFT is not installed or refuses the settings.
    """
    peft = peft_module()
    targets = lora.target_modules
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5.23 by a name that this calls old.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            torch.manual_seed(seed)
            config = peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.lora_alpha,
                lora_dropout=lora.lora_dropout,
                target_modules=targets[0] if targets == ("all-linear",) else list(targets),
                target_parameters=list(lora.target_parameters) or None,
                use_rslora=lora.use_rslora,
                use_dora=lora.use_dora,
            )
            return peft.get_peft_model(model, config)
    except ValueError as error:
        raise SafecritError(f"LoRA settings: {str(error).splitlines()[0][:200]}") from error


def train_adapter(
    loaded: LoadedModel,
    examples: Sequence[TrainExample],
    retain_examples: Sequence[TrainExample] | None,
    retain_share: float,
    settings: TrainSettings,
    lora: LoraSettings,
    folder: Path,
    progress: Progress | None = None,
    *,
    checkpoints: Path | None = None,
) -> TrainedAdapter:
    """Train an adapter on `loaded.model`, whose layers PEFT wraps in place, and save it to `folder`.

    The data and checkpoints are `run_spa`'s. Of several ranks each has the whole model, and the first saves. Raises
    SafecritError where PEFT refuses the settings, and where the ranks' adapters are not the same in the end.
    """
    data = training_data(loaded, examples, retain_examples or (), retain_share, settings)
    if loaded.model.dtype == torch.float16:
        loaded.model.float()
    model = adapt(loaded.model, lora, settings.seed)
    record = train(replace(loaded, model=model), data, settings, progress, checkpoints)
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    check_ranks(trained)
    distributed.from_first(lambda: model.save_pretrained(folder))
    count = sum(parameter.numel() for parameter in trained)
    return TrainedAdapter(folder=folder, trained=count, settings=settings, record=record, data=data)


def merged_result(adapter: TrainedAdapter, merged: Merged, total: int) -> TrainResult:
    """The run as SPA reports it; `total`: weights of the base."""
    record = adapter.record
    return TrainResult(
        mode="spa",
        settings=adapter.settings,
        trained=adapter.trained,
        total=total,
        losses=record.losses,
        grad_norms=record.grad_norms,
        tokens=record.tokens,
        seconds=record.seconds,
        peak_memory=record.peak_memory,
        sent=record.sent,
        data=adapter.data,
        parents=merged.parents,
        moved=merged.moved,
        changed=merged.changed,
        mean_sigma=merged.mean_sigma,
        warnings=[*merged.warnings, *training_warnings(adapter.data)],
        adapter=merged.adapter | {"trained": adapter.trained, "held": merged.held},
        headline=adapter_headline(merged.adapter, merged.held),
    )

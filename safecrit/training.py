"""SET and SPA as ordinary fine-tuning, through transformers' Trainer.

SET trains the masked weights on prompt -> refusal pairs, retain data mixed in; SPA
trains everything else on a task (docs/method.md, section 4). The defaults are the authors':
AdamW (0.9, 0.999), cosine, warm-up 3 %, batch 1 x 4, no weight decay, length 2048.
Where a dense optimizer runs, weights are float32 while they are trained, since bfloat16
swallows most small updates; SET has a float32 master of what it trains, and LoRA a
float32 adapter, and both leave the model in its own dtype (float16 alone becomes
float32). What is written has the checkpoint's dtypes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safecrit import distributed
from safecrit.anatomy import Anatomy, read_anatomy
from safecrit.errors import SafecritError
from safecrit.files import StoredTensor, checkpoint_tensors
from safecrit.fingerprint import Changes, accepted_fingerprints
from safecrit.fsdp import from_first_whole
from safecrit.mixture import Mixture, mix
from safecrit.models import LoadedModel
from safecrit.movement import NEGLIGIBLE, Moved, Movement
from safecrit.protection import ProtectCallback
from safecrit.sparse import SparseAdamW
from safecrit.tensorfile import DTYPES, MappedFiles
from safecrit.traindata import TrainExample
from safecrit.trainloop import Progress, TrainRecord, TrainSettings, train

if TYPE_CHECKING:
    from safecrit.maskfile import Mask


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run did. `changes`: SET's new values by checkpoint tensor; None for SPA, whose model holds them.

    `adapter` and `headline` describe the LoRA adapter that SPA trained, where it trained one.
    """

    mode: str
    settings: TrainSettings
    trained: int
    total: int
    losses: list[float]
    grad_norms: list[float]
    tokens: int
    seconds: float
    peak_memory: int
    sent: dict[str, int]
    data: Mixture
    parents: list[str]
    moved: list[Moved]
    changed: int
    mean_sigma: float
    changes: Changes | None = field(default=None, repr=False)
    warnings: list[str] = field(default_factory=list)
    adapter: dict[str, Any] | None = None
    headline: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sequences, prompts included and padding not, per second of training."""
        return self.tokens / self.seconds if self.seconds else 0.0


def headline(mask: Mask, mode: str) -> str:
    """`Training K of N weights (share), rest frozen`, for `set` or `spa`."""
    total = mask.info.total
    trained = mask.count if mode == "set" else total - mask.count
    return f"Training {trained:,} of {total:,} weights ({100 * trained / total:.4g} %), rest frozen"


def run_set(
    loaded: LoadedModel,
    mask: Mask,
    examples: Sequence[TrainExample],
    retain_examples: Sequence[TrainExample] | None = None,
    retain_share: float = 0.5,
    settings: TrainSettings | None = None,
    progress: Progress | None = None,
    *,
    checkpoints: Path | None = None,
    allow_other_weights: bool = False,
) -> TrainResult:
    """Train the weights that `mask` selects, in place, and nothing else.

    `retain_share` of the examples seen come from `retain_examples` where they are
    given. With `checkpoints` and `settings.save_steps`, the run saves itself there and
    continues from there. Raises MismatchError before training where the mask does not
    fit, SafecritError where loss or gradient is not finite.
    """
    settings = settings or TrainSettings()
    anatomy, parents = check_mask(loaded, mask, allow_other_weights)
    if loaded.model.dtype == torch.float16:
        to_float32(loaded.model)
    optimizer = SparseAdamW(
        loaded.model,
        mask,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm or None,
    )
    data = training_data(loaded, examples, retain_examples or (), retain_share, settings)
    stored = stored_tensors(loaded, mask.indices)
    try:
        record = train(loaded, data, settings, progress, checkpoints, optimizer=optimizer)
        changes = optimizer.changes(mask, {name: DTYPES[tensor.dtype] for name, tensor in stored.items()})
    finally:
        optimizer.close()
    if not distributed.is_sharded(loaded.model):
        check_ranks(values for _, values in changes.values())

    def moved() -> Movement:
        movement, maps = Movement(), MappedFiles()
        for name, (indices, values) in changes.items():
            movement.add(anatomy.tensors[name].layout, maps.tensor(stored[name]), values, only=indices)
        return movement

    movement = distributed.from_first(moved)
    return _result("set", settings, mask.count, anatomy, record, data, parents, movement, changes)


def run_spa(
    loaded: LoadedModel,
    mask: Mask,
    examples: Sequence[TrainExample],
    retain_examples: Sequence[TrainExample] | None = None,
    retain_share: float = 0.5,
    settings: TrainSettings | None = None,
    progress: Progress | None = None,
    *,
    checkpoints: Path | None = None,
    allow_other_weights: bool = False,
) -> TrainResult:
    """Train every weight but those that `mask` selects, which stay bit-identical. Arguments and errors: `run_set`."""
    settings = settings or TrainSettings(max_steps=1000)
    anatomy, parents = check_mask(loaded, mask, allow_other_weights)
    stored, maps = stored_tensors(loaded, anatomy.tensors), MappedFiles()
    if not mask.count:
        raise SafecritError("the mask selects no weight of this model, so nothing would be protected.")
    to_float32(loaded.model)
    data = training_data(loaded, examples, retain_examples or (), retain_share, settings)
    record = train(loaded, data, settings, progress, checkpoints, callback=ProtectCallback(mask))
    if not distributed.is_sharded(loaded.model):
        check_ranks(parameter.detach() for parameter in loaded.model.parameters())

    def moved(whole: Callable[[str], torch.Tensor]) -> Movement:
        movement = Movement()
        for name, tensor in anatomy.tensors.items():
            base = maps.tensor(stored[name])
            new = tensor.source.of(whole(tensor.parameter)).to("cpu", base.dtype).contiguous()
            movement.add(tensor.layout, base, new, frozen=mask.indices.get(name))
        return movement

    movement = from_first_whole(loaded.model, moved)
    return _result("spa", settings, anatomy.total - mask.count, anatomy, record, data, parents, movement, None)


def to_float32(model: torch.nn.Module) -> None:
    """Make the weights float32, in place; one whose are is left alone."""
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        model.float()


def check_mask(loaded: LoadedModel, mask: Mask, allow_other_weights: bool) -> tuple[Anatomy, list[str]]:
    """The model's anatomy and accepted fingerprints; MismatchError where the mask is of another model."""
    anatomy = read_anatomy(loaded.model)
    parents = list(accepted_fingerprints(loaded.folder))
    mask.check(anatomy, fingerprints=parents, allow_other_weights=allow_other_weights)
    return anatomy, parents


def check_ranks(tensors: Iterable[torch.Tensor]) -> None:
    """SafecritError where the ranks' copies of the trained weights are not bit-identical."""
    if distributed.current().world == 1:
        return
    digest = 0
    for tensor in tensors:
        digest = zlib.crc32(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data, digest)
    found = distributed.gather(digest)
    if other := [rank for rank, value in enumerate(found) if value != found[0]]:
        raise SafecritError(f"the weights of rank {other[0]} are not those of rank 0 after training. Discard this run.")


def stored_tensors(loaded: LoadedModel, names: Iterable[str]) -> dict[str, StoredTensor]:
    """The tensors of the model's files, checked to hold all of `names`."""
    stored = checkpoint_tensors(loaded.folder)
    for name in names:
        if name not in stored:
            raise SafecritError(
                f"{loaded.folder}: has no tensor {name!r}; its names are of an older kind. Load and save the model "
                "once with transformers, and work from that folder."
            )
    return stored


def training_data(
    loaded: LoadedModel,
    examples: Sequence[TrainExample],
    retain: Sequence[TrainExample],
    share: float,
    settings: TrainSettings,
) -> Mixture:
    """The examples of a whole run in their order, over all processes; SafecritError where there are none."""
    if not examples:
        raise SafecritError("there are no training examples.")
    window = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    return mix(
        loaded.tokenizer,
        examples,
        retain,
        retain_share=share,
        count=settings.examples * distributed.processes(),
        max_length=min(settings.max_length, window or settings.max_length),
        seed=settings.seed,
    )


def _result(
    mode: str,
    settings: TrainSettings,
    trained: int,
    anatomy: Anatomy,
    record: TrainRecord,
    data: Mixture,
    parents: list[str],
    movement: Movement,
    changes: Changes | None,
) -> TrainResult:
    warnings = []
    if movement.mean_sigma < NEGLIGIBLE:
        warnings.append(
            f"the trained weights moved by {movement.mean_sigma:.2g} sigma in the mean, which is negligible. "
            "Raise --learning-rate or --max-steps."
        )
    warnings += training_warnings(data)
    return TrainResult(
        mode=mode,
        settings=settings,
        trained=trained,
        total=anatomy.total,
        losses=record.losses,
        grad_norms=record.grad_norms,
        tokens=record.tokens,
        seconds=record.seconds,
        peak_memory=record.peak_memory,
        sent=record.sent,
        data=data,
        parents=parents,
        moved=movement.table(),
        changed=movement.changed,
        mean_sigma=movement.mean_sigma,
        changes=changes,
        warnings=warnings,
    )


def training_warnings(data: Mixture) -> list[str]:
    """What the user should know of the examples: how many were cut, and how many left out."""
    warnings = []
    if data.truncated:
        warnings.append(f"{data.truncated} of {data.distinct} examples were cut to the length allowed (--max-length).")
    if data.cut_away:
        warnings.append(f"{data.cut_away} examples were left out: the cut took all of their answer.")
    return warnings

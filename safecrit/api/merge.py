"""merge: model + LoRA adapter + mask -> a model folder with the mask's weights as they were, verified."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safecrit.adapter import Merged, adapter_headline, merge_adapter, read_adapter
from safecrit.checkpoint import rewrite
from safecrit.files import checkpoint_tensors, write_json, write_text
from safecrit.fingerprint import accepted_fingerprints
from safecrit.maskfile import Mask
from safecrit.modelcard import CardFacts, base_licence, model_card
from safecrit.models import LoadedModel, load_model, resolve_folder
from safecrit.movement import rows_to_json
from safecrit.training_output import provenance
from safecrit.verification import VerifyReport, verify


@dataclass(frozen=True, kw_only=True)
class MergeJob:
    """All that `merge` needs to know; `adapter` is a folder of PEFT's save_pretrained."""

    model: str
    adapter: Path
    mask: Path
    revision: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    allow_other_weights: bool = False


def check_merge(job: MergeJob) -> None:
    """Find the user's mistakes before an output folder is made."""
    folder = resolve_folder(job.model, revision=job.revision)
    read_adapter(job.adapter)
    shapes = {name: tensor.shape for name, tensor in checkpoint_tensors(folder).items()}
    Mask.load(job.mask).check(
        shapes, fingerprints=accepted_fingerprints(folder), allow_other_weights=job.allow_other_weights
    )


def run_merge(job: MergeJob, folder: Path) -> tuple[Merged, VerifyReport]:
    """Merge, write `folder`, and verify the files written against the base."""
    mask = Mask.load(job.mask)
    loaded = load_model(job.model, revision=job.revision, device=job.device, trust_remote_code=job.trust_remote_code)
    merged = merge_adapter(loaded, job.adapter, mask, allow_other_weights=job.allow_other_weights)
    _write(loaded, mask, merged, folder)
    return merged, verify(folder, loaded.folder, mask, "spa")


def _write(loaded: LoadedModel, mask: Mask, merged: Merged, folder: Path) -> None:
    card = CardFacts(
        mode="spa",
        base=loaded.id,
        revision=loaded.revision,
        licence=base_licence(loaded.folder),
        fingerprint=merged.parents[0],
        mask_note=f"Mask: {mask.info.mode}, {mask.count:,} of {mask.info.total:,} weights.",
        headline=adapter_headline(merged.adapter, merged.held),
        steps=None,
        learning_rate=None,
        final_loss=None,
        mean_sigma=merged.mean_sigma,
        changed=merged.changed,
        moved=merged.moved,
        warnings=merged.warnings,
    )
    document = provenance(loaded, mask, "spa", merged.parents) | {
        "adapter": merged.adapter,
        "held": merged.held,
        "changed": merged.changed,
        "mean_sigma": merged.mean_sigma,
        "moved": rows_to_json(merged.moved),
        "warnings": merged.warnings,
    }
    write_text(folder / "README.md", model_card(card))
    write_json(folder / "safecrit" / "training.json", document)
    rewrite(loaded.folder, folder, merged.weights, overwrite=True)

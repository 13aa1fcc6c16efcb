"""merge: model + adapter + mask -> merged model folder or delta -> verification of what was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safecrit.api.train import verify_output
from safecrit.errors import SafecritError
from safecrit.files import checkpoint_tensors
from safecrit.fingerprint import accepted_fingerprints
from safecrit.hub import fetch, looks_local
from safecrit.lora import CONFIG, WEIGHTS, check_adapter
from safecrit.maskfile import Mask
from safecrit.models import load_model, resolve_folder
from safecrit.training import MergeResult, run_merge
from safecrit.training_output import write_merge_output
from safecrit.verification import VerifyReport


@dataclass(frozen=True, kw_only=True)
class MergeOutcome:
    """What merging did, and what `verify` says of the files."""

    result: MergeResult
    verified: VerifyReport


def check_inputs(
    model: str, adapter: str | Path, mask: str | Path, *, revision: str | None = None, allow_other_weights: bool = False
) -> tuple[Path, Mask]:
    """Find the user's mistakes before an output folder is made; the adapter's folder, and the mask of this model."""
    folder = resolve_folder(model, revision=revision)
    place = Path(adapter).expanduser()
    if not place.is_dir():
        if looks_local(str(adapter)) or place.exists():
            raise SafecritError(f"{adapter}: no such folder. Give an adapter folder or a Hub id such as owner/name.")
        place = fetch(str(adapter), "adapter folder", patterns=[CONFIG, WEIGHTS])
    check_adapter(place)
    selected = Mask.load(mask)
    shapes = {name: tensor.shape for name, tensor in checkpoint_tensors(folder).items()}
    selected.check(shapes, fingerprints=accepted_fingerprints(folder), allow_other_weights=allow_other_weights)
    return place, selected


def merge(
    model: str | Path,
    adapter: str | Path,
    mask: str | Path,
    out: str | Path,
    *,
    save: str = "model",
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    allow_other_weights: bool = False,
    overwrite: bool = False,
) -> MergeOutcome:
    """Write to the folder `out` the model with a LoRA adapter merged everywhere but in the weights that `mask` selects.

    Those keep the base's bits; the others get PEFT's own sum. model, adapter, mask:
    folders, files or Hub ids. save: `model`, `delta` or `both`. The files written are
    compared with the base; look at `verified.ok`. Raises SafecritError where the parts
    do not fit, or where `out` already holds a model and `overwrite` is off.
    """
    place, selected = check_inputs(
        str(model), adapter, mask, revision=revision, allow_other_weights=allow_other_weights
    )
    loaded = load_model(str(model), revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    result = run_merge(loaded, selected, place, allow_other_weights=allow_other_weights)
    write_merge_output(loaded, selected, out, result, save, overwrite=overwrite)
    return MergeOutcome(result=result, verified=verify_output(Path(out), loaded.folder, selected, "spa", save))

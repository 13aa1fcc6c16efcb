"""Writing what SET or SPA made: a Hugging Face model folder, our own files under `safecrit/`.

Weight files are the base's with new values in them, so names, dtypes and sharding stay
the base's and frozen weights keep their bits. config.json comes last: a folder without
it is an unfinished one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safecrit import __version__
from safecrit.anatomy import read_anatomy
from safecrit.checkpoint import rewrite
from safecrit.delta import make_delta
from safecrit.errors import SafecritError
from safecrit.files import checkpoint_tensors, write_json, write_text
from safecrit.fingerprint import Changes
from safecrit.modelcard import CardFacts, base_licence, model_card
from safecrit.models import LoadedModel
from safecrit.movement import rows_to_json
from safecrit.tensorfile import DTYPES
from safecrit.training import TrainResult, headline

if TYPE_CHECKING:
    from safecrit.maskfile import Mask

SAVE = ("model", "delta", "both")


def write_set_output(
    loaded: LoadedModel,
    mask: Mask,
    out: str | Path,
    result: TrainResult,
    save: str = "both",
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Write SET's result to the folder `out`: the model, `safecrit/delta.safetensors`, or both; the files written.

    Always written: README.md and `safecrit/training.json`. Raises SafecritError for
    another `save`, and where `out` already holds a model and `overwrite` is off.
    """
    if save not in SAVE:
        raise SafecritError(f"--save {save}: unknown. Use {', '.join(SAVE)}.")
    assert result.changes is not None
    out, written = Path(out), []
    info = _document(loaded, mask, result)
    if save != "model":
        delta = make_delta(loaded.folder, result.changes, info={"mode": result.mode, "model": _name(loaded.id)})
        delta.save(out / "safecrit" / "delta.safetensors")
        written.append(out / "safecrit" / "delta.safetensors")
    written += _own_files(loaded, mask, out, result, info, delta_only=save == "delta")
    if save != "delta":
        written += rewrite(loaded.folder, out, result.changes, overwrite=overwrite)
    return written


def write_spa_output(
    loaded: LoadedModel,
    mask: Mask,
    out: str | Path,
    result: TrainResult,
    *,
    weights: Changes | None = None,
    whole: Callable[[str], torch.Tensor] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write SPA's result to the folder `out`: `weights`, or all that `loaded.model` holds now; the files written.

    whole: gives each runtime parameter, where the model itself has only rows of them.
    """
    out = Path(out)
    written = _own_files(loaded, mask, out, result, _document(loaded, mask, result))
    changes = ModelWeights(loaded, whole) if weights is None else weights
    return written + rewrite(loaded.folder, out, changes, overwrite=overwrite)


class ModelWeights(Mapping[str, tuple[torch.Tensor, torch.Tensor]]):
    """Every weight of a model in memory as changes to its checkpoint, made one tensor at a time when asked for.

    `tensors`: where each checkpoint tensor lies in the model; a tied copy has the anatomy's entry of its original.
    """

    def __init__(self, loaded: LoadedModel, whole: Callable[[str], torch.Tensor] | None = None) -> None:
        """Pair the checkpoint's tensors with the model's; a stored copy of a tied tensor follows the tensor."""
        anatomy = read_anatomy(loaded.model)
        self._stored = checkpoint_tensors(loaded.folder)
        self._whole = whole or (lambda name: loaded.model.get_parameter(name).detach())
        self.tensors = dict(anatomy.tensors)
        by_parameter = {tensor.parameter: tensor for tensor in anatomy.tensors.values()}
        for copy, target in (getattr(loaded.model, "all_tied_weights_keys", None) or {}).items():
            if copy in self._stored and copy not in self.tensors and target in by_parameter:
                self.tensors[copy] = by_parameter[target]

    def __getitem__(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """All flat indices (int64 [n]) and all values ([n], the checkpoint's dtype, on the CPU) of one tensor."""
        tensor = self.tensors[name]
        dtype = DTYPES[self._stored[name].dtype] if name in self._stored else None
        values = tensor.source.of(self._whole(tensor.parameter)).to("cpu", dtype).reshape(-1)
        return torch.arange(values.numel()), values

    def __iter__(self) -> Iterator[str]:
        """Names of the tensors."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.tensors)


def _own_files(
    loaded: LoadedModel, mask: Mask, out: Path, result: TrainResult, info: dict[str, Any], *, delta_only: bool = False
) -> list[Path]:
    settings, losses = result.settings, result.losses
    card = model_card(
        CardFacts(
            mode=result.mode,
            base=loaded.id,
            revision=loaded.revision,
            licence=base_licence(loaded.folder),
            fingerprint=result.parents[0],
            mask_note=f"Mask: {mask.info.mode}, {mask.count:,} of {mask.info.total:,} weights.",
            headline=result.headline or headline(mask, result.mode),
            steps=len(losses),
            learning_rate=settings.learning_rate,
            final_loss=losses[-1] if losses else None,
            mean_sigma=result.mean_sigma,
            changed=result.changed,
            moved=result.moved,
            warnings=result.warnings,
            delta_only=delta_only,
            tokens_per_second=result.tokens_per_second,
            peak_memory=result.peak_memory,
        )
    )
    write_text(out / "README.md", card)
    write_json(out / "safecrit" / "training.json", info)
    return [out / "README.md", out / "safecrit" / "training.json"]


def _document(loaded: LoadedModel, mask: Mask, result: TrainResult) -> dict[str, Any]:
    return provenance(loaded, mask, result.mode, result.parents) | {
        "settings": asdict(result.settings),
        "adapter": result.adapter,
        "trained": result.trained,
        "total": result.total,
        "changed": result.changed,
        "mean_sigma": result.mean_sigma,
        "moved": rows_to_json(result.moved),
        "losses": result.losses,
        "grad_norms": result.grad_norms,
        "data": {
            "seen": len(result.data),
            "retain": result.data.retain,
            "distinct": result.data.distinct,
            "truncated": result.data.truncated,
            "cut_away": result.data.cut_away,
        },
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_bytes": result.peak_memory,
        "sent_bytes": result.sent,
        "warnings": result.warnings,
    }


def provenance(loaded: LoadedModel, mask: Mask, mode: str, parents: list[str]) -> dict[str, Any]:
    """The head of `training.json`: what was made, from which model, under which mask."""
    return {
        "format": "safecrit-training",
        "version": 1,
        "safecrit": __version__,
        "mode": mode,
        "base": {"id": _name(loaded.id), "revision": loaded.revision, "fingerprint": parents[0]},
        "parents": parents,
        "mask": {
            "mode": mask.info.mode,
            "count": mask.count,
            "fingerprint": mask.info.fingerprint,
            "judge": mask.info.scoring.get("judge"),
            "prompt_hashes": mask.info.prompt_hashes,
        },
    }


def _name(model: str) -> str:
    """A Hub id as it is; of a folder its own name, since a path says more than others should read."""
    return Path(model).name if Path(model).exists() else model

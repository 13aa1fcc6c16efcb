"""Merging a LoRA adapter under a mask: W + (1 - M) * scale * BA, the protected entries bit-identical to the base.

PEFT merges by its own code, so every variant of LoRA that it can merge (DoRA, biases,
trained copies of modules, adapters on experts) comes out as PEFT makes it. The protected
entries are then taken from the base's files and not from the model, so nothing that
happened in memory can reach them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError

from safecrit.errors import SafecritError
from safecrit.files import checkpoint_tensors
from safecrit.fingerprint import Changes
from safecrit.models import LoadedModel
from safecrit.movement import NEGLIGIBLE, Moved, Movement
from safecrit.tensorfile import MappedFiles, bits_of
from safecrit.training import check_mask, stored_tensors
from safecrit.training_output import ModelWeights

if TYPE_CHECKING:
    from safecrit.maskfile import Mask

_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge made. `weights`: the new values of every tensor that the adapter changes, made when asked for.

    `adapter` describes it (rank, alpha, target modules); `held` counts the protected entries that PEFT's own merge
    would have changed; `parents` are the base's fingerprints.
    """

    adapter: dict[str, Any]
    held: int
    parents: list[str]
    moved: list[Moved]
    changed: int
    mean_sigma: float
    weights: Changes = field(repr=False)
    warnings: list[str] = field(default_factory=list)


def merge_adapter(loaded: LoadedModel, adapter: str | Path, mask: Mask, *, allow_other_weights: bool = False) -> Merged:
    """Merge the adapter folder `adapter` into `loaded.model`, which then holds PEFT's merge, protected entries and all.

    `loaded` is a model as its checkpoint stores it. Raises MismatchError where the mask is of another model,
    SafecritError where the adapter is no LoRA adapter, belongs to another model or changes what a checkpoint of this
    model cannot hold.
    """
    adapter = Path(adapter)
    described = read_adapter(adapter)
    anatomy, parents = check_mask(loaded, mask, allow_other_weights)
    shapes = {name: parameter.shape for name, parameter in loaded.model.named_parameters()}
    model = _merge(loaded, adapter)
    if {name: parameter.shape for name, parameter in model.named_parameters()} != shapes:
        raise SafecritError(
            f"{adapter}: changes which weights the model has (it unties, resizes or repeats some), so no checkpoint of "
            f"{loaded.id} can hold the result. Train the adapter without that."
        )
    stored, maps = stored_tensors(loaded, anatomy.tensors), MappedFiles()
    movement, touched, held = Movement(), set[str](), 0
    parameters = dict(model.named_parameters())
    for name, tensor in anatomy.tensors.items():
        base = maps.tensor(stored[name])
        new = tensor.source.of(parameters[tensor.parameter].detach()).to("cpu").contiguous()
        if np.array_equal(bits_of(new.reshape(-1)), bits_of(base.to(new.dtype).reshape(-1))):
            continue
        touched.add(name)
        if not bool(torch.isfinite(new).all()):
            raise SafecritError(f"{adapter}: makes {name} not finite. It is damaged, or its training diverged.")
        new = new.to(base.dtype, copy=True)
        frozen = mask.indices.get(name)
        if frozen is not None:
            before = base.reshape(-1)[frozen]
            held += int((bits_of(new.reshape(-1)[frozen]) != bits_of(before)).sum())
            new.view(-1)[frozen] = before
        movement.add(tensor.layout, base, new, frozen=frozen)
    notes = []
    if not touched:
        notes.append("the adapter changes nothing: its weights are zero. Was it trained?")
    elif movement.mean_sigma < NEGLIGIBLE:
        notes.append(f"the adapter moves the weights by {movement.mean_sigma:.2g} sigma in the mean: negligible.")
    if touched and not held:
        notes.append("the adapter changes no weight that the mask selects, so the mask had nothing to hold.")
    return Merged(
        adapter=described,
        held=held,
        parents=parents,
        moved=movement.table(),
        changed=movement.changed,
        mean_sigma=movement.mean_sigma,
        weights=_Held(loaded, touched, mask),
        warnings=notes,
    )


def read_adapter(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` says of a LoRA adapter; SafecritError where it cannot be merged."""
    for name in _FILES:
        if not (folder / name).is_file():
            raise SafecritError(f"{folder}: has no {name}. Give the folder that PEFT's save_pretrained wrote.")
    try:
        config = json.loads((folder / _FILES[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SafecritError(f"{folder}/{_FILES[0]}: cannot be read ({error}).") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise SafecritError(f"{folder}: is an adapter of type {kind}; only LORA adapters can be merged under a mask.")
    if config.get("alora_invocation_tokens"):
        raise SafecritError(f"{folder}: is an activated LoRA, whose weights depend on the text; it cannot be merged.")
    if config.get("layer_replication"):
        raise SafecritError(f"{folder}: repeats layers of its base model, which no checkpoint of that model can hold.")
    keys = ("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "use_dora", "use_rslora", "bias")
    return {key: config[key] for key in (*keys, "modules_to_save", "base_model_name_or_path") if config.get(key)}


def adapter_headline(adapter: Mapping[str, Any], held: int) -> str:
    """One line on a merged adapter, for the terminal and the model card."""
    return (
        f"LoRA adapter (rank {adapter.get('r')}, alpha {adapter.get('lora_alpha')}) merged; "
        f"{held:,} protected weights that it would have changed kept their values"
    )


def peft_module() -> Any:
    """The `peft` package; SafecritError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise SafecritError("LoRA adapters need PEFT: pip install 'safecrit[peft]'.") from error
    return peft


def _merge(loaded: LoadedModel, adapter: Path) -> Any:
    peft = peft_module()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of, untying, is an error here
            wrapped = peft.PeftModel(loaded.model, peft.PeftConfig.from_pretrained(str(adapter)))
            found = wrapped.load_adapter(str(adapter), "default", torch_device=str(loaded.model.device))
            lacking = [*found.missing_keys, *found.unexpected_keys]
            if lacking:
                raise SafecritError(
                    f"{adapter}: does not fit {loaded.id} ({lacking[0]}). Give the model it was made on."
                )
            return wrapped.merge_and_unload()
    except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError, ImportError, SafetensorError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SafecritError(
            f"{adapter}: cannot be merged into {loaded.id} ({reason[:200]}). Give the model it was made on."
        ) from error


class _Held(Mapping[str, tuple[torch.Tensor, torch.Tensor]]):
    """The changed tensors of a merged model, with the base's values at the entries that the mask selects."""

    def __init__(self, loaded: LoadedModel, touched: Set[str], mask: Mask) -> None:
        self._merged, self._mask = ModelWeights(loaded), mask
        self._stored, self._maps = checkpoint_tensors(loaded.folder), MappedFiles()
        self._names = [name for name, tensor in self._merged.tensors.items() if tensor.name in touched]

    def __getitem__(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        indices, values = self._merged[name]
        frozen = self._mask.indices.get(self._merged.tensors[name].name)
        if frozen is not None:
            values = values.clone()
            values[frozen] = self._maps.tensor(self._stored[name]).reshape(-1)[frozen]
        return indices, values

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

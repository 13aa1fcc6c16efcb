"""LoRA under a mask: PEFT trains the adapter, and its merge leaves the protected weights as they are.

An adapter changes no weight of the base until it is merged, so a mask of base weights has
nothing to hold while it trains. The merge is where it acts: W + (1 - M) * scale * BA (Hu
et al., arXiv 2106.09685). The sum is PEFT's own, with all its variants of LoRA; then the
selected weights take the base's bits again, read from the base's files.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safecrit.anatomy import Anatomy
from safecrit.errors import MismatchError, SafecritError, is_out_of_memory
from safecrit.files import StoredTensor
from safecrit.models import LoadedModel
from safecrit.movement import Movement
from safecrit.placement import runtime_indices
from safecrit.tensorfile import DTYPES, MappedFiles, bits_of

if TYPE_CHECKING:
    from safecrit.maskfile import Mask

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
# Ways to begin that leave the base's weights alone; the others (PiSSA, OLoRA, LoftQ, ...) change them.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """A LoRA adapter. Names and defaults are TRL's, but for `lora_target_modules`, which are all linear layers.

    `lora_target_parameters` names weights that belong to no linear layer, such as fused
    experts (`mlp.experts.gate_up_proj`).
    """

    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_target_modules: tuple[str, ...] = (ALL_LINEAR,)
    lora_target_parameters: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False

    def __str__(self) -> str:
        """As shown in headlines: rank and targets."""
        targets = ", ".join((*self.lora_target_modules, *self.lora_target_parameters))
        return f"{'DoRA' if self.use_dora else 'LoRA'} adapter of rank {self.lora_r} on {targets}"


def adapt(loaded: LoadedModel, settings: LoraSettings, seed: int) -> Any:
    """`loaded.model` with a fresh adapter, a PeftModel; its start is a function of `seed`.

    Raises SafecritError where PEFT is not installed or refuses the settings, for instance
    because the model has no such modules.
    """
    peft = _peft()
    modules = list(settings.lora_target_modules)
    torch.manual_seed(seed)
    with _told(f"--use-peft: {settings}"):
        # A folder's path is nobody's business but its owner's, so the adapter names the base as its folder is called.
        config = peft.LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=ALL_LINEAR if modules == [ALL_LINEAR] else modules,
            target_parameters=list(settings.lora_target_parameters) or None,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            task_type="CAUSAL_LM",
        )
        adapted = peft.get_peft_model(loaded.model, config)
    config.base_model_name_or_path = Path(loaded.id).name if Path(loaded.id).exists() else loaded.id
    _refuse_tied(adapted)
    return adapted


def save_adapter(adapted: Any, folder: str | Path) -> None:
    """Save what `adapt` made and training changed to `folder`, as PEFT does, without the look at the Hub it takes."""
    adapted.save_pretrained(str(folder), save_embedding_layers=False)


def load_adapter(loaded: LoadedModel, folder: str | Path) -> Any:
    """`loaded.model` with the adapter that PEFT saved in `folder`, a PeftModel.

    Rank and alpha patterns, rsLoRA, DoRA, trained biases and `modules_to_save` are
    PEFT's to understand. Raises MismatchError where adapter and model do not fit,
    SafecritError for other kinds of adapter and for those whose start changed the base.
    """
    folder = Path(folder)
    check_adapter(folder)
    peft = _peft()
    with _told(f"{folder}: does not fit this model"):
        config = peft.LoraConfig.from_pretrained(str(folder))
        config.inference_mode = True
        config.base_model_name_or_path = None  # where the base lay when the adapter was trained; PEFT would warn
        adapted = peft.get_peft_model(loaded.model, config)
        found = adapted.load_adapter(str(folder), "default", torch_device=str(loaded.model.device))
    wrong = [*found.missing_keys, *found.unexpected_keys]
    if wrong:
        raise MismatchError(
            f"{folder}: does not fit this model: {len(found.missing_keys)} adapter weights are missing and "
            f"{len(found.unexpected_keys)} unknown, the first {wrong[0]}. Give the model it was trained on."
        )
    _refuse_tied(adapted)
    return adapted


def check_adapter(folder: Path) -> dict[str, Any]:
    """The adapter's `adapter_config.json`; SafecritError where `folder` holds no adapter that can be merged."""
    try:
        document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SafecritError(f"{folder}: is no PEFT adapter folder ({CONFIG}: {type(error).__name__}).") from error
    if not (folder / WEIGHTS).is_file():
        raise SafecritError(f"{folder}: has no {WEIGHTS}. Save the adapter as safetensors (PEFT's default).")
    if document.get("peft_type") != "LORA" or document.get("task_type") not in ("CAUSAL_LM", None):
        kind = f"{document.get('peft_type')} for {document.get('task_type')}"
        raise SafecritError(f"{folder}: is of kind {kind}; only LoRA for CAUSAL_LM can be merged under a mask.")
    if document.get("init_lora_weights") not in _PLAIN_STARTS:
        raise SafecritError(
            f"{folder}: began as {document['init_lora_weights']}, which changes the base's weights. Save it with "
            "PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it."
        )
    for key in ("layer_replication", "trainable_token_indices", "alora_invocation_tokens"):
        if document.get(key):
            raise SafecritError(f"{folder}: uses {key}, which cannot be merged under a mask.")
    return dict(document)


def merge_adapter(
    adapted: Any, mask: Mask, anatomy: Anatomy, stored: dict[str, StoredTensor], *, where: str = "the adapter"
) -> Movement:
    """Merge into the base model that `adapted` wraps, in place, and put the weights that `mask` selects back.

    `anatomy` was read from the base model before it was wrapped, `stored` are its
    checkpoint's tensors. Returns how far the others moved. Raises SafecritError where
    the result is not finite.
    """
    with _told(f"{where}: cannot be merged"):
        model = adapted.merge_and_unload()
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.data = parameter.data.contiguous()  # DoRA leaves transposed views; positions are of plain layout
    maps, movement = MappedFiles(), Movement()
    for name, tensor in anatomy.tensors.items():
        base, parameter = maps.tensor(stored[name]), parameters[tensor.parameter]
        frozen = mask.indices.get(name)
        if frozen is not None:
            with torch.no_grad():
                at = runtime_indices(tensor.source, frozen).to(parameter.device)
                values = base.reshape(-1)[frozen].to(parameter.device, parameter.dtype)
                parameter.view(-1).index_put_((at,), values)
        new = tensor.source.of(parameter.detach()).to("cpu", base.dtype).contiguous()
        if not bool((bits_of(new) == bits_of(base)).all()):
            if not bool(torch.isfinite(new).all()):
                raise SafecritError(f"{where}: makes {name} not finite. It is damaged, or its training diverged.")
            movement.add(tensor.layout, base, new, frozen=frozen)
    return movement


def check_dtype(loaded: LoadedModel, anatomy: Anatomy, stored: dict[str, StoredTensor]) -> None:
    """SafecritError where the model was loaded in a dtype that cannot hold its checkpoint's bits."""
    parameters = dict(loaded.model.named_parameters())
    for name, tensor in anatomy.tensors.items():
        kept, wanted = parameters[tensor.parameter].dtype, DTYPES[stored[name].dtype]
        if torch.promote_types(kept, wanted) != kept:
            raise SafecritError(
                f"{name}: is {wanted} in the checkpoint and was loaded as {kept}, which would round the weights that "
                f"are to stay. Use --dtype {str(wanted).removeprefix('torch.')}."
            )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise SafecritError("LoRA needs PEFT. Install it: pip install 'safecrit[peft]'.") from error
    return peft


@contextmanager
def _told(what: str) -> Iterator[None]:
    """PEFT's refusals as ours."""
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by a name that this calls old.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        try:
            yield
        except (ValueError, KeyError, RuntimeError, TypeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise MismatchError(f"{what} ({first.strip()[:300]}).") from error


def _refuse_tied(adapted: Any) -> None:
    """Where input and output embedding are one tensor, an adapter of one of them would change both when merged."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    model = adapted.get_base_model()
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if model.config.get_text_config().tie_word_embeddings and any(
        isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends
    ):
        raise SafecritError(
            "the adapter is on the embedding or the output head, which are one tensor in this model: merged, it would "
            "change both. Leave them out of its target modules and modules_to_save."
        )

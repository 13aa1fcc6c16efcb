"""The only loader of models and tokenizers.

Takes a folder or a Hub id and gives back an evaluation-mode causal language
model, its tokenizer, and the local folder that holds its checkpoint, since
masks and deltas speak of checkpoint tensors.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from safecrit.checkpoint_map import keep_stored_names
from safecrit.errors import SafecritError
from safecrit.files import checkpoint_tensors
from safecrit.hub import fetch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
NO_FOLDER = Path(os.devnull)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready for use, with where it came from; `folder` is NO_FOLDER for one made in memory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    id: str
    revision: str | None


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the first CUDA device, or the CPU; anything else is torch's own name, checked."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SafecritError(f"--device {name}: unknown device. Use auto, cpu, cuda or cuda:1.") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SafecritError(f"--device {name}: cannot be used by this torch here. Use --device cpu.") from error
    return device


def resolve_folder(model: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a model: itself, or the snapshot of a Hub id (downloaded when it is not in the cache)."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SafecritError(f"{path}: is no model folder (it has no config.json). Give a folder or a Hub id.")
        return path.resolve()
    name = str(model)
    if path.exists():
        raise SafecritError(f"{path}: is a file. Give a model folder or a Hub id such as owner/name.")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise SafecritError(f"{name}: no such folder. Give a model folder or a Hub id such as owner/name.")
    return fetch(name, "model folder", revision=revision, ignore=["*.gguf", "original/*", "*.onnx", "*.h5"])


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SafecritError(f"{folder}/config.json: cannot be read ({error}).") from error
    if not isinstance(config, dict):
        raise SafecritError(f"{folder}/config.json: is no JSON object.")
    return config


def context_window(model: PreTrainedModel) -> int | None:
    """The longest sequence the model's configuration allows, in tokens, where it says so."""
    config = model.config.get_text_config()
    value = getattr(config, "max_position_embeddings", None)
    return int(value) if value else None


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a model folder, with a pad token (its own, or EOS)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise SafecritError(f"{folder}: its tokenizer cannot be loaded ({_first_line(error)}).") from error
    if not tokenizer.is_fast:
        raise SafecritError(f"{folder}: needs a fast tokenizer (tokenizer.json); convert it with transformers first.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_model(
    model: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal language model in evaluation mode.

    `dtype` `auto` keeps the checkpoint's. On device `meta` it is all but the weights and buffers, of which
    none is read. Raises SafecritError for a missing folder, a folder that holds no causal language model, or a
    quantised one.
    """
    from transformers import AutoModelForCausalLM

    kind = "a causal language model"
    loaded = _load(model, AutoModelForCausalLM, kind, revision, device, dtype, trust_remote_code)
    if any(loaded.folder.glob("model*.safetensors")):
        keep_stored_names(loaded.model, checkpoint_tensors(loaded.folder))
    return loaded


def load_classifier(
    model: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a sequence classifier or reward model in evaluation mode; arguments and errors are `load_model`'s."""
    from transformers import AutoModelForSequenceClassification

    kind = "a sequence classifier"
    return _load(model, AutoModelForSequenceClassification, kind, revision, device, dtype, trust_remote_code)


def _load(
    model: str | Path, auto: Any, kind: str, revision: str | None, device: str, dtype: str, trust_remote_code: bool
) -> LoadedModel:
    """Load with one of transformers' Auto classes, `kind` in words."""
    folder = resolve_folder(model, revision=revision)
    config = read_config(folder)
    if "quantization_config" in config:
        raise SafecritError(
            f"{model}: is quantised; gradients need the full-precision weights. Use the original model."
        )
    if dtype != "auto" and dtype not in DTYPES:
        raise SafecritError(f"--dtype {dtype}: unknown. Use auto, {', '.join(DTYPES)}.")
    place = pick_device(device)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    loaded: PreTrainedModel
    problems: dict[str, Any]
    try:
        loaded, problems = auto.from_pretrained(
            folder,
            dtype="auto" if dtype == "auto" else DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **({"device_map": {"": "meta"}} if place.type == "meta" else {}),
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise SafecritError(f"{model}: cannot be loaded as {kind} ({_first_line(error)}).") from error
    missing = sorted(problems.get("missing_keys", ()))
    if missing:
        raise SafecritError(
            f"{model}: its checkpoint lacks {len(missing)} weights, the first {missing[0]}. Download it again."
        )
    return LoadedModel(
        model=loaded.eval().to(place), tokenizer=tokenizer, folder=folder, id=str(model), revision=revision
    )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:200] if lines else type(error).__name__

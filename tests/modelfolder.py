"""Small model folders made of random bits, for tests of everything that works on files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.mlp.down_proj.weight": (6, 13),
    "model.layers.0.self_attn.q_proj.weight": (6, 6),
    "model.layers.1.mlp.down_proj.weight": (6, 13),
    "model.norm.weight": (6,),
}
CONFIG = {"model_type": "llama", "hidden_size": 6, "tie_word_embeddings": True, "transformers_version": "5.0.0"}


def random_tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def write_model(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 1, config: Mapping[str, object] = CONFIG
) -> Path:
    """Write `tensors` as transformers would, dealt in turn to `shards` files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    names = sorted(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[shard::shards]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[shard::shards], file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder

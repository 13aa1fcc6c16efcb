"""A character tokenizer for the tiny models of `architectures`, masks of any model, and model folders to train from."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from safecrit.anatomy import read_anatomy
from safecrit.fingerprint import fingerprint
from safecrit.maskfile import Mask, MaskInfo
from safecrit.models import LoadedModel
from safecrit.traindata import TrainExample
from tests.architectures import build

CHARACTERS = " \n" + string.ascii_lowercase + ".,?!" + string.digits


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def random_mask(model: PreTrainedModel, share: float, *, seed: int = 0, model_fingerprint: str = "") -> Mask:
    """`share` of the eligible weights of every second eligible tensor, at least one entry each."""
    anatomy = read_anatomy(model)
    generator = torch.Generator().manual_seed(seed)
    indices = {}
    for tensor in anatomy.eligible[::2]:
        numel = tensor.layout.numel
        chosen = torch.randperm(numel, generator=generator)[: max(1, int(numel * share))]
        indices[tensor.name] = chosen.sort().values
    info = MaskInfo(
        tensors=anatomy.layouts,
        mode="random",
        total=anatomy.total,
        eligible=anatomy.eligible_total,
        fingerprint=model_fingerprint,
        model="tiny",
    )
    return Mask(indices, info)


def folder_model(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A tiny model written to `folder` in `dtype`, and loaded."""
    model = build(name).to(dtype)
    model.save_pretrained(folder)
    tokens = tokenizer()
    tokens.save_pretrained(folder)
    return LoadedModel(model=model, tokenizer=tokens, folder=folder, id=str(folder), revision=None)


def fitting_mask(loaded: LoadedModel, share: float, *, seed: int = 0) -> Mask:
    return random_mask(loaded.model, share, seed=seed, model_fingerprint=fingerprint(loaded.folder))


def pairs(*texts: tuple[str, str]) -> list[TrainExample]:
    return [
        TrainExample(({"role": "user", "content": asked}, {"role": "assistant", "content": answer}), row)
        for row, (asked, answer) in enumerate(texts)
    ]


def batch(seed: int, rows: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 40, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def selected(model: torch.nn.Module, mask: Mask) -> dict[str, torch.Tensor]:
    """Where each runtime parameter is selected, bool in its shape, by a way of its own: dense masks pushed through."""
    anatomy = read_anatomy(model)
    parameters = dict(model.named_parameters())
    found = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    for name in mask.indices:
        tensor = anatomy.tensors[name]
        tensor.source.of(found[tensor.parameter]).copy_(mask.dense(name))
    return found


def backward(model: torch.nn.Module, seed: int, scale: float = 1.0) -> None:
    (model(**batch(seed)).loss * scale).backward()

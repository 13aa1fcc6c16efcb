"""The causal test: noise on chosen weights, then the weights back, bit for bit.

N(0, (r sigma)^2) is added to the weights of a mask, sigma being the standard
deviation of the logical matrix a weight stands in. If the top weights carry
safety, noise there must cost more of it than the same noise on as many random
weights of the same tensors, or on the bottom ones (docs/method.md, section 5).

The noise of a tensor depends on the seed and the tensor's name alone. Every r
scales the same draw, so a curve over r differs in r and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from safecrit import ops
from safecrit.errors import CheckFailed, SafecritError
from safecrit.maskfile import Mask
from safecrit.placement import check_whole, runtime_indices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from safecrit.anatomy import Anatomy, CheckpointTensor
    from safecrit.scorefile import Scores

_CHUNK = 1 << 26  # bytes of a tensor hashed at a time


@dataclass(frozen=True, kw_only=True)
class Disturbed:
    """What one perturbation did.

    `weights`: of the mask. `changed`: those whose value differs, fewer where the
    dtype rounds small noise away. `predicted`: first-order change of S, the sum
    over weights of dS/dtheta times the change as stored; None without scores.
    """

    weights: int
    changed: int
    predicted: float | None


@contextmanager
def perturbed(
    model: PreTrainedModel,
    anatomy: Anatomy,
    mask: Mask,
    *,
    factor: float,
    seed: int,
    gradients: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[Disturbed]:
    """Add noise of `factor` sigma to the mask's weights; on leaving, put every one back as it was.

    `gradients`: dS/dtheta by checkpoint name for the mask's weights in order,
    float64 [n] (`first_order`). Raises SafecritError for weights that cannot be
    reached, and CheckFailed where the restored model is not the one that came in.
    """
    before = memory_fingerprint(model)
    kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    changed, predicted = 0, 0.0
    try:
        for name, flat in mask.indices.items():
            weight, places, scale = _reach(model, anatomy, name, flat)
            old = weight[places]
            noise = torch.randn(len(flat), generator=_generator(seed, name), dtype=torch.float32)
            new = (old.cpu().double() + factor * scale * noise.double()).to(old.dtype)
            kept.append((weight, places, old))
            weight[places] = new.to(old.device)
            moved = new.double() - old.cpu().double()
            changed += int((moved != 0).sum())
            if gradients is not None:
                predicted += float((gradients[name] * moved).sum())
        yield Disturbed(weights=mask.count, changed=changed, predicted=predicted if gradients is not None else None)
    finally:
        for weight, places, old in kept:
            weight[places] = old
    if memory_fingerprint(model) != before:
        raise CheckFailed(
            "the perturbed weights did not come back bit for bit. Memory is failing, or something else changed the "
            "model meanwhile; no figure of this run can be trusted."
        )


def first_order(scores: Scores, mask: Mask) -> dict[str, torch.Tensor]:
    """dS/dtheta of the mask's weights, float64 [n] by checkpoint name, from stored signed scores.

    A score is sigma times the gradient, so it is divided by the sigma that was
    stored beside it. Raises SafecritError for scores that carry no sign.
    """
    info = scores.info
    if info.get("method") not in ("esi", "gradient") or info.get("reduction") != "signed":
        raise SafecritError(
            f"{scores.folder}: {info.get('method')} scores with reduction {info.get('reduction')} have no sign to "
            "predict with. Use scores of --method esi or gradient, --reduction signed, or leave --scores out."
        )
    sigmas: dict[str, list[float]] = {}
    for row in info["matrices"]:
        sigmas.setdefault(row["name"], []).append(row["sigma"])
    found = {}
    for name, flat in mask.indices.items():
        signed = scores.tensor(name).reshape(-1)[flat].double()
        scale = torch.zeros_like(signed)
        for matrix, sigma in zip(scores.layouts[name].matrices, sigmas[name], strict=True):
            scale[matrix.where.contains(flat)] = sigma
        found[name] = torch.where(scale > 0, signed / scale.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return found


def matched_random(mask: Mask, seed: int) -> Mask:
    """As many weights of every tensor as `mask` holds there, uniformly among all of it: the control."""
    names = list(mask.indices)
    sizes = [mask.info.tensors[name].numel for name in names]
    flat = ops.select_random_matched(sizes, [len(mask.indices[name]) for name in names], seed)
    return Mask(dict(zip(names, flat, strict=True)), replace(mask.info, mode="matched", seed=seed))


def memory_fingerprint(model: PreTrainedModel) -> str:
    """sha256 over every parameter and buffer in memory: name, dtype, shape, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for part in flat.split(_CHUNK):
            digest.update(part.cpu().numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _reach(
    model: PreTrainedModel, anatomy: Anatomy, name: str, flat: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parameter of a checkpoint tensor as one row, where the entries `flat` lie in it, and sigma of each, [n]."""
    tensor: CheckpointTensor = anatomy.tensors[name]
    parameter = model.get_parameter(tensor.parameter)
    check_whole(tensor.parameter, parameter)
    part = tensor.source.of(parameter.data).contiguous()
    matrices = [matrix.where for matrix in tensor.layout.matrices]
    scale = torch.zeros(len(flat), dtype=torch.float64)
    for where, sigma in zip(matrices, ops.matrix_std(part, matrices).tolist(), strict=True):
        scale[where.contains(flat)] = sigma
    return parameter.data.view(-1), runtime_indices(tensor.source, flat).to(parameter.device), scale


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

"""A model's sizes from its config.json alone, and the memory that a backward pass through it takes.

The model is built on torch's meta device, where tensors have shapes and no
memory, and its anatomy says what every matrix is. So no list of families is
kept here, and a model in memory is measured in the same way.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safecrit.anatomy import read_anatomy
from safecrit.errors import SafecritError
from safecrit.models import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "moe_top_k", "moe_k")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model, in weights unless said otherwise; widths are entries a token.

    parameters: all, tied ones once. eligible: those that get scores. active: those that multiply one token,
    experts by their share, the head included and the input embedding left out. head: the output matrix.
    largest: the largest eligible parameter at run time, a whole bank of experts for MoE; largest_part: the
    largest eligible checkpoint tensor. intermediate: the widest MLP that every token passes (0 for none);
    expert_intermediate: one expert's width; experts_per_token: how many a token passes.
    vocabulary: rows of the logits. embedding: width of the input embedding. norm_width: entries of one token
    that pass a norm in a layer. rms: norms compute in float32. eager: attention keeps its probabilities.
    itemsize: bytes of a weight as config.json says, 4 where it says nothing. window: longest sequence in tokens.
    group: the largest group that FSDP2 gathers at once, a layer or what lies outside the layers.
    """

    name: str
    parameters: int
    eligible: int
    active: int
    head: int
    largest: int
    largest_part: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    expert_intermediate: int
    experts_per_token: int
    gated: bool
    norm_width: int
    rms: bool
    eager: bool
    vocabulary: int
    embedding: int
    itemsize: int
    window: int | None
    group: int


def read_shape(
    folder: Path, *, trust_remote_code: bool = False, include: str | None = None, exclude: str | None = None
) -> ModelShape:
    """The shape of the model that a folder's config.json describes; no weights are read or made.

    Errors are `meta_model`'s.
    """
    model = meta_model(folder, trust_remote_code=trust_remote_code)
    return shape_of(model, name=folder.name, include=include, exclude=exclude)


def meta_model(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a folder's config.json describes, on the meta device.

    A causal language model, or a classifier where config.json names one. Raises SafecritError for
    a config that cannot be read, is quantised, or belongs to no such model.
    """
    config = read_config(folder)
    if "quantization_config" in config:
        raise SafecritError(
            f"{folder}: is quantised; gradients need the full-precision weights. Use the original model."
        )
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    classifier = any("ForSequenceClassification" in name for name in config.get("architectures") or ())
    kind: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    try:
        described = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(described, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise SafecritError(f"{folder}/config.json: describes no language model that can be built ({line}).") from error
    return model


def shape_of(
    model: PreTrainedModel, *, name: str = "", include: str | None = None, exclude: str | None = None
) -> ModelShape:
    """The shape of a model object on any device, meta included."""
    anatomy = read_anatomy(model, include=include, exclude=exclude)
    config: Any = model.config.get_text_config()
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    matrices = [matrix for tensor in anatomy.tensors.values() for matrix in tensor.layout.matrices]
    experts = 1 + max((matrix.expert for matrix in matrices if matrix.expert is not None), default=-1)
    per_token = min(experts, _experts_per_token(config, experts))
    dense = sum(m.where.numel for m in matrices if m.expert is None and m.component != "embedding")
    of_experts = sum(m.where.numel for m in matrices if m.expert is not None)
    up = [(m.where.numel // hidden, m.expert) for m in matrices if m.component == "up"]
    vocabulary, head, tied = _head(model)
    norms = [
        matrix.where.numel
        for tensor in anatomy.tensors.values()
        for matrix in tensor.layout.matrices
        if matrix.component == "norm" and matrix.layer == anatomy.layers - 1 and not tensor.name.endswith("bias")
    ]
    sizes = {parameter_name: p.numel() for parameter_name, p in model.named_parameters()}
    groups = Counter[int | None]()
    for matrix in matrices:
        groups[matrix.layer] += matrix.where.numel
    width = max((size for size, expert in up if expert is None), default=0)
    table: Any = model.get_input_embeddings().weight
    return ModelShape(
        name=name,
        parameters=anatomy.total,
        eligible=anatomy.eligible_total,
        active=dense + (head if tied else 0) + (of_experts * per_token // experts if experts else 0),
        head=head,
        largest=max(sizes[entry.parameter] for entry in anatomy.eligible),
        largest_part=max(entry.layout.numel for entry in anatomy.eligible),
        layers=max(1, anatomy.layers),
        hidden=hidden,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=head_dim,
        intermediate=width or (0 if up else int(getattr(config, "intermediate_size", None) or 4 * hidden)),
        expert_intermediate=max((size for size, expert in up if expert is not None), default=0),
        experts_per_token=per_token,
        gated=any(matrix.component == "gate" for matrix in matrices),
        norm_width=sum(heads * head_dim if size == head_dim else size for size in norms) or 2 * hidden,
        rms=any("RMSNorm" in type(module).__name__ for module in model.modules()),
        eager=config._attn_implementation == "eager",
        vocabulary=vocabulary,
        embedding=int(table.shape[1]),
        itemsize=next(model.parameters()).element_size(),
        window=getattr(config, "max_position_embeddings", None),
        group=max(groups.values()),
    )


def _experts_per_token(config: Any, default: int) -> int:
    for source in (config, getattr(config, "ffn_config", None)):
        for key in _EXPERTS_PER_TOKEN:
            if value := getattr(source, key, None):
                return int(value)
    return default


def _head(model: PreTrainedModel) -> tuple[int, int, bool]:
    """Rows of the logits, weights of the output matrix, and whether it is the input embedding too."""
    output = model.get_output_embeddings()
    if output is None:  # a classifier: its one small matrix counts among the others
        return int(getattr(model.config, "num_labels", 2)), 0, False
    weight = output.weight
    return int(weight.shape[0]), weight.numel(), weight is model.get_input_embeddings().weight


def layer_bytes(shape: ModelShape, batch: int, tokens: int, itemsize: int, *, weights_require_grad: bool) -> int:
    """What autograd keeps of one decoder layer for `batch` sequences of `tokens` tokens, in bytes.

    A token, with b bytes an activation, q = heads x head_dim, I the MLP's width, H the hidden size:

        norms       4 norm_width (RMS: float32 inputs), b norm_width (LayerNorm)
        attention   4 b q (queries, keys and values repeated to all heads, output), 4 heads (its logsumexp),
                    b tokens (the mask); eager attention (4 + 2b) heads tokens instead of the logsumexp
        MLP, gated  3 b I (gate, act(gate), up); ungated 4 b I
        experts     the same for each expert a token passes, and b H (its output)
        with weights that need gradients, the inputs of the projections too: b H twice, b I; each expert b (H + I)

    Norm weights and routers are frozen here, so what only they need is not kept. Exact to 2 % for Llama,
    Qwen2, Mixtral and GPT-2 under sdpa; 5 % for Gemma 2. Families whose activation is fused keep less.
    """
    b, q = itemsize, shape.heads * shape.head_dim
    kept = 3 if shape.gated else 4
    per_token = (4 if shape.rms else b) * shape.norm_width + 4 * b * q + b * tokens
    per_token += (4 + 2 * b) * shape.heads * tokens if shape.eager else 4 * shape.heads
    per_token += kept * b * shape.intermediate
    expert = kept * b * shape.expert_intermediate + b * shape.hidden
    if weights_require_grad:
        per_token += b * shape.hidden + (b * (shape.hidden + shape.intermediate) if shape.intermediate else 0)
        expert += b * (shape.hidden + shape.expert_intermediate)
    return batch * tokens * (per_token + shape.experts_per_token * expert)


def working_bytes(shape: ModelShape, batch: int, tokens: int, itemsize: int, *, gradients: int = 2) -> int:
    """The largest set of temporaries of one layer beside what is kept: `gradients` MLP widths, two float32 norms."""
    width = shape.intermediate + shape.experts_per_token * shape.expert_intermediate
    return batch * tokens * (gradients * itemsize * width + 8 * shape.hidden)


def activation_bytes(
    shape: ModelShape, batch: int, tokens: int, itemsize: int, *, checkpointed: bool, weights_require_grad: bool
) -> int:
    """Memory of a forward and backward pass beside weights, logits and weight gradients, at its peak, in bytes.

    batch: sequences, each of `tokens` tokens, padding included. checkpointed: every layer keeps its input alone
    and is computed again in the backward pass, one at a time (`layer_bytes` counts once, else once a layer).
    On top comes the working set: the gradients of two MLP activations (three where the weights are frozen, as the
    MLP's output is then not freed before) and two float32 copies of the hidden state. For Llama within 12 % of
    the peak that torch's profiler sees on a CPU; a CUDA allocator rounds up.
    """
    layer = layer_bytes(shape, batch, tokens, itemsize, weights_require_grad=weights_require_grad)
    kept = shape.layers * batch * tokens * itemsize * shape.hidden + layer if checkpointed else shape.layers * layer
    return kept + working_bytes(shape, batch, tokens, itemsize, gradients=2 if weights_require_grad else 3)

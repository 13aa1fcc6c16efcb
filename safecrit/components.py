"""What a runtime parameter is: layer, component, experts, and the logical matrices fused inside it.

Names and module classes decide. A weight that the rules do not know is one matrix
of component `other`: it is scored like any other, only the tables are coarser.
A fused weight is divided only where the model's own forward pass is known to divide
it so; that is why the rules for fused attention go by class and not by shape.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from safecrit.layout import Matrix
from safecrit.strided import Strided, row_major

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A parameter's own name (bank of experts) or its module's name -> component. Attention output and MLP output
# share names in several families (c_proj, dense, wo), so those are decided by the path, in `_named`.
_BY_NAME = {
    "q": "q q_proj q_a_proj q_b_proj q_lin q_attn query query_proj wq project_q",
    "k": "k k_proj k_lin key key_proj wk project_k",
    "v": "v v_proj v_lin value value_proj wv project_v",
    "o": "o o_proj o_a_proj o_b_proj out_lin attention_out attn_out",
    "gate": "gate_proj w1 wi_0 w_0",
    "up": "up_proj fc1 fc_in c_fc dense_h_to_4h w3 v1 lin1 proj_up wi wi_1 w_1",
    "down": "down_proj fc2 fc_out dense_4h_to_h w2 lin2 proj_down w_out output_linear",
}
_COMPONENT = {name: component for component, names in _BY_NAME.items() for name in names.split()}
_ATTENTION_OUTPUT = {"c_proj", "dense", "out_proj", "wo", "output", "output_linear"}
_MLP_OUTPUT = {"c_proj", "wo"}
_LAYER_LIST = re.compile(r"(?:^|_)(?:layers?|blocks?|h|attentions|ffns|resblocks)$")
_VISION = re.compile(r"(?:^|_)(?:vision|visual|image|img|video|multi_modal_projector|mm_projector)(?:_|$)")
_AUDIO = re.compile(r"(?:^|_)(?:audio|speech)(?:_|$)")
# Modules inside or beside attention whose q/k/gate projections are not the attention's own.
_SIDE_MODULES = {"indexer", "compressor", "scorer", "mamba", "mixer_ssm", "rg_lru", "altup", "laurel", "forget_gate"}
_HEADS_INTERLEAVED = (
    "GPTNeoXAttention",
    "GPTNeoXJapaneseAttention",
    "BloomAttention",
    "PersimmonAttention",
    "MiniMaxLightningAttention",
)
_ROW_BLOCKS = ("Phi3Attention", "Phi4MultimodalAttention", "MptAttention", "DbrxAttention")


@dataclass(frozen=True)
class Split:
    """How a weight is fused: `axis` holds `repeat` runs of consecutive `blocks` (component, size)."""

    axis: int
    repeat: int
    blocks: tuple[tuple[str, int], ...]


def describe(model: PreTrainedModel, name: str) -> tuple[tuple[Matrix, ...], str]:
    """The logical matrices of runtime parameter `name`, and why it is not eligible ("" where it is).

    The matrices lie in the parameter itself, row-major; together they cover it once.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = model.get_parameter(name)
    shape = tuple(parameter.shape)
    path = owner.split(".") if owner else []
    tower = _tower(path)
    layer = None if tower else _number(path, _LAYER_LIST)
    component = _special(model, module, path, leaf, parameter)
    if component or tower or len(shape) < 2:
        matrix = Matrix(component or "other", layer, None, Strided.whole(shape))
        reason = component if component in ("bias", "norm") else "vector" if len(shape) < 2 else tower or component
        return (matrix,), "" if reason == "head" else reason
    return _matrices(model, module, path, leaf, shape, layer), ""


def _tower(path: Sequence[str]) -> str:
    """The tower for another medium than text that the path leads into, "" for none."""
    towers = (("vision tower", _VISION), ("audio tower", _AUDIO))
    return next((name for name, pattern in towers if any(pattern.search(element) for element in path)), "")


def _number(path: Sequence[str], before: re.Pattern[str]) -> int | None:
    for previous, element in itertools.pairwise(path):
        if element.isdigit() and before.search(previous):
            return int(element)
    return None


def _special(model: PreTrainedModel, module: nn.Module, path: list[str], leaf: str, parameter: nn.Parameter) -> str:
    """The component of what is no ordinary weight matrix: bias, norm, embedding, router, head; "" otherwise."""
    kind = type(module).__name__
    if leaf.endswith("bias"):
        return "bias"
    if isinstance(module, nn.Embedding) or parameter is _weight_of(model, "get_input_embeddings"):
        return "embedding"
    if "norm" in kind.lower():
        return "norm"
    if parameter is _weight_of(model, "get_output_embeddings") or path[-1:] == ["lm_head"]:
        return "head"
    if "embed" in kind.lower() or "embed" in leaf:
        return "embedding"
    if "router" in kind.lower() or any(e in ("gate", "shared_expert_gate") or "router" in e for e in path):
        return "router"
    return ""


def _weight_of(model: PreTrainedModel, getter: str) -> nn.Parameter | None:
    try:
        return getattr(getattr(model, getter)(), "weight", None)
    except NotImplementedError:  # transformers' answer for a model that has none
        return None


def _matrices(
    model: PreTrainedModel, module: nn.Module, path: list[str], leaf: str, shape: tuple[int, ...], layer: int | None
) -> tuple[Matrix, ...]:
    named = [e for e in path if not e.isdigit()]
    if named and named[-1] in ("linear", "base_layer"):  # a wrapper around the layer that has the name
        named.pop()
    if leaf != "weight":
        named.append(leaf)
    banks = len(shape) == 3 and "Experts" in type(module).__name__
    if banks:
        split = _bank_split(module, named, shape)
        return tuple(
            Matrix(component, layer, expert, where)
            for expert in range(shape[0])
            for component, where in _cut(shape, split, expert)
        )
    rows = _experts_in_rows(module, leaf, shape)
    if rows:
        component = _named(named)
        return tuple(
            Matrix(component, layer, i // rows, Strided(i * shape[1], (rows, shape[1]), (shape[1], 1)))
            for i in range(0, shape[0], rows)
        )
    parent = model.get_submodule(".".join(path[:-1])) if path else model
    expert = _number(path, re.compile(r"^(?:local_)?experts$"))
    fused = _attention_split(parent, module, named, shape) or _mlp_split(parent, module, named, shape)
    if fused and shape[fused.axis] == fused.repeat * sum(size for _, size in fused.blocks):
        return tuple(Matrix(c, layer, expert, where) for c, where in _cut(shape, fused, None))
    return (Matrix(_named(named), layer, expert, Strided.whole(shape)),)


def _named(named: list[str]) -> str:
    """The component a whole matrix has by the names on its path."""
    last, above = named[-1], named[-2:-1]
    attention = any("att" in element for element in named[:-1])
    if _SIDE_MODULES.intersection(named):
        return "other"
    if attention and last.lower() in _ATTENTION_OUTPUT:
        return "o"
    if last == "dense":  # BERT's names
        return {"intermediate": "up", "output": "down"}.get(above[0] if above else "", "other")
    if last.lower() in _MLP_OUTPUT or (above == ["feed_forward"] and last in ("value", "output")):
        return "down"
    if above == ["feed_forward"] and last in ("key", "intermediate"):
        return "up"
    component = _COMPONENT.get(last) or _COMPONENT.get(last.lower(), "other")
    return "other" if attention and component in ("gate", "up", "down") and "experts" not in named else component


def _bank_split(module: nn.Module, named: list[str], shape: tuple[int, ...]) -> Split:
    """How one expert's slice of a 3-D bank [E, rows, columns] is fused; `axis` counts the bank's dimensions."""
    axis = 2 if getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts") else 1
    half = shape[axis] // 2
    last = named[-1]
    attention = any("att" in element for element in named)
    if last == "input_linear" and attention:  # JetMoE's mixture of attention heads
        return Split(1, 1, (("q", shape[1]),))
    if last in ("gate_up_proj", "input_linear") and shape[axis] % 2 == 0:
        if getattr(module, "is_concatenated", True):
            return Split(axis, 1, (("gate", half), ("up", half)))
        return Split(axis, half, (("gate", 1), ("up", 1)))
    return Split(1, 1, ((_named(named), shape[1]),))


def _experts_in_rows(module: nn.Module, leaf: str, shape: tuple[int, ...]) -> int:
    """Rows per expert where the experts of a 2-D weight lie one below the other (DBRX); else 0."""
    return int(getattr(module, "ffn_hidden_size", 0)) if type(module).__name__ == "DbrxExpertGLU" else 0


def _attention_split(parent: Any, module: nn.Module, named: list[str], shape: tuple[int, ...]) -> Split | None:
    kind = type(parent).__name__
    config, last = getattr(parent, "config", None), named[-1]
    head = getattr(parent, "head_dim", None) or getattr(parent, "head_size", None)
    rows = shape[0]
    if last == "kv_a_proj_with_mqa" and hasattr(parent, "kv_lora_rank"):  # the latent serves k and v alike
        return Split(0, 1, (("other", parent.kv_lora_rank), ("k", rows - parent.kv_lora_rank)))
    if last == "kv_b_proj" and hasattr(parent, "qk_nope_head_dim"):
        key, value = parent.qk_nope_head_dim, parent.v_head_dim
        return Split(0, rows // (key + value), (("k", key), ("v", value)))
    if kind == "JetMoeAttention" and last == "kv_proj":
        return Split(0, 1, (("k", rows // 2), ("v", rows // 2)))
    if last == "W_pack":  # Baichuan, code from the Hub
        return Split(0, 1, _qkv(rows // 3))
    if last == "c_attn" and type(module).__name__ == "Conv1D":
        names = "kv" if getattr(parent, "is_cross_attention", False) else "qkv"
        return Split(1, 1, tuple((c, shape[1] // len(names)) for c in names))
    if last not in ("query_key_value", "qkv_proj", "Wqkv", "c_attn") or not head:
        return None
    if kind == "GPTBigCodeAttention" and not parent.is_cross_attention:
        if parent.multi_query:
            return Split(0, 1, (("q", parent.embed_dim), ("k", parent.kv_dim), ("v", parent.kv_dim)))
        return Split(0, rows // (3 * head), _qkv(head))
    if kind == "CodeGenAttention":  # four blocks of q, v, k: the order of its TPU shards
        return Split(0, 4, tuple((c, rows // 12) for c in "qvk"))
    if kind.startswith("Falcon"):
        if parent.new_decoder_architecture:
            group = parent.num_heads // parent.num_kv_heads
            return Split(0, parent.num_kv_heads, (("q", group * head), ("k", head), ("v", head)))
        if parent.multi_query:
            return Split(0, 1, (("q", rows - 2 * head), ("k", head), ("v", head)))
        return Split(0, parent.num_heads, _qkv(head))
    if kind in _HEADS_INTERLEAVED:
        return Split(0, rows // (3 * head), _qkv(head))
    if kind in _ROW_BLOCKS:
        heads = getattr(config, "num_attention_heads", None) or getattr(parent, "num_heads", 0)
        query = heads * head if heads else rows // 3
        return Split(0, 1, (("q", query), ("k", (rows - query) // 2), ("v", (rows - query) // 2)))
    return None


def _qkv(size: int) -> tuple[tuple[str, int], ...]:
    return (("q", size), ("k", size), ("v", size))


def _mlp_split(parent: Any, module: nn.Module, named: list[str], shape: tuple[int, ...]) -> Split | None:
    gated = named[-1] == "gate_up_proj" or named[-2:] == ["shared_mlp", "input_linear"]
    if gated or (type(parent).__name__ == "ModernBertDecoderMLP" and named[-1] == "Wi"):
        return Split(0, 1, (("gate", shape[0] // 2), ("up", shape[0] // 2)))
    return None


def _cut(shape: tuple[int, ...], split: Split, expert: int | None) -> list[tuple[str, Strided]]:
    """The blocks of `split` in a row-major tensor of `shape`; with `expert`, of that slice of dimension 0 alone."""
    strides = row_major(shape)
    run = sum(size for _, size in split.blocks)
    start, cut = 0 if expert is None else expert * strides[0], []
    for component, size in split.blocks:
        sizes: list[int] = []
        steps: list[int] = []
        for d, (length, stride) in enumerate(zip(shape, strides, strict=True)):
            if d == 0 and expert is not None:
                continue
            if d == split.axis:
                wanted = [(split.repeat, run * stride), (size, stride)]
                kept = [(n, s) for n, s in wanted if n > 1] or [(1, stride)]
            else:
                kept = [(length, stride)]
            sizes += [n for n, _ in kept]
            steps += [s for _, s in kept]
        cut.append((component, Strided(start, tuple(sizes), tuple(steps))))
        start += size * strides[split.axis]
    return cut

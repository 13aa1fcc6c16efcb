"""Tiny models made from configs, one for each family the tests cover, with weights fixed by a seed.

Sizes differ from one another, so that a swapped axis shows. Expert widths are multiples of 4: the grouped
matrix product of torch wants strides of whole 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 61
_SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DENSE: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_UNTIED = {"tie_word_embeddings": False}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: t.LlamaConfig(**_DENSE, **_UNTIED),
    "llama-tied": lambda: t.LlamaConfig(**_DENSE, tie_word_embeddings=True),
    "mistral": lambda: t.MistralConfig(**_DENSE, **_UNTIED, head_dim=6),
    "qwen2": lambda: t.Qwen2Config(**_DENSE, **_UNTIED),
    "qwen3": lambda: t.Qwen3Config(**_DENSE, **_UNTIED, head_dim=10),
    "gemma2": lambda: t.Gemma2Config(**_DENSE, head_dim=6),
    "gemma3": lambda: t.Gemma3TextConfig(**_DENSE, head_dim=6),
    "phi3": lambda: t.Phi3Config(**_DENSE, **_UNTIED),
    "gpt2": lambda: t.GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=64, **_SPECIAL),
    "gpt-neox": lambda: t.GPTNeoXConfig(**_DENSE, **_UNTIED),
    "opt": lambda: t.OPTConfig(
        hidden_size=24,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        **_SPECIAL,
    ),
    "mixtral": lambda: t.MixtralConfig(**_DENSE, **_UNTIED, num_local_experts=3, num_experts_per_tok=2),
    "qwen2-moe": lambda: t.Qwen2MoeConfig(**_DENSE, **_UNTIED, **_EXPERTS, shared_expert_intermediate_size=16),
    "qwen3-moe": lambda: t.Qwen3MoeConfig(**_DENSE, **_UNTIED, **_EXPERTS, head_dim=6),
    "olmoe": lambda: t.OlmoeConfig(**_DENSE, **_UNTIED, num_experts=3, num_experts_per_tok=2),
    "bloom": lambda: t.BloomConfig(hidden_size=24, n_layer=2, n_head=4, **_SPECIAL),
    "falcon-multi-query": lambda: _falcon(multi_query=True, new_decoder_architecture=False),
    "falcon-heads": lambda: _falcon(multi_query=False, new_decoder_architecture=False),
    "falcon-groups": lambda: _falcon(multi_query=True, new_decoder_architecture=True, num_kv_heads=2),
    "gpt-oss": lambda: t.GptOssConfig(
        **_DENSE, **_UNTIED, head_dim=6, num_local_experts=3, num_experts_per_tok=2, layer_types=["full_attention"] * 2
    ),
    "llama4": lambda: t.Llama4TextConfig(
        **_DENSE, **_UNTIED, head_dim=6, num_local_experts=3, num_experts_per_tok=1, intermediate_size_mlp=32
    ),
    "gpt-bigcode": lambda: t.GPTBigCodeConfig(
        n_embd=24, n_layer=2, n_head=4, n_positions=64, multi_query=True, **_SPECIAL
    ),
    "gpt-bigcode-heads": lambda: t.GPTBigCodeConfig(
        n_embd=24, n_layer=2, n_head=4, n_positions=64, multi_query=False, **_SPECIAL
    ),
    "codegen": lambda: t.CodeGenConfig(
        n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, n_ctx=64, **_UNTIED, **_SPECIAL
    ),
    "mpt": lambda: t.MptConfig(d_model=24, n_heads=4, n_layers=2, max_seq_len=64, **_SPECIAL),
    "dbrx": lambda: t.DbrxConfig(
        d_model=24,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 3, "moe_top_k": 2},
        **_UNTIED,
        **_SPECIAL,
    ),
    "persimmon": lambda: t.PersimmonConfig(**{**_DENSE, "hidden_size": 32, "num_key_value_heads": 4}, **_UNTIED),
    "deepseek-v3": lambda: t.DeepseekV3Config(
        **{**_DENSE, "num_key_value_heads": 4},
        **_UNTIED,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=12,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=10,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=8,
    ),
}


def _falcon(**options: Any) -> PretrainedConfig:
    return t.FalconConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, alibi=False, bias=True, **options, **_SPECIAL
    )


def build(name: str, *, seed: int = 0, device: str = "cpu", **changes: Any) -> PreTrainedModel:
    """The tiny float32 model `name` of CONFIGS, in eval mode; every parameter, biases and norms included, is random.

    `changes` are attributes of its configuration, such as `vocab_size`.
    """
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        if device != "meta":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(0.0, 0.2)
    return model.eval()


def save(name: str, folder: Path, *, seed: int = 0) -> PreTrainedModel:
    """Build `name`, write it to `folder` as a checkpoint, and return the model that was written."""
    model = build(name, seed=seed)
    model.save_pretrained(folder)
    return model

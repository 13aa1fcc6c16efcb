"""Two small tokenizers that cut text differently, and models around them, for tests of everything that reads text."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from safecrit.models import NO_FOLDER, LoadedModel

CORPUS = [
    "How do I bake a loaf of bread for my neighbour?",
    "First warm the oven, then mix flour and water.",
    "I cannot help with that request, sorry about it.",
    "safe unsafe verdict user assistant answer question",
    "Tell me a story about the old lighthouse keeper.",
] * 4
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[verdict] ' }}{% endif %}"
)
CHAT = (
    "{{ '<s>' }}{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]


@functools.cache
def _core(style: str) -> str:
    if style == "byte-level":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        core.train_from_iterator(
            CORPUS,
            trainers.BpeTrainer(
                vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
            ),
        )
        return core.to_str()
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    described = json.loads(core.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] in SPECIALS]
    described["model"]["byte_fallback"] = True
    return json.dumps(described)


def tokenizer(style: str = "byte-level", template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """`byte-level` or `metaspace` (SentencePiece's way, with byte fallback)."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_core(style)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    made.chat_template = template
    return made


def llama(vocabulary: int, seed: int = 0, *, tied: bool = False, layers: int = 2, hidden: int = 16) -> PreTrainedModel:
    """A small Llama with large random weights, so that its outputs depend on its inputs."""
    torch.manual_seed(seed)
    config = t.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return t.AutoModelForCausalLM.from_config(config).eval()


def mixtral(vocabulary: int, seed: int = 0) -> PreTrainedModel:
    """A small Mixtral: fused experts at run time, one tensor an expert in the checkpoint."""
    torch.manual_seed(seed)
    config = t.MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        num_local_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return t.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()


def loaded(model: PreTrainedModel, made: PreTrainedTokenizerFast, folder: Path | None = None) -> LoadedModel:
    """A LoadedModel around objects in memory, saved to `folder` where one is given."""
    if folder is not None:
        model.save_pretrained(folder)
        made.save_pretrained(folder)
    return LoadedModel(
        model=model, tokenizer=made, folder=folder or NO_FOLDER, id=str(folder or "memory"), revision=None
    )


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64 throughout; transformers rounds norms and routers to float32."""
    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_rms_norm, module)  # type: ignore[method-assign]
        if type(module).__name__.endswith("TopKRouter"):
            module.forward = functools.partial(_router, module)  # type: ignore[method-assign]
    return model


def _rms_norm(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * (hidden * scale)


def _router(module: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), module.weight)
    weights, chosen = torch.topk(torch.softmax(logits, dim=-1), module.top_k, dim=-1)
    return logits, weights / weights.sum(dim=-1, keepdim=True), chosen

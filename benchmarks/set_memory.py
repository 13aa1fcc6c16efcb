"""Peak memory of one SET step on the CPU, of a dense masked AdamW beside it, and the account's word on both.

A bf16 Llama of about 1.1 B weights is made from its configuration, with a random mask of 1 % of them. Every case
runs in a fresh process. The resident set's high-water mark (VmHWM, which /proc/self/clear_refs resets) is read
over two steps, the second of which has its state already. Activations: the peak of the same forward and backward
with all weights frozen but one bias, in the same process. The bound: 1.1 x (16 bytes a trained weight + largest
gradient + activations). The dense optimizer is torch's AdamW in the weights' dtype, whose state is the smallest
that a dense one has, with gradients masked and values restored through a mask of one bit a weight.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from score_memory import reset, resident

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from safecrit.maskfile import Mask

SIZES: dict[str, dict[str, Any]] = {
    "0.1B": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2048, "num_attention_heads": 12},
    "1.1B": {"hidden_size": 2048, "num_hidden_layers": 22, "intermediate_size": 5632, "num_attention_heads": 32},
}
VOCABULARY, SHARE = 32000, 0.01
# glibc keeps freed blocks of up to 32 MiB, more of them the more a program has freed; so it gives them back.
LEAN = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_ARENA_MAX": "1"}


def make_model(size: str) -> PreTrainedModel:
    """A Llama in bf16, made in that dtype so that nothing larger was ever resident."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        **SIZES[size],
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        attention_bias=True,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.train()


def random_mask(model: PreTrainedModel, share: float = SHARE) -> Mask:
    """`share` of the model's weights, at random among the eligible ones."""
    import torch

    from safecrit.anatomy import read_anatomy
    from safecrit.maskfile import Mask, MaskInfo

    anatomy = read_anatomy(model)
    share *= anatomy.total / anatomy.eligible_total
    generator = torch.Generator().manual_seed(0)
    indices = {}
    for tensor in anatomy.eligible:
        count = int(share * tensor.layout.numel)
        drawn = torch.randint(tensor.layout.numel, (2 * count + 16,), generator=generator).unique()
        indices[tensor.name] = drawn[torch.randperm(len(drawn), generator=generator)[:count]].sort().values
    info = MaskInfo(
        tensors=anatomy.layouts, mode="random", total=anatomy.total, eligible=anatomy.eligible_total, model="benchmark"
    )
    return Mask(indices, info)


def passes(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    model(**batch, use_cache=False).loss.backward()


def settle() -> None:
    """Give freed memory back to the system, so that what is resident is what is in use, and start a new peak."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    reset()


def frozen_pass(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> int:
    """Peak of a forward and backward pass in which one bias of the first layer alone needs a gradient, bytes."""
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    bias = model.model.layers[0].self_attn.q_proj.bias.requires_grad_(True)
    passes(model, {name: value[:1, :8] for name, value in batch.items()})  # loads the kernels
    bias.grad = None
    settle()
    before = resident()
    passes(model, batch)
    peak = resident("VmHWM") - before
    bias.grad = None
    for parameter, need in zip(model.parameters(), wanted, strict=True):
        parameter.requires_grad_(need)
    return peak


def child(case: str, size: str, rows: int, tokens: int) -> dict[str, Any]:
    """Two steps in this process; bytes above the loaded model."""
    import torch

    from safecrit.metamodel import shape_of
    from safecrit.protection import protect
    from safecrit.sparse import SparseAdamW
    from safecrit.trainaccount import TrainPlan, train_parts
    from safecrit.trainaccount import peak as peak_of

    model = make_model(size)
    ids = torch.randint(300, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    activations = frozen_pass(model, batch)
    weights = sum(parameter.numel() for parameter in model.parameters())
    settle()
    loaded = resident()
    optimizer: torch.optim.Optimizer
    if case == "set":
        sparse = SparseAdamW(model, random_mask(model), lr=1e-4)
        optimizer, selected, held = sparse, sparse.trained, None
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
        held = protect(model, random_mask(model), optimizer)
        selected = held.protected
    for _ in range(2):
        passes(model, batch)
        optimizer.step()
        optimizer.zero_grad()
    peak = resident("VmHWM") - loaded
    if held is not None:
        held.check()
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    plan = TrainPlan(
        mode="set",
        selected=selected,
        itemsize=2,
        rows=rows,
        tokens=tokens,
        total_tokens=rows * tokens,
        largest=max(trained),
        cpu=True,
    )
    parts = [
        part
        for part in train_parts(shape_of(model), plan)
        if part.name not in ("libraries", "model weights", "mask", "output files")
    ]
    return {
        "account": peak_of(parts, "host"),
        "parts": {part.name: part.bytes for part in parts},
        "weights": weights,
        "selected": selected,
        "rows": rows,
        "tokens": tokens,
        "activations": activations,
        "largest_gradient": 2 * max(trained),
        "peak": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=("set", "dense"), help="this one alone, in this process")
    parser.add_argument("--size", choices=SIZES, default="1.1B")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(child(options.case, options.size, options.rows, options.tokens)))
        return
    given = [f"--{name}={getattr(options, name)}" for name in ("size", "rows", "tokens")]
    found: dict[str, Any] = {}
    for name, case, allocator in (
        ("set", "set", LEAN),
        ("set, glibc as it comes", "set", {}),
        ("dense", "dense", LEAN),
    ):
        command = [sys.executable, __file__, f"--case={case}", *given]
        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | allocator)
        found[name] = json.loads(ran.stdout)
        ours = found[name]
        if case == "dense":
            del ours["account"], ours["parts"]
            continue
        bound = 1.1 * (16 * ours["selected"] + ours["largest_gradient"] + ours["activations"])
        ours |= {"bound": bound, "of_bound": ours["peak"] / bound}
    found["dense_times_set"] = found["dense"]["peak"] / found["set"]["peak"]
    found["set_of_account"] = found["set"]["peak"] / found["set"]["account"]
    print(json.dumps(found, indent=2))
    if options.save:
        from timing import write

        print(write(f"set-memory-{options.rows}x{options.tokens}", "cpu", **found))


if __name__ == "__main__":
    main()

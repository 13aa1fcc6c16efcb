"""Run by torchrun: a script of a user's, transformers' Trainer with accelerate's FSDP2 plugin and a mask.

accelerate offers FSDP on accelerators alone, so the CPU passes for one here.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import state
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import safecrit
from safecrit import distributed
from safecrit.mixture import collate, mix
from safecrit.traindata import read_examples

inner = state.PartialState.__init__


def passing(self: Any, *arguments: Any, **more: Any) -> None:
    inner(self, *arguments, **more)
    if self.distributed_type == state.DistributedType.MULTI_CPU:
        self.distributed_type = state.DistributedType.MULTI_GPU


def train(mode: str, model: Path, mask: Path, data: Path, out: Path) -> None:
    """Ten steps of four examples; the whole weights, by runtime name, go to `out`."""
    state.PartialState.__init__ = passing
    chosen, loaded = safecrit.Mask.load(mask), AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = read_examples(str(data)).examples
    mixed = mix(tokenizer, examples, (), retain_share=0.0, count=40, max_length=128, seed=0)

    class OurTrainer(Trainer):
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            if mode == "spa":
                return super().create_optimizer(model)
            self.optimizer = safecrit.SparseAdamW(self.model, chosen, lr=1e-3, weight_decay=0.1)
            return self.optimizer

    world = int(os.environ.get("WORLD_SIZE", 1))
    blocks = "TRANSFORMER_BASED_WRAP"
    plugin: dict[str, Any] = {"version": 2, "auto_wrap_policy": blocks, "cpu_ram_efficient_loading": False}
    arguments = TrainingArguments(
        output_dir=str(out.parent / "trainer"),
        max_steps=10,
        learning_rate=1e-3,
        weight_decay=0.1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4 // world,
        max_grad_norm=0.0 if mode == "set" else 1.0,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        **({"fsdp": True, "fsdp_config": plugin} if world > 1 else {}),
    )
    callbacks = [safecrit.ProtectCallback(chosen)] if mode == "spa" else None
    collator = partial(collate, pad=tokenizer.pad_token_id)
    trainer = OurTrainer(loaded, arguments, train_dataset=mixed, data_collator=collator, callbacks=callbacks)
    trainer.train()
    assert distributed.is_sharded(trainer.model) == (world > 1)
    whole = {n: p.full_tensor() if world > 1 else p for n, p in trainer.model.named_parameters()}
    if arguments.process_index == 0:
        torch.save({name: weight.detach() for name, weight in whole.items()}, out)


if __name__ == "__main__":
    mode, *paths = sys.argv[1:]
    train(mode, *map(Path, paths))

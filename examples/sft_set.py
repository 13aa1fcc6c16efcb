"""Train only a mask's weights with TRL's SFTTrainer: pass it safecrit's optimizer.

python examples/sft_set.py MODEL MASK DATA OUT
MODEL: a folder or Hub id. MASK: a file of `safecrit mask`. DATA: JSONL with prompt and completion.
"""

import json
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import safecrit


def main(model_name: str, mask_file: str, data: str, out: str) -> None:
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    # It clips by itself (max_grad_norm=1.0), since no gradient is left for the trainer to clip.
    optimizer = safecrit.SparseAdamW(model, safecrit.Mask.load(mask_file), lr=1e-3)  # 1
    arguments = SFTConfig(
        out,
        max_steps=5,
        per_device_train_batch_size=2,
        max_grad_norm=0.0,
        bf16=False,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), optimizers=(optimizer, None))  # 2
    trainer.train()
    optimizer.close()
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

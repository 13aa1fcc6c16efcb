"""Preference tuning with TRL's DPOTrainer while a mask's weights stay bit-identical: two extra lines.

python examples/dpo_protect.py MODEL MASK DATA OUT
DATA: JSONL with prompt, chosen and rejected.
"""

import json
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

import safecrit


def main(model_name: str, mask_file: str, data: str, out: str) -> None:
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    arguments = DPOConfig(
        out,
        max_steps=3,
        per_device_train_batch_size=2,
        bf16=False,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows))
    mask = safecrit.Mask.load(mask_file)  # 1
    trainer.add_callback(safecrit.ProtectCallback(mask))  # 2
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

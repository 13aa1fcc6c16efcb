"""Supervised fine-tuning with TRL while a mask's weights stay bit-identical: two extra lines.

python examples/trl_sft.py MODEL MASK DATA OUT
DATA: JSONL with prompt and completion.
"""

import json
import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import safecrit


def main(model_name: str, mask_file: str, data: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_name)
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    arguments = SFTConfig(
        out,
        max_steps=5,
        per_device_train_batch_size=4,
        max_length=256,
        bf16=False,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    mask = safecrit.Mask.load(mask_file)  # 1
    trainer.add_callback(safecrit.ProtectCallback(mask))  # 2
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Train a LoRA adapter with PEFT in a plain loop, and merge it everywhere but in a mask's weights.

python examples/lora_merge.py MODEL MASK DATA OUT
"""

import json
import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import safecrit


def main(model_name: str, mask_file: str, data: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    base = AutoModelForCausalLM.from_pretrained(model_name)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows[:5]:
        ids = tokenizer(row["prompt"] + "\n" + row["completion"], return_tensors="pt")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as adapter:
        model.save_pretrained(adapter)
        done = safecrit.merge(model_name, adapter, mask_file, out)  # in place of merge_and_unload()
    print(done.verified.message())


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Train only a mask's weights in a loop of one's own, with 16 bytes of state a trained weight.

python examples/set_loop.py MODEL MASK DATA OUT
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import safecrit


def main(model_name: str, mask_file: str, data: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    optimizer = safecrit.SparseAdamW(model, safecrit.Mask.load(mask_file), lr=1e-3)
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows[:5]:
        ids = tokenizer(row["prompt"] + "\n" + row["completion"], return_tensors="pt")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

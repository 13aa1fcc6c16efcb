"""Fine-tune with transformers' Trainer while a mask's weights stay bit-identical: two extra lines.

python examples/protect_trainer.py MODEL MASK DATA OUT
MODEL: a folder or Hub id. MASK: a file of `safecrit mask`. DATA: JSONL with prompt and completion.
"""

import json
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import safecrit


def main(model_name: str, mask_file: str, data: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_name)
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [row["prompt"] + "\n" + row["completion"] + tokenizer.eos_token for row in rows[:64]]
    encoded = [tokenizer(text, truncation=True, max_length=256)["input_ids"] for text in texts]

    def collate(batch: list[list[int]]) -> dict[str, object]:
        padded = tokenizer.pad({"input_ids": batch}, return_tensors="pt")
        return {**padded, "labels": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)}

    arguments = TrainingArguments(
        out,
        max_steps=5,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=encoded, data_collator=collate)
    mask = safecrit.Mask.load(mask_file)  # 1
    trainer.add_callback(safecrit.ProtectCallback(mask))  # 2
    trainer.train()
    trainer.save_model(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""How far scores of the same answers depend on what must not matter: batch size, order of prompts, threads.

The demo's base model (1.4 M weights, trained on the spot) is scored with its guard on prompts and answers of many
lengths that are made once and given as files; every run is a fresh process of `safecrit score`. Reported against
the first run: ||a - b|| / ||b|| over all scores together, and the IoU of the two masks of the top 1 %. Bars, in
float32: at most 1e-5, at least 0.999. Of bfloat16 there is none: it rounds activations to three digits,
and other batches and threads round other sums.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from timing import machine, write
from transformers.utils import logging

from safecrit.comparison import agreement
from safecrit.demo import grammar, guard, zoo
from safecrit.demo.settings import DemoSettings
from safecrit.scorefile import Scores

# Name, answers a batch, threads, whether the files are shuffled; the first is what the others are compared with.
RUNS = (
    ("batch 16, 1 thread", 16, 1, False),
    ("batch 4", 4, 1, False),
    ("batch 1", 1, 1, False),
    ("shuffled prompts", 16, 1, True),
    ("2 threads", 16, 2, False),
    ("batch 4, shuffled, 2 threads", 4, 2, True),
)
FARTHEST, SHARE, LEAST_IOU = 1e-5, 0.01, 0.999


def make_models(root: Path, settings: DemoSettings) -> None:
    """Train base model and guard, and save them."""
    made = {}
    tokenizer = zoo.chat_tokenizer(settings)
    made["model"] = zoo.train_base(settings, tokenizer), tokenizer
    reader = guard.guard_tokenizer(settings)
    made["guard"] = guard.train_guard(settings, reader), reader
    for name, (model, own) in made.items():
        model.save_pretrained(root / name)
        own.save_pretrained(root / name)


def make_files(root: Path, count: int) -> None:
    """Forbidden requests with answers of one to six sentences, in order and shuffled."""
    chance = random.Random(0)
    asked = chance.sample(list(grammar.requests("harmful", "train")), count)
    rows = []
    for request in asked:
        sentences = [request.answer, request.task_answer, grammar.REFUSAL] * 2
        rows.append({"prompt": request.prompt, "answer": " ".join(chance.sample(sentences, chance.randint(1, 6)))})
    for name in ("in-order", "shuffled"):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        chance.shuffle(rows)


def run(root: Path, output: Path, batch: int, threads: int, shuffled: bool, dtype: str) -> Scores:
    """`safecrit score` in a process of its own."""
    file = root / ("shuffled.jsonl" if shuffled else "in-order.jsonl")
    flags = {
        "judge": root / "guard",
        "prompts": file,
        "answers": file,
        "batch-size": batch,
        "dtype": dtype,
        "judge-dtype": dtype,
        "device": "cpu",
        "output": output,
    }
    command = [sys.executable, "-m", "safecrit", "score", str(root / "model"), "--quiet"]
    for key, value in flags.items():
        command += [f"--{key}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return Scores.load(output)


def compare(a: Scores, b: Scores) -> dict[str, float]:
    """||a - b|| / ||b|| and IoU of the masks."""
    apart = size = 0.0
    for name in b.names:
        one, other = a.tensor(name).double(), b.tensor(name).double()
        apart += float((one - other).square().sum())
        size += float(other.square().sum())
    found = agreement(
        {name: a.tensor(name) for name in a.names},
        {name: b.tensor(name) for name in b.names},
        total=b.total,
        shares=[SHARE],
    )
    return {"difference": (apart / size) ** 0.5, "iou": found["shares"][0]["iou"]}


def measure(root: Path, dtype: str) -> list[dict[str, Any]]:
    first: Scores | None = None
    rows = []
    for number, (name, batch, threads, shuffled) in enumerate(RUNS):
        scores = run(root, root / f"{dtype}-{number}", batch, threads, shuffled, dtype)
        first = first or scores
        rows.append({"run": name, "dtype": dtype, "batch_size": batch, "threads": threads, "shuffled": shuffled})
        rows[-1] |= compare(scores, first)
    return rows[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    settings = DemoSettings()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_models(root, settings)
        make_files(root, options.prompts)
        rows = [row for dtype in ("float32", "bfloat16") for row in measure(root, dtype)]
        info = Scores.load(root / "float32-0").info
    print(f"{machine('cpu')}, torch {torch.__version__}, {info['prompts']['used']} prompts, {info['total']:,} weights")
    print(f"answers of {info['answers']['tokens'] / options.prompts:.0f} tokens on average")
    print(f"{'against ' + RUNS[0][0]:36}{'dtype':>10}{'||a-b||/||b||':>16}{'IoU, top 1 %':>16}")
    for row in rows:
        print(f"{row['run']:36}{row['dtype']:>10}{row['difference']:16.1e}{row['iou']:16.4f}")
    kept = all(row["difference"] <= FARTHEST and row["iou"] >= LEAST_IOU for row in rows if row["dtype"] == "float32")
    print(f"float32: at most {FARTHEST:.0e}, at least {LEAST_IOU}: {'kept' if kept else 'BROKEN'}")
    if options.save:
        print(
            write(
                "score-agreement",
                "cpu",
                rows=rows,
                against=RUNS[0][0],
                kept=kept,
                prompts=info["prompts"]["used"],
                answer_tokens=info["answers"]["tokens"],
                weights=info["total"],
            )
        )


if __name__ == "__main__":
    main()

"""What a user waits for: `score`, `mask`, `set` and `verify` of a model as commands, seconds and peak memory of each.

A Llama of 97 M float32 weights and a guard of 19 M with random weights; prompts and answers of about 64 tokens.
Every command is a fresh process: importing and loading count. The effect means nothing, as the weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from score_memory import make_model, make_tokenizer
from score_speed import GUARD, MODEL, WORDS
from timing import machine, write

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}</s>{% else %}"
    "user: {{ m['content'] }} assistant: {% endif %}{% endfor %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def text(n: int) -> str:
    """About 60 tokens."""
    return " ".join(LETTERS[(n + k) % 26] + LETTERS[(n * 7 + k) % 26] for k in range(26))


def run(*arguments: object) -> dict[str, float]:
    """Wall seconds and peak resident bytes of one command, which must succeed."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "safecrit", *map(str, arguments), "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"safecrit {arguments[0]} ended with {process.returncode}")
    return {"seconds": time.perf_counter() - start, "peak_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tokenizer = make_tokenizer(WORDS)
        make_model(root / "guard", GUARD, "float32", tokenizer)
        tokenizer.chat_template = TEMPLATE
        make_model(root / "model", MODEL, "float32", tokenizer)
        rows = [{"instruction": text(n), "output": text(n + 5)} for n in range(options.prompts)]
        (root / "data.json").write_text(json.dumps(rows), encoding="utf-8")
        judged = ("--judge", root / "guard", "--safe-word", "ab", "--unsafe-word", "cd", "--max-new-tokens", 64)
        prompts = ("--prompts", root / "data.json")
        arguments = ["score", root / "model", *judged, *prompts, "--dry-run", "--json", "-o", root / "dry"]
        command = [sys.executable, "-m", "safecrit", *map(str, arguments)]
        foretold = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found = {
            "score": run("score", root / "model", *judged, *prompts, "-o", root / "scores"),
            "mask": run("mask", root / "scores", "--top", "1%", "-o", root / "mask.safetensors"),
            "set": run(
                "set", root / "model", "--mask", root / "mask.safetensors", "--data", root / "data.json", "--steps",
                options.steps, "-o", root / "safer",
            ),
            "verify": run(
                "verify", root / "safer", "--base", root / "model", "--mask", root / "mask.safetensors", "--mode", "set"
            ),
        }  # fmt: skip
    print(f"{machine('cpu')}, 97 M float32 weights, {options.prompts} prompts, {options.steps} steps of 4 examples")
    print(f"score --dry-run foretold {foretold['seconds']:.1f} s for the work, loading and importing not counted")
    for name, figures in found.items():
        print(f"{name:8}{figures['seconds']:8.1f} s{figures['peak_bytes'] / 2**20:8.0f} MiB")
    if options.save:
        print(
            write(
                "whole-job",
                "cpu",
                prompts=options.prompts,
                steps=options.steps,
                commands=found,
                foretold_seconds=foretold["seconds"],
            )
        )


if __name__ == "__main__":
    main()

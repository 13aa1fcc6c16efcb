"""What a user waits for: `score`, `mask`, `set` and `verify` of a model as commands, seconds and peak memory of each.

    .venv/bin/python benchmarks/whole_job.py --save
    .venv/bin/python benchmarks/whole_job.py --size 8b --device cuda --save             # one process
    .venv/bin/python benchmarks/whole_job.py --size 8b --device cuda --ranks 1 --save   # torchrun, FSDP2, NCCL

A Llama of 97 M float32 weights and a guard of 19 M with random weights, or of 8.1 B bf16 weights and a guard of 1.3 B
(some 60 GB of disk); prompts and answers of about 64 tokens. Every command is a fresh process: importing and loading
count. The effect means nothing, as the weights are random. Memory of a GPU is what nvidia-smi says at most.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from score_memory import make_model, make_tokenizer
from score_speed import GUARD, MODEL, WORDS
from timing import machine, write

SIZES = {
    "97m": (MODEL, GUARD, "float32"),
    "8b": (
        {"hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 14336, "heads": 32},
        {"hidden_size": 2048, "num_hidden_layers": 20, "intermediate_size": 8192, "heads": 32},
        "bfloat16",
    ),
}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}</s>{% else %}"
    "user: {{ m['content'] }} assistant: {% endif %}{% endfor %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def text(n: int) -> str:
    """About 60 tokens."""
    return " ".join(LETTERS[(n + k) % 26] + LETTERS[(n * 7 + k) % 26] for k in range(26))


class Used:
    """The most memory of all GPUs together that nvidia-smi sees inside `with`, in bytes; 0 without it."""

    def __enter__(self) -> Used:
        self.bytes, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while shutil.which(query[0]) and not self._ended.wait(0.2):
            told = subprocess.run(query, capture_output=True, text=True, check=False).stdout
            self.bytes = max(self.bytes, sum(int(line) for line in told.split() if line.isdigit()) * 2**20)


def run(ranks: int, *arguments: object) -> dict[str, float]:
    """Wall seconds, peak resident bytes and those of GPUs of one command, which must succeed."""
    start, launch = time.perf_counter(), ["-m", "safecrit"]
    if ranks and arguments[0] != "verify":
        place = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--nproc-per-node={ranks}"]
        launch = ["-m", "torch.distributed.run", *place, "-m", "safecrit"]
    command = [sys.executable, *launch, *map(str, arguments), "--quiet"]
    with Used() as used:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"safecrit {arguments[0]} ended with {process.returncode}")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024, "gpu_bytes": used.bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="97m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=0, help="processes of torchrun, the model divided; 0: without it")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    model, guard, dtype = SIZES[options.size]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tokenizer = make_tokenizer(WORDS)
        make_model(root / "guard", guard, dtype, tokenizer, options.device)
        tokenizer.chat_template = TEMPLATE
        make_model(root / "model", model, dtype, tokenizer, options.device)
        rows = [{"instruction": text(n), "output": text(n + 5)} for n in range(options.prompts)]
        (root / "data.json").write_text(json.dumps(rows), encoding="utf-8")
        place = ("--device", options.device)
        judged = ("--judge", root / "guard", "--safe-word", "ab", "--unsafe-word", "cd", "--max-new-tokens", 64)
        score = ("score", root / "model", *judged, "--prompts", root / "data.json", *place)
        command = [sys.executable, "-m", "safecrit", *map(str, score), "--dry-run", "--json", "-o", str(root / "dry")]
        foretold = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        shard = ("--parallel", "shard") if options.ranks else ()
        found = {
            "score": run(options.ranks, *score, *shard, "-o", root / "scores"),
            "mask": run(options.ranks, "mask", root / "scores", "--top", "1%", "-o", root / "mask.safetensors"),
        }
        shutil.rmtree(root / "scores")
        found["set"] = run(
            options.ranks, "set", root / "model", "--mask", root / "mask.safetensors", "--data", root / "data.json",
            "--steps", options.steps, *place, *shard, "-o", root / "safer",
        )  # fmt: skip
        trained = json.loads((root / "safer/safecrit/training.json").read_text(encoding="utf-8"))
        found["verify"] = run(
            0, "verify", root / "safer", "--base", root / "model", "--mask", root / "mask.safetensors", "--mode", "set"
        )
    took = f"{options.prompts} prompts, {options.steps} steps of 4 examples"
    print(f"{machine(options.device)}, {trained['total'] / 1e6:,.0f} M {dtype} weights, ranks {options.ranks}, {took}")
    print(f"score --dry-run foretold {foretold['seconds']:.1f} s for the work, loading and importing not counted")
    print(f"score: {found['score']['seconds'] / options.prompts:.2f} s a prompt, everything counted")
    print(f"set: {trained['seconds'] / options.steps:.2f} s a step, {trained['peak_memory_bytes'] / 2**30:.1f} GiB")
    for name, figures in found.items():
        memory = "".join(f"{figures[key] / 2**20:10,.0f} MiB {key[:4]}" for key in ("peak_bytes", "gpu_bytes"))
        print(f"{name:8}{figures['seconds']:8.1f} s{memory}")
    if options.save:
        usual = options.size == "97m" and options.device == "cpu" and not options.ranks
        print(
            write(
                "whole-job" + ("" if usual else f"-{options.size}-{options.device}-{options.ranks}"),
                options.device,
                weights=trained["total"],
                prompts=options.prompts,
                steps=options.steps,
                ranks=options.ranks,
                commands=found,
                foretold_seconds=foretold["seconds"],
                set_step_seconds=trained["seconds"] / options.steps,
                set_peak_bytes=trained["peak_memory_bytes"],
            )
        )


if __name__ == "__main__":
    main()

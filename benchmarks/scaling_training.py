"""What a step of SET and SPA sends, holds and takes on 1, 2 and 4 gloo processes, beside scaling.py's prediction.

    .venv/bin/python benchmarks/scaling_training.py --save

A step is MICRO micro-batches on every rank. Bytes sent are those of a rank and a step: our own collectives, FSDP2's,
and the buckets that DistributedDataParallel sums. Bytes kept are those that a rank holds as an update begins:
weights, gradients, optimizer state, positions, protected values; without activations. Seconds are the
median of the steps between two updates, predicted from one process's, the number of cores, and the rate of a sum
or, divided, of two gathers and a scatter.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaling import Machine, Model, Work, amount, duration, make, trained, training
from scaling_world import counter, divided_rate, launch, link_rate, others

STEPS, MICRO, BATCH = 6, 2, 1
MODES, PARALLEL = ("set", "spa"), ("replicate", "shard")


def prepare(folder: Path) -> Model:
    """The model of scaling.py, a random mask of one weight in a hundred, and examples of one length."""
    from set_memory import random_mask
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from whole_job import TEMPLATE

    model = make(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    random_mask(AutoModelForCausalLM.from_pretrained(folder / "model"), 0.01).save(folder / "mask.safetensors")
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    lines = [json.dumps({"prompt": row["prompt"], "completion": row["answer"][:80]}) for row in rows]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return model


class Watch:
    """Notes time, bytes sent and bytes kept as every update begins."""

    def __init__(self, world: int) -> None:
        import torch
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        from safecrit.protection import Protection

        self.sent = counter(world)
        self.marks: list[tuple[float, float]] = []
        self.buckets: dict[int, Any] = {}  # their storages, by number
        self.protections: list[Protection] = []
        self.kept = 0
        register_optimizer_step_pre_hook(lambda optimizer, *_: self._mark(optimizer))
        wrapper = torch.nn.parallel.DistributedDataParallel
        plain, protect = wrapper.__init__, Protection.__init__

        def wrapped(ddp: Any, *rest: Any, **more: Any) -> None:
            plain(ddp, *rest, **more)
            ddp.register_comm_hook(None, lambda _, bucket: self._summed(bucket))  # torch checks annotations

        def protecting(one: Any, *rest: Any) -> None:
            protect(one, *rest)
            self.protections.append(one)

        setattr(wrapper, "__init__", wrapped)  # noqa: B010 - other signatures
        setattr(Protection, "__init__", protecting)  # noqa: B010

    def _summed(self, bucket: Any) -> Any:
        import torch.distributed as dist
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        values = bucket.buffer()
        self.buckets[bucket.index()] = values.untyped_storage()
        self.sent["bytes"] += 2 * others(dist.get_world_size()) * values.nbytes
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    def _mark(self, optimizer: Any) -> None:
        import torch

        from safecrit.placement import local

        self.marks.append((time.perf_counter(), self.sent["bytes"]))
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        model = list(optimizer._model.parameters()) if hasattr(optimizer, "_model") else trained
        tensors = [*model, *(parameter.grad for parameter in model)]
        tensors += [value for state in optimizer.state.values() for value in state.values()]
        tensors += [*getattr(optimizer, "_indices", ()), *getattr(optimizer, "_buffers", ())]
        tensors += getattr(optimizer, "_bits", {}).values()
        for protection in self.protections:
            tensors += [part for _, *parts in protection._saved for part in parts]
        storages = [local(tensor).untyped_storage() for tensor in tensors if torch.is_tensor(tensor)]
        held = {storage.data_ptr(): storage.nbytes() for storage in (*storages, *self.buckets.values())}
        self.kept = sum(held.values())


def worker(folder: Path) -> None:
    """One rank: every mode, the model replicated and divided, and what each took."""
    from safecrit import distributed
    from safecrit.api.train import TrainJob, run_training
    from safecrit.trainloop import TrainSettings

    ranks = distributed.start(120)
    rows, links = [], [link_rate(ranks.world), divided_rate(ranks.world)]
    watch = Watch(ranks.world)
    for mode in MODES:
        for parallel in PARALLEL[: 1 if ranks.world == 1 else 2]:
            job = TrainJob(
                mode=mode,  # type: ignore[arg-type]
                model=str(folder / "model"),
                mask=folder / "mask.safetensors",
                data=str(folder / "data.jsonl"),
                save="model",
                allow_other_weights=True,
                settings=TrainSettings(
                    max_steps=STEPS, per_device_train_batch_size=BATCH, gradient_accumulation_steps=MICRO
                ),
            )
            watch.marks, watch.buckets, watch.protections = [], {}, []
            before = distributed.sent_bytes()
            out = folder / f"{mode}-{parallel}-{ranks.world}"
            k = run_training(job, out, parallel=parallel).result.trained
            after = distributed.sent_bytes()
            end = sum(after.get(purpose, 0) - before.get(purpose, 0) for purpose in ("changes", "weights"))
            document = json.loads((out / "safecrit" / "training.json").read_text())
            own = sum(document["sent_bytes"].get(purpose, 0) for purpose in ("gradients", "norm")) / STEPS
            times, sent = zip(*watch.marks, strict=True)
            rows.append(
                {
                    "mode": mode,
                    "parallel": parallel,
                    "trained": k,
                    "seconds": statistics.median(b - a for a, b in itertools.pairwise(times)),
                    "sent": own + (sent[-1] - sent[0]) / (STEPS - 1),
                    "kept": max(distributed.gather(watch.kept)),
                    "end": max(distributed.gather(end)),
                }
            )
    if ranks.first:
        print(json.dumps({"links": links, "rows": rows}))
    distributed.finish()


def measure(save: bool) -> None:
    cores, rows = len(os.sched_getaffinity(0)), []
    alone: dict[str, float] = {}
    what = ("a step, s", "sent a step", "kept", "sent at the end")
    heads = [f"{name}, {kind}" for name in what for kind in ("predicted", "measured")]
    print(f"| ranks | mode | parallel | {' | '.join(heads)} |\n{'|---' * 11}|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = prepare(folder)
        for ranks in (1, 2, 4):
            found = launch(__file__, ranks, str(folder))
            for row in found["rows"]:
                sparse, sharded = row["mode"] == "set", row["parallel"] == "shard"
                share = (row["trained"] if sparse else model.total - row["trained"]) / model.total
                work = replace(Work(), share=share, micro=MICRO)
                small = Machine(memory=0 if sharded else 1e12, inside=found["links"][sharded] or 1)
                cost = training(model, ranks, small, work, sparse)
                compute = alone.setdefault(row["mode"], row["seconds"])
                pairs = {
                    "seconds": compute * max(1, ranks / cores) + cost.sent / small.inside,
                    "sent": cost.sent,
                    "kept": trained(model, ranks, work, sparse, sharded),
                    "end": cost.once,
                }
                rows.append({"ranks": ranks, **row, **{f"{name} predicted": value for name, value in pairs.items()}})
                cells = []
                for name, value in pairs.items():
                    say = duration if name == "seconds" else amount
                    cells += [say(value), say(row[name])]
                print(f"| {ranks} | {row['mode'].upper()} | {row['parallel']} | {' | '.join(cells)} |", flush=True)
                if sparse and not sharded and ranks > 1:
                    bound = 2 * others(ranks) * 4 * row["trained"]
                    rows[-1]["sent of 2(R-1)/R x 4k"] = row["sent"] / bound
    if save:
        from timing import write

        write("scaling-training", "cpu", micro_batches=MICRO, batch=BATCH, steps=STEPS, rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep what was measured in results/scaling-training.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(Path(given.worker))
    else:
        measure(given.save)


if __name__ == "__main__":
    main()

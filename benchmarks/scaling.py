"""What score, mask, SET and SPA send, hold and take on R ranks: predicted; the first two measured on processes here.

    .venv/bin/python benchmarks/scaling.py                   # the tables of docs/scaling.md
    .venv/bin/python benchmarks/scaling.py --measure --save  # 1, 2 and 4 gloo processes beside their prediction

scaling_training.py measures SET and SPA. The formulas are those of docs/scaling.md. Bytes are what one rank sends, as
a ring of all ranks sends them.
Measured bytes are counted where collectives are called, FSDP2's own ones too; seconds are those of the scoring
pass; memory is that of weights and sums, without what lives for a moment and the libraries' own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling_world import counter, launch, link_rate, others

GB = 1e9


@dataclass(frozen=True)
class Model:
    """Sizes in weights: all, those a token uses, scored ones, a layer's, the largest tensor's; and tensors scored."""

    name: str
    total: float
    active: float
    scored: float
    layer: float
    largest: float
    tensors: int
    itemsize: int = 2


@dataclass(frozen=True)
class Machine:
    """Of one rank: bytes of memory, FLOP/s that are reached, bytes/s of memory, of the link to the others, of files."""

    memory: float = 141e9
    flops: float = 400e12
    bandwidth: float = 4.3e12
    inside: float = 300e9  # between the ranks of a host
    outside: float = 40e9  # between hosts, a rank's share
    files: float = 5e9
    local: int = 8

    def link(self, ranks: int) -> float:
        """Bytes/s that a rank sends in a ring of `ranks`."""
        return self.inside if ranks <= self.local else self.outside


@dataclass(frozen=True)
class Work:
    """A run: tokens of a prompt, of its answer and of what the judge reads; draws; batches; share of the weights."""

    prompt: int = 64
    answer: int = 256
    judged: int = 360
    draws: int = 8
    batch: int = 16
    conversations: int = 64
    share: float = 0.01
    micro: int = 4  # micro-batches of a rank in a training step
    tokens: int = 4 * 2048  # of a rank in a training step


@dataclass(frozen=True)
class Cost:
    """Of one rank: bytes held, bytes sent for each unit of work and once, seconds for each unit of work and once."""

    mode: str
    memory: float
    sent: float
    once: float
    seconds: float
    more: float = 0.0


MODELS = [
    Model("8 B", 8.03e9, 8.03e9, 7.5e9, 0.218e9, 0.525e9, 225),
    Model("70 B", 70.6e9, 70.6e9, 69.5e9, 0.856e9, 1.05e9, 561),
    Model("671 B MoE", 671e9, 37e9, 669e9, 11.5e9, 7.5e9, 45_000),
]
JUDGE = Model("judge 8 B", 8.03e9, 8.03e9, 0, 0.218e9, 0.525e9, 0)
RANKS = (1, 8, 64, 1024)


def held(model: Model, judge: Model, ranks: int, sharded: bool) -> float:
    """What stays: model, float32 sums, judge."""
    return (model.itemsize * model.total + 4 * model.scored + judge.itemsize * judge.total) / (ranks if sharded else 1)


def score_memory(model: Model, judge: Model, ranks: int, sharded: bool) -> float:
    """What stays, and the largest gradient; sharded: two layers whole and one's float32 gradient."""
    if not sharded:
        return held(model, judge, ranks, sharded) + model.itemsize * model.largest
    return held(model, judge, ranks, sharded) + (2 * model.itemsize + 4) * max(model.layer, 2 * model.largest)


def score(model: Model, judge: Model, ranks: int, machine: Machine, work: Work) -> Cost:
    """Per prompt: forward, backward, and the judge's forward and input gradient for each draw; once: the sums."""
    sharded = score_memory(model, judge, 1, False) > machine.memory
    tokens = work.prompt + work.answer
    flops = 6 * model.active * tokens + 4 * judge.active * work.judged * work.draws
    compute = flops / machine.flops / ranks
    memory = score_memory(model, judge, ranks, sharded)
    if not sharded:
        once = 4 * model.scored * others(ranks)
        return Cost("replicate", memory, 0, once, compute, once / machine.link(ranks))
    calls = -(-work.batch * work.draws // work.conversations)
    # Weights are gathered for forward and backward, gradients are scattered in float32.
    passes = (2 * model.itemsize + 4) * model.total + calls * 2 * judge.itemsize * judge.total
    sent, once = others(ranks) * passes / work.batch, 4 * model.scored / ranks * others(ranks)
    return Cost("shard", memory, sent, once, compute + sent / machine.link(ranks) / ranks, once / machine.link(ranks))


def answering(model: Model, ranks: int, machine: Machine, work: Work, sharded: bool) -> float:
    """Seconds a prompt to answer: weights are read, and where they are divided gathered, for every token."""
    read = min(model.total, model.active * work.batch) * model.itemsize / machine.bandwidth
    gathered = others(ranks) * model.itemsize * model.total / machine.link(ranks) if sharded else 0.0
    return work.answer * (read + gathered) / work.batch / ranks


def mask(model: Model, ranks: int, machine: Machine, work: Work) -> Cost:
    """Two sums of histograms, counts of ties and of tensors; scores are read once from files and thrice from memory."""
    bins = (2**31 - 2**23 >> 15) + 2 + 2**15 + 1
    own, sent = 4 * model.scored / ranks, 2 * others(ranks) * (8 * bins + 8 * ranks + 4 * model.tensors)
    memory = 8 * work.share * model.total / ranks + 4 * 8 * bins
    return Cost("", memory, sent, 0, own / machine.files + 3 * own / 20e9)


def trained(model: Model, ranks: int, work: Work, sparse: bool, sharded: bool) -> float:
    """What stays of SET: weights, and of the k trained ones position, master, moments and gathered gradient.

    Of SPA, all float32: weights, gradients, moments, a bit of a scored weight, position and value of a protected one.
    """
    k = work.share * model.total
    size = model.itemsize * model.total + 20 * k if sparse else 16 * model.total + model.scored / 8 + 8 * k
    return size / ranks if sharded else size


def training(model: Model, ranks: int, machine: Machine, work: Work, sparse: bool) -> Cost:
    """A step of SET, whose k weights lie in all scored tensors, or of SPA, which computes in the model's own dtype.

    Divided, every micro-batch gathers the weights twice and scatters the float32 gradients, and the results go to rank
    0 at the end: SET's k, or all, thrice.
    """
    k = work.share * model.total
    compute = 6 * model.active * work.tokens / machine.flops
    whole = trained(model, ranks, work, sparse, False) + (model.itemsize * model.largest if sparse else 0)
    if whole <= machine.memory:
        sent = 2 * others(ranks) * 4 * (k + model.tensors if sparse else model.total)
        return Cost("replicate", whole, sent, 0, compute + sent / machine.link(ranks))
    own = trained(model, ranks, work, sparse, True)
    passes = 2 * model.itemsize * model.total + 4 * (model.scored if sparse else model.total)
    sent = others(ranks) * work.micro * passes
    memory = own + (2 * model.itemsize + 4) * max(model.layer, 2 * model.largest)
    once = (model.itemsize * k if sparse else 12 * model.total) / ranks if ranks > 1 else 0
    return Cost("shard", memory, sent, once, compute + sent / machine.link(ranks))


def amount(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def duration(seconds: float) -> str:
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{float(f'{value:.2g}'):,g} {unit}"  # 270 ms, and not 2.7e+02 ms


def fits(size: float, machine: Machine) -> str:
    return amount(size) + ("" if size <= machine.memory else " (does not fit)")


def tables() -> None:
    machine, work = Machine(), Work()
    print(
        "| model | ranks | mode | memory | sent a prompt | sent once | s a prompt | answering, s a prompt | sums, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for model in MODELS:
        for ranks in RANKS:
            cost = score(model, JUDGE, ranks, machine, work)
            asked = answering(model, ranks, machine, work, cost.mode == "shard")
            cells = [cost.mode, fits(cost.memory, machine), amount(cost.sent), amount(cost.once)]
            cells += [duration(cost.seconds), duration(asked), duration(cost.more)]
            print(f"| {model.name} | {ranks:,} | {' | '.join(cells)} |")
    print("\n| model | ranks | mask: memory | mask: sent | mask: time |\n|---|---|---|---|---|")
    for model in MODELS:
        for ranks in RANKS:
            cost = mask(model, ranks, machine, work)
            cells = [amount(cost.memory), amount(cost.sent), duration(cost.seconds)]
            print(f"| {model.name} | {ranks:,} | {' | '.join(cells)} |")
    heads = [f"{name}: {what}" for name in ("SET", "SPA") for what in ("mode", "memory", "sent a step", "a step")]
    print(f"\n| model | ranks | {' | '.join(heads)} |\n|---|---|{'---|' * 8}")
    for model in MODELS:
        for ranks in RANKS:
            cells = []
            for sparse in (True, False):
                cost = training(model, ranks, machine, work, sparse)
                cells += [cost.mode, fits(cost.memory, machine), amount(cost.sent), duration(cost.seconds)]
            print(f"| {model.name} | {ranks:,} | {' | '.join(cells)} |")


# ---- measured on this machine

SMALL: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8}
PROMPTS, BATCH = 32, 2


def make(folder: Path) -> Model:
    """A small model and guard in `folder`, prompts and answers of one length; the model's sizes."""
    import torch
    import transformers as t

    sys.path.insert(0, str(Path(__file__).parent))
    from score_memory import TEMPLATE, make_tokenizer

    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 512}
    sizes: dict[str, Any] = {"vocab_size": 4096, "tie_word_embeddings": True, **heads}
    tokenizer = make_tokenizer(4096)
    tokenizer.chat_template = TEMPLATE
    guard: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1}
    for name, own in (("model", SMALL), ("guard", guard)):
        made = t.AutoModelForCausalLM.from_config(t.LlamaConfig(**sizes, **own))
        made.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if name == "model":
            layer = sum(p.numel() for p in made.model.layers[0].parameters())
            embedding = made.get_input_embeddings().weight.numel()
            total = sum(p.numel() for p in made.parameters())
    (folder / "prompts.csv").write_text("goal\n" + "".join(f"tell me about number {n:03}\n" for n in range(PROMPTS)))
    answers = [
        {"prompt": f"tell me about number {n:03}", "answer": f"it is the number {n:03} " * 8} for n in range(PROMPTS)
    ]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    return Model("small", total, total, layer * SMALL["num_hidden_layers"], layer, embedding, 7 * 8, 4)


def worker(folder: Path, parallel: str) -> None:
    """One rank: score, select, and say what it took."""
    from safecrit import distributed
    from safecrit.api.judging import JudgeChoice
    from safecrit.api.score import run_score
    from safecrit.api.scorejob import ScoreJob, ScoreSettings
    from safecrit.relaxation import RelaxationSettings
    from safecrit.scoring import Scorer
    from safecrit.selection import SelectionSettings, select
    from safecrit.sharding import ShardedScorer

    ranks = distributed.start(120)
    fsdp = counter(ranks.world)
    seconds: dict[str, float] = {}
    kind = ShardedScorer if parallel == "shard" else Scorer
    plain = kind.run

    def timed(self: Any, *arguments: Any) -> Any:
        distributed.barrier()
        start = time.perf_counter()
        found = plain(self, *arguments)
        distributed.barrier()
        seconds["score"] = time.perf_counter() - start
        kept = [*self.model.parameters(), *self.estimator.judge_model.model.parameters()]
        local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in kept]
        seconds["held"] = sum(tensor.nbytes for tensor in (*local, *self.stream.accumulators.values()))
        return found

    setattr(kind, "run", timed)  # noqa: B010 - another signature
    link = link_rate(ranks.world)
    job = ScoreJob(
        model=str(folder / "model"),
        judge=JudgeChoice(name=str(folder / "guard")),
        prompts=str(folder / "prompts.csv"),
        answers=str(folder / "answers.jsonl"),
        parallel=parallel,
        scoring=ScoreSettings(batch_size=BATCH, relaxation=RelaxationSettings(draws=1)),
    )
    out = folder / f"{parallel}-{ranks.world}"
    scores = run_score(job, out)
    found: dict[str, Any] = {"memory": seconds.pop("held"), "link": link, "fsdp": fsdp["bytes"]}
    start = time.perf_counter()
    select(scores, SelectionSettings(share="1%")).save(out / "mask.safetensors")
    distributed.barrier()
    seconds["mask"] = time.perf_counter() - start
    found |= {"seconds": seconds, "sent": distributed.sent_bytes()}
    if ranks.first:
        print(json.dumps(found))
    distributed.finish()


def measure(save: bool) -> None:
    cores, rows = len(os.sched_getaffinity(0)), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make(folder)
        judge = Model("guard", 0.45e6, 0.45e6, 0, 28e3, 0.2e6, 0, 4)
        alone = 0.0
        print(
            "| ranks | mode | score: s, predicted | s, measured | sent, predicted | sent, measured | once, predicted | "
            "once, measured | mask: sent, predicted | mask: sent, measured | memory, predicted | memory, measured |"
        )
        print("|---" * 12 + "|")
        for ranks, mode in ((1, "replicate"), (2, "replicate"), (4, "replicate"), (2, "shard"), (4, "shard")):
            found = launch(__file__, ranks, str(folder), mode)
            seconds, sent = found["seconds"]["score"], found["sent"]
            alone = alone or seconds
            work = replace(Work(), batch=BATCH, draws=1, conversations=64)
            small = Machine(memory=0 if mode == "shard" else 1e12, inside=found["link"] or 1)
            cost = score(model, judge, ranks, small, work)
            rounds = -(-PROMPTS // (BATCH * ranks))
            expected = alone / min(ranks, cores) + rounds * BATCH * cost.sent / small.inside
            row = {
                "ranks": ranks,
                "mode": mode,
                "seconds predicted": expected,
                "seconds": seconds,
                "sent predicted": cost.sent * rounds * BATCH,
                "sent": found["fsdp"],
                "once predicted": cost.once,
                "once": sent.get("scores", 0),
                "mask predicted": mask(model, ranks, small, work).sent,
                "mask": sent.get("selection", 0),
                "memory predicted": held(model, judge, ranks, mode == "shard"),
                "memory": found["memory"],
            }
            rows.append(row)
            shown = [duration(row["seconds predicted"]), duration(seconds)]
            shown += [amount(float(value)) for value in list(row.values())[4:]]
            print(f"| {ranks} | {mode} | {' | '.join(shown)} |", flush=True)
    if save:
        from timing import write

        write("scaling", "cpu", rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--save", action="store_true", help="keep what was measured in results/scaling.json")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(Path(given.worker[0]), given.worker[1])
    elif given.measure:
        measure(given.save)
    else:
        tables()


if __name__ == "__main__":
    main()

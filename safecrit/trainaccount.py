"""What training with `set` or `spa` takes: memory by part and phase, disk and work, from sizes alone.

Parts, places and activations are those of scoring's account. Beside them: what an
optimizer holds of each weight, and the loss, whose softmax over the vocabulary is
float32 and often the largest block of a small batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safecrit.account import CUDA_CONTEXT, LIBRARIES, Place
from safecrit.metamodel import ModelShape, activation_bytes

Phase = Literal["load", "loss", "backward", "step", "write"]
PHASES: tuple[Phase, ...] = ("load", "loss", "backward", "step", "write")
TRAIN: tuple[Phase, ...] = ("loss", "backward", "step")
PASSES: tuple[Phase, ...] = ("loss", "backward")
STATE = 16  # bytes of a SET weight: position, float32 master, two moments
# Float32 numbers that an optimizer keeps of each weight; any other counts as Adam.
_MOMENTS = {"sgd": 0, "adafactor": 0, "adamw_bnb_8bit": 0.5, "adamw_8bit": 0.5, "paged_adamw_8bit": 0.5, "lion": 1}


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What a run does. selected: weights in the mask. itemsize: bytes a weight while it is trained.

    rows, tokens: of the micro-batch with the most tokens, padding included. total_tokens: of the whole run, all ranks.
    adapter: weights of a LoRA adapter, 0 without one. largest: weights of the largest tensor with a gradient.
    checkpointed: layers are computed again in the backward pass. saved: bytes of what is written. The account is that
    of one of `ranks`. divided: weights and state are, by FSDP2.
    """

    mode: Literal["set", "spa"]
    selected: int
    itemsize: int
    rows: int
    tokens: int
    total_tokens: int
    largest: int
    optim: str = "adamw_torch"
    adapter: int = 0
    checkpointed: bool = False
    accumulation: int = 1
    cpu: bool = False
    saved: int = 0
    ranks: int = 1
    divided: bool = False


@dataclass(frozen=True)
class TrainPart:
    """A block of memory or disk: bytes, where it lies, the phases in which it is alive."""

    name: str
    bytes: int
    place: Place
    phases: tuple[Phase, ...] = PHASES


def train_parts(shape: ModelShape, plan: TrainPlan) -> list[TrainPart]:
    """The parts of a run, on the host where `plan.cpu`."""
    device: Place = "host" if plan.cpu else "device"
    b, tokens = plan.itemsize, plan.rows * plan.tokens
    # DistributedDataParallel keeps the memory that it sends gradients from.
    passes: tuple[Phase, ...] = TRAIN if plan.ranks > 1 and not plan.divided else ("backward", "step")

    def held(size: float) -> int:
        return -(-int(size) // (plan.ranks if plan.divided else 1))

    parts = [TrainPart("libraries", LIBRARIES, "host")]
    if not plan.cpu:
        parts.append(TrainPart("CUDA context", CUDA_CONTEXT, "device"))
    parts.append(TrainPart("model weights", held(b * shape.parameters), device))
    if plan.mode == "set":
        parts += [
            TrainPart("positions, master and moments", held(STATE * plan.selected), device, TRAIN),
            TrainPart("mask", 8 * plan.selected, "host"),
            # Kept through the next backward pass where gradients add up over several.
            TrainPart(
                "gathered gradients", held(4 * plan.selected), device, TRAIN if plan.accumulation > 1 else ("step",)
            ),
            TrainPart("largest weight gradient", 0 if plan.divided else b * plan.largest, device, ("backward",)),
        ]
    elif plan.adapter:
        parts += [
            TrainPart("adapter, its gradients and state", 16 * plan.adapter, device, TRAIN),
            TrainPart("mask", 8 * plan.selected, "host"),
            TrainPart("largest merged weight", 4 * plan.largest, device, ("write",)),
        ]
    else:
        moments = _MOMENTS.get(plan.optim, 2)
        parts += [
            TrainPart("gradients", held(b * shape.parameters), device, passes),
            TrainPart("optimizer state", held(4 * moments * shape.parameters), device, TRAIN),
            TrainPart("protected values and positions", held((4 + b) * plan.selected), device, TRAIN),
            TrainPart("mask", 8 * plan.selected, "host"),
        ]
    if plan.divided:
        parts.append(TrainPart("two whole layers, a float32 gradient", (2 * b + 4) * shape.group, device, PASSES))
    kept = activation_bytes(shape, plan.rows, plan.tokens, b, checkpointed=plan.checkpointed, weights_require_grad=True)
    parts.append(TrainPart("activations", kept, device, PASSES))
    # Logits, their log-softmax and its gradient; those two are float32.
    parts.append(TrainPart("loss over the vocabulary", tokens * shape.vocabulary * (8 + b), device, ("loss",)))
    parts.append(TrainPart("gradient of the logits", tokens * shape.vocabulary * b, device, ("backward",)))
    parts.append(TrainPart("output files", plan.saved, "disk"))
    return [part for part in parts if part.bytes]


def peak(parts: list[TrainPart], place: Place) -> int:
    """The most bytes that a place holds in any phase."""
    return max(sum(p.bytes for p in parts if p.place == place and phase in p.phases) for phase in PHASES)


def flops(shape: ModelShape, plan: TrainPlan) -> float:
    """FLOPs of the run: 2 active weights a token forward, 4 backward, 2 more where layers are checkpointed."""
    return (8.0 if plan.checkpointed else 6.0) * shape.active * plan.total_tokens

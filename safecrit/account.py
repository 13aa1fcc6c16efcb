"""What scoring a model takes: memory by part and place, disk and work, from sizes alone.

A part is a block of memory with the phases in which it is alive; a place's peak
is its largest sum over the phases. Activations come from `metamodel`, all else is
counted exactly. The same account decides at run time where accumulators live and
whether layers are checkpointed (`decide`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from safecrit.costs import moved
from safecrit.metamodel import ModelShape, activation_bytes, working_bytes

Place = Literal["device", "judge device", "host", "disk"]
Phase = Literal["load", "answer", "score.model", "score.judge"]
Placement = Literal["together", "sequential", "separate"]
Accumulate = Literal["auto", "device", "host", "disk"]
Checkpointed = Literal["auto", "on", "off"]

PHASES: tuple[Phase, ...] = ("load", "answer", "score.model", "score.judge")
ANSWER: tuple[Phase, ...] = ("answer",)
MODEL: tuple[Phase, ...] = ("score.model",)
JUDGE: tuple[Phase, ...] = ("score.judge",)
SCORE: tuple[Phase, ...] = ("score.model", "score.judge")
CHUNK_BUFFERS = 4  # [chunk, V] float32 buffers of the relaxation alive at once: logits, noise, p, dS/dp
LIBRARIES = 600 << 20  # torch and transformers, 520 to 550 MiB on a CPU (measured), and kernels that oneDNN compiles
CUDA_CONTEXT = 700 << 20  # CUDA's context and cuBLAS workspaces; assumed
BF16_FOLD = 10  # bytes an entry of the fold that the cost model was fitted on: a bfloat16 gradient, float32 sums
BYTES_PER_ANSWER_TOKEN = 12  # of samples.jsonl: an id and its text


@dataclass(frozen=True, kw_only=True)
class ScorePlan:
    """What a run of `score` does. Token counts are the longest that occur, the means are for the work alone.

    judge_tokens: of a conversation as the judge reads it, answer included. itemsize: bytes a weight as loaded;
    score_itemsize: as a score is stored. placement: `separate` is a judge on a device of its own, with judge_cpu
    on the host. cpu: the device is the host itself. given_answers: no answers are generated. one_by_one: prompts
    are scored alone, whatever batch_size they are answered in. chunk_bytes: of one buffer of the relaxation.
    sent_bytes: host memory for what lies between the model's turn and the judge's.
    """

    prompts: int
    prompt_tokens: int
    answer_tokens: int
    judge_tokens: int
    mean_prompt_tokens: float
    mean_judge_tokens: float
    batch_size: int = 16
    judge_batch_size: int = 64
    draws: int = 8
    itemsize: int = 2
    judge_itemsize: int = 2
    score_itemsize: int = 4
    placement: Placement = "together"
    accumulate_on: Accumulate = "auto"
    checkpointed: Checkpointed = "auto"
    cpu: bool = False
    judge_cpu: bool = False
    given_answers: bool = False
    one_by_one: bool = False
    chunk_bytes: int = 64 << 20
    sent_bytes: int = 2 << 30

    @property
    def tokens(self) -> int:
        """The longest sequence that the model reads while it is scored."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def answered(self) -> int:
        """Prompts that are answered at once."""
        return max(1, min(self.batch_size, self.prompts))

    @property
    def batch(self) -> int:
        """Prompts that are scored at once."""
        return 1 if self.one_by_one else self.answered

    @property
    def conversations(self) -> int:
        """Conversations before the judge at once."""
        return max(1, min(self.judge_batch_size, self.batch * self.draws))


@dataclass(frozen=True)
class Part:
    """A block of memory or disk: bytes, where it lies, the phases in which it is alive."""

    name: str
    bytes: int
    place: Place
    phases: tuple[Phase, ...] = PHASES


@dataclass(frozen=True)
class Work:
    """One kind of work of the whole run: `flops`, of them `flops32` in float32; bytes read and written; over a link.

    moved: in the device's memory. linked: between host and device (0 on a CPU).
    """

    name: str
    flops: float
    moved: float = 0.0
    linked: float = 0.0
    flops32: float = 0.0


@dataclass(frozen=True)
class Account:
    """The parts of a run under `plan`, whose `auto` settings are decided, and its work."""

    plan: ScorePlan
    parts: tuple[Part, ...]
    work: tuple[Work, ...]

    def in_phase(self, place: Place, phase: Phase) -> int:
        """Bytes in a place during a phase."""
        return sum(part.bytes for part in self.parts if part.place == place and phase in part.phases)

    def peak(self, place: Place) -> int:
        """The most bytes that a place holds in any phase."""
        return max(self.in_phase(place, phase) for phase in PHASES)

    def fits(self, device_bytes: int, host_bytes: int | None = None) -> bool:
        """Whether each device holds its peak in `device_bytes`, and the host its own in `host_bytes` where given.

        With `plan.cpu` everything lies on the host, and `device_bytes` is the host's memory.
        """
        devices = ("host",) if self.plan.cpu else ("device", "judge device")
        if any(self.peak(place) > device_bytes for place in devices):  # type: ignore[arg-type]
            return False
        return host_bytes is None or self.peak("host") <= host_bytes


def score_account(model: ModelShape, judge: ModelShape | None, plan: ScorePlan) -> Account:
    """The account of one plan. `auto` counts as accumulators on the device and no checkpointing; see `decide`."""
    plan = replace(
        plan,
        accumulate_on="device" if plan.accumulate_on == "auto" else plan.accumulate_on,
        checkpointed="off" if plan.checkpointed == "auto" else plan.checkpointed,
    )
    parts = [*_model_parts(model, judge, plan), *_judge_parts(model, judge, plan), *_disk_parts(model, plan)]
    parts = [part for part in parts if part.bytes]
    if plan.cpu:
        parts = [replace(part, place="host") if "device" in part.place else part for part in parts]
    return Account(plan, tuple(parts), tuple(_work(model, judge, plan)))


def divided_account(model: ModelShape, judge: ModelShape | None, account: Account, ranks: int) -> Account:
    """The account of one of `ranks` among which FSDP2 divides model, guard and sums; a classifier stays whole."""
    plan = replace(account.plan, placement="together")
    if account.plan.placement != "together":
        account = score_account(model, judge, plan)
    names = ["model weights", "accumulators", *(["judge weights"] if judge is not None and judge.head else [])]
    parts = []
    for part in account.parts:
        if part.name in names:
            part = replace(part, bytes=-(-part.bytes // ranks))
        if part.name != "largest weight gradient":
            parts.append(part)
    b = plan.itemsize
    place: Place = "host" if plan.cpu else "device"
    parts.append(Part("two whole layers", 2 * b * model.group, place, ("answer", "score.model")))
    parts.append(Part("a layer's float32 gradient", 4 * model.group, place, MODEL))
    if judge is not None and judge.head:
        parts.append(Part("two whole layers of the judge", 2 * plan.judge_itemsize * judge.group, place, JUDGE))
    return Account(plan, tuple(parts), account.work)


def decide(
    model: ModelShape, judge: ModelShape | None, plan: ScorePlan, device_bytes: int, host_bytes: int | None = None
) -> Account:
    """The account with the `auto` settings decided: the first that fits, or the one that needs least.

    Accumulators go to the device, else to the host, else to disk; on each the
    layers are checkpointed only where it would not fit otherwise.
    """
    # On a CPU the host is the device.
    places = ("device", "disk") if plan.cpu else ("device", "host", "disk")
    chosen = places if plan.accumulate_on == "auto" else (plan.accumulate_on,)
    ways = ("off", "on") if plan.checkpointed == "auto" else (plan.checkpointed,)
    account = None
    for place in chosen:
        for way in ways:
            tried = replace(plan, accumulate_on=place, checkpointed=way)  # type: ignore[arg-type]
            account = score_account(model, judge, tried)
            if account.fits(device_bytes, host_bytes):
                return account
    assert account is not None
    return account


def largest_batches(
    model: ModelShape, judge: ModelShape | None, plan: ScorePlan, device_bytes: int, host_bytes: int | None = None
) -> Account | None:
    """The account with the largest batch sizes that fit, found by halving those of `plan`; None where none fits.

    The batch that is halved is the one whose phase is the peak.
    """
    while True:
        account = decide(model, judge, plan, device_bytes, host_bytes)
        if account.fits(device_bytes, host_bytes):
            return account
        places: tuple[Place, ...] = ("host",) if plan.cpu else ("device", "judge device")
        peaks = {phase: max(account.in_phase(place, phase) for place in places) for phase in PHASES}
        at_judge = peaks["score.judge"] == max(peaks.values())
        if plan.judge_batch_size > 1 and (at_judge or plan.batch_size == 1):
            plan = replace(plan, judge_batch_size=plan.conversations // 2 or 1)
        elif plan.batch_size > 1:
            plan = replace(plan, batch_size=plan.answered // 2 or 1)
        else:
            return None


def _model_parts(model: ModelShape, judge: ModelShape | None, plan: ScorePlan) -> Iterator[Part]:
    b, batch, tokens = plan.itemsize, plan.batch, plan.tokens
    apart = plan.placement == "sequential" and judge is not None
    held = MODEL if apart else SCORE  # when judge and model take turns, nothing of the graph waits for the judge
    weights = b * model.parameters
    yield Part("libraries", LIBRARIES, "host")
    if not plan.cpu:
        yield Part("CUDA context", CUDA_CONTEXT, "device")
    yield Part("model weights", weights, "device", ("answer", "score.model") if apart else PHASES)
    if apart:
        yield Part("model weights, the host's copy", weights, "host", PHASES)
    elif not plan.cpu:
        yield Part("weights on their way to the device", weights, "host", ("load",))
    if not plan.given_answers:
        cache = 2 * model.layers * model.kv_heads * model.head_dim * b
        answered = plan.answered
        yield Part("key-value cache", cache * answered * tokens, "device", ANSWER)
        yield Part("logits of a step", answered * model.vocabulary * (b + 4), "device", ANSWER)
        yield Part("reading the prompt", working_bytes(model, answered, plan.prompt_tokens, b), "device", ANSWER)
    place: Place = "device" if plan.accumulate_on == "auto" else plan.accumulate_on
    yield Part("accumulators", 4 * model.eligible, place, SCORE)
    activations = activation_bytes(
        model, batch, tokens, b, checkpointed=plan.checkpointed == "on", weights_require_grad=True
    )
    yield Part("activations", activations, "device", held)
    yield Part("logits and their gradient", batch * plan.answer_tokens * model.vocabulary * b, "device", held)
    yield Part("largest weight gradient", b * model.largest, "device", MODEL)
    if place != "device" and not plan.cpu:
        yield Part("gradient on its way", b * model.largest_part, "host", MODEL)
    chunk = min(plan.chunk_bytes, 4 * plan.answer_tokens * model.vocabulary)
    yield Part("float32 buffers over the vocabulary", CHUNK_BUFFERS * chunk, "device", MODEL if apart else SCORE)


def _judge_parts(model: ModelShape, judge: ModelShape | None, plan: ScorePlan) -> Iterator[Part]:
    if judge is None:
        return
    b, conversations = plan.judge_itemsize, plan.conversations
    place: Place = "device"
    if plan.placement == "separate":
        place = "host" if plan.judge_cpu else "judge device"
    apart = plan.placement == "sequential"
    weights = b * judge.parameters
    yield Part("judge weights", weights, place, JUDGE if apart else PHASES)
    if apart:
        yield Part("judge weights, the host's copy", weights, "host", PHASES)
    if place == "judge device":
        yield Part("CUDA context of the judge's device", CUDA_CONTEXT, place)
    yield Part("judge's embeddings of the model's tokens", 4 * model.vocabulary * judge.embedding, "device", SCORE)
    shifts = plan.batch * _shift_bytes(judge, plan)
    if apart:
        yield Part("relaxed answers", shifts, "device", MODEL)
        yield Part("relaxed answers between turns", _in_turn(judge, plan) * 2 * shifts, "host", SCORE)
    else:
        yield Part("relaxed answers and their gradients", 2 * shifts, "device", SCORE)
    activations = activation_bytes(
        judge,
        conversations,
        plan.judge_tokens,
        b,
        checkpointed=plan.checkpointed == "on",
        weights_require_grad=False,
    )
    yield Part("judge's activations", activations, place, JUDGE)
    inputs = (4 + b) * conversations * plan.judge_tokens * judge.embedding
    yield Part("judge's input, float32 and as it reads it", inputs, place, JUDGE)
    yield Part("judge's logits", conversations * judge.vocabulary * (b + 8), place, JUDGE)


def _shift_bytes(judge: ModelShape, plan: ScorePlan) -> int:
    """One answer's shifts of the judge's embeddings, float32 [draws, m, d], for as many judge tokens as model's."""
    return 4 * plan.draws * plan.answer_tokens * judge.embedding


def _in_turn(judge: ModelShape, plan: ScorePlan) -> int:
    """Batches that the model hands to the judge in one turn: those whose shifts and gradients fit `sent_bytes`."""
    each = 2 * plan.batch * _shift_bytes(judge, plan)
    return max(1, min(plan.sent_bytes // each, -(-plan.prompts // plan.batch)))


def _disk_parts(model: ModelShape, plan: ScorePlan) -> Iterator[Part]:
    yield Part("score files", plan.score_itemsize * model.eligible, "disk", PHASES)
    yield Part("state of an interrupted run", 4 * model.eligible, "disk", PHASES)
    yield Part("samples.jsonl", plan.prompts * plan.tokens * BYTES_PER_ANSWER_TOKEN, "disk", PHASES)


def _work(model: ModelShape, judge: ModelShape | None, plan: ScorePlan) -> Iterator[Work]:
    """The run's work. Passes cost 2 active weights a token, backward passes as much again for each kind of gradient."""
    prompts, batches = plan.prompts, -(-plan.prompts // plan.batch)
    answer, mean = plan.answer_tokens, plan.mean_prompt_tokens + plan.answer_tokens
    again = 1 if plan.checkpointed == "on" else 0
    forward = prompts * _forward(model, mean, answer)
    link = 0.0 if plan.cpu else 1.0
    if not plan.given_answers:
        yield Work("reading prompts", prompts * _forward(model, plan.mean_prompt_tokens, 1))
        read = plan.itemsize * min(model.parameters, plan.answered * model.active)
        cache = 2 * model.layers * model.kv_heads * model.head_dim * plan.itemsize * plan.answered * mean
        steps = -(-prompts // plan.answered) * answer
        yield Work("writing answers", prompts * answer * 2.0 * model.active, steps * (read + cache))
    apart = plan.placement == "sequential" and judge is not None
    yield Work("model, forward and backward", forward * (3 + again + apart))
    sums = batches * model.eligible
    folded = (plan.itemsize + 8.0) * (sums if not plan.cpu else moved("esi_accumulate_", sums) / BF16_FOLD)
    there = plan.accumulate_on in ("auto", "device")
    moved_off = 0.0 if there else link * batches * model.eligible * plan.itemsize
    yield Work("folding gradients into scores", 0.0, folded, moved_off)
    if judge is None:
        return
    conversations = prompts * plan.draws
    yield Work("judge, forward and backward", conversations * _forward(judge, plan.mean_judge_tokens, 1) * (2 + again))
    # Either way: logits, noise and softmax at about ten float32 reads or writes an entry, and a product with P E.
    entries = 2.0 * conversations * answer * model.vocabulary
    yield Work("relaxation", 0.0, 40.0 * entries, flops32=entries * 2 * judge.embedding)
    if apart:
        resident = plan.itemsize * model.parameters + plan.judge_itemsize * judge.parameters
        turns = -(-batches // _in_turn(judge, plan))
        yield Work("taking turns on the device", 0.0, linked=link * turns * resident)


def _forward(shape: ModelShape, tokens: float, positions: float) -> float:
    """FLOPs of one sequence's forward pass with logits at `positions` of its tokens."""
    attention = 4.0 * shape.layers * shape.heads * shape.head_dim * tokens * tokens
    return 2.0 * (shape.active - shape.head) * tokens + 2.0 * shape.head * positions + attention

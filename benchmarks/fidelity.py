"""How near scores come to the exact sigma x dS/dtheta, on a toy whose answers can be enumerated (see enumerable.py).

Every estimate runs through the product's own estimators, judge, gradient stream and
selection. `cosine` is that of the signed scores of all eligible weights, `IoU` that of
the masks of the top 1 %, which by chance alone is about 0.005. Each seed has a model, a
guard, answers and noise of its own.

Costs are counted a prompt: `answers` generated, `model` forward and backward passes,
`judge` passes forward only and with a backward to the embeddings. `units` adds them up
as forward passes of equally large models: 1 an answer, 3 a model pass, 1 and 2 a judge pass.

The setting `trained` and the 1 % were fixed before the first estimate was made; the other
settings were added after it, to see what its figures depend on:

    trained    model and guard as enumerable.py describes them, 300 steps each
    soft       the guard has only 80 steps: less sure, a few per cent wrong
    confident  the model's language has half the temperature: fewer likely answers
    blended    the guard also learns blends of two answers with a label in between
    prob       s is p(safe) instead of the log-odds
    long       answers of four letters, out of 4
    random     random weights in both

Answers of two or four tokens favour `score-function`: its noise grows with an answer's length.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from enumerable import Toy, World
from timing import RESULTS, _commit, machine
from torch import Tensor

from safecrit.estimators import Item, Judged, LikelihoodEstimator, RelaxedEstimator, advantages
from safecrit.maskfile import Mask
from safecrit.relaxation import Kind, RelaxationSettings
from safecrit.scoring import forward_logits
from safecrit.selection import SelectionSettings, select_from

Scores = dict[str, Tensor]
SHARE = "1%"
SETTINGS = {
    "trained": Toy(),
    "soft": Toy(judge_steps=80),
    "confident": Toy(sharpness=2.0),
    "blended": Toy(blended=True),
    "prob": Toy(objective="prob"),
    "long": Toy(letters=4, length=4),
    "random": Toy(model_steps=0, judge_steps=0),
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to estimate: `run` takes a world and a seed; costs are passes a prompt."""

    name: str
    run: Callable[[World, int], Scores]
    answers: int
    model: int
    judge_forward: int = 0
    judge_backward: int = 0

    @property
    def units(self) -> int:
        """Forward passes of equally large models."""
        return self.answers + 3 * self.model + self.judge_forward + 2 * self.judge_backward


@dataclass(kw_only=True)
class Row:
    """What one method reached in one setting, a number a seed."""

    setting: str
    method: Method
    cosine: list[float] = field(default_factory=list)
    iou: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        cost = {key: value for key, value in dataclasses.asdict(self.method).items() if key not in ("name", "run")}
        found = {"setting": self.setting, "method": self.method.name, "cosine": self.cosine, "iou": self.iou}
        return found | cost | {"units": self.method.units}


def estimator(world: World, relaxation: RelaxationSettings) -> RelaxedEstimator:
    """The product's estimator around a world's models."""
    return RelaxedEstimator(world.model, world.loaded.tokenizer, world.judge, relaxation)


def relaxed(kind: Kind = "gumbel", tau: float = 0.3, draws: int = 8, samples: int = 0) -> Method:
    """Relaxed answers, as `safecrit score` does it: around the greedy answer, or around `samples` sampled ones."""

    def run(world: World, seed: int) -> Scores:
        settings = RelaxationSettings(kind=kind, tau=tau, draws=draws, seed=seed)
        items = world.sampled(samples, seed) if samples else world.greedy
        if samples > 1:  # the noise hangs on the prompt's hash; every answer gets noise of its own
            items = [dataclasses.replace(item, hash=f"{item.hash}/{item.sample}") for item in items]
        return world.scores(estimator(world, settings), items)

    drawn = "" if kind == "softmax" else f", {draws} draw{'s' * (draws > 1)}"
    around = f", {samples} sampled answer{'s' * (samples > 1)}" if samples else ""
    each = max(1, samples)
    passes = each * (1 if kind == "softmax" else draws)
    return Method(name=f"{kind} tau {tau:g}{drawn}{around}", run=run, answers=each, model=each, judge_backward=passes)


def score_function(samples: int) -> Method:
    """`--objective score-function`: sampled answers, leave-one-out baseline."""

    def run(world: World, seed: int) -> Scores:
        items = world.sampled(samples, seed)
        weights = advantages(_grid([world.value_of(item) for item in items], samples))
        return world.scores(LikelihoodEstimator(), _weighted(items, weights, samples))

    return Method(
        name=f"score-function, {samples} samples", run=run, answers=samples, model=samples, judge_forward=samples
    )


class ControlledEstimator(LikelihoodEstimator):
    """The score function with the relaxed judge's slopes as a control variate.

    slopes [prompts, T, V]: c_t(v), what the judge's gradient around the greedy answer says of token v at
    position t. With the residual r in an item's weight (see `controlled`),

        ds/dL_t = r (onehot(y_t) - p_t) + p_t (c_t - p_t . c_t)

    The last term is the expectation of what r leaves out, so the slopes change the noise, not the mean
    (but for their factor beta, which `controlled` fits on the same samples).
    """

    def __init__(self, slopes: Tensor) -> None:
        self.slopes = slopes

    def backward(self, item: Item, logits: Tensor, judged: Judged, out: Tensor) -> float:
        """Write d s / d logits to `out`; returns its norm."""
        p, slopes = logits.softmax(-1), self.slopes[item.row]
        known = p * (slopes - (p * slopes).sum(-1, keepdim=True))
        super().backward(item, logits, judged, out)
        out += known
        return float(out.norm())


def controlled(samples: int, tau: float = 1.0, draws: int = 8) -> Method:
    """A trial, not in the product: score function with relaxed slopes (compare REBAR, arXiv 1703.07370)."""

    def run(world: World, seed: int) -> Scores:
        source = estimator(world, RelaxationSettings(tau=tau, draws=draws, seed=seed))
        judged = source.judge(world.greedy, source.forward(world.greedy, _rows(world, world.greedy)))
        slopes = torch.stack([one.grads.mean(0) for one in judged if one.grads is not None]) @ source.bridged.T
        items = world.sampled(samples, seed)
        s, u = [], []
        for item, logits in zip(items, _rows(world, items), strict=True):
            p, c = logits.softmax(-1), slopes[item.row]
            u.append(float((c[range(len(c)), list(item.answer_ids)] - (p * c).sum(-1)).sum()))
            s.append(world.value_of(item))
        value, slope = (torch.tensor(numbers, dtype=torch.float64).view(-1, samples) for numbers in (s, u))
        beta = float((slope * (value - value.mean(1, keepdim=True))).sum() / (slope * slope).sum())
        weights = advantages((value - beta * slope).tolist())
        return world.scores(ControlledEstimator(beta * slopes), _weighted(items, weights, samples))

    name = f"controlled tau {tau:g}, {draws} draws, {samples} samples"
    return Method(name=name, run=run, answers=samples + 1, model=samples, judge_forward=samples, judge_backward=draws)


def _rows(world: World, items: list[Item]) -> list[Tensor]:
    with torch.no_grad():
        logits, where = forward_logits(world.model, items)
    return [logits[row, span] for row, span in where]


def _grid(values: list[float], samples: int) -> list[list[float | None]]:
    return [list(values[start : start + samples]) for start in range(0, len(values), samples)]


def _weighted(items: list[Item], weights: list[list[float]], samples: int) -> list[Item]:
    """`items` with their weights, such that the mean over items is a mean over prompts."""
    flat = [weight * samples for own in weights for weight in own]
    return [dataclasses.replace(item, weight=weight) for item, weight in zip(items, flat, strict=True)]


def mask_of(world: World, scores: Scores) -> Mask:
    """The product's selection of the top 1 %."""
    settings = SelectionSettings(share=SHARE)
    return select_from(scores, settings, layouts=world.anatomy.layouts, total=world.anatomy.total)


def agreement(world: World, scores: Scores, truth: Scores) -> tuple[float, float]:
    """Cosine of signed scores and IoU of the masks."""
    a, b = (torch.cat([found[name].flatten().double() for name in sorted(truth)]) for found in (scores, truth))
    one, other = (mask_of(world, found).indices for found in (scores, truth))
    shared = sum(int(torch.isin(one[name], other[name]).sum()) for name in one.keys() & other.keys())
    count = sum(len(flat) for flat in one.values())
    return float(a @ b / (a.norm() * b.norm())), shared / (2 * count - shared)


def chance(world: World) -> float:
    """The IoU of two random masks of that size."""
    k = world.anatomy.total // 100
    return k / (2 * world.anatomy.eligible_total - k)


def methods(setting: str) -> Iterator[Method]:
    """The rows of a setting; all of them in `trained`."""
    yield relaxed()
    yield relaxed(tau=0.5)
    yield relaxed(tau=1.0)
    yield relaxed(tau=1.0, draws=2, samples=4)
    yield score_function(4)
    yield score_function(8)
    yield controlled(8)
    if setting != "trained":
        return
    kinds: tuple[Kind, ...] = ("gumbel", "gumbel-conditional")
    for kind in kinds:
        for draws in (1, 2, 4, 8, 16):
            if (kind, draws) != ("gumbel", 8):
                yield relaxed(kind, draws=draws)
    for tau in (0.1, 2.0):
        yield relaxed(tau=tau)
    yield relaxed("gumbel-conditional", tau=1.0)
    for tau in (0.3, 1.0):
        yield relaxed("softmax", tau=tau)
        yield relaxed(tau=tau, draws=16) if tau == 1.0 else relaxed(tau=tau, samples=1)
        yield relaxed(tau=tau, draws=128)
    yield relaxed(draws=1, samples=8)
    yield relaxed("gumbel-conditional", draws=1, samples=8)
    yield relaxed("gumbel-conditional", tau=1.0, draws=2, samples=4)
    yield score_function(16)
    yield controlled(4)
    yield controlled(8, tau=0.3)


def measure(setting: str, seed: int) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """Cosine and IoU of every method in one world, and what the world looks like."""
    torch.set_num_threads(1)  # small tensors gain nothing from more, and their sums would differ
    world = World(seed, SETTINGS[setting])
    truth = world.exact()
    found = [agreement(world, method.run(world, seed), truth) for method in methods(setting)]
    return found, world.summary() | {"iou_by_chance": chance(world)}


def spread(values: list[float]) -> str:
    """Mean, and smallest to largest."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def report(rows: list[Row], worlds: list[dict[str, float]]) -> None:
    """Print a setting's table."""
    about = ", ".join(f"{key} {statistics.mean(world[key] for world in worlds):.3g}" for key in worlds[0])
    print(f"\n{rows[0].setting}: {about}")
    print(f"{'':54}{'cosine':>20}{'IoU':>20}{'answers':>9}{'model':>7}{'judge':>9}{'units':>7}")
    for row in rows:
        m = row.method
        print(
            f"{m.name:54}{spread(row.cosine):>20}{spread(row.iou):>20}{m.answers:9}{m.model:7}"
            f"{f'{m.judge_forward}+{m.judge_backward}':>9}{m.units:7}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="worlds measured at a time, one thread each")
    parser.add_argument("--setting", choices=list(SETTINGS), action="append", help="default: all")
    parser.add_argument("--save", action="store_true", help="write results/fidelity.json")
    options = parser.parse_args()
    begun, stored, chosen = time.perf_counter(), [], options.setting or list(SETTINGS)
    print(f"64 prompts, 256 answers each, {options.seeds} seeds; mean (smallest-largest)")
    work = [(setting, seed) for setting in chosen for seed in range(options.seeds)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        results = pool.starmap(measure, work, chunksize=1)
    for setting in chosen:
        own = [result for place, result in zip(work, results, strict=True) if place[0] == setting]
        rows = [Row(setting=setting, method=method) for method in methods(setting)]
        for n, row in enumerate(rows):
            row.cosine, row.iou = [found[n][0] for found, _ in own], [found[n][1] for found, _ in own]
        worlds = [world for _, world in own]
        report(rows, worlds)
        found = {"setting": setting, "toy": dataclasses.asdict(SETTINGS[setting]), "worlds": worlds}
        stored.append(found | {"rows": [row.to_json() for row in rows]})
    if options.save:
        save("fidelity", {"share": SHARE, "seeds": options.seeds, "settings": stored}, time.perf_counter() - begun)


def save(benchmark: str, found: dict[str, Any], seconds: float) -> None:
    """Write a result to results/ with machine, versions, commit and date."""
    value = found | {
        "benchmark": benchmark,
        "machine": machine("cpu"),
        "seconds": round(seconds, 1),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }
    path = RESULTS / f"{benchmark}.json"
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()

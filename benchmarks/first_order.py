"""Do stored scores predict what a change of the weights does? On the toy whose answers can be enumerated.

The weights of the top 1 % mask (the product's default scores and selection) are shifted by
N(0, (r sigma)^2), again and again, and restored. Predicted: sum of score / sigma x shift, from
the stored signed scores alone. Measured, each as the change of a mean over the 64 prompts:

    relaxed     s of the relaxed answers, same noise and answers: what was differentiated
    exact       S itself, all answers enumerated
    plain       sampled answers to the unchanged model, weighted by p_theta(y) / p_theta0(y)
    normalised  the same, the weights of a prompt's answers divided by their sum
    greedy      s of the answers generated anew

The correlation (Pearson) is over the perturbations, with its 95 % interval by Fisher's z.
`slope` is that of measured on predicted change. The rows `by exact` predict from the exact
dS/dtheta on the same mask and shifts: what is missing there is not first order.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from enumerable import Toy, World
from fidelity import _rows, estimator, mask_of, save
from torch import Tensor

from safecrit.maskfile import Mask
from safecrit.relaxation import RelaxationSettings

RADII = (0.01, 0.1, 0.38)
TOYS = {"trained": Toy(), "larger": Toy(hidden=128, intermediate=256, layers=4)}
MEASURES = ("relaxed", "exact", "plain", "normalised", "greedy")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One correlation over `n` perturbations, in [-1, 1], with its interval; None where nothing changed."""

    toy: str
    seed: int
    predicted_by: str
    measured: str
    r: float
    n: int
    correlation: float | None
    low: float | None
    high: float | None
    slope: float | None


class Measured:
    """The quantities of a world, at whatever weights its model has."""

    def __init__(self, world: World, relaxation: RelaxationSettings, samples: int) -> None:
        self.world, self.estimator = world, estimator(world, relaxation)
        self.items = world.sampled(samples)
        self.values = torch.tensor([world.value_of(item) for item in self.items], dtype=torch.float64)
        self.samples = samples
        self.before = self._likelihoods()

    def _likelihoods(self) -> Tensor:
        with torch.no_grad():
            log_p = self.world.log_p()
        return torch.stack([log_p[item.row, self.world.place(item)] for item in self.items])

    def __call__(self) -> dict[str, float]:
        """Every one of MEASURES."""
        world = self.world
        judged = self.estimator.judge(world.greedy, self.estimator.forward(world.greedy, _rows(world, world.greedy)))
        ratio = torch.exp(self._likelihoods() - self.before)
        own, each = (ratio * self.values).view(-1, self.samples), ratio.view(-1, self.samples)
        greedy = world.answered(0, 0)
        return {
            "relaxed": sum(one.s for one in judged) / len(judged),
            "exact": world.expected(),
            "plain": float(own.mean()),
            "normalised": float((own.sum(1) / each.sum(1)).mean()),
            "greedy": sum(world.value_of(item) for item in greedy) / len(greedy),
        }


@contextmanager
def shifted(world: World, shifts: dict[str, Tensor], mask: Mask) -> Iterator[None]:
    """The masked weights changed by `shifts` (float32, in the order of the mask's indices), then as they were."""
    parameters = dict(world.model.named_parameters())
    views = {
        entry.name: entry.source.of(parameters[entry.parameter].detach()).view(-1)
        for entry in world.anatomy.eligible
        if entry.name in shifts
    }
    kept = {name: view[mask.indices[name]] for name, view in views.items()}
    for name, view in views.items():
        view[mask.indices[name]] += shifts[name]
    try:
        yield
    finally:
        for name, view in views.items():
            view[mask.indices[name]] = kept[name]


def measure(
    world: World, toy: str, seed: int, perturbations: int, samples: int, radii: Sequence[float] = RADII
) -> list[Result]:
    """All correlations in one world, which is named by `toy` and `seed`."""
    relaxation = RelaxationSettings(seed=seed)
    scores = {name: found.clone() for name, found in world.scores(estimator(world, relaxation), world.greedy).items()}
    sources = {"score": scores, "exact": world.exact()}
    mask, sigma = mask_of(world, scores), world.sigma()
    measured = Measured(world, relaxation, samples)
    start = measured()
    chance = torch.Generator().manual_seed(seed)
    results = []
    for r in radii:
        predicted: dict[str, list[float]] = {source: [] for source in sources}
        changes: dict[str, list[float]] = {name: [] for name in MEASURES}
        for _ in range(perturbations):
            shifts = {
                name: torch.randn(len(flat), generator=chance) * (r * sigma[name])
                for name, flat in mask.indices.items()
                if len(flat)
            }
            for source, own in sources.items():
                total = sum(
                    float((own[name].view(-1)[mask.indices[name]].double() * shift.double()).sum()) / sigma[name]
                    for name, shift in shifts.items()
                )
                predicted[source].append(total)
            with shifted(world, shifts, mask):
                after = measured()
            for name in MEASURES:
                changes[name].append(after[name] - start[name])
        for source in sources:
            for name in MEASURES:
                found = correlation(predicted[source], changes[name])
                about = {"toy": toy, "seed": seed, "predicted_by": source, "measured": name, "r": r}
                results.append(Result(**about, n=perturbations, **found))  # type: ignore[arg-type]
    return results


def correlation(predicted: list[float], measured: list[float]) -> dict[str, float | None]:
    """Pearson's correlation, its 95 % interval by Fisher's z, and the slope of measured on predicted."""
    x, y = torch.tensor(predicted, dtype=torch.float64), torch.tensor(measured, dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    if not bool((y != 0).any()):
        return {"correlation": None, "low": None, "high": None, "slope": None}
    value = max(-1.0, min(1.0, float(x @ y / (x.norm() * y.norm()))))
    z, arm = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, value))), 1.96 / math.sqrt(len(x) - 3)
    slope = float(x @ y / (x @ x))
    return {"correlation": value, "low": math.tanh(z - arm), "high": math.tanh(z + arm), "slope": slope}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--perturbations", type=int, default=50)
    parser.add_argument("--samples", type=int, default=16, help="sampled answers a prompt")
    parser.add_argument("--toy", choices=list(TOYS), action="append", help="default: all")
    parser.add_argument("--save", action="store_true", help="write results/first_order.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in fidelity.py
    begun, results = time.perf_counter(), []
    print(f"{'':44}" + "".join(f"{f'{r:g} sigma':>32}" for r in RADII))
    print(f"{'':44}" + f"{'correlation [95 %]':>25}{'slope':>7}" * len(RADII))
    for toy in options.toy or TOYS:
        for seed in range(options.seeds if toy == "trained" else 1):
            found = measure(World(seed, TOYS[toy]), toy, seed, options.perturbations, options.samples)
            results += found
            for source in ("score", "exact"):
                for name in MEASURES:
                    own = [one for one in found if (one.predicted_by, one.measured) == (source, name)]
                    print(f"{f'{toy}, seed {seed}, {name} by {source}':44}" + "".join(map(cell, own)))
    if options.save:
        stored: dict[str, Any] = {"toys": {name: asdict(toy) for name, toy in TOYS.items()}}
        stored |= {"samples": options.samples, "share": "1%", "rows": [asdict(one) for one in results]}
        save("first_order", stored, time.perf_counter() - begun)


def cell(one: Result) -> str:
    """A correlation with interval and slope, for the table."""
    if one.correlation is None:
        return f"{'no change':>32}"
    return f"{f'{one.correlation:.4f} [{one.low:.3f}, {one.high:.3f}]':>25}{one.slope:7.2f}"


if __name__ == "__main__":
    main()

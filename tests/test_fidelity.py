from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from safecrit.estimators import Item, LikelihoodEstimator

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MODULES = ("timing", "enumerable", "fidelity", "first_order")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The benchmark `first_order`, whose imports hold the others; the modules are forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import first_order

        yield first_order
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def fidelity(bench: Any) -> Any:
    return sys.modules["fidelity"]


@pytest.fixture(scope="module")
def world(bench: Any) -> Any:
    small = {"hidden": 32, "intermediate": 64, "layers": 1, "model_steps": 100, "judge_steps": 60, "batch": 128}
    return bench.World(0, bench.Toy(letters=4, **small))


def flat(scores: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([scores[name].flatten().double() for name in sorted(scores)])


def test_the_truth_is_the_products_likelihood_gradient_over_all_answers(world: Any) -> None:
    with torch.no_grad():
        weights = world.log_p().exp() * world.values
    assert float(world.log_p().detach().exp().sum(1).sub(1).abs().max()) < 1e-6
    items: list[Item] = []
    for item in world.greedy:
        for n, letters in enumerate(world.answers.tolist()):
            whole = dataclasses.replace(item, answer_ids=tuple(letters), sample=n)
            assert world.place(whole) == n
            items.append(dataclasses.replace(whole, weight=float(weights[item.row, n]) * len(world.answers)))
    found, truth = flat(world.scores(LikelihoodEstimator(), items)), flat(world.exact())
    assert float((found - truth).norm() / truth.norm()) <= 1e-4


def test_default_scores_are_far_above_chance_and_more_draws_help(world: Any, fidelity: Any) -> None:
    truth = world.exact()
    one, default = (fidelity.agreement(world, fidelity.relaxed(draws=d).run(world, 0), truth) for d in (1, 8))
    assert default[0] >= 0.6 and default[1] >= 20 * fidelity.chance(world)
    assert default[0] > one[0]


def test_the_control_variate_changes_no_mean(world: Any, fidelity: Any) -> None:
    truth = flat(world.exact())
    runs = [flat(fidelity.controlled(4).run(world, seed)) for seed in range(6)]
    along = torch.stack([run @ truth / (truth @ truth) for run in runs])
    assert float((along.mean() - 1).abs()) <= 4 * float(along.std()) / len(runs) ** 0.5
    assert float(torch.cosine_similarity(torch.stack(runs).mean(0), truth, dim=0)) >= 0.95


def test_scores_predict_the_relaxed_verdict_of_small_shifts(bench: Any, world: Any) -> None:
    found = bench.measure(world, "small", 0, perturbations=10, samples=2, radii=(0.01,))
    by = {(one.predicted_by, one.measured, one.r): one for one in found}
    for source, measured in (("score", "relaxed"), ("exact", "exact")):
        one = by[source, measured, 0.01]
        assert one.correlation >= 0.99 and one.slope == pytest.approx(1, abs=0.1)
    assert by["score", "exact", 0.01].correlation < by["exact", "exact", 0.01].correlation


def test_shifts_are_taken_back_bit_for_bit(bench: Any, fidelity: Any, world: Any) -> None:
    before = {name: p.detach().clone() for name, p in world.model.named_parameters()}
    mask = fidelity.mask_of(world, world.exact())
    shifts = {name: torch.ones(len(indices)) for name, indices in mask.indices.items() if len(indices)}
    with bench.shifted(world, shifts, mask):
        changed = sum(int((p.detach() != before[name]).sum()) for name, p in world.model.named_parameters())
    assert changed == mask.count
    assert all(torch.equal(p.detach(), before[name]) for name, p in world.model.named_parameters())

"""MaskedAdamW beside torch.optim.AdamW, whose state it shares."""

from __future__ import annotations

import copy

import torch

from safecrit.masked import MaskedAdamW
from tests.architectures import build
from tests.training_helpers import backward

SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}


def distance(model: torch.nn.Module, twin: torch.nn.Module) -> float:
    ours, theirs = (torch.cat([p.detach().reshape(-1) for p in m.parameters()]) for m in (model, twin))
    return float((ours - theirs).norm() / theirs.norm())


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for step in range(count):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def test_it_is_adamw_where_nothing_is_frozen() -> None:
    model, twin = build("mixtral"), build("mixtral")
    steps(model, MaskedAdamW(model.parameters(), **SETTINGS), 20)
    steps(twin, torch.optim.AdamW(twin.parameters(), **SETTINGS), 20)
    assert distance(model, twin) < 1e-6


def test_parameter_groups_schedulers_and_closures_work() -> None:
    model, twin = build("llama"), build("llama")
    for m, kind in ((model, MaskedAdamW), (twin, torch.optim.AdamW)):
        matrices = [p for p in m.parameters() if p.ndim > 1]
        others = [p for p in m.parameters() if p.ndim < 2]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        optimizer = kind(groups, **SETTINGS)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        for step in range(10):
            assert optimizer.step(lambda: (backward(m, step), 3.0)[1]) == 3.0  # noqa: B023
            optimizer.zero_grad()
            schedule.step()
    assert distance(model, twin) < 1e-6


def test_state_is_torchs() -> None:
    model, twin = build("llama"), build("llama")
    first = torch.optim.AdamW(model.parameters(), **SETTINGS)
    steps(model, first, 3)
    steps(twin, torch.optim.AdamW(twin.parameters(), **SETTINGS), 3)
    saved = copy.deepcopy(first.state_dict())  # loading shares the tensors
    ours = MaskedAdamW(model.parameters(), **SETTINGS)
    ours.load_state_dict(first.state_dict())
    back = torch.optim.AdamW(twin.parameters(), **SETTINGS)
    steps(model, ours, 3)
    back.load_state_dict(saved)
    steps(twin, back, 3)
    assert distance(model, twin) < 1e-6


def test_frozen_entries_and_their_moments_stay_until_thawed() -> None:
    weight = torch.nn.Parameter(torch.randn(1001))
    optimizer, chosen = MaskedAdamW([weight], **SETTINGS), torch.tensor([0, 7, 8, 63, 64, 1000])
    optimizer.freeze(weight, chosen.to(torch.int32))
    before = weight.detach().clone()
    free = torch.ones(1001, dtype=torch.bool)
    free[chosen] = False
    for _ in range(3):
        weight.grad = torch.randn(1001)
        optimizer.step()
    assert torch.equal(weight.detach()[chosen], before[chosen]) and (weight.detach() != before)[free].all()
    assert not optimizer.state[weight]["exp_avg"][chosen].any()
    optimizer.thaw()
    optimizer.step()
    assert (weight.detach() != before).all()

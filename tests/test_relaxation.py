from __future__ import annotations

import dataclasses

import pytest
import torch

from safecrit import relaxation
from safecrit.relaxation import RelaxationSettings, Relaxed, chunks, conditional_gumbel


def made(kind: str = "gumbel", tau: float = 0.5, tokens: int = 5, vocabulary: int = 23) -> Relaxed:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    live = torch.ones(vocabulary, dtype=torch.bool)
    live[[0, 7]] = False
    bridged = normal(vocabulary, 4)
    bridged[~live] = 0
    return Relaxed(
        logits=normal(tokens, vocabulary) * 3,
        ids=torch.tensor([3, 1, 7, 22, 9][:tokens]),
        live=live,
        bridged=bridged,
        weights=torch.rand(6, tokens, generator=generator, dtype=torch.float64),
        prompt="p",
        settings=RelaxationSettings(kind=kind, tau=tau, draws=3, seed=1),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("kind", ["gumbel", "softmax"])
def test_written_out_backward_equals_autograd(kind: str) -> None:
    one = made(kind)
    grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    logits = one.logits.clone().requires_grad_(True)
    traced = dataclasses.replace(one, logits=logits)
    grads = [grad, -2 * grad]
    sum((traced.shift(draw) * each).sum() / 2 for draw, each in enumerate(grads)).backward()
    out = torch.zeros_like(one.logits)
    norm = one.backward(grads, out)
    assert norm == pytest.approx(float(out.norm()))
    torch.testing.assert_close(out, logits.grad, rtol=1e-12, atol=1e-14)
    assert (out[:, ~one.live] == 0).all()


def test_conditional_noise_is_constant_at_the_point_it_was_drawn() -> None:
    one = made("gumbel-conditional")
    p = one.probabilities(slice(0, 5), one.noise(0))
    grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    out = torch.zeros_like(one.logits)
    one.backward([grad], out)
    logits = one.logits.masked_fill(~one.live, -torch.inf)
    sums = torch.log(p) * one.settings.tau
    free = logits.clone().requires_grad_(True)
    noise = torch.where(one.live, sums - logits, torch.zeros_like(sums))
    q = torch.softmax((free + noise) / one.settings.tau, -1)
    ((one.weights @ (q @ one.bridged)) * grad).sum().backward()
    torch.testing.assert_close(out, torch.nan_to_num(free.grad), rtol=1e-9, atol=1e-12)


def test_chunks_do_not_change_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    one = made()
    whole = one.shift(2)
    monkeypatch.setattr(relaxation, "CHUNK_BYTES", 4 * 23 * 2)
    torch.testing.assert_close(one.shift(2), whole, rtol=1e-14, atol=1e-14)
    assert len(chunks(one.logits)) == 3


def test_draws_and_prompts_have_their_own_noise() -> None:
    one, other = made(), dataclasses.replace(made(), prompt="q")

    def drawn(relaxed: Relaxed, draw: int) -> torch.Tensor:
        return relaxed.probabilities(slice(0, 5), relaxed.noise(draw))

    assert torch.equal(drawn(one, 0), drawn(one, 0))
    assert not torch.equal(drawn(one, 0), drawn(one, 1))
    assert not torch.equal(drawn(one, 0), drawn(other, 0))


def test_a_sharp_relaxation_of_certain_logits_changes_nothing() -> None:
    one = made("softmax", tau=0.01)
    logits = torch.full_like(one.logits, -50.0)
    ids = torch.tensor([3, 1, 2, 22, 9])
    logits[torch.arange(5), ids] = 50.0
    sure = dataclasses.replace(one, logits=logits, ids=ids)
    assert float(sure.shift(0).abs().max()) < 1e-12


@pytest.mark.parametrize("kind", ["gumbel", "gumbel-conditional", "softmax"])
@pytest.mark.parametrize("offset", [-1000.0, 500.0])
def test_an_offset_of_all_logits_changes_nothing(kind: str, offset: float) -> None:
    one = made(kind)
    moved = dataclasses.replace(one, logits=one.logits + offset)
    torch.testing.assert_close(moved.shift(0), one.shift(0), rtol=1e-9, atol=1e-11)


def test_conditional_gumbel_follows_the_truncated_distribution() -> None:
    """The winner always wins, and the runner-up is distributed as in noise that happens to make it win."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, -1.0, 1.5, 0.0], dtype=torch.float64).expand(40_000, 4)

    def gumbel() -> torch.Tensor:
        return -torch.log(-torch.log(torch.rand(40_000, 4, generator=generator, dtype=torch.float64)))

    sums = conditional_gumbel(logits, torch.full((40_000,), 0), gumbel()) + torch.logsumexp(logits, 1, keepdim=True)
    assert (sums.argmax(1) == 0).all()
    free = logits + gumbel()
    won = free[free.argmax(1) == 0]
    for column in range(4):
        error = (won[:, column].std() / len(won) ** 0.5) * 5
        assert abs(float(sums[:, column].mean() - won[:, column].mean())) < error

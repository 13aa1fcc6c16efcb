"""Logits to relaxed tokens: where the gradient leaves the judge and enters the model.

p = softmax((L + g) / tau) replaces each answer token by a mixture (docs/method.md,
section 2, steps 3 and 4). The mixture shifts the judge's embedding of the real text, so
the value depends on the weights and yet equals the judge's own reading when p is the
token itself:

    e_j = E[y_j] + sum_t A[j,t] (p_t - onehot(y_t)) P E

Forward and backward are written out, so that only one chunk of positions times
the vocabulary is ever held in float32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["gumbel", "gumbel-conditional", "softmax"]
CHUNK_BYTES = 64 << 20  # of one [chunk, V] buffer; a few of them are alive at once


@dataclass(frozen=True, kw_only=True)
class RelaxationSettings:
    """How logits become relaxed tokens.

    `kind`: `gumbel` adds independent noise (the paper's choice), `gumbel-conditional`
    draws the noise given that the answer's own token wins, `softmax` adds none.
    `tau`: temperature. `draws`: independent draws whose gradients are averaged.
    """

    kind: Kind = "gumbel"
    tau: float = 0.3
    draws: int = 8
    seed: int = 0

    @property
    def effective_draws(self) -> int:
        """Draws that differ: without noise there is only one."""
        return 1 if self.kind == "softmax" else self.draws


def noise_seed(seed: int, prompt: str, draw: int) -> int:
    """A 63-bit seed of one draw's noise; depends on nothing but its arguments, so batches cannot matter."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{draw}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def chunks(logits: torch.Tensor) -> list[slice]:
    """Parts of the positions of `logits` [T, V], each of which takes `CHUNK_BYTES` in float32, or one position."""
    positions, vocabulary = logits.shape
    step = max(1, CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, min(start + step, positions)) for start in range(0, positions, step)]


@dataclass(frozen=True, kw_only=True)
class Relaxed:
    """One prompt's answer, relaxed: [T] positions, V tokens, d judge dimensions.

    logits [T, V] at the answer's positions (any float dtype, no graph), ids [T]
    int64 the answer's tokens, live bool [V] tokens the judge can read,
    bridged [V, d] = P E, weights [m, T] = A, prompt: the hash that seeds the noise.
    """

    logits: torch.Tensor
    ids: torch.Tensor
    live: torch.Tensor
    bridged: torch.Tensor
    weights: torch.Tensor
    prompt: str
    settings: RelaxationSettings

    @property
    def dtype(self) -> torch.dtype:
        """What the relaxation is computed in: float32, or float64 for float64 logits."""
        return torch.promote_types(self.logits.dtype, torch.float32)

    def noise(self, draw: int) -> torch.Generator:
        """Where the noise of one draw comes from, on the logits' device; one stream over the chunks of positions."""
        seed = noise_seed(self.settings.seed, self.prompt, draw)
        return torch.Generator(self.logits.device).manual_seed(seed)

    def probabilities(self, rows: slice, noise: torch.Generator) -> torch.Tensor:
        """p of one draw at the next positions, [rows, V]."""
        values = self.logits[rows]
        if self.settings.kind == "softmax":
            values = values.to(self.dtype, copy=True)
        else:
            gumbel = torch.empty_like(values, dtype=torch.float32).uniform_(generator=noise)
            gumbel = gumbel.clamp_(torch.finfo(torch.float32).tiny, 1 - 2**-24).to(self.dtype)
            gumbel.log_().neg_().log_().neg_()
            if self.settings.kind == "gumbel-conditional":
                # An answer token that the judge cannot read may win, but has no share in the mixture.
                live = values.to(self.dtype).masked_fill(~self.live, -torch.inf)
                values = conditional_gumbel(live, self.ids[rows], gumbel)
            else:
                values = gumbel.add_(values)
        return torch.softmax(values.masked_fill_(~self.live, -torch.inf).div_(self.settings.tau), dim=-1)

    def shift(self, draw: int) -> torch.Tensor:
        """A (p - onehot(y)) P E of one draw: what is added to the judge's embeddings, [m, d]."""
        noise = self.noise(draw)
        rows = [self.probabilities(rows, noise) @ self.bridged for rows in chunks(self.logits)]
        return self.weights @ (torch.cat(rows) - self.bridged[self.ids])

    def backward(self, grads: Sequence[torch.Tensor], out: torch.Tensor) -> float:
        """Write d s / d logits, averaged over the draws, to `out` [T, V], given each draw's d s / d shift [m, d].

        `out` may be the logits' own memory: every chunk is read before it is
        written. Returns the gradient's norm as computed, in float32 or wider.
        """
        into_tokens = [self.weights.T @ grad for grad in grads]
        noises = [self.noise(draw) for draw in range(len(grads))]
        square = 0.0
        for rows in chunks(self.logits):
            total = torch.zeros_like(self.logits[rows], dtype=self.dtype)
            for noise, grad in zip(noises, into_tokens, strict=True):
                p = self.probabilities(rows, noise)
                through = grad[rows] @ self.bridged.T
                through -= torch.bmm(p[:, None], through[..., None])[:, 0]
                total.addcmul_(p, through)
            total /= self.settings.tau * len(grads)
            square += float(torch.linalg.vector_norm(total, dtype=torch.float64)) ** 2
            out[rows] = total.to(out.dtype)
        return math.sqrt(square)


def conditional_gumbel(logits: torch.Tensor, winners: torch.Tensor, gumbel: torch.Tensor) -> torch.Tensor:
    """Logits plus Gumbel noise drawn given that `winners` [T] have the largest sum; gumbel [T, V] is independent noise.

    The winner's sum is a Gumbel shifted by logsumexp(logits); every other sum is
    a Gumbel of its own location, truncated at the winner's (Maddison, Tarlow and
    Minka, "A* Sampling", 2014, section 3). The result is shifted
    by a constant a row, which a softmax ignores. The noise (result - logits) is a constant
    of the point where it was drawn: no gradient flows through it.
    """
    rows = torch.arange(len(winners), device=logits.device)
    # Relative to their logsumexp, logits of any size stay clear of overflow; softmax ignores the shift.
    own = logits - torch.logsumexp(logits, dim=-1, keepdim=True) + gumbel
    top = gumbel[rows, winners]
    below = -torch.logaddexp(-own, -top[:, None])
    below[rows, winners] = top
    return below

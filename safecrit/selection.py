"""Scores -> mask: the exact global top k of |score|, and its controls.

k = floor(share x weights), in exact arithmetic. Ties go to the smaller tensor name, then
the smaller flat index, so equal scores give equal masks on any device. Controls: the
bottom k, k at random, k at random with another mask's count in every tensor (docs/method.md,
section 3; arXiv 2604.08297 selects the top 1 % of all model weights).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from safecrit import distributed, ops
from safecrit.errors import MismatchError, SafecritError
from safecrit.layout import TensorLayout
from safecrit.maskfile import Mask, MaskInfo
from safecrit.ops.dispatch import Backend
from safecrit.ops.rank_counts import INFINITY
from safecrit.scorefile import Scores
from safecrit.selection_together import PURPOSE, select_top_together

log = logging.getLogger(__name__)

MODES = ("top", "bottom", "random")
SHARES_OF = ("all", "eligible")
_NUMBER = re.compile(r"([+-]?)(\d+\.?\d*|\.\d+)(e[+-]?\d{1,2})?", re.IGNORECASE)


def parse_share(text: str | float | Fraction) -> Fraction:
    """A share of the weights from `1%`, `0.01` or a number below 1, exactly; SafecritError where it is none."""
    if isinstance(text, Fraction):
        share, word, percent = text, str(text), True
    else:
        word = str(text).strip()
        percent = word.endswith("%")
        number = word.removesuffix("%").strip()
        if not _NUMBER.fullmatch(number):
            raise SafecritError(f"{word!r} is no share. Write a percentage such as 1%, or a fraction such as 0.01.")
        share = Fraction(number) / (100 if percent else 1)
        if not percent and 1 <= share <= 100:
            raise SafecritError(f"{word} is no fraction below 1: did you mean {number}%? A share is 1% or 0.01.")
    if share < 0:
        raise SafecritError(f"a share of {word} is negative. Write a percentage such as 1%.")
    if share == 0:
        raise SafecritError(f"a share of {word} selects nothing. Write a percentage such as 1%.")
    if share > 1:
        raise SafecritError(f"a share of {word} is more than there is. Write at most 100%.")
    return share


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """What to select.

    Exactly one of `share` (`1%`, `0.01`, or a Fraction) and `count` (weights), or neither with `match`.
    `share_of`: the share's denominator, all weights or the eligible ones. `match` (random only): take
    this mask's count in every tensor. `allow_zero`: a top selection may contain weights that score 0.
    """

    mode: str = "top"
    share: str | float | Fraction | None = None
    count: int | None = None
    share_of: str = "all"
    match: Mask | None = None
    seed: int = 0
    allow_zero: bool = False

    def __post_init__(self) -> None:
        """Report every problem of the settings at once."""
        problems = []
        if self.mode not in MODES:
            problems.append(f"mode {self.mode!r} is none of {', '.join(MODES)}")
        if self.share_of not in SHARES_OF:
            problems.append(f"share_of {self.share_of!r} is none of {', '.join(SHARES_OF)}")
        if self.match is not None and self.mode != "random":
            problems.append("a mask to match goes with mode random only")
        if self.share is not None and self.count is not None:
            problems.append("give a share or a count, not both")
        if self.share is None and self.count is None and self.match is None:
            problems.append("give a share such as 1%, or a count")
        if self.count is not None and self.count < 1:
            problems.append(f"a count of {self.count} selects nothing")
        if self.share is not None:
            try:
                parse_share(self.share)
            except SafecritError as error:
                problems.append(str(error).rstrip("."))
        if problems:
            raise SafecritError("; ".join(problems) + ".")

    def resolve(self, total: int, eligible: int) -> int:
        """Number of weights to select, k; SafecritError where that is 0 or more than are eligible."""
        if self.count is not None:
            k, asked = self.count, f"{self.count:,} weights"
        elif self.share is not None:
            base = total if self.share_of == "all" else eligible
            k = math.floor(parse_share(self.share) * base)
            asked = f"{self.share} of {base:,} weights"
        else:
            assert self.match is not None
            k, asked = self.match.count, "as many as the mask to match"
        if k == 0:
            raise SafecritError(f"{asked} is less than one weight. Raise the share, or give a count.")
        if k > eligible:
            raise SafecritError(
                f"{asked} are {k:,}, but only {eligible:,} are eligible. Lower the share, or make more weights "
                "eligible (--include)."
            )
        if self.match is not None and k != self.match.count:
            raise SafecritError(
                f"{asked} are {k:,}, but the mask to match holds {self.match.count:,}. Leave the share out, or match "
                "a mask of the same share."
            )
        return k


def select(scores: Scores, settings: SelectionSettings) -> Mask:
    """The mask that `settings` ask for, from a score folder; files are read through, never loaded whole."""
    info = scores.info
    model, prompts = _object(info, "model"), _object(info, "prompts")
    return select_from(
        {name: scores.tensor(name) for name in scores.names},
        settings,
        layouts=scores.layouts,
        total=scores.total,
        fingerprint=scores.fingerprint,
        model=str(model.get("id") or ""),
        revision=model.get("revision"),
        scoring=scoring_summary(info),
        prompt_hashes=list(prompts.get("hashes") or []),
    )


def scoring_summary(info: Mapping[str, Any]) -> dict[str, Any]:
    """What a mask repeats from score.json: how the scores were made, without tables or per-prompt lists."""
    kept = ("method", "estimator", "reduction", "objective", "relaxation", "tau", "draws", "seed", "dtype")
    summary = {key: info[key] for key in kept if key in info}
    judge, prompts = _object(info, "judge"), _object(info, "prompts")
    if judge:
        summary["judge"] = {key: judge[key] for key in ("id", "fingerprint") if key in judge}
    if prompts:
        summary["prompts_used"] = prompts.get("used")
    stability = _object(info, "stability")
    if stability:
        summary["stability"] = {
            kind: {key: found[key] for key in ("shares", "spearman") if key in found}
            for kind, found in stability.items()
        }
    return summary


def _object(info: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = info.get(key)
    return value if isinstance(value, dict) else {}


def select_from(
    tensors: Mapping[str, torch.Tensor],
    settings: SelectionSettings,
    *,
    layouts: Mapping[str, TensorLayout] | None = None,
    total: int | None = None,
    backend: Backend = "auto",
    **about: Any,
) -> Mask:
    """The mask that `settings` ask for, from signed scores by checkpoint name (float32 or bfloat16, any shape).

    `layouts` lists every tensor of the model (left out: just these), `total` its weights (left out: by the
    layouts); `about` are further fields of `MaskInfo`. Several ranks, each with all `tensors` at hand (mapped, say),
    read a part of them each, and the mask holds that part.
    """
    names = sorted(tensors)
    if layouts is None:
        layouts = {name: TensorLayout(tuple(tensors[name].shape), (), True) for name in names}
    total = sum(layout.numel for layout in layouts.values()) if total is None else total
    sizes = [tensors[name].numel() for name in names]
    k = settings.resolve(total, sum(sizes))
    ranks, counts = distributed.current(), None
    found: Mapping[str, torch.Tensor]
    details: dict[str, Any]
    if settings.mode == "random":
        # A draw needs no scores; one rank makes all of it.
        drawn = _random(names, sizes, k, settings) if ranks.first else []
        found, details = dict(zip(names, drawn, strict=False)), {"seed": settings.seed}
    else:
        shares = zip(names, distributed.owners(sizes), strict=True)
        own = [name for name, owner in shares if owner == ranks.rank]
        ranked, details = _ranked([tensors[name].detach().reshape(-1) for name in own], k, settings, backend)
        found = dict(zip(own, ranked, strict=True))
        if bad := details["non_finite"]:
            log.warning("%s of %s scores are not finite; they are never selected.", f"{bad:,}", f"{sum(sizes):,}")
    if ranks.world > 1:
        lengths = torch.tensor([len(found.get(name, ())) for name in names], dtype=torch.int64)
        # Counts travel as int32 where they can: 4 bytes a tensor.
        lengths = lengths if max(sizes, default=0) >= 2**31 else lengths.to(torch.int32)
        counts = dict(zip(names, distributed.sum_(lengths, PURPOSE).tolist(), strict=True))
    share = None if settings.share is None else float(parse_share(settings.share))
    info = MaskInfo(
        tensors=dict(sorted(layouts.items())),
        mode="matched" if settings.match is not None else settings.mode,
        total=total,
        eligible=sum(sizes),
        share=share,
        share_of=settings.share_of,
        **details,
        **about,
    )
    return Mask(found, info, counts)


def _random(names: Sequence[str], sizes: Sequence[int], k: int, settings: SelectionSettings) -> list[torch.Tensor]:
    if settings.match is None:
        return ops.select_random(sizes, k, settings.seed)
    counts = {name: len(flat) for name, flat in settings.match.indices.items()}
    for name, count in counts.items():
        if name not in names or count > sizes[names.index(name)]:
            raise MismatchError(
                f"the mask to match holds {count:,} weights of {name!r}, which has not as many eligible here. "
                "Match a mask made from the same scores."
            )
    return ops.select_random_matched(sizes, [counts.get(name, 0) for name in names], settings.seed)


def _ranked(
    flat: list[torch.Tensor], k: int, settings: SelectionSettings, backend: Backend
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    largest, alone = settings.mode == "top", distributed.current().world == 1
    chosen = None
    if largest and alone:
        # An infinity would be the first to be selected, so the selected entries tell whether there are any and the
        # scores need no pass of their own. From the bottom it would be the last.
        with suppress(ValueError):  # fewer than k are numbers, or a dtype is wrong: what follows says which
            chosen = ops.select_top(flat, k, backend=backend)
    if chosen is None or _any_infinite(flat, chosen.indices):
        flat, bad = _without_infinities(flat)
        available = sum(distributed.gather(sum(map(len, flat)) - bad, PURPOSE))
        if k > available:
            raise SafecritError(
                f"{k:,} weights are wanted, but only {available:,} have a finite score. Lower the share."
            )
        chosen = select_top_together(flat, k, largest, backend)
    if largest and chosen.threshold_bits == 0 and not settings.allow_zero:
        raise SafecritError(
            f"{k:,} weights are wanted, but only {k - chosen.tied_selected:,} eligible weights have a score other than "
            "0. Lower the share, score more prompts, or use --allow-zero."
        )
    details = {
        "threshold_bits": chosen.threshold_bits,
        "tied": chosen.tied,
        "tied_selected": chosen.tied_selected,
        "non_finite": chosen.nan,
    }
    return [indices.cpu() for indices in chosen.indices], details


def _any_infinite(flat: list[torch.Tensor], indices: list[torch.Tensor]) -> bool:
    return any(bool(entries[chosen].isinf().any()) for entries, chosen in zip(flat, indices, strict=True))


def _without_infinities(flat: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """The same tensors with NaN for infinities (copied only where there are some), and the non-finite entries."""
    result, bad = [], 0
    for entries in flat:
        infinite, nan = ops.rank_counts([entries], INFINITY, INFINITY, 0).tolist()
        bad += infinite + nan
        result.append(torch.where(entries.isinf(), torch.nan, entries) if infinite else entries)
    return result, bad

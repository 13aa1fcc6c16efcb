"""Shares with their uncertainty: Wilson intervals, the exact McNemar test, the paired difference.

Every share names its denominator. A share of nothing is None, never NaN, so
that it can be written as JSON and is never mistaken for zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import binomtest, norm, t

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A share `count / n` with its Wilson interval [`low`, `high`]; all three None where `n` is 0.

    `denominator` says in words what `n` counts.
    """

    count: int
    n: int
    rate: float | None
    low: float | None
    high: float | None
    denominator: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the fields' names."""
        return asdict(self)


def wilson(successes: int, n: int, denominator: str = "", *, confidence: float = CONFIDENCE) -> Rate:
    """The share of `successes` among `n` with its Wilson score interval (without continuity correction)."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes among {n} are impossible")
    if n == 0:
        return Rate(count=0, n=0, rate=None, low=None, high=None, denominator=denominator)
    interval = binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    low, high = float(interval.low), float(interval.high)
    return Rate(count=successes, n=n, rate=successes / n, low=low, high=high, denominator=denominator)


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two yes/no outcomes of the same `n` prompts: a 2 x 2 table, its test and the difference of the shares.

    `both`, `first_only`, `second_only`, `neither` count prompts. `difference` is
    share of the first minus share of the second, in [-1, 1], with its interval;
    None where `n` is 0. `p` is the two-sided exact McNemar probability.
    """

    n: int
    both: int
    first_only: int
    second_only: int
    neither: int
    difference: float | None
    low: float | None
    high: float | None
    p: float | None

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the fields' names."""
        return asdict(self)


def paired(first: Sequence[bool], second: Sequence[bool], *, confidence: float = CONFIDENCE) -> Paired:
    """Compare two aligned lists of outcomes, entry i of both being the same prompt.

    McNemar's exact test: among the prompts on which the two differ, each
    direction is equally likely under the null hypothesis; without such prompts
    p is 1.
    """
    both = sum(a and b for a, b in zip(first, second, strict=True))
    first_only = sum(bool(a) for a in first) - both
    second_only = sum(bool(b) for b in second) - both
    n = len(first)
    differing = first_only + second_only
    low, high = _difference_interval(both, first_only, second_only, n, confidence) if n else (None, None)
    return Paired(
        n=n,
        both=both,
        first_only=first_only,
        second_only=second_only,
        neither=n - both - differing,
        difference=(first_only - second_only) / n if n else None,
        low=low,
        high=high,
        p=(float(binomtest(first_only, differing, 0.5).pvalue) if differing else 1.0) if n else None,
    )


def mean_difference(
    first: Sequence[float], second: Sequence[float], *, confidence: float = CONFIDENCE
) -> dict[str, float | int | None]:
    """Mean of first minus second over paired numbers, with Student's interval; None where it is unknown.

    Keys `n`, `difference`, `low`, `high`. Two pairs are the fewest with an interval.
    """
    gains = [a - b for a, b in zip(first, second, strict=True)]
    n = len(gains)
    if not n:
        return {"n": 0, "difference": None, "low": None, "high": None}
    mean = math.fsum(gains) / n
    if n == 1:
        return {"n": 1, "difference": mean, "low": None, "high": None}
    spread = math.sqrt(math.fsum((gain - mean) ** 2 for gain in gains) / (n - 1))
    arm = float(t.ppf((1 + confidence) / 2, n - 1)) * spread / math.sqrt(n)
    return {"n": n, "difference": mean, "low": mean - arm, "high": mean + arm}


def cohens_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Agreement beyond chance of two raters on the same answers (Cohen 1960); None where chance agrees on all."""
    n = len(first)
    if not n:
        return None
    agreed = sum(bool(a) == bool(b) for a, b in zip(first, second, strict=True)) / n
    share, other = sum(map(bool, first)) / n, sum(map(bool, second)) / n
    chance = share * other + (1 - share) * (1 - other)
    return None if chance == 1 else (agreed - chance) / (1 - chance)


def _difference_interval(
    both: int, first_only: int, second_only: int, n: int, confidence: float
) -> tuple[float, float]:
    """Interval of a paired difference of shares: Newcombe 1998 (Statistics in Medicine 17:2635), method 10.

    Square-and-add of the two Wilson intervals, less twice phi times their arms.
    phi is the table's correlation with Newcombe's correction: where the
    determinant is positive n/2 is taken from it, not below 0. Unlike the Wald
    interval it neither collapses at 0 differing prompts nor leaves [-1, 1].
    """
    neither = n - both - first_only - second_only
    share_1, low_1, high_1 = _wilson_bounds(both + first_only, n, confidence)
    share_2, low_2, high_2 = _wilson_bounds(both + second_only, n, confidence)
    margins = (both + first_only) * (second_only + neither) * (both + second_only) * (first_only + neither)
    determinant = float(both * neither - first_only * second_only)
    if determinant > 0:
        determinant = max(determinant - n / 2, 0.0)
    phi = determinant / math.sqrt(margins) if margins else 0.0
    down_1, up_1, down_2, up_2 = share_1 - low_1, high_1 - share_1, share_2 - low_2, high_2 - share_2
    below = math.sqrt(max(down_1**2 - 2 * phi * down_1 * up_2 + up_2**2, 0.0))
    above = math.sqrt(max(up_1**2 - 2 * phi * up_1 * down_2 + down_2**2, 0.0))
    difference = (first_only - second_only) / n
    return max(difference - below, -1.0), min(difference + above, 1.0)


def _wilson_bounds(count: int, n: int, confidence: float) -> tuple[float, float, float]:
    """Share and Wilson bounds, without scipy's test around it: the paired interval is asked for often."""
    z = float(norm.ppf((1 + confidence) / 2))
    share = count / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    arm = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return share, min(max(centre - arm, 0.0), share), max(min(centre + arm, 1.0), share)

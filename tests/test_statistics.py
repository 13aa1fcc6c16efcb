from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from safecrit.statistics import paired, wilson


def outcomes(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    table = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * neither
    random.Random(0).shuffle(table)
    return [a for a, _ in table], [b for _, b in table]


def test_wilson_equals_the_formula_on_random_tables() -> None:
    rng, z = random.Random(1), 1.959963984540054
    for _ in range(200):
        n = rng.randint(1, 2000)
        k = rng.choice([0, n, rng.randint(0, n)])
        rate = wilson(k, n, "things")
        p = k / n
        centre = (k + z * z / 2) / (n + z * z)
        arm = z * math.sqrt(n) / (n + z * z) * math.sqrt(p * (1 - p) + z * z / (4 * n))
        assert rate.rate == p
        assert rate.low == pytest.approx(max(centre - arm, 0.0), abs=1e-12)
        assert rate.high == pytest.approx(min(centre + arm, 1.0), abs=1e-12)
        scipys = binomtest(k, n).proportion_ci(method="wilson")
        assert (rate.low, rate.high) == (scipys.low, scipys.high)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5])
def test_wilson_covers_as_it_says(p: float) -> None:
    rates = [wilson(k, 100) for k in range(101)]
    inside = [rate.low is not None and rate.high is not None and rate.low <= p <= rate.high for rate in rates]
    assert 0.93 <= float(binom.pmf(np.arange(101), 100, p)[inside].sum()) <= 0.97


def test_a_share_of_nothing_is_none() -> None:
    rate = wilson(0, 0, "judged answers")
    assert (rate.rate, rate.low, rate.high, rate.n) == (None, None, None, 0)
    assert json.loads(json.dumps(rate.to_json(), allow_nan=False))["denominator"] == "judged answers"
    nothing = paired([], [])
    assert (nothing.difference, nothing.low, nothing.high, nothing.p) == (None, None, None, None)
    json.dumps(nothing.to_json(), allow_nan=False)


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (1, 0)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="impossible"):
        wilson(k, n)


def test_mcnemar_equals_scipy_on_random_tables() -> None:
    rng = random.Random(2)
    for _ in range(200):
        table = [rng.randint(0, rng.choice([1, 10, 200])) for _ in range(4)]
        result = paired(*outcomes(*table))
        both, first, second, _ = table
        assert (result.both, result.first_only, result.second_only, result.neither) == tuple(table)
        if sum(table) == 0:
            continue
        # the two-sided exact test of b against c, written out
        b, n = min(first, second), first + second
        expected = min(1.0, 2 * float(binom.cdf(b, n, 0.5))) if n else 1.0
        assert result.p == pytest.approx(expected, rel=1e-9)
        assert result.difference == pytest.approx((both + first) / sum(table) - (both + second) / sum(table))
        assert result.low is not None and result.high is not None
        assert -1 <= result.low <= result.difference <= result.high <= 1


def test_paired_interval_equals_published_values() -> None:
    """Newcombe 1998, table III: 36, 12, 2, 0 gives 0.0569 to 0.3404 by his method 10."""
    result = paired(*outcomes(36, 12, 2, 0))
    assert result.difference == pytest.approx(0.2)
    assert (round(result.low or 0, 4), round(result.high or 0, 4)) == (0.0569, 0.3404)


def test_paired_interval_corrects_a_positive_correlation() -> None:
    """30 agree on yes, 24 on no. By hand: shares 0.5556 (0.4241 to 0.6800), phi (720 - 27) / 720, arm 0.0358."""
    result = paired(*outcomes(30, 0, 0, 24))
    assert (round(result.low or 0, 4), round(result.high or 0, 4)) == (-0.0358, 0.0358)


def test_paired_interval_mirrors_when_the_two_change_places() -> None:
    first, second = outcomes(10, 7, 3, 20)
    one, other = paired(first, second), paired(second, first)
    assert one.low is not None and one.high is not None and other.low is not None and other.high is not None
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert one.p == other.p


def test_paired_interval_covers_about_as_it_says() -> None:
    rng = np.random.default_rng(0)
    shares = np.array([0.3, 0.2, 0.1, 0.4])
    truth, hits, runs = 0.2 - 0.1, 0, 1000
    for table in rng.multinomial(100, shares, size=runs):
        result = paired(*outcomes(*(int(count) for count in table)))
        assert result.low is not None and result.high is not None
        hits += result.low <= truth <= result.high
    assert 0.93 <= hits / runs <= 0.98


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_paired_is_well_formed(table: list[tuple[bool, bool]]) -> None:
    result = paired([a for a, _ in table], [b for _, b in table])
    assert result.low is not None and result.high is not None and result.difference is not None and result.p is not None
    assert -1 <= result.low <= result.difference <= result.high <= 1
    assert 0 <= result.p <= 1
    assert result.both + result.first_only + result.second_only + result.neither == result.n == len(table)


def test_lists_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired([True], [True, False])

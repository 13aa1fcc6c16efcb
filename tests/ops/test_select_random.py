from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safecrit import ops
from safecrit.ops import native
from safecrit.ops.reference.select_random import CHUNK

OP = "select_random"


def plain(seed: int, position: int, index: int) -> int:
    """The documented hash, in Python integers."""
    mask = (1 << 64) - 1

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
        return value ^ (value >> 31)

    key = mix((mix(seed & mask) + position * 0x9E3779B97F4A7C15) & mask)
    return mix((index * 0x9E3779B97F4A7C15 + key) & mask)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    share=st.floats(0, 1),
    seed=st.integers(-(1 << 63), 1 << 64),
)
def test_is_the_top_k_of_the_documented_hash(target, sizes, share, seed):
    k = int(share * sum(sizes))
    entries = [(plain(seed, p, i), p, i) for p, size in enumerate(sizes) for i in range(size)]
    expected = [sorted(i for _, q, i in sorted(entries)[:k] if q == p) for p in range(len(sizes))]
    assert [indices.tolist() for indices in ops.select_random(sizes, k, seed, backend=target.backend)] == expected


@given(data=st.data(), seed=st.integers(0, 99))
def test_matched_takes_the_count_of_each_tensor(target, data, seed):
    sizes = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))
    counts = [data.draw(st.integers(0, size)) for size in sizes]
    found = ops.select_random_matched(sizes, counts, seed, backend=target.backend)
    for size, count, indices in zip(sizes, counts, found, strict=True):
        assert indices.numel() == count
        assert indices.tolist() == sorted(set(indices.tolist()))
        assert all(0 <= index < size for index in indices.tolist())


def test_is_uniform_over_tensors_indices_and_seeds(target):
    sizes, draws, k = [20, 5, 75], 400, 25
    hits = np.zeros(100)
    for seed in range(draws):
        parts = ops.select_random(sizes, k, seed, backend=target.backend)
        hits[np.concatenate([parts[0], parts[1] + 20, parts[2] + 25])] += 1
    chi_squared = ((hits - draws * k / 100) ** 2 / (draws * k / 100 * (1 - k / 100))).sum()
    assert 60 < chi_squared < 150  # 99 degrees of freedom: mean 99, standard deviation 14


def test_chunks_and_large_sizes(target):
    found = ops.select_random([CHUNK + 7, 3 * CHUNK], 1000, 1, backend=target.backend)
    assert sum(indices.numel() for indices in found) == 1000
    assert all(bool((indices[1:] > indices[:-1]).all()) for indices in found)
    assert found[1].max() > 2 * CHUNK
    # A larger k only adds entries: the order of the hashes is one order.
    more = ops.select_random([CHUNK + 7, 3 * CHUNK], 2000, 1, backend=target.backend)
    assert all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(found, more, strict=True))


@pytest.mark.parametrize("k", [1, 17, 60_000, 2_999_000])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_native_gives_the_indices_of_the_reference(threads, k):
    if native.cpu_module()[0] is None:
        pytest.skip("no native module here")
    sizes, before = [1_600_001, 0, 3, 1_399_996], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = ops.select_random(sizes, k, -5, backend="native")
    finally:
        torch.set_num_threads(before)
    expected = ops.select_random(sizes, k, -5, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_the_native_function_refuses_what_it_cannot_run_with():
    module, _ = native.cpu_module()
    if module is None:
        pytest.skip("no native module here")
    out, counts = torch.empty(4, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
    good = {"positions": [0, 1], "sizes": [3, 4], "k": 4, "seed": 1, "threads": 2}
    good |= {"out": out.data_ptr(), "counts": counts.data_ptr()}
    module.select_random(**good)
    for change, problem in [
        ({"positions": [0]}, "as many positions"),
        ({"sizes": [-1, 9]}, "negative"),
        ({"sizes": [1 << 62, 1 << 62]}, "more than 2"),
        ({"k": 8}, "there are 7 entries"),
        ({"k": -1}, "there are 7 entries"),
        ({"out": 0}, "null output"),
        ({"counts": 0}, "null counts"),
        ({"out": out.data_ptr() + 4}, "misaligned"),
        ({"threads": 0}, "threads"),
    ]:
        with pytest.raises(ValueError, match=problem):
            module.select_random(**(good | change))


def test_refused():
    with pytest.raises(ValueError, match="there are 5 entries"):
        ops.select_random([2, 3], 6, 0)
    with pytest.raises(ValueError, match="there are 5 entries"):
        ops.select_random([2, 3], -1, 0)
    with pytest.raises(ValueError, match="tensor 1 has -1 entries"):
        ops.select_random([2, -1], 1, 0)
    with pytest.raises(ValueError, match="2 sizes, 1 counts"):
        ops.select_random_matched([2, 3], [1], 0)
    with pytest.raises(ValueError, match="there are 2 entries"):
        ops.select_random_matched([2, 3], [3, 0], 0)

"""select_top in C++ against the reference: every path to the threshold, thread count, instruction set and bad call."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from safecrit import ops
from safecrit.ops import native, native_select

module = native.cpu_module()[0]
pytestmark = pytest.mark.skipif(module is None, reason="no native module here")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = {"segment": 97, "runs": 16, "run": 4}


def agree(scores: list[torch.Tensor], k: int, largest: bool = True) -> ops.Selection:
    ours = ops.select_top(scores, k, largest=largest, backend="native")
    expected = ops.select_top(scores, k, largest=largest, backend="reference")
    assert len(ours.indices) == len(expected.indices)
    assert all(torch.equal(a, b) for a, b in zip(ours.indices, expected.indices, strict=True))
    for name in ("threshold", "threshold_bits", "tied", "tied_selected", "nan"):
        assert getattr(ours, name) == getattr(expected, name), name
    return ours


def passes(scores: list[torch.Tensor], k: int, **tuning: int) -> int:
    out, counts = torch.empty(k, dtype=torch.int64), torch.empty(len(scores), dtype=torch.int64)
    sizes = [tensor.numel() for tensor in scores]
    codes = [native.DTYPE_CODES[tensor.dtype] for tensor in scores]
    pointers = [tensor.data_ptr() for tensor in scores]
    assert module is not None
    return module.select_top(pointers, sizes, codes, k, True, out.data_ptr(), counts.data_ptr(), 2, **tuning)[-1]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["normal", "few values", "bits", "zeros", "sorted"]),
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=5),
    share=st.floats(0, 1),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    largest=st.booleans(),
    seed=st.integers(0, 1 << 30),
    tuning=st.sampled_from([SMALL, {"segment": 1, "runs": 1, "run": 1}, {"segment": 5000, "runs": 64, "run": 8}, {}]),
)
def test_any_scores(kind, sizes, share, dtypes, largest, seed, tuning):
    rng = np.random.default_rng(seed)
    scores = []
    for size, dtype in zip(sizes, dtypes, strict=False):
        values = rng.standard_normal(size).astype(np.float32)
        if kind == "few values":
            values = rng.choice(np.float32([0, -0.0, 1, -1, 2, np.inf, -np.inf, np.nan, 1e-40]), size)
        if kind == "bits":
            values = rng.integers(0, 1 << 32, size, dtype=np.uint32).view(np.float32)
        if kind == "zeros":
            values *= rng.random(size) < 0.02
        if kind == "sorted":
            values.sort()
        tensor = torch.from_numpy(values)
        scores.append(tensor if dtype == torch.float32 else tensor.to(dtype))
    numbers = sum(int((~tensor.isnan()).sum()) for tensor in scores)
    native_select.tuning.update(tuning)
    try:
        agree(scores, int(share * numbers), largest)
        if tuning is not SMALL:
            with pytest.raises(ValueError, match=f"only {numbers} entries"):
                ops.select_top(scores, numbers + 1, largest=largest, backend="native")
    finally:
        native_select.tuning.clear()


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_and_segments(threads, dtype, largest, monkeypatch):
    scores = [randn(500_003).to(dtype), randn(7, seed=1).to(dtype), 4 * randn(300, 1001, seed=2).to(dtype)]
    scores[2][5, 7] = torch.nan
    monkeypatch.setitem(native_select.tuning, "segment", 50_021)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for k in (1, 8_003, 400_000, 800_309):
            agree(scores, k, largest)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("largest", [True, False])
def test_every_16_bit_pattern(dtype, largest):
    scores = [torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)]
    numbers = int((~scores[0].isnan()).sum())
    for k in (1, 2, 1000, 1024, 2047, 2048, 2049, 30_000, 61_441, 63_000, numbers - 1, numbers):
        agree(scores, k, largest)


def test_one_read_is_usual_and_a_missed_range_costs_more_but_changes_nothing(monkeypatch):
    scores, k = [randn(400_000), randn(200_001, seed=1)], 6000
    expected = ops.select_top(scores, k, backend="reference").threshold_bits
    assert passes(scores, k) == 1
    for low, high in [(0, 5), (0x7F000000, 0x7F800000), (expected, expected - 1), (expected + 1, 0x7F800000)]:
        monkeypatch.setattr(native_select, "tuning", {"low": low, "high": high})
        if high >= low:
            assert passes(scores, k, low=low, high=high) == 2
            agree(scores, k)
    monkeypatch.setattr(native_select, "tuning", {"low": expected, "high": expected})
    agree(scores, k)


def test_the_histogram_decides_where_the_sample_misleads(monkeypatch):
    """First a rank that is given, then the only sampled one; 2^20 entries are too many to store all the others."""
    tuning = {"runs": 1, "run": 1, "low": 1, "high": 1}
    above = float(np.nextafter(np.float32(0.5), np.float32(1)))
    parts = [randn(300_000) * 1e-3, torch.full((700_000,), 0.5), torch.full((700_000,), -above), 9 + randn(100_000)]
    scores = torch.cat(parts)[torch.randperm(1_800_000, generator=torch.Generator().manual_seed(2))]
    scores[:50] = torch.nan
    monkeypatch.setattr(native_select, "tuning", tuning)
    seen = set()
    for k in (1, 50_000, 450_000, 1_150_000, 1_600_000, 1_799_950):
        agree([scores], k)
        seen.add(passes([scores], k, **tuning))
    assert {4, 5} <= seen  # with a histogram of the upper digit, and of both
    with pytest.raises(ValueError, match="only 1799950 entries are not NaN"):
        ops.select_top([scores], 1_799_951, backend="native")


def test_the_end_of_the_list_is_sampled_too():
    """Where the largest are last and few, leaving them out would miss the threshold."""
    scores = torch.zeros(4096 * 300 - 1)
    scores[-4000:] = randn(4000)
    assert passes([scores], 3000) == 1


@pytest.mark.parametrize("share", [0.001, 0.0099, 0.01, 0.0101, 0.5])
def test_two_values_with_the_threshold_at_the_step(share):
    """More ties than may be stored: they are counted, and read again as far as they are selected."""
    total = 1_500_000
    scores = torch.full((total,), -0.25)
    scores[torch.randperm(total, generator=torch.Generator().manual_seed(0))[: int(share * total)]] = 0.5
    agree([scores[:700_001], scores[700_001:]], 15_000)
    assert passes([scores], 15_000) <= 2


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("value", [0.0, 5 * 2.0**-24, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ties_are_counted_among_16_bits_and_between_them(dtype, value, largest):
    """Most scores are either `value` or the next float32, which 16 bits do not have."""
    total = 900_000
    between = float(np.nextafter(np.float32(value), np.float32(1)))
    scores = [torch.full((total,), -value).to(dtype), torch.full((total + 1,), between), randn(5000).to(dtype)]
    scores[2][:7] = torch.nan
    for k in (total - 9000, total + 1000, 2 * total - 3000):
        agree(scores, k, largest)


@pytest.mark.parametrize(
    "scores", [torch.zeros(1_300_000), torch.arange(1_300_000.0), -torch.arange(1_300_000.0).flip(0)]
)
def test_all_equal_and_sorted(scores):
    agree([scores], 13_000)
    assert passes([scores], 13_000) == 1


def test_more_nan_than_numbers():
    scores = randn(600_000)
    scores[torch.rand(600_000, generator=torch.Generator().manual_seed(1)) < 0.9] = torch.nan
    numbers = int((~scores.isnan()).sum())
    for k in (0, 1, 30_000, numbers):
        agree([scores], k)
    with pytest.raises(ValueError, match=f"only {numbers} entries are not NaN"):
        ops.select_top([scores], numbers + 1, backend="native")


def test_flushed_subnormals_do_not_matter():
    patterns = torch.arange(2048, dtype=torch.int16)
    scores = [patterns.view(torch.float16), patterns.int().view(torch.float32), patterns.view(torch.bfloat16)]
    expected = [indices.tolist() for indices in ops.select_top(scores, 3000, backend="reference").indices]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormals")
    try:
        ours = ops.select_top(scores, 3000, backend="native")
    finally:
        torch.set_flush_denormal(False)
    assert [indices.tolist() for indices in ours.indices] == expected


def test_mapped_and_misaligned_tensors(tmp_path):
    tensors = {"b": randn(333, 7).bfloat16(), "a": randn(50, 9, seed=1), "c": torch.empty(0)}
    save_file(tensors, tmp_path / "scores.safetensors")
    mapped = load_file(tmp_path / "scores.safetensors")
    assert agree(list(mapped.values()), 300).tied_selected >= 1
    raw = torch.zeros(4 * 100 + 1, dtype=torch.uint8)
    misaligned = torch.frombuffer(raw.numpy().data, dtype=torch.float32, offset=1, count=100)
    misaligned.copy_(randn(100))
    assert misaligned.data_ptr() % 4
    agree([misaligned], 10)


CODE = """
import hashlib, torch
from safecrit import ops
from safecrit.ops import native
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (400_003,), generator=generator).int()
    scores = bits.view(torch.float32) if dtype == torch.float32 else bits.to(torch.int16).view(dtype)
    for largest in (True, False):
        for tensors, k in (([scores[:9], scores[9:]], 5000), ([scores * 0], 4000)):
            found = ops.select_top(tensors, k, largest=largest, backend="native")
            digest.update(repr((found.indices, found.threshold_bits, found.tied, found.nan)).encode())
            digest.update(torch.cat(found.indices).numpy().tobytes())
digest.update(torch.cat(ops.select_random([200_000, 300_000], 4000, 3, backend="native")).numpy().tobytes())
print(native.cpu_module()[1], digest.hexdigest())
"""


def test_every_instruction_set_selects_the_same():
    printed = {}
    for variant in ("plain", "avx2", ""):
        done = subprocess.run(
            [sys.executable, "-c", CODE],
            env={**os.environ, "SAFECRIT_CPU": variant},
            capture_output=True,
            text=True,
            check=True,
        )
        name, _, digest = done.stdout.strip().rpartition(" ")
        printed[name] = digest
    assert "C++, plain" in printed
    assert len(set(printed.values())) == 1
    assert len(next(iter(printed.values()))) == hashlib.sha256().digest_size * 2


def test_the_native_function_refuses_what_it_cannot_run_with():
    assert module is not None
    data, out, counts = torch.zeros(9), torch.empty(4, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
    good = {"data": [data.data_ptr(), 0], "sizes": [9, 0], "dtypes": [0, 1], "k": 4, "largest": True, "threads": 2}
    good |= {"out": out.data_ptr(), "counts": counts.data_ptr()}
    assert module.select_top(**good)[0]
    assert out.tolist() == [0, 1, 2, 3]
    for change, problem in [
        ({"sizes": [9]}, "as many pointers"),
        ({"dtypes": [0, 1, 2]}, "as many pointers"),
        ({"dtypes": [3, 0]}, "unknown dtype code 3"),
        ({"dtypes": [-1, 0]}, "unknown dtype code -1"),
        ({"sizes": [9, -1]}, "negative"),
        ({"sizes": [9, 1]}, "tensor 1: null pointer"),
        ({"sizes": [1 << 62, 1 << 62]}, "more than 2"),
        ({"data": [data.data_ptr() + 2, 0]}, "misaligned"),
        ({"k": 10}, "there are 9 entries"),
        ({"k": -1}, "k is -1"),
        ({"out": 0}, "null output"),
        ({"out": out.data_ptr() + 4}, "misaligned output"),
        ({"counts": 0}, "null counts"),
        ({"threads": 0}, "threads"),
        ({"segment": 0}, "segment"),
        ({"runs": 0}, "runs"),
        ({"run": 1 << 40}, "runs"),
        ({"low": 7, "high": 3}, "low and high"),
        ({"low": 1 << 40}, "low and high"),
    ]:
        with pytest.raises(ValueError, match=problem):
            module.select_top(**(good | change))

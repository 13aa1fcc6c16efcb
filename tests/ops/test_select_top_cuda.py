"""select_top in CUDA against the reference: every path to the threshold, odd starts, many tensors, and bad calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safecrit import ops
from safecrit.ops import native, native_select
from safecrit.selection import SelectionSettings, select_from

OP, BACKEND = "select_top", "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SAMPLE = 1 << 18  # of csrc/select_scan.cuh: fewer entries are not sampled
TILE = 8192
LARGE = SAMPLE + 3 * TILE + 5


@pytest.fixture
def tuning(monkeypatch):
    chosen: dict[str, int] = {}
    monkeypatch.setattr(native_select, "cuda_tuning", chosen)
    return chosen


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def agree(scores: list[torch.Tensor], k: int, largest: bool = True) -> None:
    ours = ops.select_top(scores, k, largest=largest, backend="cuda")
    expected = ops.select_top([tensor.cpu() for tensor in scores], k, largest=largest, backend="reference")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours.indices, expected.indices, strict=True))
    for name in ("threshold", "threshold_bits", "tied", "tied_selected", "nan"):
        assert getattr(ours, name) == getattr(expected, name), name


def run(scores: list[torch.Tensor], k: int, /, exact: bool = False, **changed) -> list[int]:
    """What the native function writes: hit, threshold bits, tied, tied selected, NaN, then the counts."""
    module = native.cuda_module()[0]
    assert module is not None
    device = scores[0].device
    out = torch.full((k,), -1, dtype=torch.int64, device=device)
    result = torch.empty(module.SELECT_RESULTS + len(scores), dtype=torch.int64, device=device)
    arguments = {
        "data": [tensor.data_ptr() for tensor in scores],
        "sizes": [tensor.numel() for tensor in scores],
        "dtypes": [native.DTYPE_CODES[tensor.dtype] for tensor in scores],
        "k": k,
        "largest": True,
        "out": out.data_ptr(),
        "result": result.data_ptr(),
        "exact": exact,
        "room": 0,
        "place": 0,
    }
    scratch = torch.empty(module.select_top_scratch(**arguments) + 16 * k, dtype=torch.uint8, device=device)
    index, stream = native.queue(device)
    changed = {"scratch": scratch.data_ptr(), "device": index, "stream": stream} | changed
    module.select_top(**(arguments | changed))
    return result.tolist()


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_floor_of_a_sample(target, dtype, largest, tuning):
    scores = [randn(LARGE - 7001).to(dtype), randn(7001, seed=1).to(dtype)]
    scores[0][[3, 8191, 8192, 250_000]] = torch.nan
    scores[1][-1] = torch.inf
    k = 6000
    tuning["room"] = 4 * k  # without it nothing as small as this is sampled
    scores = [tensor.to(target.device) for tensor in scores]
    agree(scores, k, largest)
    if largest:
        assert run(scores, k, room=4 * k)[0] == 1


def test_a_fifth_of_the_entries_tells_the_floor(target):
    """The floor lies four deviations below the threshold: one read, and little more kept than k."""
    for seed in range(3):
        scores, k = [randn(5 * SAMPLE, seed=seed).to(target.device)], 10_000
        assert run(scores, k, room=k + k // 4)[0] == 1


def test_a_sample_that_misleads_is_noticed(target, tuning):
    scores, k = [randn(LARGE).to(target.device)], 6000
    for wrong in ({"place": 5000, "room": k}, {"place": 100, "room": 4 * k}, {"place": 1, "room": 4 * k}):
        assert run(scores, k, **wrong)[0] == wrong["place"] // 7000  # too much is kept; the floor is too high
        tuning.update(wrong)
        agree(scores, k)
        assert run(scores, k, exact=True, **wrong)[0] == 1


def test_more_than_there_is_room_for_writes_nothing_outside(target):
    scores, k = [randn(3 * TILE).to(target.device)], 10
    room = torch.zeros(1 << 20, dtype=torch.uint8, device=target.device)
    module = native.cuda_module()[0]
    assert module is not None
    size = module.select_top_scratch([0x1000], [3 * TILE], [0], k, True, 16, 16, False, k, 0)
    room[size:] = 7
    assert run(scores, k, room=k, scratch=room.data_ptr())[0] == 0
    assert bool((room[size:] == 7).all())


@pytest.mark.parametrize("exact", [False, True])
def test_scratch_is_at_most_twice_the_output_and_a_constant(target, exact):
    module = native.cuda_module()[0]
    assert module is not None
    for total, k in ((10, 3), (10**6, 10**6), (8 * 10**9, 8 * 10**7), (7 * 10**10, 7 * 10**7)):
        scratch = module.select_top_scratch([0x1000], [total], [0], k, True, 16, 16, exact, 0, 0)
        assert scratch <= 16 * k + total / 250 + (1 << 25)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_starts_at_any_item_and_ends_anywhere(target, dtype):
    base = randn(3 * TILE).to(dtype).to(target.device)
    for start, size in [(1, 1), (2, 5), (3, TILE - 3), (4, TILE - 1), (5, TILE), (6, TILE + 1), (7, 2 * TILE + 3)]:
        agree([base[start : start + size], base[start:20]], min(size, 100))


def test_many_small_tensors_and_empty_ones(target):
    sizes = [0, 1, 0, 0, 17, 3, *range(200), 0]
    scores = [randn(size, seed=size).to(DTYPES[size % 3]).to(target.device) for size in sizes]
    for k in (1, 5000, sum(sizes)):
        agree(scores, k)


@pytest.mark.parametrize("repeated", [False, True])
def test_more_tiles_than_a_group_holds(target, repeated):
    """Places come from sums over groups of 1024 tiles; a tensor of one entry takes a tile too."""
    agree(list((randn(1100) if not repeated else torch.ones(1100)).to(target.device).split(1)), 1060)


@pytest.mark.parametrize("case", ["all equal", "two values", "ascending", "descending", "mostly zero", "one family"])
def test_hard_inputs_take_one_read(target, case, tuning):
    k = LARGE // 100
    scores = {
        "all equal": torch.full((LARGE,), 0.5),
        "two values": torch.where(torch.arange(LARGE) % 100 == 0, 0.5, -0.25),
        "ascending": torch.arange(LARGE, dtype=torch.float32),
        "descending": torch.arange(LARGE, 0, -1, dtype=torch.float32),
        "mostly zero": randn(LARGE) * (torch.arange(LARGE) % 128 == 5),
        "one family": randn(LARGE) * (1 + 3 * (torch.arange(LARGE) // TILE % 8 == 0)),
    }[case].to(target.device)
    tuning["room"] = 2 * k
    agree([scores[:70_001], scores[70_001:]], k)
    assert run([scores], k, room=2 * k)[0] == 1


def test_every_16_bit_pattern(target):
    for dtype in DTYPES[1:]:
        scores = [torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).to(target.device)]
        numbers = int((~scores[0].isnan()).sum())
        for k in (1, 2047, 2048, 30_000, numbers):
            agree(scores, k, largest=k % 2 == 0)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["normal", "few values", "bits"]),
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=5),
    share=st.floats(0, 1),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    largest=st.booleans(),
    seed=st.integers(0, 1 << 30),
    tight=st.booleans(),
)
def test_any_scores(target, kind, sizes, share, dtypes, largest, seed, tight):  # tight: a second, exact run
    rng = np.random.default_rng(seed)
    scores = []
    for size, dtype in zip(sizes, dtypes, strict=False):
        values = rng.standard_normal(size).astype(np.float32)
        if kind == "few values":
            values = rng.choice(np.float32([0, -0.0, 1, -1, 2, np.inf, -np.inf, np.nan, 1e-40]), size)
        if kind == "bits":
            values = rng.integers(0, 1 << 32, size, dtype=np.uint32).view(np.float32)
        tensor = torch.from_numpy(values)
        scores.append((tensor if dtype == torch.float32 else tensor.to(dtype)).to(target.device))
    numbers = sum(int((~tensor.isnan()).sum()) for tensor in scores)
    k = int(share * numbers)
    native_select.cuda_tuning.update({"room": k} if tight else {})
    try:
        agree(scores, k, largest)
    finally:
        native_select.cuda_tuning.clear()
    with pytest.raises(ValueError, match=f"only {numbers} entries"):
        ops.select_top(scores, numbers + 1, largest=largest, backend="cuda")


@pytest.mark.parametrize("mode", ["top", "bottom"])
def test_a_mask_of_scores_on_the_device(target, mode):
    tensors = {name: randn(99, 31, seed=seed).to(target.device) for seed, name in enumerate("ab")}
    tensors["b"][7] = torch.nan
    settings = SelectionSettings(mode=mode, share="2%")
    ours, theirs = (select_from(tensors, settings, backend=name) for name in ("cuda", "reference"))
    assert ours.info == theirs.info
    assert all(torch.equal(ours.indices[name], theirs.indices[name]) for name in tensors)


def test_the_native_function_refuses_what_it_cannot_run_with(target):
    scores = [randn(9).to(target.device), torch.empty(0, device=target.device)]
    assert run(scores, 4)[0] == 1
    address = scores[0].data_ptr()
    for change, problem in [
        ({"sizes": [9]}, "as many pointers"),
        ({"dtypes": [0, 3]}, "unknown dtype code 3"),
        ({"sizes": [9, -1]}, "negative"),
        ({"sizes": [9, 1]}, "tensor 1: null pointer"),
        ({"data": [address + 2, 0]}, "misaligned"),
        ({"k": 10}, "there are 9 entries"),
        ({"k": -1}, "k is -1"),
        ({"out": 0}, "null output"),
        ({"result": 0}, "null counts"),
        ({"room": 3}, "bad room"),
        ({"place": -1}, "bad place"),
        ({"scratch": 0}, "scratch: null"),
        ({"scratch": 8}, "scratch: misaligned"),
        ({"out": address, "scratch": address // 16 * 16}, "share memory"),
    ]:
        with pytest.raises(ValueError, match=problem):
            run(scores, 4, **change)

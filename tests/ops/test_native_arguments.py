"""The raw functions of `_native`: what no caller may get wrong raises, and never ends the process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safecrit.ops import native

MODULE, REASON = native.cpu_module()
pytestmark = pytest.mark.skipif(MODULE is None, reason=REASON)

N = 24
FLOATS = [torch.zeros(N) for _ in range(5)]
A, B, C, D, E = (tensor.data_ptr() for tensor in FLOATS)
INDICES = torch.arange(0, N, 2)
BITS = torch.zeros(3, dtype=torch.uint8)
FACTORS = (1.0, 0.1, 0.99, 0.01, 1.0, 0.1, 1e-8)
K = INDICES.numel()

GOOD = {
    "esi_accumulate": {
        "acc": A, "grad": B, "rows": 4, "cols": 6, "acc_row_stride": 6, "acc_col_stride": 1, "grad_row_stride": 6,
        "grad_col_stride": 1, "sigma": 0.5, "dtype": 0, "reduction": 0, "threads": 1,
    },
    "matrix_std": {"matrices": [(A, [4, 6], [6, 1])], "dtype": 0, "threads": 1},
    "sparse_adamw": {
        "weight": A, "indices": INDICES.data_ptr(), "grad": B, "master": C, "exp_avg": D, "exp_avg_sq": E, "numel": N,
        "k": K, "dtypes": (0, 0), "factors": FACTORS, "threads": 1,
    },
    "gather": {
        "out": A, "values": B, "indices": INDICES.data_ptr(), "numel": N, "k": K, "dtype": 0, "wide": True, "add": True,
        "threads": 1,
    },
    "masked_adamw": {
        "weight": A, "grad": B, "exp_avg": C, "exp_avg_sq": D, "bits": BITS.data_ptr(), "numel": N,
        "dtypes": (0, 0, 0, 0), "factors": FACTORS, "threads": 1,
    },
    "bits_from_indices": {"indices": INDICES.data_ptr(), "k": K, "numel": N, "bits": BITS.data_ptr(), "threads": 1},
    "count_bits": {"bits": BITS.data_ptr(), "bytes": 3, "threads": 1},
    "indices_from_bits": {"bits": BITS.data_ptr(), "bytes": 3, "indices": E, "k": 0, "threads": 1},
    "read_memory": {"data": 0, "bytes": 0, "threads": 1},
}  # fmt: skip
POINTERS = {"acc", "grad", "weight", "master", "exp_avg", "exp_avg_sq", "indices", "bits", "out", "values"}


@pytest.fixture(autouse=True)
def fresh():
    for tensor in [*FLOATS, BITS]:
        tensor.zero_()


def cases() -> list[tuple[str, dict]]:
    found: list[tuple[str, dict]] = []
    for name, good in GOOD.items():
        if "threads" in good:
            found += [(name, {"threads": value}) for value in (0, -1, 1 << 20)]
        for field in POINTERS & good.keys():
            if not (name == "indices_from_bits" and field == "indices"):
                found.append((name, {field: 0}))
            if field != "bits":
                found.append((name, {field: good[field] + 1}))
        for field in {"rows", "cols", "numel", "k", "bytes"} & good.keys():
            found += [(name, {field: value}) for value in (-1, -(1 << 63), (1 << 63) - 1)]
        for field in {"dtype", "reduction"} & good.keys():
            found += [(name, {field: value}) for value in (-1, 3, 1 << 30)]
        if "dtypes" in good:
            for i in range(len(good["dtypes"])):
                codes = list(good["dtypes"])
                codes[i] = 3
                found.append((name, {"dtypes": tuple(codes)}))
    for field in ("acc_row_stride", "acc_col_stride", "grad_row_stride", "grad_col_stride"):
        found += [("esi_accumulate", {field: value}) for value in (-1, 1 << 62)]
    found += [
        ("esi_accumulate", {"grad": A + 4}),
        ("esi_accumulate", {"acc_row_stride": 5}),
        ("esi_accumulate", {"acc_col_stride": 0}),
        ("matrix_std", {"matrices": [(0, [4], [1])]}),
        ("matrix_std", {"matrices": [(A + 2, [4], [1])]}),
        ("matrix_std", {"matrices": [(A, [4, 2], [1])]}),
        ("matrix_std", {"matrices": [(A, [-4], [1])]}),
        ("matrix_std", {"matrices": [(A, [4], [-1])]}),
        ("matrix_std", {"matrices": [(A, [4], [1 << 62])]}),
        ("matrix_std", {"matrices": [(A, [1 << 62, 1 << 62], [0, 0])]}),
        ("matrix_std", {"matrices": [(A, [1] * 65, [1] * 65)]}),
        ("sparse_adamw", {"numel": N - 2}),  # the last index is out of range
        ("sparse_adamw", {"numel": 0}),
        ("sparse_adamw", {"master": A}),
        ("sparse_adamw", {"exp_avg_sq": D + 4}),
        ("sparse_adamw", {"grad": C}),
        ("gather", {"numel": N - 2}),
        ("gather", {"numel": 0}),
        ("gather", {"k": -1}),
        ("gather", {"out": B}),
        ("masked_adamw", {"weight": B}),
        ("masked_adamw", {"exp_avg": D}),
        ("masked_adamw", {"bits": A}),
        ("bits_from_indices", {"numel": N - 2}),
        ("bits_from_indices", {"bits": INDICES.data_ptr()}),
        ("indices_from_bits", {"k": 1}),  # no bit is set
        ("indices_from_bits", {"indices": BITS.data_ptr(), "k": 1}),
        ("read_memory", {"bytes": 512}),
        ("read_memory", {"data": 64, "bytes": 100}),
        ("read_memory", {"data": 32, "bytes": 512}),
    ]
    return found


@pytest.mark.parametrize("name", GOOD)
def test_good_arguments_are_taken(name):
    getattr(MODULE, name)(**GOOD[name])


CASES = sorted(cases(), key=lambda case: (case[0], *case[1]))  # values hold addresses, which are no names for tests


@pytest.mark.parametrize(
    ("name", "change"), CASES, ids=[f"{name}-{'-'.join(change)}-{n}" for n, (name, change) in enumerate(CASES)]
)
def test_bad_arguments_raise_and_change_nothing(name, change):
    before = [tensor.clone() for tensor in [*FLOATS, INDICES, BITS]]
    with pytest.raises(ValueError):
        getattr(MODULE, name)(**GOOD[name] | change)
    for now, then in zip([*FLOATS, INDICES, BITS], before, strict=True):
        assert torch.equal(now, then)


@given(
    values=st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=6),
    numel=st.integers(0, 40),
)
def test_any_indices_raise_or_are_set(values, numel):
    indices, bits = torch.tensor(values, dtype=torch.int64), torch.full(((numel + 7) // 8,), 255, dtype=torch.uint8)
    arguments = (indices.data_ptr(), len(values), numel, bits.data_ptr(), 1)
    good = all(0 <= value < numel for value in values) and values == sorted(set(values))
    if good:
        MODULE.bits_from_indices(*arguments)
        assert [i for i in range(8 * bits.numel()) if int(bits[i // 8]) >> i % 8 & 1] == values
    else:
        with pytest.raises(ValueError):
            MODULE.bits_from_indices(*arguments)
        assert bool((bits == 255).all())

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from safecrit import ops
from safecrit.errors import SafecritError
from safecrit.ops import dispatch, native

CPU = torch.device("cpu")
without_module = pytest.mark.skipif(native.cpu_module()[0] is None, reason="no native module here")


@without_module
def test_the_cpu_takes_the_native_kernel():
    choice = ops.choose("esi_accumulate_", CPU)
    assert choice.backend == "native"
    assert choice.reason.startswith("C++")


def test_an_op_without_kernels_takes_the_reference_silently(caplog, monkeypatch):
    monkeypatch.setitem(dispatch._OPS, "matrix_std", {"reference": dispatch._OPS["matrix_std"]["reference"]})
    with caplog.at_level(logging.INFO, "safecrit.ops"):
        assert ops.choose("matrix_std", CPU).backend == "reference"
    assert not caplog.records


def test_a_missing_native_module_is_noticed_once_and_replaced(monkeypatch, caplog):
    monkeypatch.setattr(native, "cpu_module", lambda: (None, "_native is not built"))
    dispatch._notice.cache_clear()
    acc = torch.zeros(3)
    for _ in range(2):
        ops.esi_accumulate_(acc, torch.ones(3), 0.5)
    assert acc.tolist() == [1.0, 1.0, 1.0]
    assert ["_native is not built" in record.getMessage() for record in caplog.records] == [True]
    dispatch._notice.cache_clear()


@pytest.mark.parametrize("backend", ["cuda", "nonsense"])
def test_a_backend_asked_for_and_missing_raises_and_lists_what_there_is(backend):
    with pytest.raises(ops.BackendError, match="reference") as caught:
        ops.esi_accumulate_(torch.zeros(3), torch.ones(3), 1.0, backend=backend)
    assert isinstance(caught.value, SafecritError)
    with pytest.raises(ops.BackendError, match="no such kernel"):
        ops.select_top([torch.zeros(3)], 1, backend="triton")


def test_a_dtype_that_kernels_do_not_take_goes_to_the_reference_with_a_reason():
    choice = ops.choose("matrix_std", CPU, dtypes=[torch.float64])
    assert choice.backend == "reference"
    with pytest.raises(ops.BackendError, match=r"not torch\.float64.*Usable here: reference"):
        ops.matrix_std(torch.zeros(3, dtype=torch.float64), backend="native")


def test_the_table_names_every_pair_once():
    rows = ops.backends()
    pairs = [(row.op, row.backend) for row in rows]
    assert len(set(pairs)) == len(pairs) == 10 * 4
    assert all(row.reason for row in rows)
    assert all(row.available for row in rows if row.backend == "reference")


def test_importing_ops_loads_neither_triton_nor_the_native_modules():
    code = (
        "import sys, safecrit.ops; "
        "print([m for m in ('triton', 'safecrit.ops._native', 'safecrit.ops._cuda') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@without_module
def test_python_m_from_the_root_finds_the_native_module(pytestconfig):
    code = "from safecrit.ops import native; print(native.cpu_module()[1])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=pytestconfig.rootpath
    )
    assert done.stdout.startswith("C++")

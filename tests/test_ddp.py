"""Masks where a model is spread over processes: what is sent, what is protected, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from safecrit import distributed
from safecrit.errors import SafecritError
from safecrit.protection import protect
from safecrit.sparse import PURPOSE, SparseAdamW
from tests.architectures import build
from tests.training_helpers import backward, batch, random_mask, selected

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo backend")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_divided_after_the_optimizer_was_made(alone: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mask = build("llama"), random_mask(build("llama"), 0.1)
    optimizer = SparseAdamW(model, mask)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(SafecritError, match="divided after SparseAdamW was made"):
        backward(model, 0)
    model = build("llama")
    optimizer = SparseAdamW(model, mask)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer.attach()
    before = {n: p.detach().full_tensor().clone() for n, p in model.named_parameters()}  # type: ignore[attr-defined]
    where = selected(build("llama"), mask)
    backward(model, 0)
    optimizer.step()
    for n, p in model.named_parameters():
        assert torch.equal(p.detach().full_tensor() != before[n], where[n]), n  # type: ignore[attr-defined]


def test_a_model_divided_by_columns_is_refused(alone: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    model, mask = build("llama"), random_mask(build("llama"), 0.1)
    columns = lambda parameter: Shard(parameter.dim() - 1)  # noqa: E731
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), shard_placement_fn=columns)
    with pytest.raises(SafecritError, match="rows over all ranks"):
        SparseAdamW(model, mask).attach()
    with pytest.raises(SafecritError, match="rows over all ranks"):
        protect(model, mask, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_wrapped_model_of_one_process_trains(alone: None) -> None:
    model, mask = build("llama"), random_mask(build("llama"), 0.1)
    where = selected(model, mask)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    protection = protect(wrapped, mask, optimizer)
    for step in range(2):
        backward(wrapped, step)
        optimizer.step()
    protection.check()
    for n, p in model.named_parameters():
        assert torch.equal(p[where[n]], before[n][where[n]])
        assert (p != before[n])[~where[n]].any()


def test_set_refuses_a_wrapped_model_on_several_processes(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    SparseAdamW(model, random_mask(model, 0.1))
    wrapped = DistributedDataParallel(model)
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    with pytest.raises(SafecritError, match="DistributedDataParallel would send every gradient"):
        backward(wrapped, 0)


def test_a_step_of_set_sends_the_gradients_of_the_selected_weights(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    optimizer, sent, ranks = SparseAdamW(model, random_mask(model, 0.1)), [], 4
    monkeypatch.setattr(distributed, "processes", lambda: ranks)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op: sent.append(tensor.nbytes))
    before = distributed.sent_bytes().get(PURPOSE, 0)
    backward(model, 0)
    assert not sent
    optimizer.step()
    ring = 2 * (ranks - 1) / ranks
    assert len(sent) == 1 and distributed.sent_bytes()[PURPOSE] - before == round(ring * sent[0])
    assert ring * 4 * optimizer.trained <= ring * sent[0] <= 1.1 * ring * 4 * optimizer.trained


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SafecritError, match="DeepSpeed"):
        SparseAdamW(model, random_mask(model, 0.1)).attach()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)

    class DeepSpeedOptimizerWrapper:  # as accelerate names its own
        optimizer = inner

    with pytest.raises(SafecritError, match="DeepSpeed"):
        protect(model, random_mask(model, 0.1), DeepSpeedOptimizerWrapper())  # type: ignore[arg-type]


def worker(rank: int, size: int, folder: Path) -> None:
    """Three steps of one of two processes; each sees its own half of the batch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    model = build("llama")
    mask = random_mask(model, 0.3)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.1)
    protection = protect(wrapped, mask, optimizer)
    for step in range(3):
        half = {name: value[rank : rank + 1] for name, value in batch(step).items()}
        wrapped(**half).loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    protection.check()
    torch.save(dict(model.named_parameters()), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_protect_as_one(tmp_path: Path) -> None:
    code = "import sys, pathlib; from tests.test_distributed import worker\n"
    code += "worker(int(sys.argv[1]), 2, pathlib.Path(sys.argv[2]))"
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)], cwd=root, env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    ranks: list[dict[str, Any]] = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = build("llama")
    mask = random_mask(model, 0.3)
    where = selected(model, mask)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    protect(model, mask, optimizer)
    for step in range(3):
        backward(model, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for n, p in model.named_parameters():
        assert torch.equal(ranks[0][n], ranks[1][n]), n
        assert torch.equal(ranks[0][n][where[n]], before[n][where[n]]), n
        torch.testing.assert_close(ranks[0][n], p, rtol=1e-4, atol=1e-5)
